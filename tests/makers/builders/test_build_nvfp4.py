"""build-nvfp4 on a small synthetic export: globs, what is replaced and removed, and one named error for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.common import comfy_order, config_of, decode_nvfp4, rel_l2, save, stored
from support.pack import start_comfy

start_comfy()

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers.builders import component
from quantized_transformers.makers.builders.nvfp4 import build_nvfp4
from quantized_transformers.makers.builders.options import one_a_line, shard_bytes

pytestmark = pytest.mark.unit

FLUX = "FluxTransformer2DModel"
LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_mlp",
          "single_transformer_blocks.0.attn.to_q")


class Models:
    """A BF16 base and a ModelOpt export of it, quantized by nvidia-modelopt's own NVFP4QTensor."""

    def __init__(self, root: Path) -> None:
        from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

        torch.manual_seed(0)
        self.root = root
        self.base = {f"{name}.weight": torch.randn(16, 64).bfloat16() for name in LAYERS}
        self.base |= {f"{name}.bias": torch.randn(16).bfloat16() for name in LAYERS}
        self.base["proj_out.weight"] = torch.randn(4, 64).bfloat16()
        self.export = dict(self.base)
        for name in LAYERS:
            codes, block, scale = NVFP4QTensor.quantize(self.base[f"{name}.weight"].clone(), 16)
            self.export |= {f"{name}.weight": codes._quantized_data, f"{name}.weight_scale": block,
                            f"{name}.weight_scale_2": scale.reshape(()), f"{name}.input_scale": torch.tensor(0.01)}
        group = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
        self.config = {"_class_name": FLUX, "quantization_config": {
            "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["proj_out"],
            "config_groups": {"group_0": {"weights": group, "input_activations": group, "targets": ["Linear"]}}}}

    def build(self, export: bool = True, **options):
        base = save(self.root / "base", self.base, {"_class_name": FLUX})
        if export:
            options["modelopt_hf_dir"] = str(save(self.root / "hf", self.export, self.config))
        return build_nvfp4(**{"base_transformer_dir": str(base), "output_dir": str(self.root / "out")} | options)

    def refused(self, match: str, **options) -> None:
        with pytest.raises(CheckpointError, match=match):
            self.build(**options)
        assert not (self.root / "out").exists()


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def test_globs_match_whole_names_and_cross_dots(models):
    models.export["x_quantizer._amax"] = torch.ones(())
    found = models.build(keep_bf16_patterns=["transformer_blocks.*.to_q", "*.net.*", "proj_mlp",
                                             "single_transformer_blocks.0"])
    assert found.statistics == {"fallback_modules": 2, "replaced_tensors": 4, "removed_aux_tensors": 2 * 3 + 1,
                                "output_shards": 1, "swap_weight_nibbles": False}
    tensors = stored(found.folder)
    assert {name.removesuffix(".weight") for name, t in tensors.items() if t.dtype == torch.uint8} == set(LAYERS[2:])
    assert config_of(found.folder)["quantization_config"]["ignore"] == ["proj_out", "transformer_blocks.*.to_q", "*.net.*",
                                                                        "proj_mlp", "single_transformer_blocks.0"]
    assert "these patterns match no layer: proj_mlp, single_transformer_blocks.0" in found.report


@pytest.mark.parametrize("swap", [False, True])
def test_an_exports_bytes_are_never_changed(models, swap):
    """The switch says how they are; it is written either way."""
    if swap:
        models.export = comfy_order({**models.export}) | {n: t for n, t in models.export.items() if n.endswith("_scale")}
    found = models.build(swap_weight_nibbles=swap)
    tensors = stored(found.folder)
    assert found.statistics["swap_weight_nibbles"] is config_of(found.folder)["quantization_config"][
        "swap_weight_nibbles"] is swap
    assert tensors.keys() == models.export.keys()
    assert all(torch.equal(tensors[n].float(), t.float()) for n, t in models.export.items())


REFUSED = {
    "scale_2 missing": (lambda m: m.export.pop(f"{LAYERS[0]}.weight_scale_2"), r"to_q\.weight_scale_2 is missing"),
    "block scales missing": (lambda m: m.export.pop(f"{LAYERS[0]}.weight_scale"), r"to_q\.weight_scale is missing"),
    "input scale missing": (lambda m: m.export.pop(f"{LAYERS[0]}.input_scale"), r"to_q\.input_scale is missing"),
    "swizzled": (lambda m: m.export.update({f"{LAYERS[0]}.weight_scale": torch.zeros(128, 4).to(torch.float8_e4m3fn)}),
                 r"to_q\.weight_scale is \[128, 4\], expected \[16, 4\]"),
    "scale NaN": (lambda m: m.export[f"{LAYERS[0]}.weight_scale_2"].fill_(float("nan")), r"weight_scale_2 holds NaN"),
    "scale zero": (lambda m: m.export[f"{LAYERS[0]}.input_scale"].zero_(), r"input_scale is not a positive number"),
    "block NaN": (lambda m: m.export[f"{LAYERS[0]}.weight_scale"].view(torch.uint8)[0].fill_(0x7F),
                  r"to_q\.weight_scale holds NaN"),
    "block negative": (lambda m: m.export[f"{LAYERS[0]}.weight_scale"].view(torch.uint8)[0].fill_(0x81),
                       r"to_q\.weight_scale holds negative values, expected finite numbers from 0 on"),
    "base shape": (lambda m: m.base.update({f"{LAYERS[0]}.weight": torch.zeros(16, 32).bfloat16()}),
                   r"to_q\.weight is \[16, 32\] in the base, \[16, 64\] in the export"),
    "base lacks": (lambda m: m.base.pop(f"{LAYERS[1]}.bias"), r"ff\.net\.2\.bias is not in the base"),
    "class": (lambda m: m.config.update(_class_name="Flux2Transformer2DModel"), "the base is FluxTransformer2DModel, but"),
    "algorithm": (lambda m: m.config["quantization_config"].update(quant_algo="NVFP4_AWQ"),
                  "quant_algo is 'NVFP4_AWQ', not 'NVFP4'"),
    "no algorithm": (lambda m: m.config["quantization_config"].pop("quant_algo"), "quant_algo is 'missing', not 'NVFP4'"),
    "method": (lambda m: m.config["quantization_config"].update(quant_method="fp8"), "quant_method is 'fp8'"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_refuses_an_export(models, what):
    change, match = REFUSED[what]
    change(models)
    models.refused(match)


def test_straight_from_bf16(models):
    """Weights whose columns are no multiple of 16 stay; NaN is named; q of two blocks do not share a scale."""
    models.base["single_transformer_blocks.0.attn.to_v.weight"] = torch.randn(16, 40).bfloat16()
    found = models.build(export=False, keep_bf16_patterns=["*.proj_mlp"])
    assert found.statistics == {"fallback_modules": 1, "replaced_tensors": 0, "removed_aux_tensors": 0, "output_shards": 1,
                                "quantized_weights": 3, "swap_weight_nibbles": False}
    assert "1 weights stay as they are: their columns are no multiple of 16" in found.report
    tensors = stored(found.folder)
    for name in (LAYERS[0], LAYERS[1], LAYERS[3]):
        weight = models.base[f"{name}.weight"]
        assert torch.equal(tensors[f"{name}.weight_scale_2"], weight.abs().max().float() / 2688)
        parts = (tensors[f"{name}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2"))
        assert rel_l2(decode_nvfp4(*parts), weight) < 0.1
    assert config_of(found.folder)["quantization_config"]["ignore"] == [
        "proj_out", "single_transformer_blocks.0.attn.to_v", "single_transformer_blocks.0.proj_mlp"]
    models.base[f"{LAYERS[3]}.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"single_transformer_blocks\.0\.attn\.to_q\.weight holds NaN"):
        models.build(export=False, output_dir=str(models.root / "other"))
    assert not (models.root / "other").exists()
    with pytest.raises(CheckpointError, match="there is nothing to quantize"):
        models.build(export=False, keep_bf16_patterns=["*"], output_dir=str(models.root / "other"))
    with pytest.raises(CheckpointError, match="the base is quantized already"):
        build_nvfp4(base_transformer_dir=str(found.folder), output_dir=str(models.root / "other"))
    with pytest.raises(CheckpointError, match="unknown pattern preset 'sdxl'"):
        models.build(pattern_preset="sdxl", output_dir=str(models.root / "other"))


def test_spans_do_not_matter(models, monkeypatch):
    whole = stored(models.build(export=False).folder)
    monkeypatch.setattr(component, "SPAN", 96)
    split = stored(models.build(export=False, overwrite=True).folder)
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[key].float(), split[key].float()) for key in whole)


def test_sizes_and_patterns():
    assert shard_bytes("5GB") == 5 * 10 ** 9 and shard_bytes(" 1.5 MiB ") == 3 << 19 and shard_bytes("7") == 7
    for wrong in ("", "5XB", "GB", "-1GB", "0.1"):
        with pytest.raises(CheckpointError, match="is no size of a file"):
            shard_bytes(wrong)
    assert one_a_line("a\n\n  b.* \n") == ["a", "b.*"]
