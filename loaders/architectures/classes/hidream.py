"""HiDream-I1 (comfy/ldm/hidream/model.py), whose sizes are all in ComfyUI's detection."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="HiDream-I1", hosts=("HiDream",), table="hidream", classes=("HiDreamImageTransformer2DModel",),
    marks=("caption_projection.0.linear.", "double_stream_blocks.0.block.ff_i.gate."),
    fixed={
        "patch_size": (2,), "in_channels": (16,), "out_channels": (16,), "num_layers": (16,),
        "num_single_layers": (32,), "attention_head_dim": (128,), "num_attention_heads": (20,),
        "caption_channels": ((4096, 4096),), "text_emb_dim": (2048,), "num_routed_experts": (4,),
        "num_activated_experts": (2,), "axes_dims_rope": ((64, 32, 32),),
        "llama_layers": ((*range(32), *[31] * 16),),
    },
    # the largest picture is what diffusers pads others to, which ComfyUI does not
    free=frozenset({"max_resolution", "force_inference_output"}),
)
