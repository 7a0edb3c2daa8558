"""What builders leave high in architectures without a preset, by the names that diffusers' classes have."""

from __future__ import annotations

import diffusers
import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.makers.builders.fp8 import build_fp8
from quantized_transformers.makers.builders.nvfp4 import build_nvfp4
from quantized_transformers.makers.builders.presets import high_by_name
from support.derived_models import ALL, made

pytestmark = pytest.mark.parity


def linears(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)}


def real(kind, **config):
    """(quantized, left) Linear layers of a class of its published size, without memory."""
    with torch.device("meta"):
        found = linears(getattr(diffusers, kind)(**config))
    high = high_by_name(found)
    return {name: found[name] for name in found if name not in high}, {name: found[name] for name in found if name in high}


# class -> (configuration where the published one is not the default, kinds of layers that stay high in blocks)
PUBLISHED = {
    "ChromaTransformer2DModel": ({}, set()),  # modulation is the approximator's
    "SD3Transformer2DModel": ({"num_layers": 38, "num_attention_heads": 38, "joint_attention_dim": 4096, "qk_norm": "rms_norm",
                               "caption_projection_dim": 2432, "pooled_projection_dim": 2048}, {"norm1.linear", "norm1_context.linear"}),
    "LTX2VideoTransformer3DModel": ({"rope_type": "split"}, set()),  # its tables are no Linear layers
    "Lumina2Transformer2DModel": ({}, {"norm1.linear"}),
    "WanVACETransformer3DModel": ({"vace_layers": [0, 5, 10, 15, 20, 25, 30, 35]}, set()),
    "AuraFlowTransformer2DModel": ({}, {"norm1.linear", "norm1_context.linear"}),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_embedders_modulation_and_heads_stay_high(kind):
    config, inner = PUBLISHED[kind]
    if not hasattr(diffusers, kind):
        pytest.skip("this diffusers has no such class")
    quantized, left = real(kind, **config)
    assert sum(m.weight.numel() for m in quantized.values()) > 0.8 * sum(m.weight.numel() for m in (quantized | left).values()) \
        or inner, "most of a model is in its blocks"
    assert any(name.startswith("proj_out") or name.startswith("norm_out") for name in left)
    assert {name.split(".", 2)[2] for name in left if "blocks." in name or name.startswith("layers.")
            if "refiner" not in name} >= inner
    assert not [name for name in quantized if "embed" in name or "norm" in name or "refiner" in name or "guidance" in name]
    kinds = {name.rpartition(".")[2] if "to_out" not in name else "to_out" for name in quantized}
    assert {"to_q", "to_k", "to_v", "to_out"} <= kinds


@pytest.mark.parametrize("name", ["Krea-2, Krea-2", "Stable Diffusion 3, SD3.5 M"])
def test_what_is_built_loads(name, tmp_path):
    one, case = ALL[name]
    stored, _ = made(one, case)
    stored.save_pretrained(tmp_path / "base" / "transformer")
    expected = {module for module in linears(stored) if module not in high_by_name(linears(stored))}
    for build in (build_fp8, build_nvfp4):
        out = str(tmp_path / build.__name__)
        built = build(base_transformer_dir=str(tmp_path / "base" / "transformer"), output_dir=out)
        formats = model.load(model.Request(out, dtype="fp32"), quiet=True).description.formats
        assert sum(n for kind, n in formats.items() if kind not in ("BF16", "F32")) == len(expected)
        assert built.statistics["quantized_weights"] == len(expected) > 5
