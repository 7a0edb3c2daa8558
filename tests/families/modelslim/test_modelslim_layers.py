"""The numbers of real msmodelslim 26.1.0 exports (support/modelslim.py): weights, layers and whole forwards against an
independent decoding and an independent emulation of the vendor's arithmetic. ComfyUI runs in fp32 on this CPU."""

from __future__ import annotations

import contextlib

import pytest
import torch

from support import modelslim as ms
from support import wan
from support.common import rel_l2

pytestmark = pytest.mark.parity

# fp32 forwards of one network twice: as in test_wan.py.
FORWARD = 1e-5
ALL = list(ms.EXPORTS)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return ms.copy_all(tmp_path_factory.mktemp("modelslim"))


def test_every_type_is_in_an_export(exports):
    """The fixtures cover what the package's savers write for Linear layers."""
    met = {kind for export in exports.values() for key, kind in export.entries.items() if key.endswith(".weight")}
    assert met == {"FLOAT", "W8A8", "W8A8_DYNAMIC", "W4A4_DYNAMIC", "W4A8_DYNAMIC", "W8A16", "WFP8AFP8_DYNAMIC",
                   "W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE"}
    assert exports["w8a8_fp16"].tensors["blocks.0.ffn.0.deq_scale"].dtype == torch.int64
    assert exports["w8a8"].tensors["blocks.0.ffn.0.deq_scale"].dtype == torch.float32
    assert "blocks.0.ffn.0.div.mul_scale" in exports["mxfp4_smooth"].tensors


@pytest.mark.parametrize("name", ALL)
def test_weights_are_an_independent_decoding(name, exports):
    """Every weight exactly; every other tensor is the stored one; FLOAT tensors are those of the float source."""
    export = exports[name]
    loaded = ms.load(export.folder)
    assert loaded.description.formats == ms.COUNTS[name]
    ours, theirs = ms.weights(loaded.patcher), ms.decode(export.tensors, export.entries)
    expected = {layer: weight.float() for layer, weight in theirs.items()}
    expected |= {key.replace(".linear.", "."): tensor.float() for key, tensor in export.tensors.items()
                 if key.endswith(".bias") or "norm" in key or "modulation" in key or tensor.ndim == 5}
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(ours[key].float(), tensor), key
    source = dict(export.source().named_parameters())
    for key, kind in export.entries.items():
        if kind == "FLOAT" and key in source and key in export.tensors:
            assert torch.equal(export.tensors[key].float()[..., :ms.TEXT] if key == "text_embedding.0.weight"
                               else export.tensors[key].float(), source[key].float()), key


@pytest.mark.parametrize("name", ALL)
def test_dequantized_forward_is_the_definition(name, exports):
    """compute "dequantize" is the float network on the decoded weights."""
    export = exports[name]
    loaded = ms.load(export.folder, compute="dequantize")
    assert "dequantized for every matmul" in loaded.report
    expected = ms.velocity(ms.decoded_source(export), **ms.inputs(export.channels))
    assert rel_l2(wan.comfy_velocity(loaded.patcher, **ms.inputs(export.channels)), expected) < FORWARD


@contextlib.contextmanager
def watched(network, layers):
    """Layer name -> (input, output) of its last call."""
    seen: dict = {}
    hooks = [network.get_submodule(layer).register_forward_hook(
        lambda module, args, out, layer=layer: seen.__setitem__(layer, (args[0], out))) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# What a CPU multiplies by quantized activations when nothing else is asked for: integers. "native" does so with all.
INTEGER = ("W8A8", "W8A8_DYNAMIC", "W4A4_DYNAMIC", "W4A8_DYNAMIC")


@pytest.mark.parametrize("compute", ["auto", "native"])
@pytest.mark.parametrize("name", ALL)
def test_forward_is_the_vendors_arithmetic(name, compute, exports):
    """Activations go through each type's rule, written a second time in support/ascend.py.

    A layer given the same input differs by its sum in F32 only; it is called by itself, for in the network newer hosts
    pass by the forward of an INT8 layer with an activation before it (comfy.ops.linear_input_act). In the whole network that difference moves a value over
    a rounding boundary here and there, and it is a step of its format off from there on, which is what the runs with
    other inputs are for. The host multiplies W8A8_DYNAMIC itself, and divides where an NPU has a reciprocal.
    """
    export = exports[name]
    layers = {layer: ms.Emulated(kind, part, activations=compute == "native" or kind in INTEGER,
                                 divide=kind == "W8A8_DYNAMIC")
              for layer, (kind, part) in ms.layers(export).items()}
    assert len(layers) == sum(ms.COUNTS[name].values()) - max(ms.COUNTS[name].get(plain, 0) for plain in ("BF16", "F16"))
    network = export.source().float()
    for layer, emulated in layers.items():
        network.set_submodule(layer, emulated)
    patcher = ms.load(export.folder, compute=compute).patcher
    for seed in range(3):
        inputs = ms.inputs(export.channels, seed=seed)
        with watched(network, layers) as seen:
            expected = ms.velocity(network, **inputs)
        ours = wan.comfy_velocity(patcher, **inputs)
        for layer in layers:
            x, out = seen[layer]
            assert rel_l2(layer_output(patcher, layer, x), out) < FORWARD, layer
        if rel_l2(ours, expected) < 1e-3:
            return
    raise AssertionError("no forward within 1e-3 of the emulation")


def layer_output(patcher, layer, x) -> torch.Tensor:
    """A loaded layer on x, as ComfyUI runs it."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    with torch.inference_mode():
        return patcher.model.diffusion_model.get_submodule(layer)(x)


def layer_error(patcher, export, layer, x) -> float:
    """A loaded layer on x against the float source's."""
    return rel_l2(layer_output(patcher, layer, x), export.source().float().get_submodule(layer)(x))


# Relative error of a layer with 512 columns on N(0, 1), weights normal, both sides quantized:
# docs/sources/ascend.md, "Error bands".
BANDS = {"w8a8_dynamic": 0.0110, "mxfp8": 0.0414, "mxfp4": 0.160, "w4a4_dynamic": 0.194, "mixed": 0.116}


@pytest.mark.parametrize("name", list(BANDS))
def test_layer_error_is_in_the_vendors_band(name, exports):
    """+-10 %: too small an error would be activations that nobody quantized."""
    x = torch.randn(512, ms.FFN, generator=torch.Generator().manual_seed(9))
    patcher = ms.load(exports[name].folder, compute="native").patcher
    error = layer_error(patcher, exports[name], "blocks.0.ffn.2", x)
    assert error == pytest.approx(BANDS[name], rel=0.1)


# Their inputs are normalised: N(0, 1), what the bands were measured on. The band says nothing of the others.
AFTER_NORM = [f"blocks.0.{layer}" for layer in ("self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.q", "ffn.0")]


@pytest.mark.parametrize("name", ["w8a8", "w8a8_fp16"])
def test_static_layer_error_is_in_the_vendors_band(name, exports):
    """.011 +-10 % with "inputs clipped to the calibrated range" (docs/sources/ascend.md, "Error bands"):
    on N(0, 1), and on what reaches the layer in the network. Values out of that range saturate, with
    an error that no rounding has."""
    export = exports[name]
    patcher, network = ms.load(export.folder, compute="native").patcher, export.source()
    with watched(network, AFTER_NORM) as seen:
        ms.velocity(network, **ms.inputs())
    normal = torch.randn(512, ms.HIDDEN, generator=torch.Generator().manual_seed(9))
    for layer in AFTER_NORM:
        scale, offset = (float(export.tensors[f"{layer}.{leaf}"]) for leaf in ("input_scale", "input_offset"))
        for x in (normal, seen[layer][0]):
            x = x.clamp((-128 - offset) * scale, (127 - offset) * scale)
            assert layer_error(patcher, export, layer, x) == pytest.approx(0.011, rel=0.1), layer
