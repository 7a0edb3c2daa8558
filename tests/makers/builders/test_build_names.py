"""What builders leave high in architectures without a preset, by the names that diffusers' classes have."""

from __future__ import annotations

import re

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.makers.builders.fp8 import build_fp8
from quantized_transformers.makers.builders.nvfp4 import build_nvfp4
from quantized_transformers.makers.builders.presets import high_by_name
from support import common
from support.derived import unet
from support.derived_models import ALL, made

pytestmark = pytest.mark.parity


def linears(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)}


def real(kind, **config):
    """(quantized, left) Linear layers of a class of its published size, without memory."""
    with torch.device("meta"):
        found = linears(common.diffusers_class(kind)(**config))
    high = high_by_name(found)
    return {name: found[name] for name in found if name not in high}, {name: found[name] for name in found if name in high}


ATTENTION = r"attn\d?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
SD3 = rf"transformer_blocks\.\d+\.({ATTENTION}|ff(_context)?\.net\.(0\.proj|2))"
# class -> (configuration where the published one is not the default, the Linear layers that are quantized: those that
# nvidia-modelopt's examples quantize in their kin, attention and feed-forward of every block of the stack that is the model)
PUBLISHED = {
    # modulation is the approximator's
    "ChromaTransformer2DModel": ({}, rf"{SD3}|single_transformer_blocks\.\d+\.({ATTENTION}|proj_mlp|proj_out)"),
    "SD3Transformer2DModel": ({"num_layers": 38, "num_attention_heads": 38, "joint_attention_dim": 4096, "qk_norm": "rms_norm",
                               "caption_projection_dim": 2432, "pooled_projection_dim": 2048}, SD3),
    "LTX2VideoTransformer3DModel": ({"rope_type": "split"},
                                    rf"transformer_blocks\.\d+\.(\w*{ATTENTION}|(audio_)?ff\.net\.(0\.proj|2))"),
    "Lumina2Transformer2DModel": ({}, rf"layers\.\d+\.({ATTENTION}|feed_forward\.linear_[123])"),
    "WanVACETransformer3DModel": ({"vace_layers": [0, 5, 10, 15, 20, 25, 30, 35]},
                                  rf"(vace_)?blocks\.\d+\.({ATTENTION}|ffn\.net\.(0\.proj|2))|vace_blocks\.\d+\.proj_(in|out)"),
    "AuraFlowTransformer2DModel": (
        {}, rf"(joint|single)_transformer_blocks\.\d+\.({ATTENTION}|ff(_context)?\.(linear_[12]|out_projection))"),
    "UNet2DConditionModel": (unet.PUBLISHED["SDXL"], rf"(down_blocks\.\d|mid_block|up_blocks\.\d)\.attentions\.\d\.(proj_in|proj_out|"
                                                     rf"transformer_blocks\.\d+\.({ATTENTION}|ff\.net\.(0\.proj|2)))"),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_attention_and_feed_forward_of_blocks_are_quantized(kind):
    """Embedders, refiners, modulation and heads stay high."""
    config, wanted = PUBLISHED[kind]
    quantized, left = real(kind, **config)
    assert quantized.keys() == {name for name in quantized | left if re.fullmatch(wanted, name)} and left


@pytest.mark.parametrize("name, wanted", [
    ("Krea-2, Krea-2", r"transformer_blocks\.\d+\.(attn\.(to_[qkvo]\w*|to_out\.0|to_gate)|ff\.\w+)"), ("Stable Diffusion 3, SD3.5 M", SD3)])
def test_what_is_built_loads(name, wanted, tmp_path):
    one, case = ALL[name]
    stored, _ = made(one, case)
    stored.save_pretrained(tmp_path / "base" / "transformer")
    expected = [module for module in linears(stored) if re.fullmatch(wanted, module)]
    for build in (build_fp8, build_nvfp4):
        out = str(tmp_path / build.__name__)
        built = build(base_transformer_dir=str(tmp_path / "base" / "transformer"), output_dir=out)
        formats = model.load(model.Request(out, dtype="fp32"), quiet=True).description.formats
        assert sum(n for kind, n in formats.items() if kind not in ("BF16", "F32")) == len(expected)
        assert built.statistics["quantized_weights"] == len(expected) > 5
