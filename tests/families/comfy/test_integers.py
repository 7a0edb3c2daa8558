"""INT8 (by tensor, row and block, ConvRot) and MXFP8, with ComfyUI's markers and without, under every name.

The oracle is comfy-kitchen: its layouts code the weights and say what they mean; blocks are a formula of this file's. A
forward is held against stock ComfyUI on that truth in F32.
"""

from __future__ import annotations

import json

import pytest
import torch

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.quant.layouts.tiled import is_tiled
from quantized_transformers.quant.marker import marker
from support import common, flux
from support.real_files import BESIDE, EXACT, NAMES, expected, linears, load, lora_agrees, weights_of, write

pytestmark = pytest.mark.parity

WHOLE = "model.diffusion_model."
LAYER = "double_blocks.0.img_attn.qkv"


@pytest.fixture(scope="module")
def weights(tiny):
    return weights_of(tiny)


def int8(weight, per_channel=True, group=0):
    """(leaves, truth, marker) by comfy-kitchen."""
    from comfy_kitchen.tensor import TensorWiseINT8Layout

    codes, params = TensorWiseINT8Layout.quantize(weight, per_channel=per_channel, convrot=bool(group),
                                                  convrot_groupsize=group or 256)
    conf = {"format": "int8_tensorwise"} | ({"convrot": True, "convrot_groupsize": group} if group else {})
    return {"weight": codes, "weight_scale": params.scale}, TensorWiseINT8Layout.dequantize(codes, params), conf


def mxfp8(weight, tiles=True):
    from comfy_kitchen.float_utils import from_blocked
    from comfy_kitchen.tensor import get_layout_class

    layout = get_layout_class("TensorCoreMXFP8Layout")
    codes, params = layout.quantize(weight)
    scale = params.scale.view(torch.uint8)
    if not tiles:
        scale = from_blocked(scale, weight.shape[0], weight.shape[1] // 32).contiguous()
    return {"weight": codes, "weight_scale": scale}, layout.dequantize(codes, params), {"format": "mxfp8"}


def blocks(weight, tall, wide):
    rows, columns = weight.shape
    cut = weight.reshape(rows // tall, tall, columns // wide, wide)
    scale = cut.abs().amax((1, 3)) / 127
    whole = scale.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
    codes = (weight / whole).round().clamp(-127, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * whole, {}


def changed(made, **leaves):
    """Scales stored otherwise, which the truth takes part in."""
    found, truth, conf = made
    for leaf, change in leaves.items():
        found[leaf] = change(found[leaf])
    return found, found["weight"].float() * found["weight_scale"].float().reshape(-1, 1), conf


# Kind -> (layer of a weight, whether markers say so, the report's name)
KINDS = {
    "INT8 tensor, marked": (lambda w: int8(w, False), True, "INT8"), "INT8 rows, marked": (int8, True, "INT8"),
    "INT8 rows [N] BF16, marked": (lambda w: changed(int8(w), weight_scale=lambda s: s[:, 0].bfloat16()), True, "INT8"),
    "ConvRot 64": (lambda w: int8(w, group=64), True, "INT8"), "ConvRot 16": (lambda w: int8(w, group=16), True, "INT8"),
    "MXFP8, marked": (mxfp8, True, "MXFP8"),
    "INT8 tensor": (lambda w: int8(w, False), False, "INT8"), "INT8 rows": (int8, False, "INT8"),
    "INT8 rows [N] F16": (lambda w: changed(int8(w), weight_scale=lambda s: s[:, 0].half()), False, "INT8"),
    "INT8 blocks of a row": (lambda w: blocks(w, 1, 64), False, "INT8 (blocks)"),
    "INT8 blocks": (lambda w: blocks(w, 64, 64), False, "INT8 (blocks)"),
    "MXFP8": (lambda w: mxfp8(w, tiles=False), False, "MXFP8")}


def made(tensors, kind, every=1, listed=False):
    """(stored, truth, metadata), every so-many-th layer quantized, where its size is a multiple of the format's."""
    layer_of, marked, _ = KINDS[kind]
    stored = {name: t.to(torch.bfloat16) for name, t in tensors.items()}
    truth, layers = {name: t.float() for name, t in stored.items()}, {}
    for i, layer in enumerate(linears(tensors)):
        weight = tensors[f"{layer}.weight"]
        if i % every or weight.shape[0] % 128 or weight.shape[1] % 128:
            continue
        leaves, truth[f"{layer}.weight"], conf = layer_of(weight)
        stored |= {f"{layer}.{leaf}": t for leaf, t in leaves.items()}
        if marked and not listed:
            stored[f"{layer}.comfy_quant"] = marker(conf)
        layers[layer] = conf
    listing = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return stored, truth, listing if marked and listed else None


@pytest.mark.part(3)
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_under_every_name(weights, tmp_path, kind, names):
    stored, truth, _ = made(weights[names.split(",")[0]], kind)
    loaded = load(write(tmp_path, stored, NAMES[names]), compute="dequantize")
    assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), expected(truth)) < EXACT
    assert loaded.description.formats[KINDS[kind][2]] > 20


@pytest.mark.parametrize("style", ["native", "diffusers"])
@pytest.mark.parametrize("kind", ["INT8 rows, marked", "ConvRot 64", "MXFP8, marked", "INT8 rows", "MXFP8"])
def test_beside_layers_that_are_not_quantized(weights, tmp_path, kind, style):
    """Every other layer: in diffusers' names within what ComfyUI keeps in one. And listed in the metadata."""
    stored, truth, metadata = made(weights[style], kind, every=2, listed=True)
    loaded = load(write(tmp_path, stored, metadata=metadata), compute="dequantize")
    assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), expected(truth)) < EXACT


@pytest.mark.part(2)
@pytest.mark.parametrize("style", ["native", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_shards_and_in_company(weights, tmp_path, kind, style):
    stored, truth, _ = made(weights[style], kind)
    wanted, paths = expected(truth), [write(tmp_path / "shards", stored, shards=3)]
    if style == "native":
        paths.append(write(tmp_path / "whole", stored, WHOLE, BESIDE))
    for path in paths:
        loaded = load(path, compute="dequantize")
        assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), wanted) < EXACT


@pytest.mark.parametrize("kind", ["INT8 rows, marked", "ConvRot 64", "MXFP8, marked", "INT8 rows", "MXFP8"])
def test_fused_layers_are_the_hosts_own(weights, tmp_path, kind):
    """What diffusers' names have apart ends in ComfyUI's own layout, so that its matmuls run it, and saves as it."""
    stored, _, _ = made(weights["diffusers"], kind)
    module = load(write(tmp_path, stored)).patcher.get_model_object(f"diffusion_model.{LAYER}")
    assert not is_tiled(module.weight)
    params, sizes = module.weight._params, module.weight.shape
    assert getattr(params, "convrot", False) is (kind == "ConvRot 64") and sizes[0] == 3 * sizes[1]
    assert getattr(params, "convrot_groupsize", 64) == (64 if kind == "ConvRot 64" else getattr(params, "convrot_groupsize", 64))
    q = stored["transformer_blocks.0.attn.to_q.weight"]
    assert torch.equal(module.weight._qdata[:len(q)].view(torch.uint8), q.view(torch.uint8))


@pytest.mark.parametrize("style", ["native", "diffusers"])
@pytest.mark.parametrize("kind", ["INT8 rows, marked", "ConvRot 64", "MXFP8, marked", "INT8 blocks"])
def test_lora(weights, tmp_path, kind, style):
    import comfy.model_detection

    stored, truth, _ = made(weights[style], kind)
    if style == "diffusers":
        truth = comfy.model_detection.convert_diffusers_mmdit(dict(truth))
    lora_agrees(load(write(tmp_path, stored), dtype="default", compute="dequantize"), truth, tmp_path / "lora")


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", ["ConvRot 64", "MXFP8", "INT8 blocks"])
def test_saved_and_loaded_again(weights, tmp_path, kind, every):
    import comfy.sd

    stored, _, _ = made(weights["diffusers"], kind, every)
    first = load(write(tmp_path, stored), compute="dequantize")
    before = flux.comfy_velocity(first.patcher, **flux.inputs())
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), first.patcher)
    again = load(tmp_path / "saved.safetensors", compute="dequantize")
    assert torch.equal(flux.comfy_velocity(again.patcher, **flux.inputs()), before)


def first(value):
    """The first value changed."""
    def change(t):
        t = t.clone()
        (t.view(torch.uint8) if t.dtype == torch.float8_e8m0fnu else t).view(-1)[0] = value
        return t
    return change


REFUSED = {
    "ConvRot of no such group": ("ConvRot 64", {"comfy_quant": lambda t: marker({"format": "int8_tensorwise", "convrot": True,
                                                                                 "convrot_groupsize": 100})}, "convrot_groupsize is 100"),
    "a scale for some rows": ("INT8 rows", {"weight_scale": lambda t: t[:7]}, r"the scale is \[7, 1\]"),
    "a scale for some rows, marked": ("INT8 rows, marked", {"weight_scale": lambda t: t[:7]}, r"weight_scale is \[7, 1\]"),
    "a scale that is no number": ("INT8 rows, marked", {"weight_scale": lambda t: t * torch.nan}, "weight_scale holds NaN"),
    "a negative scale": ("INT8 rows", {"weight_scale": lambda t: -t}, "weight_scale holds negative values"),
    "no number in E8M0": ("MXFP8", {"weight_scale": lambda t: t | 255}, "weight_scale holds NaN"),
    "no number in E8M0, marked": ("MXFP8, marked", {"weight_scale": first(255)}, "weight_scale holds NaN, expected exponents"),
    "an infinite scale, marked": ("INT8 rows, marked", {"weight_scale": first(torch.inf)}, "weight_scale holds infinite values"),
    "a negative scale of a block": ("INT8 blocks", {"weight_scale": first(-1)}, "weight_scale holds negative values"),
    "MXFP8 scales cut": ("MXFP8", {"weight_scale": lambda t: t[:, :-1]}, r"weight_scale is"),
    "MXFP8 scales row-major, marked": ("MXFP8, marked", {"weight_scale": lambda t: t[:-1]}, "128 x 4 tiles"),
    "codes as U8": ("INT8 rows", {"weight": lambda t: t.view(torch.uint8)}, "stored as U8 weights"),
    "an unknown marker": ("INT8 rows, marked", {"comfy_quant": lambda t: marker({"format": "hqq_int4"})}, "says 'hqq_int4'")}


@pytest.mark.parametrize("style", ["native", "diffusers"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(weights, tmp_path, name, style):
    kind, changes, message = REFUSED[name]
    stored, _, _ = made(weights[style], kind)
    layer = LAYER if style == "native" else "transformer_blocks.0.attn.to_q"
    for leaf, change in changes.items():
        stored[f"{layer}.{leaf}"] = change(stored[f"{layer}.{leaf}"]).contiguous()
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path, stored))
