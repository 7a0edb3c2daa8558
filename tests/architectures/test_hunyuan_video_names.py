"""HunyuanVideo's names and configs against diffusers' converter and classes, and the models that share its names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from quantized_transformers.loaders.architectures.base import Naming
from quantized_transformers.loaders.architectures.hunyuan_video import HUNYUAN_VIDEO
from support import common, hunyuan_video
from support.common import assembled

pytestmark = pytest.mark.parity

VENDOR = hunyuan_video.vendor_by_host()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The BF16 folder of a tiny model."""
    folder = tmp_path_factory.mktemp("hunyuan")
    hunyuan_video.make().save_pretrained(folder)
    return SimpleNamespace(bf16=folder)


@pytest.mark.parametrize("guidance", [True, False])
def test_name_map_is_the_inverse_of_diffusers_converter(guidance):
    """Every row of a full-width vendor model carries a tag. Through diffusers' unmodified converter and our map it must
    arrive where the host's own renaming puts it."""
    from diffusers import HunyuanVideoTransformer3DModel

    dims = {"hidden": 3072, "in": 16, "out": 64, "text": 4096, "double": 2, "single": 3, "guidance": int(guidance)}
    with torch.device("meta"):
        reference = HunyuanVideoTransformer3DModel(num_layers=2, num_single_layers=3, guidance_embeds=guidance)
    vendor: dict[str, torch.Tensor] = {}
    count = 0
    ours = {f"{module.stored[0]}.{leaf}": sum(module.rows) for module in HUNYUAN_VIDEO.modules(dims, Naming("vendor"))
            for leaf in (("weight", "bias") if module.bias else ("weight",))}
    assert sorted(ours) == sorted(hunyuan_video.vendor_names(2, 3, guidance))
    for name, rows in ours.items():
        tags = torch.arange(count, count := count + rows)
        vendor[name] = tags[:, None] if name.endswith(".weight") and "norm" not in name else tags
    diffusers = hunyuan_video.convert(vendor)
    assert {name: t.shape[0] for name, t in diffusers.items()} == {
        name: t.shape[0] for name, t in reference.state_dict().items()}
    expected = hunyuan_video.by_host(vendor)
    for naming, stored in ((Naming("diffusers"), diffusers), (Naming("vendor"), vendor)):
        back = hunyuan_video.by_host(assembled(HUNYUAN_VIDEO, dims, naming, dict(stored)).tensors)
        assert back.keys() == expected.keys()
        assert all(torch.equal(back[name], expected[name]) for name in expected)


CONFIGS = {"attention_head_dim": 64, "rope_axes_dim": [32, 48, 48], "mlp_ratio": 3.0, "patch_size": 1, "patch_size_t": 2,
           "pooled_projection_dim": 64, "rope_theta": 10000.0, "num_refiner_layers": 3, "qk_norm": "layer_norm",
           "num_layers": "8"}


@pytest.mark.parametrize("key", CONFIGS)
def test_config_that_the_host_cannot_run(key, tiny):
    config = common.config_of(tiny.bf16)
    assert HUNYUAN_VIDEO.dims_from_config(config)["hidden"] == 256
    with pytest.raises(ValueError, match=key):
        HUNYUAN_VIDEO.dims_from_config({**config, key: CONFIGS[key]})


def test_names_of_other_models(tiny):
    """HunyuanVideo 1.5, HunyuanImage, FramePack, FLUX.1, a ControlNet and a LoRA share the names of blocks."""
    diffusers = set(common.stored(tiny.bf16))
    styles = [Naming("diffusers"), Naming("native"), Naming("vendor")]
    for names, naming in zip((diffusers, set(VENDOR), set(VENDOR.values())), styles, strict=True):
        assert HUNYUAN_VIDEO.naming(names) == naming
        for more in ("cond_type_embedding.weight", "cond_type_embed.weight", "vision_in.proj.0.weight",
                     "byt5_in.fc1.weight", "time_r_in.in_layer.weight", "context_embedder_2.linear_1.weight",
                     "image_embedder.linear_1.weight", "clean_x_embedder.proj.weight", "controlnet_blocks.0.weight",
                     "transformer_blocks.0.attn.qkv_proj.qweight"):
            assert HUNYUAN_VIDEO.naming({*names, more}) is None
        assert HUNYUAN_VIDEO.naming({n for n in names if "refiner" not in n}) is None
        pooled = ("vector_in.", "time_text_embed.text_embedder.")
        assert HUNYUAN_VIDEO.naming({n for n in names if not n.startswith(pooled)}) is None
        assert HUNYUAN_VIDEO.naming({n.replace(".weight", ".lora_A.weight") for n in names}) is None


@pytest.mark.parametrize(("name", "options"), [
    ("HunyuanVideo15Transformer3DModel", {}), ("HunyuanImageTransformer2DModel", {"num_single_layers": 1}),
    # as published: both switched on
    ("HunyuanVideoFramepackTransformer3DModel", {"num_single_layers": 1, "has_clean_x_embedder": True}),
    ("HunyuanVideoFramepackTransformer3DModel", {"num_single_layers": 1, "has_image_proj": True})])
def test_diffusers_relatives_are_not_claimed(name, options):
    import diffusers

    with torch.device("meta"):
        relative = getattr(diffusers, name)(num_layers=1, **options)
    names = set(relative.state_dict())
    assert any("refiner_blocks" in n for n in names)
    assert HUNYUAN_VIDEO.naming(names) is None
