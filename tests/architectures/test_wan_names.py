"""Wan's names, shapes and configs against diffusers' converter, classes and defaults; models around Wan are not Wan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantized_transformers.loaders.architectures.base import Naming
from quantized_transformers.loaders.architectures.wan import WAN
from quantized_transformers.loaders.containers.safetensors import TensorInfo
from support import common, wan
from support.common import assembled

pytestmark = pytest.mark.parity

VARIANTS = list(wan.VARIANTS)


@pytest.mark.parametrize("image", [0, 1])
def test_name_map_is_the_inverse_of_diffusers_converter(image):
    """Every row of a native model carries a tag; diffusers' unmodified converter, then ours, is identity."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    dims = {"hidden": 256, "in": 36, "out": 16, "ffn": 512, "layers": 12, "image": image, "positions": 0}
    native: dict[str, torch.Tensor] = {}
    count = 0
    for module in WAN.modules(dims, Naming("native")):
        for leaf in (module.leaf, "bias") if module.bias else (module.leaf,):
            rows = sum(module.rows)
            native[f"{module.native}.{leaf}"] = torch.arange(count, count + rows)
            count += rows
    diffusers = convert_wan_transformer_to_diffusers(dict(native))
    back = assembled(WAN, dims, Naming("diffusers"), dict(diffusers)).tensors
    assert back.keys() == native.keys()
    assert all(torch.equal(back[name], native[name]) for name in native)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_are_those_of_diffusers_model(variant):
    """Names and shapes of every stored tensor are those of diffusers' model, and the config tells the same sizes."""
    from diffusers import WanTransformer3DModel

    sizes, _ = wan.VARIANTS[variant]
    with torch.device("meta"):
        reference = WanTransformer3DModel.from_config(wan.make(heads=1, **sizes).config)
    shapes = {name: tuple(t.shape) for name, t in reference.state_dict().items()}
    dims = WAN.dims_from_config(json.loads(reference.to_json_string()))
    ours = {}
    for module in WAN.modules(dims, Naming("diffusers")):
        stored = module.stored[0]
        ours[f"{stored}.{module.stored_leaf}" if stored else module.stored_leaf] = (*module.rows, *module.inner)
        if module.bias:
            ours[f"{stored}.bias"] = module.rows
    assert ours == shapes


@pytest.mark.parametrize("name", sorted(WAN.class_names))
def test_configs_defaults_are_diffusers_defaults(name):
    """A config.json that leaves everything out is Wan2.1 14B, or that of its class."""
    with torch.device("meta"):
        reference = common.diffusers_class(name)()
    tensors = {name: TensorInfo("BF16", tuple(t.shape), 0, 0) for name, t in reference.state_dict().items()}
    said = {"_class_name": name} if name != "WanTransformer3DModel" else {}
    assert WAN.dims_from_config(said) == WAN.dims_from_tensors(tensors, Naming("diffusers"))


@pytest.mark.parametrize("name", sorted(WAN.class_names))
def test_all_keys_of_a_configuration_are_known(name):
    """What is new in diffusers' classes is looked at by someone before it is let through."""
    import inspect

    read = {"patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim",
            "ffn_dim", "num_layers", "cross_attn_norm", "qk_norm", "eps", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len",
            "inject_sample_info", "num_frame_per_block"}
    # the length of a table that the host has no end of, and ChronoEdit's positions (ScaleROPE)
    free = {"rope_max_seq_len", "rope_temporal_skip_len"}
    assert inspect.signature(common.diffusers_class(name).__init__).parameters.keys() - {"self"} <= read | free


@pytest.mark.parametrize("change", [
    {"attention_head_dim": 64}, {"patch_size": [1, 1, 1]}, {"text_dim": 512}, {"freq_dim": 128}, {"eps": 1e-5},
    {"qk_norm": "layer_norm"}, {"cross_attn_norm": False}, {"image_dim": 1280}, {"added_kv_proj_dim": 5120},
    {"image_dim": 768, "added_kv_proj_dim": 5120}, {"image_dim": 1280, "added_kv_proj_dim": 5120},
    {"out_channels": 12}, {"in_channels": 12, "out_channels": None}, {"num_layers": "many"}])
def test_configs_that_the_host_cannot_run_are_refused(change):
    with pytest.raises(ValueError, match="ComfyUI runs|expected a number"):
        WAN.dims_from_config(change)


def variants_of_diffusers() -> dict[str, list[str]]:
    """Tensor names of models that diffusers builds around Wan."""
    import diffusers

    small = {"num_layers": 2, "num_attention_heads": 2, "ffn_dim": 256}
    made = {"WanVACETransformer3DModel": {**small, "vace_layers": [0, 1]}, "WanAnimateTransformer3DModel": small,
            "WanAnimate2Transformer3DModel": {"num_layers": 2}, "HeliosTransformer3DModel": small,
            "SkyReelsV2Transformer3DModel": {**small, "inject_sample_info": True},
            "AnyFlowTransformer3DModel": small, "AnyFlowFARTransformer3DModel": small}
    # those that are younger than the oldest diffusers, as 0.42.1 builds them
    younger = json.loads((Path(__file__).parents[1] / "data" / "wan_variants.json").read_text(encoding="utf-8"))
    assert younger.keys() < made.keys()
    with torch.device("meta"):
        return {**younger, **{name: list(getattr(diffusers, name)(**config).state_dict())
                              for name, config in made.items() if hasattr(diffusers, name) or name not in younger}}


def variants_of_the_host() -> dict[str, list[str]]:
    """Tensor names of models that ComfyUI builds around Wan."""
    import comfy.ops
    from comfy.ldm.wan import model as host
    from comfy.ldm.wan.model_animate import AnimateWanModel
    from comfy.ldm.wan.model_wandancer import WanDancerModel

    made = {host.VaceWanModel: {"vace_layers": 2, "vace_in_dim": 96}, host.CameraWanModel: {}, host.WanModel_S2V: {},
            host.HumoWanModel: {}, host.SCAILWanModel: {}, host.SCAIL2WanModel: {}, AnimateWanModel: {},
            WanDancerModel: {}, host.WanModel: {"in_dim_ref_conv": 16}}
    with torch.device("meta"):
        models = {kind.__name__: kind(**{"dim": 256, "num_heads": 2, "ffn_dim": 256, "num_layers": 40, **config},
                                      operations=comfy.ops.disable_weight_init) for kind, config in made.items()}
    return {name: list(m.state_dict()) for name, m in models.items()}


@pytest.mark.parametrize("names_of", [variants_of_diffusers, variants_of_the_host])
def test_models_around_wan_are_not_wan(names_of):
    for name, tensors in names_of().items():
        assert len(tensors) > 50 and any("attn" in tensor for tensor in tensors)
        assert WAN.naming(tensors) is None, name
