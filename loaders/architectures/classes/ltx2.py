"""LTX-2 and 2.3, video with sound (comfy/ldm/lightricks/av_model.py).

The host's model has the pipeline's `connectors` in it, all but what projects the text encoder's states: that is of the
text encoder there. What tensors do not tell it reads in a native file's header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ....host.texts import Text
from ..derived import Companion, Derived

# config.json -> the host's names (comfy/ldm/lightricks/av_model.py and model.py); where diffusers' class has it by
# another value than the host, what it is when config.json leaves it out.
_SAME = {"num_attention_heads": 32, "attention_head_dim": 128, "cross_attention_dim": 4096,
         "audio_num_attention_heads": 32, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 2048,
         "caption_channels": 3840, "rope_type": "interleaved", "timestep_scale_multiplier": 1000}
_CALLED = {"cross_attn_timestep_scale_multiplier": ("av_ca_timestep_scale_multiplier", 1000),
           "rope_theta": ("positional_embedding_theta", 10000.0), "gated_attn": ("apply_gated_attention", False),
           "cross_attn_mod": ("cross_attention_adaln", False)}
# Both halves of the connectors have one number of layers in the host, and one for the rest of what it reads.
_CONNECTORS = {"video_connector_attention_head_dim": ("connector_attention_head_dim", 128),
               "video_connector_num_attention_heads": ("connector_num_attention_heads", 30),
               "audio_connector_attention_head_dim": ("audio_connector_attention_head_dim", 128),
               "audio_connector_num_attention_heads": ("audio_connector_num_attention_heads", 30),
               "video_connector_num_layers": ("connector_num_layers", 2),
               "video_gated_attn": ("connector_apply_gated_attention", False)}
# The host's own values, which Lightricks' headers partly leave out; so does this one, or a base would seem to be
# another than their files. Not of the widths that it takes from tensors, nor of rope_type, which transformer and
# connectors have by other defaults.
_OWN = {"num_attention_heads": 32, "audio_num_attention_heads": 32, "audio_attention_head_dim": 64,
        "audio_cross_attention_dim": 2048, "caption_channels": 3840, "timestep_scale_multiplier": 1000,
        "av_ca_timestep_scale_multiplier": 1, "positional_embedding_theta": 10000.0, "apply_gated_attention": False,
        "cross_attention_adaln": False, "positional_embedding_max_pos": [20, 2048, 2048],
        "audio_positional_embedding_max_pos": [20]}
_OWN_CONNECTORS = {"connector_attention_head_dim": 128, "connector_num_attention_heads": 30, "connector_num_layers": 2,
                   "connector_apply_gated_attention": False}
_AGREE = (("gated_attn", "audio_gated_attn"), ("cross_attn_mod", "audio_cross_attn_mod"))
_CONNECTORS_AGREE = (("video_connector_num_layers", "audio_connector_num_layers"),
                     ("video_gated_attn", "audio_gated_attn"))


def _said(config: Mapping[str, Any], key: str, default: Any) -> Any:
    return default if config.get(key) is None else config[key]


def _header(config: Mapping[str, Any]) -> dict[str, str]:
    """The `config` of a native file's header: what the host's constructor takes. Raises ValueError without any."""
    if not config:
        raise ValueError(Text("of an {model} only its config.json says how it is run, and there is none",
                              model="LTX-2"))
    connectors = config.get("_connectors") or {}
    told = {key: _said(config, key, default) for key, default in _SAME.items()}
    told |= {name: _said(config, key, default) for key, (name, default) in _CALLED.items()}
    told |= {name: _said(connectors, key, default) for key, (name, default) in _CONNECTORS.items()}
    told["positional_embedding_max_pos"] = [_said(config, "pos_embed_max_pos", 20), _said(config, "base_height", 2048),
                                            _said(config, "base_width", 2048)]
    told["audio_positional_embedding_max_pos"] = [_said(config, "audio_pos_embed_max_pos", 20)]
    # diffusers' class has the middles of patches and a causal first frame, always
    told |= {"frequencies_precision": "float64", "use_middle_indices_grid": True, "causal_temporal_positioning": True}
    if config.get("use_prompt_embeddings") is False:  # 2.3, whose text encoder projects to both widths
        told |= {"caption_proj_before_connector": True, "caption_projection_first_linear": False}
    own = {**_OWN, **_OWN_CONNECTORS, **{f"audio_{key}": told[key] for key in _OWN_CONNECTORS}}
    return {"config": json.dumps({"transformer": {key: value for key, value in told.items()
                                                  if key not in own or value != own[key]}})}


def _refuses(config: Mapping[str, Any]) -> str:
    """Why the host does not run a model of this configuration, or empty."""
    connectors = config.get("_connectors")
    if connectors is None:
        return Text("ComfyUI's LTX-2 has the pipeline's connectors in it, and none lie beside this transformer: give "
                    "the whole pipeline's folder, or use this as override on such a base")
    both = [(config, *pair) for pair in _AGREE] + [(connectors, *pair) for pair in _CONNECTORS_AGREE]
    for where, video, audio in both:
        if (where.get(video) or 0) != (where.get(audio) or 0):
            return Text("ComfyUI runs LTX-2 with one {video} for video and sound; config.json says {a} and {b}",
                        video=video, a=where.get(video), b=where.get(audio))
    if _said(connectors, "rope_type", "interleaved") != _said(config, "rope_type", "interleaved"):
        return Text("ComfyUI runs LTX-2 with one rope_type in transformer and connectors")
    return ""


CLASS = Derived(
    title="LTX-2", hosts=("LTXAV",), table="ltx2", classes=("LTX2VideoTransformer3DModel",),
    marks=("audio_proj_in.", "av_cross_attn_video_scale_shift."),
    fixed={
        "in_channels": (128,), "out_channels": (128,), "patch_size": (1,), "patch_size_t": (1,),
        "vae_scale_factors": ((8, 32, 32),), "audio_in_channels": (128,), "audio_out_channels": (128,),
        "audio_patch_size": (1,), "audio_patch_size_t": (1,), "audio_scale_factor": (4,),
        "audio_sampling_rate": (16000,), "audio_hop_length": (160,), "activation_fn": ("gelu-approximate",),
        "qk_norm": ("rms_norm_across_heads",), "norm_elementwise_affine": (False,), "norm_eps": (1e-6,),
        "attention_bias": (True,), "attention_out_bias": (True,), "rope_double_precision": (True,),
        "causal_offset": (1,), "ff_bias": (True,), "audio_ff_bias": (True,), "use_prompt_adaln_single": (True,),
        "use_keyframes_abs_pos_embedding": (False,),
    },
    free=frozenset({
        *_SAME, *_CALLED, "pos_embed_max_pos", "base_height", "base_width", "audio_gated_attn", "audio_cross_attn_mod",
        "audio_pos_embed_max_pos", "num_layers", "use_prompt_embeddings", "perturbed_attn",
    }),
    refuses=_refuses, header=_header,
    companions={"connectors": Companion(
        "diffusers.pipelines.ltx2.connectors",
        fixed={
            "connector_rope_base_seq_len": (4096,), "rope_theta": (10000.0, 10000), "rope_double_precision": (True,),
            "video_connector_num_learnable_registers": (128,), "audio_connector_num_learnable_registers": (128,),
        },
        # the last ones are of what projects the text encoder's states, and of positions in time, which text has not
        free=frozenset({
            *_CONNECTORS, "audio_connector_num_layers", "audio_gated_attn", "rope_type", "caption_channels",
            "text_proj_in_factor", "per_modality_projections", "video_hidden_dim", "audio_hidden_dim", "proj_bias",
            "causal_temporal_positioning",
        }))},
    leaves=("text_proj_in.", "video_text_proj_in.", "audio_text_proj_in."),
)
