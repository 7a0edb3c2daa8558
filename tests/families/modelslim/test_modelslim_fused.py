"""Exports in msmodelslim's formats of every architecture with a table, encoded by the formulas of support/ascend.py and
held against diffusers' forward on the decoded weights: layers that ComfyUI fuses (q, k, v, proj_mlp), whose halves it
exchanges (norm_out), and those it has as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from quantized_transformers.loaders import model
from support import ascend, common, hunyuan_video
from support.families import FAMILIES

pytestmark = [pytest.mark.parity, pytest.mark.full]

FORWARD = 1e-5  # fp32 forwards of the same network in two implementations (test_flux1.py)
KINDS = ("W8A8", "W8A8_DYNAMIC", "W8A8_MXFP8", "WFP8AFP8_DYNAMIC", "W4A4_MXFP4", "W4A4_DYNAMIC", "W4A8_DYNAMIC")


class Names(NamedTuple):
    """`quantized`: beginnings of the diffusers names of modules whose Linears are quantized: the blocks and what is behind
    them, no embedder. `fused`: native layer -> the stored layers that ComfyUI keeps in it, in order."""

    quantized: tuple[str, ...]
    fused: dict[str, tuple[str, ...]]


def parts(attention: str, names: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{name}" for name in names.split())


FLUX_LIKE = {"double_blocks.0.img_attn.qkv": parts("transformer_blocks.0.attn", "to_q to_k to_v"),
             "double_blocks.0.txt_attn.qkv": parts("transformer_blocks.0.attn", "add_q_proj add_k_proj add_v_proj")}
SINGLE = {"single_blocks.1.linear1": (*parts("single_transformer_blocks.1.attn", "to_q to_k to_v"),
                                      "single_transformer_blocks.1.proj_mlp")}
FLUX_BLOCKS = ("transformer_blocks", "single_transformer_blocks", "norm_out", "proj_out")
NAMES = {
    "flux1": Names(FLUX_BLOCKS, FLUX_LIKE | SINGLE),
    # as stored: its single blocks are fused by diffusers
    "flux2": Names((*FLUX_BLOCKS, "double_stream_modulation", "single_stream_modulation"), FLUX_LIKE),
    "hunyuan_video": Names(FLUX_BLOCKS, FLUX_LIKE | SINGLE),
    "qwen_image": Names(("transformer_blocks", "norm_out", "proj_out"), {}),
    "wan": Names(("blocks", "proj_out"), {}),
    # of the refiners the attention alone: this model is as small as Z-Image gets, and large
    "z_image": Names(("layers", "noise_refiner.1.attention", "context_refiner.0.attention", "all_final_layer"), {
        f"{block}.attention.qkv": parts(f"{block}.attention", "to_q to_k to_v")
        for block in ("layers.0", "noise_refiner.1", "context_refiner.0")}),
}
FUSED = [family for family, names in NAMES.items() if names.fused]


def write(folder, tensors, types, config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, str(folder / "quant_model_weight_w8a8.safetensors"))
    described = {name: types.get(name.rpartition(".")[0], "FLOAT") for name in tensors}
    (folder / "quant_model_description_w8a8.json").write_text(json.dumps({"model_quant_type": "W8A8", **described}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Export(NamedTuple):
    """An export of one type, its tensors, and diffusers' model in F32 on the decoded weights."""

    family: str
    kind: str
    folder: Path
    tensors: dict
    types: dict
    reference: torch.nn.Module

    @property
    def config(self):
        return json.loads(self.reference.to_json_string())


@pytest.fixture(scope="module", params=[(family, kind) for family in NAMES for kind in KINDS], ids="-".join)
def export(request, tmp_path_factory):
    family, kind = request.param
    reference, tensors, types = FAMILIES[family].support.make().float(), {}, {}
    with torch.no_grad():
        for seed, (name, module) in enumerate(reference.named_modules()):
            if not isinstance(module, torch.nn.Linear) or not name.startswith(NAMES[family].quantized):
                continue
            part = ascend.make(kind, *module.weight.shape, seed=seed, bias=module.bias is not None)
            module.weight.copy_(torch.from_numpy(ascend.decode(kind, part)))
            if module.bias is not None:
                module.bias.copy_(part["bias"])
            tensors |= {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in part.items()}
            types[name] = kind
    tensors |= {name: t for name, t in reference.state_dict().items() if name.rpartition(".")[0] not in types}
    made = Export(family, kind, tmp_path_factory.mktemp("export") / family, tensors, types, reference)
    write(made.folder, tensors, types, made.config)
    with FAMILIES[family].ready():
        yield made


def load(folder, **request):
    return model.load(model.Request(str(folder), dtype="fp32", **request), quiet=True)


def test_forward_and_fused_weights(export):
    loaded = load(export.folder, compute="dequantize")
    family, fused = FAMILIES[export.family], NAMES[export.family].fused
    assert loaded.description.formats[export.kind] == len(export.types) > 10
    expected = family.support.diffusers_velocity(export.reference, **family.support.inputs())
    assert common.rel_l2(family.run(loaded.patcher), expected) < FORWARD
    native = loaded.patcher.model.diffusion_model
    for name, stored in fused.items():
        weight = torch.cat([export.reference.get_submodule(part).weight for part in stored])
        assert common.rel_l2(native.get_submodule(name).weight.dequantize().float(), weight) < 1e-6, name


def wanted(tensors, stored, kind_of):
    """(x, the output of each of the stored layers in an NPU's arithmetic, joined)."""
    columns = tensors[f"{stored[0]}.weight"].shape[1] * (2 if kind_of(stored[0]) == "W4A4_MXFP4" else 1)
    x = torch.randn(6, columns, generator=torch.Generator().manual_seed(3))
    outputs = []
    for layer in stored:
        part = {name.removeprefix(f"{layer}."): t for name, t in tensors.items() if name.startswith(f"{layer}.")}
        if kind_of(layer) == "FLOAT":
            bias = part["bias"].float() if "bias" in part else None
            outputs.append(torch.nn.functional.linear(x, part["weight"].float(), bias))
        else:
            outputs.append(torch.from_numpy(ascend.forward(kind_of(layer), part, x)))
    return x, torch.cat(outputs, 1)


@pytest.mark.parametrize("export", [(family, kind) for family in FUSED for kind in KINDS], indirect=True, ids="-".join)
def test_activations_are_quantized_once_for_all_parts(export):
    """A fused layer's output is that of its parts, each in an NPU's arithmetic."""
    native = load(export.folder, compute="native").patcher.model.diffusion_model
    for name, stored in NAMES[export.family].fused.items():
        x, output = wanted(export.tensors, stored, lambda part: export.kind)
        with torch.inference_mode():
            assert common.rel_l2(native.get_submodule(name)(x), output) < FORWARD, name


OTHER = {"another input scale": "W8A8", "another type": "W8A8_DYNAMIC", "microscaling": "W8A8_MXFP8", "INT4": "W4A4_DYNAMIC",
         "FLOAT": "FLOAT"}
CODEC = {"FLOAT": "plain"}


@pytest.mark.parametrize("export", [(family, "W8A8") for family in FUSED], indirect=True, ids="-".join)
@pytest.mark.parametrize("other", OTHER)
def test_parts_of_other_types_keep_their_own(other, export, tmp_path):
    """k in another type than q and v, or its activation under another scale: tiles of one weight, each multiplied in
    its own arithmetic."""
    kind, tensors = OTHER[other], export.tensors
    native, stored = next(iter(NAMES[export.family].fused.items()))
    layer = stored[1]
    rows, bias = tensors[f"{layer}.weight"].shape, f"{layer}.bias" in tensors
    if kind == "FLOAT":
        part = {"weight": torch.randn(rows), **({"bias": torch.randn(rows[0])} if bias else {})}
    else:
        part = ascend.make(kind, *rows, seed=9, bias=bias)
    if other == "another input scale":
        # what is quantized is x / scale, so the other scales of the layer go along
        part = {leaf: tensors[f"{layer}.{leaf}"] for leaf in part}
        part |= {leaf: part[leaf] * 2 for leaf in ("input_scale", "deq_scale")}
        part["quant_bias"] = ((part["bias"] if bias else 0) / part["deq_scale"]).round().to(torch.int32) - (
            part["weight"].sum(1).int() * part["input_offset"].int())
    tensors = {name: t for name, t in tensors.items() if not name.startswith(f"{layer}.")}
    tensors |= {f"{layer}.{leaf}": t.contiguous() for leaf, t in part.items()}
    path = write(tmp_path / "mixed", tensors, {**export.types, layer: kind}, export.config)
    x, output = wanted(tensors, stored, lambda part: kind if part == layer else "W8A8")
    module = load(path, compute="native").patcher.model.diffusion_model.get_submodule(native)
    assert [tile.codec for tile in module.weight._params.tiles] == ["w8a8", CODEC.get(kind, kind.lower()), "w8a8"]
    with torch.inference_mode():
        assert common.rel_l2(module(x), output) < FORWARD
    dense = module.weight.dequantize()[rows[0]:2 * rows[0]]
    exact = part["weight"] if kind == "FLOAT" else torch.from_numpy(ascend.decode(kind, part))
    assert common.rel_l2(dense, exact) < 1e-6


def vendor(family: str, native: dict) -> tuple[dict, dict]:
    """(ComfyUI's tensors under the vendor's names, the same under diffusers' by its own converter)."""
    from diffusers.loaders import single_file_utils

    if family == "hunyuan_video":
        names = hunyuan_video.vendor_by_host()
        stored = {names[name]: t for name, t in native.items()}
        return stored, hunyuan_video.convert(stored, hidden=native["img_in.proj.weight"].shape[0])
    if family == "flux1":
        stored = {name.replace("_norm.weight", "_norm.scale"): t for name, t in native.items()}
        convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
        return stored, common.of_width(convert, native["img_in.weight"].shape[0])(dict(stored))
    return native, getattr(single_file_utils, f"convert_{family}_transformer_checkpoint_to_diffusers")(dict(native))


@pytest.mark.parametrize("kind", ["W8A8", "W4A8_DYNAMIC", "W4A4_MXFP4"])
@pytest.mark.parametrize("family", FUSED)
def test_the_vendors_names(family, kind, tmp_path):
    """msmodelslim quantizes the vendor's own code, too: there q, k and v are one layer, as in ComfyUI."""
    reference = FAMILIES[family].support.make().float()
    reference.save_pretrained(tmp_path / "float")
    with FAMILIES[family].ready():
        plain = load(tmp_path / "float").patcher.model.diffusion_model
        native = {name: t.float() for name, t in plain.state_dict().items()}
        stored, _ = vendor(family, native)
        names = {t.data_ptr(): name for name, t in stored.items()}
        part_of, types = {}, {}
        for seed, (name, module) in enumerate(plain.named_modules()):
            if name.startswith(("double_blocks", "single_blocks", "layers")) and hasattr(module, "out_features"):
                layer = names[native[f"{name}.weight"].data_ptr()].removesuffix(".weight")
                part = ascend.make(kind, *module.weight.shape, seed=seed, bias=module.bias is not None)
                native[f"{name}.weight"].copy_(torch.from_numpy(ascend.decode(kind, part)))
                if module.bias is not None:
                    native[f"{name}.bias"].copy_(part["bias"])
                part_of |= {f"{layer}.{leaf}": t.contiguous() for leaf, t in part.items()}
                types[layer] = kind
        stored, converted = vendor(family, native)
        tensors = {name: t.contiguous() for name, t in stored.items() if name.rpartition(".")[0] not in types} | part_of
        folder = write(tmp_path / "export", tensors, types, {})
        (folder / "config.json").unlink()
        loaded = load(folder, compute="dequantize")
        assert loaded.description.formats[kind] == len(types) > 5
        reference.load_state_dict(converted)
        inputs = FAMILIES[family].support.inputs()
        expected = FAMILIES[family].support.diffusers_velocity(reference, **inputs)
        assert common.rel_l2(FAMILIES[family].run(loaded.patcher), expected) < FORWARD
