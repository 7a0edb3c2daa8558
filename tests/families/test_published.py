"""Every checkpoint laid out as in a public report (support/published): its weights, its wishes and a forward against the
truth, or a refusal that names what it is; by the nodes, as a user drags them.

Each Linear is probed with random input, every other tensor compared, and a forward held against stock ComfyUI on the same
truth in F32. Both sides compute in F32: what remains is INT8's activations, which the host rounds on every device (half a
step of 1 / 127 of the largest, 0.0075 a Linear), and 8-bit activations are not used on the CPU.
"""

from __future__ import annotations

import pytest
import torch

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.nodes.inspect_checkpoint import QT_InspectCheckpoint
from quantized_transformers.nodes.load_base import QT_LoadBaseModel
from support import common
from support.published import CASES
from support.published.models import rand

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def miniatures(monkeypatch):
    """The host has heads and widths of Qwen-Image and Z-Image in its code; here it reads them from the tensors."""
    import comfy.model_detection as detection

    theirs = detection.detect_unet_config

    def tiny(tensors, prefix, metadata=None):
        found = theirs(tensors, prefix, metadata=metadata)
        kind = (found or {}).get("image_model")
        if kind == "qwen_image":
            found["num_attention_heads"] = tensors[f"{prefix}img_in.weight"].shape[0] // 128
            found["joint_attention_dim"] = tensors[f"{prefix}txt_norm.weight"].shape[0]
        if kind == "lumina2" and found["dim"] not in (2304, 3840):
            found |= {"n_heads": found["dim"] // 128, "n_kv_heads": found["dim"] // 128, "axes_dims": [32, 48, 48],
                      "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0,
                      "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}
        return found

    monkeypatch.setattr(detection, "detect_unet_config", tiny)


def forward(patcher, case):
    x, conds = {
        "flux1": ((1, 16, 8, 8), {"c_crossattn": (1, 7, 64), "y": (1, 32)}),
        "flux1-fill": ((1, 16, 8, 8), {"c_crossattn": (1, 7, 64), "y": (1, 32), "c_concat": (1, 80, 8, 8)}),
        "flux2": ((1, 128, 4, 4), {"c_crossattn": (1, 7, 96)}),
        "wan": ((1, 16, 1, 8, 8), {"c_crossattn": (1, 7, 4096)}),
        "wan-vace": ((1, 16, 1, 8, 8), {"c_crossattn": (1, 7, 4096), "vace_context": (1, 1, 96, 1, 8, 8)}),
        "qwen": ((1, 16, 1, 8, 8), {"c_crossattn": (1, 7, 64)}),
        "z-image": ((1, 16, 8, 8), {"c_crossattn": (1, 7, 64)}),
    }[case.family]
    given = {name: rand("in", name, shape=shape) for name, shape in conds.items()}
    if case.family.startswith("flux"):
        given["guidance"] = torch.tensor([4.0])
    if case.family == "wan-vace":
        given["vace_strength"] = [1.0]
    if case.family == "z-image":
        given["num_tokens"] = 7
    if case.zero_cond:
        given["ref_latents"] = [rand("in", "r", shape=(1, 16, 1, 8, 8))]
    return common.apply_model(patcher, rand("in", "x", shape=x), torch.tensor([0.5]), **given)


def stock(truth, case):
    import comfy.sd

    tensors = {name: t.clone() for name, t in truth.items()} | ({"__index_timestep_zero__": torch.zeros(0)} if case.zero_cond else {})
    return comfy.sd.load_diffusion_model_state_dict(tensors, model_options={"dtype": torch.float32})


def rel(a, b):
    """As common.rel_l2, where the truth may be nothing but zeros (those that Z-Image's file has as holes)."""
    return common.rel_l2(a, b) if b.any() else float(a.float().norm())


def differences(patcher, truth, tolerance):
    """Linears whose product and other tensors whose values are not the truth's."""
    net = patcher.model.diffusion_model
    for stored, wanted in truth.items():
        name, = patcher.model.model_config.process_unet_state_dict({stored: stored})
        layer, _, leaf = name.rpartition(".")
        module = net.get_submodule(layer)
        if leaf == "weight" and wanted.ndim == 2 and hasattr(module, "in_features"):
            x = rand("probe", stored, shape=(4, wanted.shape[1]))
            bias = truth.get(stored.removesuffix("weight") + "bias")
            error = rel(module(x).float(), torch.nn.functional.linear(x, wanted, bias))
        else:
            error = rel(getattr(module, leaf).detach().float(), wanted)
        if not error < tolerance:
            yield f"{stored} is off by {error:.3g}"


@pytest.mark.parametrize("name", CASES)
def test_published(name, tmp_path):
    case = CASES[name]
    truth = case.build(tmp_path)
    path = str((tmp_path / case.ref).resolve())
    if truth is None:
        with pytest.raises(CheckpointError) as refused:
            QT_LoadBaseModel.execute(path, dtype="fp32")
        words = str(refused.value).replace(str(tmp_path), "").lower()
        assert any(word in words for word in case.words), words
        return
    patcher, _ = QT_LoadBaseModel.execute(path, dtype="fp32").result
    assert not list(differences(patcher, truth, case.tolerance))
    assert common.rel_l2(forward(patcher, case), forward(stock(truth, case), case)) < case.tolerance
    said = QT_InspectCheckpoint.execute(path).result[0].replace(str(tmp_path), "").lower()
    assert not any(word in said for word in case.unsaid) and "refused" not in said
    net = patcher.model.diffusion_model
    for asked, layers in ((True, case.full_precision), (False, case.no_full_precision)):
        for layer in layers:
            assert bool(getattr(net.get_submodule(layer), "_full_precision_mm_config", False)) is asked, layer
    for layer, scale in case.inputs.items():
        assert float(net.get_submodule(layer).input_scale.max()) == pytest.approx(scale), layer
