"""The diffusers classes that load by a derived table (derived.py), with what ComfyUI has of them in its code.

`fixed` is what comfy/model_detection.py and comfy/ldm say for the class, by the names of diffusers' config; the first
value is the usual one. A new class is an entry here, its table by `python3 dev.py tables`, and a row in
tests/tables.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ... import host
from ...host.texts import Text
from ..containers.safetensors import TensorInfo
from .derived import Derived, Translated
from .passthrough import logical_shapes


def _uneven(config: Mapping[str, Any]) -> str:
    """ComfyUI places VACE's blocks evenly, by their number (comfy/ldm/wan/model.py)."""
    layers, count = config.get("vace_layers"), config.get("num_layers") or 40
    if layers and list(layers) != list(range(0, count, max(1, count // len(layers)))):
        return Text("ComfyUI runs VACE blocks beside every so many layers only; config.json has them beside {layers} "
                    "of {count}", layers=", ".join(map(str, layers)), count=count)
    return ""


def _not_square(config: Mapping[str, Any]) -> str:
    """ComfyUI takes the number of heads for that of layers (comfy/ldm/modules/diffusionmodules/mmdit.py)."""
    layers, heads = config.get("num_layers") or 18, config.get("num_attention_heads") or 18
    return "" if layers == heads else Text("ComfyUI runs Stable Diffusion 3 with as many heads as layers only; "
                                           "config.json says {heads} and {layers}", heads=heads, layers=layers)


DERIVED: tuple[Derived, ...] = (
    Derived("AuraFlow", "AuraFlow", "auraflow", frozenset({"AuraFlowTransformer2DModel"}),
            ("joint_transformer_blocks.0.", "pos_embed.pos_embed", "register_tokens"),
            {"patch_size": (2,), "in_channels": (4,), "out_channels": (4,), "attention_head_dim": (256,),
             "num_attention_heads": (12,), "caption_projection_dim": (3072,)},
            frozenset({"sample_size", "num_mmdit_layers", "num_single_dit_layers", "joint_attention_dim",
                       "pos_embed_max_size"})),
    Derived("Chroma", "Chroma", "chroma", frozenset({"ChromaTransformer2DModel"}),
            ("distilled_guidance_layer.layers.0.linear_1.", "transformer_blocks.0.attn.to_q."),
            {"patch_size": (1,), "attention_head_dim": (128,), "num_attention_heads": (24,),
             "axes_dims_rope": ((16, 56, 56),), "approximator_num_channels": (64,), "approximator_hidden_dim": (5120,),
             "approximator_layers": (5,)},
            frozenset({"in_channels", "out_channels", "num_layers", "num_single_layers", "joint_attention_dim",
                       "guidance_embeds", "pooled_projection_dim"})),
    Derived("Krea-2", "Krea2", "krea2", frozenset({"Krea2Transformer2DModel"}),
            ("text_fusion.", "final_layer.scale_shift_table"),
            {"attention_head_dim": (128,), "axes_dims_rope": ((32, 48, 48),), "rope_theta": (1000.0, 1000),
             "norm_eps": (1e-5,), "timestep_embed_dim": (256,), "text_num_attention_heads": (20,),
             "text_num_key_value_heads": (20,), "num_layerwise_text_blocks": (2,), "num_refiner_text_blocks": (2,)},
            frozenset({"in_channels", "num_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
                       "text_hidden_dim", "num_text_layers", "text_intermediate_size"})),
    Derived("LTX-Video", "LTXV", "ltxv", frozenset({"LTXVideoTransformer3DModel"}),
            ("proj_in.", "caption_projection.linear_1.", "transformer_blocks.0.attn1.norm_q."),
            {"patch_size": (1,), "patch_size_t": (1,), "num_attention_heads": (32,), "norm_eps": (1e-6,),
             "activation_fn": ("gelu-approximate",), "qk_norm": ("rms_norm_across_heads",),
             "norm_elementwise_affine": (False,), "attention_bias": (True,), "attention_out_bias": (True,)},
            frozenset({"in_channels", "out_channels", "attention_head_dim", "cross_attention_dim", "num_layers",
                       "caption_channels"})),
    Derived("Lumina 2", "Lumina2", "lumina2", frozenset({"Lumina2Transformer2DModel"}),
            ("time_caption_embed.", "noise_refiner.0.attn.to_q."),
            {"patch_size": (2,), "in_channels": (16,), "hidden_size": (2304,), "num_refiner_layers": (2,),
             "num_attention_heads": (24,), "num_kv_heads": (8,), "norm_eps": (1e-5,), "scaling_factor": (1.0, 1),
             "axes_dim_rope": ((32, 32, 32),)},
            # the lengths of axes are those of a table that ComfyUI computes as it goes
            frozenset({"sample_size", "out_channels", "num_layers", "multiple_of", "ffn_dim_multiplier", "axes_lens",
                       "cap_feat_dim"}), never=("ref_image_refiner.",)),  # OmniGen2
    Derived("Stable Diffusion 3", "SD3", "sd3", frozenset({"SD3Transformer2DModel"}),
            ("pos_embed.pos_embed", "transformer_blocks.0.norm1_context.", "time_text_embed.timestep_embedder."),
            {"attention_head_dim": (64,), "qk_norm": ("rms_norm",)},
            frozenset({"sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "num_attention_heads",
                       "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size",
                       "dual_attention_layers"}), _not_square),
    Derived("Wan VACE", "WAN21_Vace", "wan_vace", frozenset({"WanVACETransformer3DModel"}),
            ("vace_blocks.0.proj_in.", "condition_embedder."),
            {"patch_size": ((1, 2, 2),), "attention_head_dim": (128,), "freq_dim": (256,), "cross_attn_norm": (True,),
             "qk_norm": ("rms_norm_across_heads",), "eps": (1e-6,)},
            frozenset({"in_channels", "out_channels", "text_dim", "ffn_dim", "num_layers", "num_attention_heads",
                       "image_dim", "added_kv_proj_dim", "rope_max_seq_len", "pos_embed_seq_len", "vace_layers",
                       "vace_in_channels"}), _uneven),
)


def of_class(name: str) -> list[Derived]:
    """Those that a `_class_name` of config.json may be."""
    return [one for one in DERIVED if name in one.classes]


def recognise(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], claim: str) -> Translated | None:
    """The host's model of tensors in diffusers' names: by config.json's class and by marks. None for any other, and
    where there is no host.

    Raises ValueError for those of a class that has a table where they are not all of a model.
    """
    text = "\n".join(tensors)
    derived = next((one for one in (of_class(claim) if claim else DERIVED) if one.is_named(text)), None)
    if derived is None or not host.is_there() or host.lacking("native passthrough"):
        return None
    return Translated(derived, logical_shapes(tensors), metadata)


def of_config(config: Mapping[str, Any], claim: str) -> Translated:
    """The model that a config.json describes, without its weights: by diffusers' own class.

    Raises ValueError where the package diffusers is not there, or the host does not run such a model.
    """
    derived = of_class(claim)[0]
    derived.check(config)
    try:
        import torch
        from diffusers import __version__, models
    except ImportError as error:
        raise ValueError(Text("what a {model} without weights is made of is asked of the package diffusers, which does "
                              "not import ({error}): set weights to 'load', or install it", model=derived.title,
                              error=error)) from error
    kind = getattr(models, claim, None)
    if kind is None:
        raise ValueError(Text("what a {model} without weights is made of is asked of the package diffusers, whose "
                              "version {version} does not have it: set weights to 'load', or update it",
                              model=derived.title, version=__version__))
    with torch.device("meta"):
        net = kind.from_config(dict(config))
    return Translated(derived, {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}, {})
