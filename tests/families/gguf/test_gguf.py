"""GGUF files of FLUX.1: every type, under every name, whole, in parts and in mixtures; refused where damaged.

The oracle is gguf-py: its writer, its quantizers, its dequantization. A forward is held against stock ComfyUI on that
truth in F32.
"""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch

from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from quantized_transformers.quant.codecs import codec
from quantized_transformers.quant.ggml import QUANTIZED
from quantized_transformers.quant.layouts.tiled import is_tiled
from quantized_transformers.quant.tile import Place, Tile
from support import common, flux
from support.gguf_files import PACKED, Kind, packed, write
from support.real_files import EXACT, WHOLE, expected, linears, load, lora_agrees, weights_of

pytestmark = pytest.mark.parity
LAYER = "double_blocks.0.img_attn.qkv"


@pytest.fixture(scope="module")
def weights(tiny):
    return weights_of(tiny)


def velocity(loaded):
    return flux.comfy_velocity(loaded.patcher, **flux.inputs())


@pytest.mark.parametrize("name", PACKED)
def test_every_value_of_every_type(name):
    """Bit for bit gguf-py's, on random bytes: every scale, infinite and subnormal ones among them; and cut by rows."""
    kind = Kind[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    assert QUANTIZED[int(kind)] == (name, int(kind), block, size)
    raw = np.random.default_rng(3).integers(0, 256, (500, 2 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(raw, kind)
    one = codec(f"ggml_{name.lower()}")
    tile, rows = Tile(Place(one.name, 500, 2 * block), {"codes": torch.from_numpy(raw)}), torch.empty(499, 2 * block)
    one.decode_rows(tile, 1, 500, rows)
    for got, meant in ((one.dequantize(tile, torch.float32).numpy(), wanted), (rows.numpy(), wanted[1:])):
        same = meant.view(np.uint32) == got.view(np.uint32)
        assert got.shape == meant.shape and (same | np.isnan(meant) & np.isnan(got)).all()


def test_all_types_of_gguf_are_known():
    """A newer gguf-py with a type that it gives a meaning to is noticed."""
    assert {kind.name for kind in gguf.quants._type_traits} - {"BF16"} == set(PACKED) == {k.name for k in QUANTIZED.values()}


@pytest.mark.parametrize("kind", PACKED)
def test_every_type(weights, tmp_path, kind):
    tensors, truth = packed(weights["native"], kind)
    loaded = load(write(tmp_path / "model.gguf", tensors))
    assert common.rel_l2(velocity(loaded), expected(truth)) < EXACT
    assert loaded.description.family == "gguf" and loaded.description.formats[f"GGUF {kind}"] > 20
    weight = loaded.patcher.get_model_object(f"diffusion_model.{LAYER}").weight
    assert is_tiled(weight) and weight._qdata.dtype == torch.uint8
    assert np.array_equal(weight._qdata.numpy(), tensors[f"{LAYER}.weight"][0])


MIXED = ("Q4_K", "Q6_K", "Q5_0", "IQ4_XS", "Q8_0")


@pytest.mark.parametrize("style,prefix", [("native", ""), ("native", WHOLE), ("diffusers", ""), ("diffusers", "transformer.")])
def test_mixtures_under_every_name(weights, tmp_path, style, prefix):
    """Every type may stand on every tensor; diffusers' names have apart what ComfyUI keeps in one."""
    tensors, truth = packed(weights[style], MIXED)
    loaded = load(write(tmp_path / "model.gguf", {prefix + name: tensor for name, tensor in tensors.items()}))
    assert common.rel_l2(velocity(loaded), expected(truth)) < EXACT
    assert {f"GGUF {kind}" for kind in MIXED} <= loaded.description.formats.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_quantized(weights, tmp_path, dtype):
    """Converters' own output: all floats, vectors in the same dtype too."""
    tensors = {name: tensor.to(dtype) for name, tensor in weights["native"].items()}
    loaded = load(write(tmp_path / "model.gguf", tensors))
    assert common.rel_l2(velocity(loaded), expected({n: t.float() for n, t in tensors.items()})) < EXACT


@pytest.mark.parametrize("arch", ["pig", "lumina2", "wan"])
def test_the_architecture_in_the_header_is_a_claim(weights, tmp_path, arch):
    tensors, _ = packed(weights["native"], "Q8_0")
    assert load(write(tmp_path / "model.gguf", tensors, arch)).description.architecture == "FLUX.1"


def test_in_parts(weights, tmp_path):
    """llama.cpp's split files, by the folder and by any part; and a part without the others."""
    tensors, truth = packed(weights["native"], "Q4_K")
    names = sorted(tensors)
    for i in range(3):
        write(tmp_path / f"model-0000{i + 1}-of-00003.gguf", {n: tensors[n] for n in names[i::3]},
              add_uint16=("split.count", 3))
    for reference in (tmp_path, tmp_path / "model-00001-of-00003.gguf", tmp_path / "model-00002-of-00003.gguf"):
        assert common.rel_l2(velocity(load(reference)), expected(truth)) < EXACT
    alone = tmp_path / "alone.gguf"
    (tmp_path / "model-00002-of-00003.gguf").rename(alone)
    with pytest.raises(CheckpointError, match="1 of 3 parts are missing"):
        load(tmp_path / "model-00001-of-00003.gguf")
    with pytest.raises(CheckpointError, match="part of a model in 3 files"):
        load(alone)


def test_one_of_many_in_a_folder(weights, tmp_path):
    tensors, truth = packed(weights["native"], "Q8_0")
    for name in ("flux-Q8_0.gguf", "flux-Q4_K.gguf"):
        write(tmp_path / name, tensors)
    with pytest.raises(CheckpointError, match="there are 2 GGUF files"):
        load(tmp_path)
    assert common.rel_l2(velocity(load(tmp_path, weights_name="flux-Q8_0.gguf")), expected(truth)) < EXACT


@pytest.mark.parametrize("kind", ["Q4_K", "IQ3_S"])
@pytest.mark.parametrize("style", ["native", "diffusers"])
def test_lora(weights, tmp_path, style, kind):
    import comfy.model_detection

    tensors, truth = packed(weights[style], kind)
    if style == "diffusers":
        truth = comfy.model_detection.convert_diffusers_mmdit(dict(truth))
    lora_agrees(load(write(tmp_path / "model.gguf", tensors), dtype="default"), truth, tmp_path / "lora")


def test_saved_and_loaded_again(weights, tmp_path):
    import comfy.sd

    tensors, _ = packed(weights["diffusers"], MIXED)
    first = load(write(tmp_path / "model.gguf", tensors))
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), first.patcher)
    assert torch.equal(velocity(load(tmp_path / "saved.safetensors")), velocity(first))


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def patched(path, old, new):
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


def type_of(path, name, number):
    """Change a tensor's type in the header."""
    data, key = bytearray(path.read_bytes()), name.encode()
    at = data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)
    dimensions = struct.unpack_from("<I", data, at)[0]
    struct.pack_into("<I", data, at + 4 + 8 * dimensions, number)
    path.write_bytes(data)


def plain(path):
    """The tensors of a file, decoded."""
    return {tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).view(
        tuple(map(int, tensor.shape))[::-1]) for tensor in gguf.GGUFReader(path).tensors}


NAME = f"{LAYER}.weight"
DAMAGED = {
    "cut in the tensors": (lambda p: cut(p, 1000), "truncated"),
    "cut in the header": (lambda p: cut(p, p.stat().st_size - 300), "ends within its header|bytes"),
    "a type that needs more bytes": (lambda p: type_of(p, NAME, 8), "overlap"),
    "a type of other blocks": (lambda p: type_of(p, "double_blocks.0.img_attn.qkv.bias", 12), "overlap|no multiple of|expected"),
    "a type that ggml does not store": (lambda p: type_of(p, NAME, 9), "Q8_1"),
    "an unknown type": (lambda p: type_of(p, NAME, 77), "unknown type 77"),
    "big-endian": (lambda p: patched(p, b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03"), "big-endian"),
    "version 1": (lambda p: patched(p, b"GGUF\x03", b"GGUF\x01"), "version 1"),
    "a tensor twice": (lambda p: patched(p, b"double_blocks.1.img_attn.qkv.weight", NAME.encode()), "twice"),
    "a tensor too few": (lambda p: patched(p, NAME.encode(), b"double_blocks.0.img_attn.qkv.wwight"), "missing tensor"),
    "transposed": (lambda p: write(p, {**plain(p), NAME: torch.ones(256, 768)}), r"is \[256, 768\], expected \[768, 256\]"),
    "transposed, in blocks": (lambda p: write(p, {**plain(p), NAME: (np.zeros((256, 816), np.uint8), "Q8_0")}),
                              r"is \[256, 768\], expected \[768, 256\]"),
    "names of a text encoder": (lambda p: write(p, {"blk.0.attn_q.weight": torch.ones(4, 4)}), "text encoder"),
    "an empty file": (lambda p: p.write_bytes(b"GGUF"), "invalid")}


@pytest.mark.parametrize("name", DAMAGED)
def test_refused(weights, tmp_path, name):
    tensors, _ = packed(weights["native"], "Q4_0")
    path = write(tmp_path / "model.gguf", tensors)
    DAMAGED[name][0](path)
    with pytest.raises(CheckpointError, match=DAMAGED[name][1]):
        load(path)


def test_long_lists_are_passed_over(weights, tmp_path):
    """A tokenizer's words are no matter of a transformer's; a file may have them."""
    words = [f"word{i}" for i in range(5000)]
    path = write(tmp_path / "model.gguf", {"a.weight": torch.ones(2, 2)}, add_token_list=(words,), add_name=("x" * 100,))
    header = Checkpoint(locate(str(path))).headers[0]
    assert header.metadata["general.name"] == "x" * 100 and "tokenizer.ggml.tokens" not in header.metadata
    assert header.load()["a.weight"].tolist() == [[1, 1], [1, 1]]


def test_linears_are_counted(weights, tmp_path):
    tensors, _ = packed(weights["native"], "Q8_0")
    formats = load(write(tmp_path / "model.gguf", tensors)).description.formats
    assert sum(formats.values()) == len(linears(weights["native"]))
