"""nvidia-modelopt's other real exports: MXFP8, INT8 (SmoothQuant, weights only), FP8 by row and by block.

The oracle is ModelOpt: the weights that its own layers multiply by, before its export.
"""

from __future__ import annotations

import copy

import pytest
import torch

from support import common, flux
from support.real_files import EXACT, expected, load

pytestmark = pytest.mark.parity

# Algorithm -> (family, format)
ALGORITHMS = {"MXFP8": ("modelopt-mxfp8", "MXFP8"), "FP8_PER_CHANNEL_PER_TOKEN": ("modelopt-fp8", "FP8 (blocks)"),
              "FP8_PB_WO": ("modelopt-fp8", "FP8 (blocks)"), "W8A8_SQ_PER_CHANNEL": ("modelopt-int8", "INT8"),
              "W8A16": ("modelopt-int8", "INT8")}


def dequantized(tensors):
    """The weights that stored tensors mean, F32."""
    out = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        scale = tensors.get(f"{layer}.weight_scale")
        if leaf in ("weight_scale", "input_scale", "pre_quant_scale"):
            continue
        out[name] = tensor.float()
        if leaf == "weight" and scale is not None:
            rows, columns = tensor.shape
            if scale.dtype == torch.uint8:
                spread = (2.0 ** (scale.float() - 127)).repeat_interleave(32, 1)
            elif scale.ndim == 4:
                spread = scale[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
            else:
                spread = scale.reshape(-1, 1).expand(rows, columns)
            out[name] = out[name] * spread[:rows, :columns]
            if f"{layer}.pre_quant_scale" in tensors:
                out[name] = out[name] * tensors[f"{layer}.pre_quant_scale"].float()
    return out


@pytest.fixture(scope="module", params=ALGORITHMS)
def export(request, tmp_path_factory):
    """(algorithm, folder, the effective weights of ModelOpt's layers)"""
    from modelopt.torch.export import export_hf_checkpoint

    folder = tmp_path_factory.mktemp(request.param)
    net = common.calibrated(flux.make(), lambda m, seed: flux.diffusers_velocity(m, **flux.inputs(seed=seed)), request.param)
    meant = {}
    with torch.no_grad():
        for name, module in net.named_modules():
            if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled and request.param != "MXFP8":
                twin = copy.deepcopy(module).float()
                twin.input_quantizer.disable()
                twin.bias = None
                meant[name] = twin(torch.eye(module.weight.shape[1])).T
            elif hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled:
                meant[name] = module.weight.float()  # its MXFP8 needs CUDA to run: within the format's rounding
    export_hf_checkpoint(net, export_dir=str(folder))
    return request.param, folder, meant


def test_real_exports(export):
    algorithm, folder, meant = export
    family, fmt = ALGORITHMS[algorithm]
    stored = common.stored(folder)
    truth = dequantized(stored)
    layers = [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]
    assert len(layers) > 20 and meant.keys() == set(layers)
    errors = sorted(common.rel_l2(truth[f"{layer}.weight"], weight) for layer, weight in meant.items())
    assert errors[-1] < (0.03 if algorithm == "MXFP8" else 0.02 if fmt.startswith("FP8") else 5e-3)
    loaded = load(folder, compute="dequantize")
    assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), expected(truth)) < EXACT
    assert loaded.description.family == family and loaded.description.formats[fmt] == len(layers)
    assert not loaded.description.problems
    module = load(folder).patcher.get_model_object("diffusion_model.double_blocks.0.img_mlp.0")
    assert bool(module._full_precision_mm_config) is (algorithm in ("W8A16", "FP8_PB_WO"))
