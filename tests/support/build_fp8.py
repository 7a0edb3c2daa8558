"""Small synthetic models for build-fp8, and builds of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers.builders.fp8 import build_fp8
from support.common import save

FLUX = "FluxTransformer2DModel"
LAYERS = {"transformer_blocks.0.attn.to_q": (32, 32), "transformer_blocks.0.attn.to_k": (32, 32),
          "transformer_blocks.0.norm1.linear": (64, 32), "transformer_blocks.0.ff.net.2": (32, 48), "proj_out": (16, 32)}
QUANTIZED = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k")
QUANTIZATION = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["proj_out"]}


class Models:
    """A BF16 base, an export of it with BF16 weights and ModelOpt's scales, and a backbone.pt, to be changed."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.root = root
        self.base = {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in LAYERS.items()}
        self.base |= {f"{name}.bias": torch.randn(shape[0]).bfloat16() for name, shape in LAYERS.items()}
        self.base["transformer_blocks.0.attn.norm_q.weight"] = torch.ones(16, dtype=torch.bfloat16)
        self.export = {key: value.clone() for key, value in self.base.items()}
        self.amax = {name: (self.base[f"{name}.weight"].abs().max(), torch.tensor(3.5)) for name in LAYERS
                     if name != "proj_out"}
        self.base_config, self.config = {"_class_name": FLUX}, {"_class_name": FLUX,
                                                                "quantization_config": dict(QUANTIZATION)}
        self.options: dict = {"output_dir": str(root / "out")}

    def own_scales(self, codes: bool = True) -> None:
        """Let the export carry its scales, and FP8 weights."""
        for name, (weight, inner) in self.amax.items():
            scale = weight.float() / 448
            self.export[f"{name}.weight_scale"], self.export[f"{name}.input_scale"] = scale, inner / 448
            if codes:
                self.export[f"{name}.weight"] = (self.base[f"{name}.weight"].float() / scale).to(torch.float8_e4m3fn)

    def backbone(self) -> None:
        """Let the scales be in a backbone.pt."""
        state = {}
        for name, (weight, inner) in self.amax.items():
            state |= {f"{name}.weight_quantizer._amax": weight, f"{name}.input_quantizer._amax": inner}
        (self.root / "ckpt").mkdir()
        torch.save({"modelopt_state": {"version": "0.47.0"}, "model_state_dict": state}, self.root / "ckpt" / "backbone.pt")
        self.options["modelopt_backbone_ckpt"] = str(self.root / "ckpt")

    def build(self, base: bool = True, export: bool = True, **options):
        if base:
            options["base_transformer_dir"] = str(save(self.root / "base", self.base, self.base_config))
        if export:
            options["modelopt_hf_dir"] = str(save(self.root / "hf" / "transformer", self.export, self.config).parent)
        return build_fp8(**self.options | options)

    def refused(self, match: str, **options) -> str:
        """The build is refused with this message, and nothing is there that would load."""
        with pytest.raises(CheckpointError, match=match) as error:
            self.build(**options)
        assert not (self.root / "out").exists()
        assert "what to do" in str(error.value)
        return str(error.value)


def numbers(found) -> tuple[int, int, int]:
    return tuple(found.statistics[key] for key in ("quantized_weights", "bf16_fallback_weights",
                                                   "preserved_ignored_weights"))
