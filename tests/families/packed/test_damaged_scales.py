"""NaN, infinite and negative scales in every real export of packers: each is refused by the name that its file has for it,
and nothing else is. What may be negative is so by the packers' formulas (quant/scales.py): AutoRound's scales, in the
layouts that GPTQ and AWQ have in common with it.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.quant.scales import EXPONENTS, FINITE, NOT_NEGATIVE, POSITIVE, damage
from support.packed_files import EXPORTS, layers_of

pytestmark = pytest.mark.unit

FAMILIES = {"auto-round": "gptq", "gptqmodel": "gptq", "quanto": "rows", "torchao": "rows", "sdnq": "sdnq",
            "compressed-tensors": "compressed-tensors"}
FOLDERS = [folder for tool in FAMILIES for folder in sorted((EXPORTS / tool).iterdir())]
SCALES = ("scales", "scale", "weight_scale", "_weight_scale", "weight._scale", "weight_global_scale", "input_global_scale")
OTHERS = ("zero_point", "weight._shift", "svd_up", "svd_down")  # of any sign
SIGNED = ("UINT4 (groups)", "UINT8 (groups)")


def poisoned(folder, tensors, name, value, tmp_path):
    """The export with one value of one tensor, the last, changed; bytes are meant as such."""
    changed = {leaf: tensor.clone() for leaf, tensor in tensors.items()}
    tensor = changed[name].view(torch.uint8) if isinstance(value, int) else changed[name]
    tensor.view(-1)[-1] = value
    save_file(changed, str(tmp_path / "model.safetensors"))
    return tmp_path


def values(tensor: torch.Tensor, signed: bool) -> dict[str, float | int]:
    """What is not to be in a scale of this dtype, and what is said of it."""
    if tensor.dtype == torch.uint8:
        return {"NaN": 255}
    if tensor.dtype == torch.float8_e4m3fn:  # NaN of both signs; the smallest number below zero
        return {"NaN": 0x7F, "NaN ": 0xFF, "negative values": 0x81}
    return {"NaN": float("nan"), "infinite values": float("inf"), "infinite values ": float("-inf")} | (
        {} if signed else {"negative values": -1.0})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_every_scale_of_every_export(folder, tmp_path):
    family = FAMILIES[folder.parent.name]
    tensors = load_file(str(folder / "model.safetensors"))
    shutil.copy(folder / "config.json", tmp_path)
    formats = {name: said.format.name for name, said, _ in layers_of(folder, family)}
    tried = 0
    for name, tensor in tensors.items():
        layer = next((one for one in formats if name.startswith(f"{one}.")), "")
        leaf = name.removeprefix(f"{layer}.").replace("_data.", "")
        if not layer or leaf not in (*SCALES, *OTHERS) and not leaf.endswith(("_scale", "_shift")) \
                or leaf in ("input_scale", "output_scale") or not (tensor.is_floating_point() or tensor.dtype == torch.uint8):
            continue
        signed = formats[layer] in SIGNED or leaf in OTHERS
        for what, value in values(tensor, signed).items():
            with pytest.raises(ValueError) as caught:
                list(layers_of(poisoned(folder, tensors, name, value, tmp_path), family))
            said = str(caught.value)
            assert leaf.rpartition(".")[2].lstrip("_") in said and layer in said, said
            assert what.strip() in said or "must be a finite positive number" in said, said
            tried += 1
        if signed and tensor.is_floating_point():
            list(layers_of(poisoned(folder, tensors, name, -0.01, tmp_path), family))
    assert tried


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_rules(dtype):
    """Against the definition, by every value of the dtype, or of its upper 16 bits."""
    bits = torch.arange(1 << 8 * min(dtype.itemsize, 2), dtype=torch.int32)
    word = {1: torch.uint8, 2: torch.int16}.get(dtype.itemsize)
    every = bits.to(word).view(dtype) if word else (bits << 16).view(dtype)
    every = every[::16] if dtype.itemsize > 1 else every
    said = {rule: set() for rule in (FINITE, NOT_NEGATIVE, POSITIVE)}
    for value, meant in zip(every, every.double().tolist(), strict=True):
        for rule, found in said.items():
            words = damage(torch.stack([value, torch.ones((), dtype=dtype)]) if dtype.itemsize > 1 else
                           torch.tensor([int(value.view(torch.uint8)), 0x38], dtype=torch.uint8).view(dtype), rule)
            wanted = "NaN" if meant != meant else "infinite values" if abs(meant) == float("inf") else "" if rule == FINITE else \
                "negative values" if meant < 0 else "zeros" if meant == 0 and rule == POSITIVE else ""
            assert words == wanted, (meant, rule)
            found.add(words)
    assert [len(found) for found in said.values()] == [count - (dtype.itemsize == 1) for count in (3, 4, 5)]
    assert damage(torch.empty(0, dtype=dtype), POSITIVE) == ""


def test_exponents():
    every = torch.arange(255, dtype=torch.uint8)
    assert damage(every, EXPONENTS) == "" == damage(every.view(torch.float8_e8m0fnu), EXPONENTS)
    assert damage(torch.tensor([3, 255], dtype=torch.uint8), EXPONENTS) == "NaN"
    assert damage(torch.full((3,), 9, dtype=torch.int32), POSITIVE) == ""
