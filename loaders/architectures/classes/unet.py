"""UNets of Stable Diffusion 1, 2 and XL, and what was trained or distilled from them
(comfy/ldm/modules/diffusionmodules/openaimodel.py).

The host has the table of names itself (comfy/utils.py, unet_to_diffusers), for any numbers of blocks; it knows UNets by
their sizes (comfy/supported_models.py). What one predicts is said by the scheduler's configuration beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from .... import host
from ....host.texts import Text
from ..base import count_blocks
from ..derived import Companion, Derived

if TYPE_CHECKING:
    from torch import Tensor

CHANNELS, HEADS_OF_SD1, WIDTH_OF_SD1, WIDTH_OF_XL = (320, 640, 1280, 1280), 8, 768, 2048


def _names(stored: Collection[str]) -> Mapping[str, str]:
    """The host's map for as many blocks as there are."""
    def depth(place: str, count: int) -> list[int]:
        return [count_blocks(stored, f"{place}.attentions.{at}.transformer_blocks") for at in range(count)]

    down = [count_blocks(stored, f"down_blocks.{at}.resnets") for at in range(count_blocks(stored, "down_blocks"))]
    up = [block for at, count in enumerate(reversed(down)) for block in depth(f"up_blocks.{at}", count + 1)]
    return host.unet_names({
        "num_res_blocks": down, "channel_mult": down, "transformer_depth_output": up[::-1],
        "transformer_depth": [block for at, count in enumerate(down) for block in depth(f"down_blocks.{at}", count)],
        "transformer_depth_middle": count_blocks(stored, "mid_block.attentions.0.transformer_blocks")})


def _refuses(config: Mapping[str, Any]) -> str:
    """Heads, which no tensor tells: the host has 8 in Stable Diffusion 1, of 64 channels in all others. diffusers calls
    their number attention_head_dim."""
    heads: Any = config.get("num_attention_heads") or config.get("attention_head_dim")
    channels = config.get("block_out_channels") or CHANNELS
    kinds = config.get("down_block_types") or ("CrossAttn",) * (len(channels) - 1) + ("",)
    first = config.get("cross_attention_dim") == WIDTH_OF_SD1
    for level, (width, kind) in enumerate(zip(channels, kinds, strict=False) if heads else ()):
        said = heads if isinstance(heads, int) else heads[level]
        wanted = HEADS_OF_SD1 if first else width // 64
        if kind.startswith("CrossAttn") and said != wanted:
            return Text("ComfyUI runs this UNet with {wanted} heads where it is {width} wide; config.json says {said}",
                        wanted=wanted, width=width, said=said)
    return ""


def _predicts(config: Mapping[str, Any]) -> str:
    said = (config.get("_scheduler") or {}).get("prediction_type")
    return {"epsilon": "EPS", "v_prediction": "V_PREDICTION"}.get(str(said), "")


def _marks(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those by which the host knows an SDXL that predicts velocity."""
    import torch

    if config.get("cross_attention_dim") != WIDTH_OF_XL or _predicts(config) != "V_PREDICTION":
        return {}
    marks = ("v_pred", "ztsnr") if config["_scheduler"].get("rescale_betas_zero_snr") else ("v_pred",)
    return {mark: torch.zeros(0) for mark in marks}


def _notes(config: Mapping[str, Any]) -> list[str]:
    return [] if config.get("_scheduler") else [
        Text("no scheduler lies beside this UNet: what it predicts is taken from its tensors, as by ComfyUI")]


CLASS = Derived(
    title="Stable Diffusion UNet", table="unet", classes=("UNet2DConditionModel",), names=_names,
    hosts=("SD15", "SD15_instructpix2pix", "SD20", "SD21UnclipL", "SD21UnclipH", "LotusD", "SDXL",
           "SDXL_instructpix2pix", "SDXLRefiner", "SSD1B", "Segmind_Vega", "KOALA_700M", "KOALA_1B"),
    marks=("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.resnets.0.time_emb_proj.weight",
           ".attentions.0.transformer_blocks.0.attn2.to_k.weight"),
    never=("controlnet", "temp_", "motion_modules", "fps_", "temporal_", "encoder_hid_proj", "conv_shortcut_"),
    fixed={
        "center_input_sample": (False,), "flip_sin_to_cos": (True,), "freq_shift": (0,), "downsample_padding": (1,),
        "mid_block_scale_factor": (1, 1.0), "act_fn": ("silu",), "norm_num_groups": (32,), "norm_eps": (1e-5,),
        "out_channels": (4,), "only_cross_attention": (False,), "dual_cross_attention": (False,),
        "class_embed_type": ("projection",), "addition_embed_type": ("text_time",), "addition_time_embed_dim": (256,),
        "num_class_embeds": (None,), "resnet_time_scale_shift": ("default",), "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0, 1), "time_embedding_type": ("positional",), "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,), "time_cond_proj_dim": (None,), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
        "attention_type": ("default",), "class_embeddings_concat": (False,), "mid_block_only_cross_attention": (False,),
        "cross_attention_norm": (None,), "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    },
    free=frozenset({
        "sample_size", "in_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
        "dropout", "cross_attention_dim", "transformer_layers_per_block", "reverse_transformer_layers_per_block",
        "attention_head_dim", "num_attention_heads", "use_linear_projection", "upcast_attention", "time_embedding_dim",
        "projection_class_embeddings_input_dim", "addition_embed_type_num_heads",
    }),
    refuses=_refuses, made=_marks, predicts=_predicts, notes=_notes,
    companions={"scheduler": Companion(config="scheduler_config.json")},
)
