"""Nunchaku's packings: unpacked again, a tensor packed by the closed formulas of the spec is bit for bit what it was."""

from __future__ import annotations

import pytest
import torch

from quantized_transformers.quant.svdquant import packing
from quantized_transformers.quant.svdquant.parts import FIELDS, awq_part, split_rows, w4a4_part
from support import svdquant
from support.svdquant import awq, pack_codes, padded, up_to, w4a4
from support.svdquant_net import native_tensors, placed

pytestmark = pytest.mark.unit

SIZES = [(n, k, r) for n, k, r in zip((128, 200, 384, 128, 384), (128, 320, 512, 512, 320), (16, 40, 48, 128, 256),
                                      strict=True)]


def pairs(codes: torch.Tensor) -> torch.Tensor:
    return codes[:, 0::2] | codes[:, 1::2] << 4


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "rank"), SIZES)
def test_w4a4_comes_back(rows, columns, rank, dtype, kind):
    layer = w4a4(rows, columns, rank, kind, dtype=dtype, channel_scales=rank == 48)
    part, bias = w4a4_part(layer.leaves, rows, columns)
    assert part.kind == kind and torch.equal(part.codes, pairs(layer.codes))
    assert torch.equal(part.scale.view(torch.uint8), layer.scale.view(torch.uint8))
    assert torch.equal(part.smooth, layer.smooth) and torch.equal(bias, layer.bias)
    assert torch.equal(part.down, padded(layer.down, columns, up_to(rank, 16)))
    assert torch.equal(part.up, padded(layer.up, rows, up_to(rank, 16)))
    if kind == "nvfp4":
        assert torch.equal(part.tensor_scale, layer.tensor_scale)
        assert (part.channel_scale is None) == (layer.channel_scale is None)
        assert layer.channel_scale is None or torch.equal(part.channel_scale, layer.channel_scale)


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (200, 320), (384, 512), (96, 640)])
def test_awq_comes_back_without_padded_groups(rows, columns):
    layer = awq(rows, columns)
    assert layer.leaves["wscales"].shape == (16, rows)
    part, bias = awq_part(layer.leaves, rows, columns)
    assert torch.equal(part.codes, pairs(layer.codes)) and torch.equal(part.scale, layer.scale)
    assert torch.equal(part.zeros, layer.zeros) and torch.equal(bias, layer.bias)


@pytest.mark.parametrize(("rows", "columns"), [(9216, 3072), (3072, 12288), (3840, 10240)],
                         ids=["FLUX qkv", "Qwen-Image mlp", "Z-Image w2"])
def test_real_sizes(rows, columns):
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    assert torch.equal(packing.unpack_qweight(pack_codes(codes)), pairs(codes))


@pytest.mark.parametrize("name", ["qweight", "awq", "micro_scales", "scales", "vector", "down", "up"])
def test_the_packers_for_the_engine_are_the_inverse(name):
    """Random bytes of the packed type, unpacked and packed again."""
    shape, dtype = {"qweight": ((256, 160), torch.int8), "awq": ((64, 160), torch.int32),
                    "micro_scales": ((20, 256), torch.uint8), "scales": ((5, 256), torch.int16),
                    "vector": ((256,), torch.int16), "down": ((320, 48), torch.int16), "up": ((256, 48), torch.int16)}[name]
    limits = torch.iinfo(dtype)
    stored = torch.randint(limits.min, limits.max, shape, dtype=dtype)
    there, back = (getattr(packing, f"{word}_{name}") for word in ("unpack", "pack"))
    assert torch.equal(back(there(stored)), stored) and not torch.equal(there(stored).view(-1)[:16], stored.view(-1)[:16])


@pytest.mark.parametrize(("vectors", "size", "columns"), [(3, 64, 128), (6, 64, 128), (3, 404, 3072), (6, 202, 3072)])
def test_modulation_rows_and_the_folded_one(vectors, size, columns):
    """The larger ones are unpacked in several pieces, the last of them shorter."""
    layer = awq(vectors * size, columns)
    # BF16 holds these biases with and without the 1
    layer.bias = (layer.bias.float().clamp(-0.49, 0.49) * 128).round().div(128).to(torch.bfloat16)
    part, bias = awq_part(svdquant.interleave(layer, vectors), vectors * size, columns, interleaved=vectors)
    assert torch.equal(part.codes, pairs(layer.codes)) and torch.equal(part.scale, layer.scale)
    assert torch.equal(part.zeros, layer.zeros)
    assert torch.equal(bias, layer.bias.float())
    order = torch.arange(vectors * size).view(size, vectors).t().reshape(-1)  # stored row of every natural one
    folded = svdquant.interleave(layer, vectors)["bias"].float()[order] - bias
    expected = {3: [0, 1, 0], 6: [0, 1, 0, 0, 1, 0]}[vectors]
    assert folded.view(vectors, size).tolist() == [[value] * size for value in expected]


@pytest.mark.parametrize("kind", ["int4", "nvfp4", "awq", "modulation"])
def test_parts_share_no_memory_with_what_they_are_made_of(kind):
    """Files are read into memory that the next layer overwrites."""
    leaves = {"awq": lambda: awq(192, 128).leaves, "modulation": lambda: svdquant.interleave(awq(192, 128), 3)}.get(
        kind, lambda: w4a4(256, 128, 16, kind, channel_scales=True).leaves)()
    leaves = {name: tensor.clone() for name, tensor in leaves.items()} \
        | ({"wtscale": torch.tensor([0.5])} if kind == "nvfp4" else {})

    def made():
        if kind in ("int4", "nvfp4"):
            return w4a4_part(leaves, 256, 128)
        return awq_part(leaves, 192, 128, interleaved=3 * (kind == "modulation"))

    (part, bias), (expected, its_bias) = made(), made()
    ours = {"bias": bias, **{field: getattr(part, field) for field in FIELDS if getattr(part, field) is not None}}
    kept = {"bias": its_bias.clone(), **{field: getattr(expected, field).clone() for field in FIELDS if field in ours}}
    for tensor in leaves.values():
        tensor.view(-1).view(torch.uint8).fill_(0x55)
    for field, tensor in ours.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), kept[field].view(-1).view(torch.uint8)), field


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_fused_rows_split_as_they_would_unpack_alone(kind):
    """docs/sources/nunchaku.md, "Fused rows": parts of 128 rows are whole blocks of the packed tensors."""
    layer = w4a4(384, 128, 16, kind, channel_scales=True)
    part, _ = w4a4_part(layer.leaves, 384, 128)
    for i, piece in enumerate(split_rows(part, [128, 128, 128])):
        rows = slice(128 * i, 128 * (i + 1))
        alone = dict(layer.leaves)
        alone |= {name: layer.leaves[name][rows] for name in ("qweight", "proj_up")}
        for name in ("wscales", "bias", "wcscales"):
            if name in layer.leaves:
                whole = layer.leaves[name]
                flat = whole.view(torch.uint8).flatten().view(3, -1)[i].clone().view(whole.dtype)
                alone[name] = flat.view(*whole.shape[:-1], 128)
        expected, _ = w4a4_part(alone, 128, 128)
        for field in ("codes", "up", "scale", "channel_scale"):
            mine, theirs = getattr(piece, field), getattr(expected, field)
            assert (mine is None and theirs is None) or torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
        assert piece.down is part.down and piece.smooth is part.smooth
    with pytest.raises(ValueError, match="384 rows"):
        split_rows(part, [128, 128])


def broken(leaf, change):
    def leaves(kind):
        out = dict(w4a4(256, 128, 16, kind, channel_scales=True).leaves)
        out[leaf] = change(out[leaf]) if leaf in out else None
        return {name: tensor for name, tensor in out.items() if tensor is not None}
    return leaves


REFUSED = {"raw bytes of another format": (broken("qweight", lambda t: t.view(torch.uint8)), "qweight is uint8"),
           "unpacked scales": (broken("wscales", lambda t: t.float()), "wscales is float32"),
           "another shape": (broken("qweight", lambda t: t[:128]), r"qweight is \[128, 64\], expected \[256, 64\]"),
           "not finite": (broken("bias", lambda t: t * float("inf")), "bias holds infinite values"),
           "missing": (broken("proj_up", lambda t: None), "proj_up is missing"),
           "no low rank": (broken("proj_down", lambda t: t[:, :8]), "rank 8"),
           "zero smoothing": (broken("smooth_factor", lambda t: t * 0), "smooth_factor has zeros")}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_tensors_are_refused(case):
    leaves, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        w4a4_part(leaves("int4"), 256, 128)


def test_more_wrong_tensors():
    fp4 = w4a4(256, 128, 16, "nvfp4", channel_scales=True).leaves
    with pytest.raises(ValueError, match="no unsigned"):
        w4a4_part(fp4, 256, 128, unsigned=True)
    with pytest.raises(ValueError, match="belong to NVFP4"):
        w4a4_part({**w4a4(256, 128).leaves, "wcscales": fp4["wcscales"]}, 256, 128)
    with pytest.raises(ValueError, match="100 columns"):
        w4a4_part(w4a4(256, 128).leaves, 256, 100)
    with pytest.raises(ValueError, match="wtscale is"):
        w4a4_part({**fp4, "wtscale": torch.ones(2)}, 256, 128)
    rows = awq(96, 128).leaves
    with pytest.raises(ValueError, match=r"wzeros is \[2, 96\], expected \[16, 96\]"):
        awq_part({**rows, "wzeros": rows["wzeros"][:2]}, 96, 128)
    with pytest.raises(ValueError, match="interleave 5"):
        awq_part(rows, 96, 128, interleaved=5)
    part, bias = w4a4_part(w4a4(256, 128).leaves, 256, 128)
    with pytest.raises(ValueError, match="do not make a weight"):
        native_tensors("x", [part, placed(part, 128, 0)], bias, (512, 128))
