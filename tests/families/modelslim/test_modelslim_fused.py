"""Exports in msmodelslim's formats of an architecture whose layers ComfyUI fuses (FLUX.1: q, k, v, proj_mlp), encoded by
the formulas of support/ascend.py and held against diffusers' forward on the decoded weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders import model
from support import ascend, common, flux

pytestmark = pytest.mark.parity

FORWARD = 1e-5  # fp32 forwards of the same network in two implementations (test_flux1.py)
KINDS = ("W8A8", "W8A8_DYNAMIC", "W8A8_MXFP8", "WFP8AFP8_DYNAMIC", "W4A4_MXFP4", "W4A4_DYNAMIC", "W4A8_DYNAMIC")


def quantized(name: str, module: torch.nn.Module) -> bool:
    """Every Linear of the blocks, and the output's modulation, whose halves ComfyUI exchanges."""
    return isinstance(module, torch.nn.Linear) and name.startswith(("transformer_blocks", "single_transformer", "norm_out"))


def write(folder, tensors, types):
    folder.mkdir(exist_ok=True)
    save_file(tensors, str(folder / "quant_model_weight_w8a8.safetensors"))
    described = {name: types.get(name.rpartition(".")[0], "FLOAT") for name in tensors}
    (folder / "quant_model_description_w8a8.json").write_text(json.dumps({"model_quant_type": "W8A8", **described}))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def export(request, tmp_path_factory):
    """(type, folder of the export, diffusers' model in F32 on the decoded weights)."""
    reference, tensors, types = flux.make().float(), {}, {}
    with torch.no_grad():
        for seed, (name, module) in enumerate(reference.named_modules()):
            if not quantized(name, module):
                continue
            part = ascend.make(request.param, *module.weight.shape, seed=seed, bias=module.bias is not None)
            module.weight.copy_(torch.from_numpy(ascend.decode(request.param, part)))
            if module.bias is not None:
                module.bias.copy_(part["bias"])
            tensors |= {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in part.items()}
            types[name] = request.param
    tensors |= {name: t for name, t in reference.state_dict().items() if name.rpartition(".")[0] not in types}
    return request.param, write(tmp_path_factory.mktemp("export") / "flux", tensors, types), reference


def load(folder, **request):
    return model.load(model.Request(str(folder), dtype="fp32", **request), quiet=True)


def test_fused_layers_are_their_parts(export):
    kind, folder, reference = export
    loaded = load(folder, compute="dequantize")
    assert loaded.description.architecture == "FLUX.1" and loaded.description.formats[kind] > 20
    expected = flux.diffusers_velocity(reference, **flux.inputs())
    assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), expected) < FORWARD
    native = loaded.patcher.model.diffusion_model
    for block, parts in (("double_blocks.0.img_attn.qkv", ("to_q", "to_k", "to_v")),
                         ("double_blocks.1.txt_attn.qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))):
        attention = reference.transformer_blocks[int(block.split(".")[1])].attn
        weight = torch.cat([attention.get_submodule(part).weight for part in parts])
        assert common.rel_l2(native.get_submodule(block).weight.dequantize().float(), weight) < 1e-6


def parts_of(tensors, kind_of):
    """(x, the output of each of q, k, v in an NPU's arithmetic, joined) of the first block's fused layer."""
    x = torch.randn(6, tensors["transformer_blocks.0.attn.to_q.bias"].shape[0],
                    generator=torch.Generator().manual_seed(3))
    wanted = []
    for part in ("to_q", "to_k", "to_v"):
        prefix = f"transformer_blocks.0.attn.{part}."
        stored = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if kind_of(part) == "FLOAT":
            wanted.append(torch.nn.functional.linear(x, stored["weight"].float(), stored["bias"].float()))
        else:
            wanted.append(torch.from_numpy(ascend.forward(kind_of(part), stored, x)))
    return x, torch.cat(wanted, 1)


def fused_layer(folder):
    return load(folder, compute="native").patcher.model.diffusion_model.get_submodule("double_blocks.0.img_attn.qkv")


def test_activations_are_quantized_once_for_all_parts(export):
    """A fused layer's output is that of its parts, each in an NPU's arithmetic."""
    kind, folder, _ = export
    x, wanted = parts_of(load_file(str(folder / "quant_model_weight_w8a8.safetensors")), lambda part: kind)
    with torch.inference_mode():
        assert common.rel_l2(fused_layer(folder)(x), wanted) < FORWARD


OTHER = {"another input scale": "W8A8", "another type": "W8A8_DYNAMIC", "microscaling": "W8A8_MXFP8", "INT4": "W4A4_DYNAMIC",
         "FLOAT": "FLOAT"}


@pytest.mark.parametrize("export", ["W8A8"], indirect=True)
@pytest.mark.parametrize("other", OTHER)
def test_parts_of_other_types_keep_their_own(other, export, tmp_path):
    """k in another type than q and v, or its activation under another scale: tiles of one weight, each multiplied in
    its own arithmetic."""
    _, folder, reference = export
    kind, layer = OTHER[other], "transformer_blocks.0.attn.to_k"
    tensors = load_file(str(folder / "quant_model_weight_w8a8.safetensors"))
    types = {name.rpartition(".")[0]: "W8A8" for name in tensors if name.endswith(".deq_scale")}
    rows = tensors[f"{layer}.weight"].shape
    part = {"weight": torch.randn(rows), "bias": torch.randn(rows[0])} if kind == "FLOAT" else ascend.make(kind, *rows, seed=9)
    if other == "another input scale":
        # what is quantized is x / scale, so the other scales of the layer go along
        part = {leaf: tensors[f"{layer}.{leaf}"] for leaf in part}
        part |= {leaf: part[leaf] * 2 for leaf in ("input_scale", "deq_scale")}
        part["quant_bias"] = (part["bias"] / part["deq_scale"]).round().to(torch.int32) - (
            part["weight"].sum(1).int() * part["input_offset"].int())
    tensors = {name: t for name, t in tensors.items() if not name.startswith(f"{layer}.")}
    tensors |= {f"{layer}.{leaf}": t.contiguous() for leaf, t in part.items()}
    path = write(tmp_path / "mixed", tensors, {**types, layer: kind})
    x, wanted = parts_of(tensors, lambda part: kind if part == "to_k" else "W8A8")
    module = fused_layer(path)
    assert [tile.codec for tile in module.weight._params.tiles] == ["w8a8", CODEC.get(kind, kind.lower()), "w8a8"]
    with torch.inference_mode():
        assert common.rel_l2(module(x), wanted) < FORWARD
    dense = module.weight.dequantize()[rows[0]:2 * rows[0]]
    exact = part["weight"] if kind == "FLOAT" else torch.from_numpy(ascend.decode(kind, part))
    assert common.rel_l2(dense, exact) < 1e-6


CODEC = {"FLOAT": "plain"}
