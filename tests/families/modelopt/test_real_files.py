"""FP8 files as people have them: ComfyUI's first scaled FP8, casts, E5M2, scales by row and block; under the names and in
the company they come in.

The truth is a formula of this file's; a forward is held against stock ComfyUI on that truth in F32.
"""

from __future__ import annotations

import json

import pytest
import torch

from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from quantized_transformers.quant.marker import marker
from support import common, flux
from support.real_files import BESIDE, EXACT, NAMES, WHOLE, expected, linears, load, lora_agrees, weights_of, write

pytestmark = pytest.mark.parity

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = "double_blocks.0.img_attn.qkv"


@pytest.fixture(scope="module")
def weights(tiny):
    return weights_of(tiny)


def codes(weight, scale, dtype=E4M3):
    largest = torch.finfo(dtype).max
    return (weight / scale).clamp(-largest, largest).to(dtype)


def spread(scale, shape, sizes):
    """A scale of blocks of these sizes over all values of a weight."""
    return scale.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)[:shape[0], :shape[1]]


def scaled(tensors, *, dtype=torch.float32, shape=(), marker=0, input_scale=None, codes_in=E4M3, leaf="scale_weight"):
    """(stored, truth) in ComfyUI's first scaled FP8; another `leaf` for today's names."""
    stored, truth = {name: t.to(torch.bfloat16) for name, t in tensors.items()}, {}
    for layer in linears(tensors):
        weight = tensors[f"{layer}.weight"]
        scale = (weight.abs().max() / torch.finfo(codes_in).max).to(dtype)
        stored[f"{layer}.weight"] = codes(weight, scale.float(), codes_in)
        stored[f"{layer}.{leaf}"] = scale.reshape(shape)
        if input_scale is not None:
            stored[f"{layer}.scale_input"] = torch.tensor(input_scale).reshape(shape)
        truth[f"{layer}.weight"] = stored[f"{layer}.weight"].float() * scale.float()
    if marker is not None:
        stored["scaled_fp8"] = torch.zeros(marker, dtype=codes_in)
    return stored, {name: truth.get(name, stored[name].float()) for name in tensors}


def cast(tensors, dtype):
    """Everything in FP8: weights, biases and norms."""
    stored = {name: t.to(dtype) for name, t in tensors.items()}
    return stored, {name: t.float() for name, t in stored.items()}


def blocks(tensors, sizes, *, leaf="weight_scale", dtype=torch.float32, shape=None, codes_in=E4M3):
    """A scale for every block of [rows, columns] (0: all of them)."""
    stored, truth = {name: t.to(torch.bfloat16) for name, t in tensors.items()}, {}
    for layer in linears(tensors):
        weight = tensors[f"{layer}.weight"]
        size = [want or have for want, have in zip(sizes, weight.shape, strict=True)]
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % size[1], 0, -weight.shape[0] % size[0]))
        cut = padded.reshape(padded.shape[0] // size[0], size[0], padded.shape[1] // size[1], size[1])
        scale = (cut.abs().amax((1, 3)) / torch.finfo(codes_in).max).clamp(min=1e-8).to(dtype)
        whole = spread(scale.float(), weight.shape, size)
        stored[f"{layer}.weight"] = codes(weight, whole, codes_in)
        stored[f"{layer}.{leaf}"] = shape(scale) if shape else scale
        truth[f"{layer}.weight"] = stored[f"{layer}.weight"].float() * whole
    return stored, {name: truth.get(name, stored[name].float()) for name in tensors}


KINDS = {
    "scaled": lambda t: scaled(t), "scaled F32 [1], full": lambda t: scaled(t, shape=(1,), marker=2, input_scale=1.0),
    "scaled BF16, no mark": lambda t: scaled(t, dtype=torch.bfloat16, marker=None),
    "scaled F16": lambda t: scaled(t, dtype=torch.float16, marker=1), "scaled E5M2": lambda t: scaled(t, codes_in=E5M2),
    "today's names, E5M2": lambda t: scaled(t, codes_in=E5M2, marker=None, leaf="weight_scale"),
    "cast E4M3": lambda t: cast(t, E4M3), "cast E5M2": lambda t: cast(t, E5M2),
    "rows [N]": lambda t: blocks(t, (1, 0), shape=lambda scale: scale[:, 0]),
    "rows [N, 1] BF16": lambda t: blocks(t, (1, 0), dtype=torch.bfloat16),
    "rows of E5M2": lambda t: blocks(t, (1, 0), codes_in=E5M2),
    "tensor [1, 1]": lambda t: blocks(t, (0, 0)),
    "blocks 128": lambda t: blocks(t, (128, 128), leaf="weight_scale_inv"),
    "blocks 64 x 32": lambda t: blocks(t, (64, 32), dtype=torch.bfloat16),
    "blocks of rows [N, K/64, 1]": lambda t: blocks(t, (1, 64), shape=lambda scale: scale[..., None])}


@pytest.mark.part(3)
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_under_every_name(weights, tmp_path, kind, names):
    stored, truth = KINDS[kind](weights[names.split(",")[0]])
    loaded = load(write(tmp_path, stored, NAMES[names]))
    assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), expected(truth)) < EXACT
    quantized = sum(count for name, count in loaded.description.formats.items() if name.startswith("FP8"))
    assert quantized == len(linears(weights[names.split(",")[0]]))
    if kind.startswith("cast"):
        assert any("no scale" in note for note in loaded.description.notes)
        assert any("no weights of Linear layers" in note for note in loaded.description.notes)


@pytest.mark.part(2)
@pytest.mark.parametrize("style", ["native", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_shards_and_in_company(weights, tmp_path, kind, style):
    """Several files; and one with text encoders, a VAE and an EMA's counter beside, which is said."""
    stored, truth = KINDS[kind](weights[style])
    wanted = expected(truth)
    loaded = load(write(tmp_path / "shards", stored, shards=3))
    assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), wanted) < EXACT
    if style == "diffusers":
        return
    loaded = load(write(tmp_path / "whole", stored, WHOLE, BESIDE))
    assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), wanted) < EXACT
    for what in ("text encoders (2 tensors", "a VAE (1 tensors", "an EMA copy (1 tensors"):
        assert f"left out, as no part of the transformer: {what}" in loaded.report


def test_what_the_mark_asks_for(weights, tmp_path):
    """Two elements: full-precision matmul. Static activation scales stay, and 1.0 is none (convert_old_quants)."""
    for elements, value in ((0, 0.25), (2, 0.25), (0, 1.0)):
        stored, _ = scaled(weights["native"], marker=elements, input_scale=value)
        module = load(write(tmp_path / f"{elements}-{value}", stored)).patcher.get_model_object(f"diffusion_model.{BLOCK}")
        assert bool(module._full_precision_mm_config) is (elements == 2)
        if value == 1.0:
            assert getattr(module, "input_scale", None) is None
        else:
            assert float(module.input_scale) == 0.25


@pytest.mark.parametrize("listed", ["", WHOLE, "transformer.", "module._orig_mod."])
@pytest.mark.parametrize("stored_as", ["", WHOLE, "transformer.", "net."])
def test_the_metadatas_names_of_layers(weights, tmp_path, listed, stored_as):
    """With or without whatever prefix, and whatever the tensors have: what it asks for of a layer is done."""
    stored, _ = scaled(weights["native"], marker=None, leaf="weight_scale")
    conf = {"format": "float8_e4m3fn"}
    layers = {listed + layer: conf | ({"full_precision_matrix_mult": True} if layer == BLOCK else {})
              for layer in linears(weights["native"])}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    loaded = load(write(tmp_path, stored, stored_as, BESIDE if stored_as in (WHOLE, "net.") else None, metadata=metadata))
    asked = {name for name, module in loaded.patcher.model.diffusion_model.named_modules()
             if getattr(module, "_full_precision_mm_config", False)}
    assert asked == {BLOCK}


def test_memory_stays_that_of_the_file(weights, tmp_path):
    """A cast is not blown up to BF16, and a scale for each row is all that E5M2 takes beside its bytes."""
    for kind in ("cast E4M3", "cast E5M2", "scaled E5M2", "rows [N]"):
        stored, _ = KINDS[kind](weights["native"])
        module = load(write(tmp_path / kind[:9], stored)).patcher.get_model_object(f"diffusion_model.{BLOCK}")
        assert module.weight._qdata.dtype == stored[f"{BLOCK}.weight"].dtype
        assert torch.equal(module.weight._qdata.view(torch.uint8), stored[f"{BLOCK}.weight"].view(torch.uint8))


@pytest.mark.parametrize("kind", ["scaled", "cast E4M3", "cast E5M2", "rows [N]", "blocks 128"])
def test_lora(weights, tmp_path, kind):
    """In low VRAM exactly W + B A; fully loaded, coded again, the same effect."""
    stored, truth = KINDS[kind](weights["native"])
    lora_agrees(load(write(tmp_path, stored), dtype="default"), truth, tmp_path / "lora")


def test_a_scaled_norm_and_convolution(tmp_path):
    """SGLang's converter for Wan quantizes the 5-D patch embedding, too: it is read exactly, times its scale."""
    from support import wan

    tensors = {name: t.float() for name, t in wan.make().state_dict().items()}
    name = "patch_embedding.weight"
    scale = tensors[name].abs().max() / 448
    stored = {key: t.to(torch.bfloat16) for key, t in tensors.items()}
    stored |= {name: codes(tensors[name], scale), "patch_embedding.weight_scale": scale}
    common.save(tmp_path, stored, {"_class_name": "WanTransformer3DModel", **dict(wan.make().config)})
    loaded = load(tmp_path)
    found = loaded.patcher.get_model_object("diffusion_model.patch_embedding").weight
    assert torch.equal(found, stored[name].float() * scale)
    assert any("read as the numbers they are: patch_embedding.weight" in note for note in loaded.description.notes)
    common.save(tmp_path / "b", {**stored, "patch_embedding.weight_scale": torch.tensor(float("nan"))}, common.config_of(tmp_path))
    with pytest.raises(CheckpointError, match="patch_embedding.weight_scale is nan"):
        load(tmp_path / "b")


REFUSED = {
    "one scale lost": (lambda t: t.pop(f"{BLOCK}.scale_weight"), "FP8 weight without weight_scale"),
    "all scales lost, with the mark": (lambda t: [t.pop(k) for k in list(t) if k.endswith("scale_weight")],
                                       "FP8 weight without weight_scale, .*; the same of 35 more layers"),
    "a scale twice": (lambda t: t.update({f"{BLOCK}.weight_scale": t[f"{BLOCK}.scale_weight"].clone()}), "say the same twice"),
    "a scale for some rows": (lambda t: t.update({f"{BLOCK}.scale_weight": torch.ones(7)}), r"the scale is \[7\]"),
    "blocks of no power of two": (lambda t: t.update({f"{BLOCK}.scale_weight": torch.ones(8, 3)}), r"the scale is \[8, 3\]"),
    "a negative scale of a row": (lambda t: t.update({f"{BLOCK}.scale_weight": torch.ones(768).index_fill_(0, torch.tensor(3), -1)}),
                                  "weight_scale holds negative values"),
    "an unknown tensor beside": (lambda t: t.update({"something.weight": torch.ones(3)}), "unexpected tensors: something.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(weights, tmp_path, name):
    change, message = REFUSED[name]
    stored, _ = scaled(weights["native"])
    change(stored)
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path, stored))


def u8(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


# What a writer leaves in the place of a layer's weight of [rows, columns], and what the refusal calls it.
WRITERS = {
    "SDNQ": (lambda n, k: {"weight": u8(n, k).view(torch.int8), "scale": torch.ones(n, 1)}, "SDNQ"),
    "SDNQ with SVD": (lambda n, k: {"weight": u8(n, k).view(torch.int8), "scale": torch.ones(n, 1), "svd_up": torch.ones(n, 4),
                                    "svd_down": torch.ones(4, k)}, "SDNQ"),
    "SDNQ 4-bit": (lambda n, k: {"weight": u8(n * k // 2), "scale": torch.ones(n, k // 32, 1), "zero_point":
                                 torch.ones(n, k // 32, 1)}, "SDNQ"),
    "HQQ": (lambda n, k: {"W_q": u8(n * k // 64, 32), "scale": torch.ones(n * k // 64, 1), "zero": torch.ones(n * k // 64, 1)}, "HQQ"),
    "GPTQ": (lambda n, k: {"qweight": torch.zeros(k // 8, n, dtype=torch.int32), "qzeros": torch.zeros(1, n // 8, dtype=torch.int32),
                           "scales": torch.ones(1, n), "g_idx": torch.zeros(k, dtype=torch.int32)}, "version 1 or 2 of GPTQ"),
    "compressed-tensors": (lambda n, k: {"weight_packed": torch.zeros(n, k // 8, dtype=torch.int32), "weight_scale": torch.ones(n, 1),
                                         "weight_shape": torch.tensor([n, k])}, "compressed-tensors"),
    "ExLlamaV2": (lambda n, k: {"q_weight": torch.zeros(k // 8, n, dtype=torch.int32), "q_scale": u8(3)}, "ExLlamaV2"),
    "a marker of a format that is not known": (lambda n, k: {
        "weight": u8(n, k), "weight_scale": torch.ones(n, 1), "comfy_quant": marker({"format": "hqq_4bit"})}, "hqq_4bit"),
    "a marker without a format": (lambda n, k: {"weight": u8(n, k), "weight_scale": torch.ones(n, 1), "comfy_quant": marker({"bits": 4})},
                                  "names no format"),
    "integers alone": (lambda n, k: {"weight": u8(n, k).view(torch.int8)}, "INT8 without weight_scale"),
    "bytes alone": (lambda n, k: {"weight": u8(n, k // 2)}, "U8 weights")}


@pytest.mark.parametrize("prefix", ["", WHOLE])
@pytest.mark.parametrize("writer", WRITERS)
def test_writers_that_are_not_read_are_named(weights, tmp_path, writer, prefix):
    """All layers as they write them, in one line; nobody is told to download it again."""
    made, words = WRITERS[writer]
    stored = {name: t.to(torch.bfloat16) for name, t in weights["native"].items()}
    for layer in linears(weights["native"]):
        rows, columns = stored.pop(f"{layer}.weight").shape
        stored |= {f"{layer}.{leaf}": t for leaf, t in made(rows, columns).items()}
    with pytest.raises(CheckpointError, match=words) as refused:
        load(write(tmp_path, stored, prefix))
    said = str(refused.value)
    assert "download it again" not in said and said.count("\n  - ") <= 3, said


def test_many_layers_with_one_problem_are_one_line(weights, tmp_path):
    stored, _ = scaled(weights["native"])
    for layer in linears(weights["native"])[:15]:
        stored[f"{layer}.scale_weight"] = torch.ones(7)
    with pytest.raises(CheckpointError) as refused:
        load(write(tmp_path, stored))
    text = str(refused.value)
    assert "the same of 14 more layers: " in text and ", and 4 more" in text and "download it again" not in text and text.count("\n  - ") <= 10


def test_unknown_names_are_left_as_they_are(weights, tmp_path):
    """Nothing is taken away but what is known: another prefix is another model."""
    stored, _ = scaled(weights["native"])
    with pytest.raises(CheckpointError, match="unknown kind of model|incomplete"):
        load(write(tmp_path, stored, "mystery."))
    path = write(tmp_path / "b", stored, "net.")
    description = describe(Checkpoint(locate(str(path))))
    assert "all names begin with 'net.', which is taken away" in description.notes and not description.problems
