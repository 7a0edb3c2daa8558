"""What other nodes do to a MODEL, done to an SVDQuant MODEL and to an ordinary one with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantized_transformers.loaders import model
from support import flux
from support import svdquant_models as models
from support.common import apply_model, rel_l2

pytestmark = pytest.mark.parity

SAME = 1e-5  # two fp32 forwards on equal weights: the quantized ones dequantized for every matmul


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Any, Any]:
    """(a Nunchaku FLUX.1, dequantized for every matmul; an ordinary F32 FLUX.1 with its weights)."""
    folder = tmp_path_factory.mktemp("pair")
    made = models.make_flux()
    made.dequantized().save_pretrained(folder / "plain")
    quantized = model.load(model.Request(str(made.write(folder)), backend="dequantize"), quiet=True)
    plain = model.load(model.Request(str(folder / "plain"), dtype="fp32"), quiet=True)
    return quantized.patcher, plain.patcher


def velocity(patcher: Any, **more: Any) -> torch.Tensor:
    given = flux.inputs()
    return apply_model(patcher, given["x"], given["sigma"], c_crossattn=given["text"], y=given["pooled"],
                       guidance=given["guidance"], **more)


def changed_alike(pair, change, **more: Any) -> None:
    """`change` moves both models' outputs, and by the same."""
    before = velocity(pair[0])
    after = [velocity(change(patcher.clone()), **more) for patcher in pair]
    assert rel_l2(after[0], before) > 1e-3 and rel_l2(after[0], after[1]) < SAME


def test_block_replacement(pair):
    """Native module names, so nodes find double_blocks and single_blocks."""
    seen = []

    def replace(arguments, extra):
        seen.append(sorted(arguments))
        out = extra["original_block"](arguments)
        return {**out, "img": out["img"] * 1.1}

    def change(patcher):
        for kind, index in (("double_block", 0), ("single_block", 0)):
            patcher.set_model_patch_replace(replace, "dit", kind, index)
        return patcher

    changed_alike(pair, change)
    assert len(seen) == 4


def test_attention_patches(pair):
    changed_alike(pair, lambda patcher: (patcher.set_model_patch(
        lambda q, k, v, **kwargs: {"q": q * 1.2, "k": k, "v": v, "pe": kwargs["pe"], "attn_mask": kwargs.get("attn_mask")},
        "attn1_patch"), patcher)[1])


def test_controlnet_residuals(pair):
    torch.manual_seed(3)
    control = {"input": [torch.randn(1, 256) * 0.5, None], "output": [torch.randn(1, 256) * 0.5]}
    changed_alike(pair, lambda patcher: patcher, control=control)


def test_a_clone_for_another_device(pair):
    clone = pair[0].deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert clone.model is not pair[0].model and torch.equal(velocity(clone), velocity(pair[0]))


def test_objects_and_weights_of_other_nodes(pair):
    """A wrapper around the model function, and a weight patch on an unquantized layer."""
    delta = torch.randn(256, 64, generator=torch.Generator().manual_seed(4)) * 0.05

    def change(patcher):
        patcher.set_model_unet_function_wrapper(lambda apply, given: apply(given["input"], given["timestep"], **given["c"]))
        patcher.add_patches({"diffusion_model.img_in.weight": (delta,)}, 1.0)
        return patcher

    changed_alike(pair, change)


def test_saved_files_name_their_format(pair, tmp_path: Path):
    state = pair[0].model_state_dict()
    marks = [name for name in state if name.endswith("comfy_quant")]
    assert len(marks) == 10 + 3 and all(b"qt.tiles" in bytes(state[name].tolist()) for name in marks)
