"""Scales of ggml's blocks that are no numbers, against gguf-py's dequantization; and when they are refused: not when a file
is loaded, whose weights nothing reads then, but before the first run, by the name of the tensor."""

from __future__ import annotations

import comfy.model_management
import gguf
import numpy as np
import pytest
import torch

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.quant.ggml import QUANTIZED
from quantized_transformers.quant.ggml.damage import EXPONENT, HALVES, NIBBLES, _anywhere, damage
from support import flux
from support.gguf_files import PACKED, Kind, packed, write
from support.real_files import load, weights_of

pytestmark = pytest.mark.parity

TYPES = {kind.name: kind for kind in QUANTIZED.values()}
NAN, INFINITE = 0x7E01, 0xFC00  # as F16


@pytest.fixture(scope="module")
def weights(tiny):
    return weights_of(tiny)


def poison(block: np.ndarray, name: str, bits: int, which: int = 0) -> None:
    """Put an F16 (of MXFP4: 255) into the scale of a block of bytes."""
    if name in EXPONENT:
        block[EXPONENT[name]] = 255
    elif name in NIBBLES:
        for i in range(4):
            at = NIBBLES[name] + 2 * i + 1
            block[at] = block[at] & 15 | (bits >> 4 * i & 15) << 4
    else:
        at = HALVES[name][which]
        block[at:at + 2] = np.array([bits], np.uint16).view(np.uint8)


@pytest.mark.parametrize("name", PACKED)
def test_scales_that_are_no_numbers_are_those_that_make_none(name):
    """Of random blocks, a third of them with exponents of ones: by numpy and by torch alike."""
    kind, rng = TYPES[name], np.random.default_rng(5)
    blocks = rng.integers(0, 256, (3000, kind.size), dtype=np.uint8)
    for i, block in enumerate(blocks[:1000]):
        if name != "NVFP4":
            poison(block, name, (NAN, INFINITE, 0x7C00, 0xFBFF)[i % 4], which=i % len(HALVES.get(name, (0,))))
    with np.errstate(all="ignore"):
        numbers = np.isfinite(gguf.dequantize(blocks, Kind[name])).all(1)
    if name in EXPONENT:  # which ggml decodes to 2^127, and refuses as a file's
        numbers = blocks[:, EXPONENT[name]] != 255
    assert (not numbers.all()) is (name != "NVFP4") and numbers.any()
    said = [damage(torch.from_numpy(block), kind) for block in blocks]
    assert [not words for words in said] == numbers.tolist()
    assert said == [_anywhere(torch.from_numpy(block)[None], name) for block in blocks]
    assert set(said) <= {"", "NaN", "infinite values"}
    whole = torch.from_numpy(blocks).view(1000, -1)
    assert damage(whole, kind) == _anywhere(whole.view(-1, kind.size), name) == ("NaN" if "NaN" in said else "")
    fine = torch.from_numpy(blocks[numbers])
    assert damage(fine, kind) == _anywhere(fine, name) == ""


STYLES = {"native": ("double_blocks.0.img_attn.qkv.weight", {}),
          "diffusers": ("transformer_blocks.0.attn.to_k.weight", {"dtype": "default"})}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "IQ1_M", "MXFP4"])
def test_refused_before_the_first_run(weights, tmp_path, kind, style):
    name, request = STYLES[style]
    tensors, _ = packed(weights[style], kind)
    damaged = tensors[name][0].copy()
    poison(damaged.reshape(-1, TYPES[kind].size)[-1], kind, NAN)
    path = write(tmp_path / "model.gguf", {**tensors, name: (damaged, kind)})
    patcher = load(path, **request).patcher
    for again in (patcher, patcher.clone(), patcher):  # a run that failed does not make the next one right
        with pytest.raises(CheckpointError, match=f"{name} holds NaN, expected ") as caught:
            flux.comfy_velocity(again, **flux.inputs())
        assert str(path) in str(caught.value) and "what to do:" in str(caught.value)
    comfy.model_management.unload_all_models()


def test_what_is_read_when_it_is_loaded_is_looked_at_then(weights, tmp_path):
    """Layers whose width ComfyUI's detection reads, and tensors of no Linear layer."""
    for name in ("img_in.weight", "double_blocks.0.img_attn.norm.query_norm.scale"):
        tensors, _ = packed(weights["native"], "Q8_0")
        raw = gguf.quantize(weights["native"][name].float().numpy().reshape(-1, 32), Kind.Q8_0)
        raw[-1, :2] = np.array([INFINITE], np.uint16).view(np.uint8)
        shape = tuple(weights["native"][name].shape)
        tensors[name] = raw.reshape(*shape[:-1], -1), "Q8_0"
        with pytest.raises(CheckpointError, match=f"{name} holds infinite values, expected finite numbers"):
            load(write(tmp_path / "model.gguf", tensors))
