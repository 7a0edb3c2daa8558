"""Tensors called by another type of their width, whose bytes stay: refused, or the same numbers, but for what
docs/limits.md says that nobody can tell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from quantized_transformers.makers.builders.gguf import build_gguf
from quantized_transformers.makers.compare.weights import compare_weights
from support import common, flux, modelslim

pytestmark = pytest.mark.parity

WIDTHS = (("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL"), ("BF16", "F16", "I16"), ("F32", "I32"), ("F64", "I64"))
TOLD = {("BF16", "F16"), ("F16", "BF16")}
GGUF_TOLD = (("Q4_0", "IQ4_NL"), ("Q4_0", "Q4_K"), ("Q4_0", "NVFP4"), ("Q5_0", "Q5_K"), ("MXFP4", "IQ4_XS"),
             ("TQ2_0", "IQ2_XXS"), ("F16", "BF16"))
GGUF_SEEN = {("Q4_0", "Q4_K"), ("Q5_0", "Q5_K"), ("MXFP4", "IQ4_XS")}  # by scales that are no numbers


def same(reference: Path, candidate: Path) -> bool | None:
    """Whether both are the same numbers; None where the second is refused."""
    try:
        found = compare_weights(locate(str(reference)), locate(str(candidate)))
    except CheckpointError:
        return None
    return not any(layer.sums.noise for layer in (*found.layers, *found.others))


def relabelled(folder: Path) -> Iterator[tuple[str, str]]:
    """Call a tensor of each kind by each other type of its width: (what it is, what it is called), while it is."""
    file = next(folder.glob("*.safetensors"))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    kinds = {(name.rpartition(".")[2], info["dtype"]): name for name, info in header.items()
             if name != "__metadata__" and info["data_offsets"][0] < info["data_offsets"][1]}
    for (_, dtype), name in kinds.items():
        for other in next((width for width in WIDTHS if dtype in width), ()):
            if other != dtype:
                text = json.dumps(header | {name: header[name] | {"dtype": other}}).encode()
                file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])
                yield dtype, other
    file.write_bytes(data)


def wrong(reference: Path, folder: Path) -> set[tuple[str, str]]:
    """What loads as other numbers."""
    made = [(pair, same(reference, folder)) for pair in relabelled(folder)]
    assert len(made) > 8 and None in {outcome for _, outcome in made}
    return {pair for pair, outcome in made if outcome is False}


@pytest.mark.parametrize("name", ["nvfp4", "w8a8_dynamic", *(
    pytest.param(name, marks=pytest.mark.full) for name in ("fp8", "w8a8_fp16", "mxfp4_smooth"))])
def test_every_kind_of_tensor(name, tiny, tmp_path):
    if name in modelslim.EXPORTS:
        reference, folder = (modelslim.folder(name, tmp_path / place) for place in ("reference", "folder"))
    else:
        reference = getattr(tiny, name)
        folder = common.save(tmp_path / "folder", common.stored(reference), common.config_of(reference))
    found = wrong(reference, folder)
    assert found and found <= TOLD


def test_weights_without_scales(tiny, tmp_path):
    tensors = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor
               for name, tensor in common.stored(tiny.bf16).items()}
    reference, folder = (common.save(tmp_path / place, tensors, common.config_of(tiny.bf16))
                         for place in ("reference", "folder"))
    assert wrong(reference, folder) == {("F8_E4M3", "F8_E5M2"), ("BF16", "F16")}


@pytest.mark.parametrize(("kind", "other"), [pytest.param(*pair, marks=pytest.mark.full if at else ())
                                             for at, pair in enumerate(GGUF_TOLD)])
def test_types_of_gguf(kind, other, tmp_path):
    flux.make(double=1, single=1).save_pretrained(tmp_path / "base")
    file, called = tmp_path / "file.gguf", tmp_path / "called.gguf"
    build_gguf(output=str(file), base=str(tmp_path / "base"), kind=kind, progress=lambda total: lambda count: None)
    data = bytearray(file.read_bytes())
    for tensor in gguf.GGUFReader(file).tensors:
        name = tensor.name.encode()
        start = data.find(len(name).to_bytes(8, "little") + name + len(tensor.shape).to_bytes(4, "little"))
        at = start + 8 + len(name) + 4 + 8 * len(tensor.shape)  # behind its name and dimensions
        if tensor.tensor_type.name == kind:
            data[at:at + 4] = int(gguf.GGMLQuantizationType[other]).to_bytes(4, "little")
    called.write_bytes(data)
    assert same(file, called) is (None if (kind, other) in GGUF_SEEN else False)
