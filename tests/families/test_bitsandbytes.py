"""bitsandbytes' NF4, FP4 and LLM.int8: every layer of its own export against its own dequantization, whole models against
diffusers' forward on the weights that they mean, and what is refused."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantized_transformers.loaders import assemble, model
from quantized_transformers.loaders import plan as plans
from quantized_transformers.loaders.architectures import Module
from quantized_transformers.loaders.architectures.base import Naming
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.description import CheckpointDescription
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.families import bitsandbytes, family_of, modelopt
from quantized_transformers.loaders.locate import locate
from quantized_transformers.makers.save import save
from quantized_transformers.quant.codecs import codec
from quantized_transformers.quant.layouts import stored as layout
from support import bitsandbytes as made
from support import common, flux, flux2
from support import lora as lora_tools

pytestmark = pytest.mark.parity

STORED, EXPECTED = made.export()
LAYERS = [name.removesuffix(".weight") for name in EXPECTED]
PLAIN = {"across_few", "across_odd"}  # whose blocks rows cut into less than eight values


class Apart:
    """An architecture of Linear layers that have nothing to do with each other."""

    name, class_names, config_only = "layers", frozenset(), frozenset()

    def modules(self, dims: Any, naming: Any) -> Any:
        return (Module(name, (name,), (EXPECTED[f"{name}.weight"].shape[0],), (EXPECTED[f"{name}.weight"].shape[1],),
                       f"{name}.bias" in STORED) for name in LAYERS)

    def marks(self, dims: Any) -> tuple[str, ...]:
        return ()


def assembled(tensors: made.Tensors, path: Any) -> assemble.NativeStateDict:
    """The layers of the export, through the family's reading and the load of every checkpoint."""
    save_file(tensors, str(path))
    checkpoint = Checkpoint(locate(str(path)))
    assert family_of(checkpoint) is bitsandbytes.FAMILY
    description = CheckpointDescription(str(path), [], 0, "layers", Naming("native"), {}, "bitsandbytes")
    states, plain = bitsandbytes._by_leaf(checkpoint), modelopt.StoredLayers(description)
    plan = plans.make(plans.LoadPlan(description, Apart()), checkpoint.tensors,
                      lambda *layer: bitsandbytes.read_layer(states, plain, *layer))
    description.require_loadable()
    return assemble.assemble(plan, assemble.Tensors(checkpoint, plan))


def weight_of(native: made.Tensors, name: str, shape: torch.Size) -> torch.Tensor:
    """What a native layer's tensors mean, F32, by its codec."""
    leaves = {key.removeprefix(f"{name}."): tensor for key, tensor in native.items() if key.startswith(f"{name}.")}
    if "comfy_quant" not in leaves:
        return leaves["weight"]
    tile, = layout.read(leaves, "", json.loads(bytes(leaves["comfy_quant"].tolist())), tuple(shape))
    return codec(tile.place.codec).dequantize(tile, torch.float32)


def test_its_own_export_dequantizes_as_it_does(tmp_path):
    """To the last bit of the dtype that bitsandbytes dequantizes to."""
    native = assembled(STORED, tmp_path / "layers.safetensors")
    assert len(LAYERS) == 14
    for name in LAYERS:
        expected = EXPECTED[f"{name}.weight"]
        found = weight_of(native.tensors, name, expected.shape)
        if name == "int8":  # q * (SCB / 127) and (q * SCB) * (1 / 127): three roundings apart
            assert ((found - expected).abs() <= 3 * 2 ** -24 * expected.abs()).all()
        else:
            assert torch.equal(found.to(expected.dtype), expected), name
        assert (f"{name}.comfy_quant" in native.tensors) is (name not in PLAIN)
    assert native.tensors["nf4.bias"].equal(STORED["nf4.bias"])
    assert sum("cross rows" in note for note in native.notes) == len(PLAIN)
    assert native.codecs == {"codebook", "w8a16"}  # and nothing of LLM.int8 became ComfyUI's INT8, which is W8A8


MODELS = {
    "flux nf4": (lambda: flux.make(double=1, single=1), flux, nullcontext, made.four_bits, {"double": True}),
    "flux fp4": (lambda: flux.make(double=1, single=1), flux, nullcontext, made.four_bits, {"kind": "fp4", "block": 128}),
    "flux int8": (lambda: flux.make(double=1, single=1), flux, nullcontext, made.llm_int8, {"skip": ("proj_out", "norm1.")}),
    "flux2 nf4": (lambda: flux2.make(double=1, single=1), flux2, nullcontext, made.four_bits, {"skip": ("to_k",)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model(name, tmp_path):
    make, support, context, layer, options = MODELS[name]
    reference = make()
    stored = made.quantized(reference, layer, **options)
    folder = common.save(tmp_path / "folder", stored, {**reference.config, "quantization_config": {
        "quant_method": "bitsandbytes"}})
    with context():
        loaded = model.load(model.Request(str(folder), dtype="fp32"), quiet=True)
        expected = support.diffusers_velocity(reference, **support.inputs())
        assert common.rel_l2(support.comfy_velocity(loaded.patcher, **support.inputs()), expected) < 1e-5
    description = loaded.description
    assert description.family == "bitsandbytes" and "bitsandbytes" in loaded.report
    title = {"nf4": "NF4", "fp4": "FP4", "int8": "INT8 (LLM.int8)"}[name.split()[1]]
    assert description.formats[title] == sum(key.endswith((".quant_map", ".SCB")) for key in stored)


def test_loras_and_saves(tmp_path, output):
    reference = flux.make(double=1, single=1)
    stored = made.quantized(reference, made.four_bits, double=True)
    folder = common.save(tmp_path / "folder", stored, dict(reference.config))
    base = model.load(model.Request(str(folder), dtype="fp32"), quiet=True)
    before = flux.comfy_velocity(base.patcher, **flux.inputs())
    path, _ = save(base.patcher, "nf4", step=lambda n: None)
    again = model.load(model.Request(str(path), dtype="fp32"), quiet=True)
    assert torch.equal(flux.comfy_velocity(again.patcher, **flux.inputs()), before)
    lora_tools.follows(base, reference, tmp_path)


def state(**changes: Any) -> Any:
    """Change what a layer's JSON says; None takes a key away."""
    def change(tensors: made.Tensors) -> None:
        name = "nf4_double.weight.quant_state.bitsandbytes__nf4"
        said = {**json.loads(bytes(tensors[name].tolist())), **changes}
        text = json.dumps({key: value for key, value in said.items() if value is not None})
        tensors[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return change


def put(name: str, change: Any) -> Any:
    return lambda tensors: tensors.update({name: change(tensors[name].clone())})


def drop(*names: str) -> Any:
    return lambda tensors: [tensors.pop(name) for name in names]


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0] = float("nan")
    return tensor


def negative(tensor: torch.Tensor) -> torch.Tensor:
    tensor[-1] *= -1
    return tensor


REFUSED = {
    "a truncated weight": (put("nf4.weight", lambda t: t[:-1]), r"nf4: weight is U8 \[383, 1\], expected 384 bytes"),
    "a weight on its side": (put("nf4.weight", lambda t: t.t()), r"nf4: weight is U8 \[1, 384\], expected 384 bytes"),
    "a truncated weight in other storage": (put("storage_f32.weight", lambda t: t[1:]), r"weight is F32 \[63, 1\]"),
    "no absmax": (drop("nf4.weight.absmax"), "nf4: weight.absmax missing"),
    "a short absmax": (put("nf4.weight.absmax", lambda t: t[1:]), r"weight.absmax is F32 \[11\], expected floats \[12\]"),
    "an absmax of codes": (put("nf4.weight.absmax", lambda t: t.byte()), r"weight.absmax is U8 \[12\], expected floats"),
    "a nested absmax of floats": (put("nf4_double.weight.absmax", lambda t: t.float()), r"weight.absmax is F32 \[384\], expected U8"),
    "no quant_map": (drop("nf4.weight.quant_map"), "nf4: weight.quant_map missing"),
    "a short quant_map": (put("nf4.weight.quant_map", lambda t: t[:8]), r"weight.quant_map is F32 \[8\], expected floats \[16\]"),
    "no quant_state": (drop("nf4.weight.quant_state.bitsandbytes__nf4"), "nf4: weight.quant_state missing"),
    "two quant_states": (lambda t: t.update({"nf4.weight.quant_state.bitsandbytes__fp4": t[
        "fp4.weight.quant_state.bitsandbytes__fp4"]}), "say the same twice"),
    "no nested_absmax": (drop("nf4_double.weight.nested_absmax"), "nf4_double: one of nested_absmax and nested_quant_map"),
    "a short nested_absmax": (put("nf4_double.weight.nested_absmax", lambda t: t[1:]), r"nested_absmax is F32 \[1\]"),
    "no nested tensors": (drop("nf4_double.weight.nested_absmax", "nf4_double.weight.nested_quant_map"),
                          r"weight.absmax is U8 \[384\], expected floats"),
    "no nested_offset": (state(nested_offset=None), "does not say its nested_blocksize and nested_offset"),
    "no JSON": (put("nf4.weight.quant_state.bitsandbytes__nf4", lambda t: t[1:]), "nf4.weight.quant_state.bitsandbytes__nf4 is no JSON"),
    "a JSON that is no object": (put("nf4.weight.quant_state.bitsandbytes__nf4", lambda t: torch.tensor(
        list(b"[1]"), dtype=torch.uint8)), "is no JSON object"),
    "an unknown quant_type": (state(quant_type="int3"), "says quant_type 'int3'; supported: nf4, fp4"),
    "another shape": (state(shape=[512, 48]), r"nf4_double: weight.quant_state says shape \[512, 48\], expected \[48, 512\]"),
    "a shape of one": (state(shape=[24576]), r"says shape \[24576\]"),
    "a blocksize of 0": (state(blocksize=0), "says blocksize 0"),
    "no blocksize": (state(blocksize=None), "says blocksize None"),
    "another blocksize": (state(blocksize=128), r"weight.absmax is U8 \[384\], expected U8 \[192\]"),
    "an infinite offset": (state(nested_offset=float("inf")), "is no JSON object"),
    "NaN in absmax": (put("nf4.weight.absmax", nan), "nf4.weight.absmax holds NaN"),
    "NaN in nested_absmax": (put("nf4_double.weight.nested_absmax", nan), "nf4_double.weight.nested_absmax holds NaN"),
    "NaN in quant_map": (put("nf4.weight.quant_map", nan), "nf4.weight.quant_map holds NaN"),
    "a negative absmax": (put("nf4.weight.absmax", negative), "nf4.weight.absmax holds negative values, expected finite numbers from 0"),
    "an infinite absmax": (put("fp4.weight.absmax", lambda t: t / 0), "fp4.weight.absmax holds infinite values"),
    "a negative nested_absmax": (put("nf4_double.weight.nested_absmax", negative), "nf4_double.weight.nested_absmax holds negative"),
    "an infinite nested_quant_map": (put("nf4_double.weight.nested_quant_map", lambda t: t.index_fill(0, torch.tensor(7), torch.inf)),
                                     "nf4_double.weight.nested_quant_map holds infinite values"),
    "a negative SCB": (put("int8.SCB", negative), "int8.SCB holds negative values"),
    "no SCB": (drop("int8.SCB"), "int8: SCB missing beside I8 weights"),
    "a short SCB": (put("int8.SCB", lambda t: t[1:]), r"SCB is F32 \[7\], expected floats \[8\]"),
    "NaN in SCB": (put("int8.SCB", nan), "int8.SCB holds NaN"),
    "INT8 in an order of kernels": (put("int8.weight_format", lambda t: t + 1), "int8.weight_format is 1"),
    "INT8 of another shape": (put("int8.weight", lambda t: t[:, 1:]), r"weight is \[8, 63\], expected \[8, 64\]"),
    "INT8 that is U8": (put("int8.weight", lambda t: t.view(torch.uint8)), "weight is U8, expected I8"),
    "both": (lambda t: t.update({"nf4.SCB": torch.ones(12)}), "nf4: tensors of 4-bit codes and of LLM.int8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    change, message = REFUSED[name]
    tensors = dict(STORED)
    change(tensors)
    with pytest.raises(CheckpointError, match=message) as refused:
        assembled({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, tmp_path / "layers.safetensors")
    assert str(refused.value).count("\n  - ") <= 1, str(refused.value)  # one thing is wrong, and one is said
