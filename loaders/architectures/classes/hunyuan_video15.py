"""HunyuanVideo 1.5, its step-distilled and its super-resolution models (comfy/ldm/hunyuan_video/model.py)."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="HunyuanVideo 1.5", hosts=("HunyuanVideo15", "HunyuanVideo15_SR_Distilled"), table="hunyuan_video15",
    classes=("HunyuanVideo15Transformer3DModel",),
    marks=("cond_type_embed.weight", "image_embedder.norm_in.", "context_embedder.token_refiner."),
    fixed={
        # what is beside the noise: latents of a picture and a mask, and for super resolution the same again
        "in_channels": (65, 98), "out_channels": (32,), "attention_head_dim": (128,), "num_refiner_layers": (2,),
        "mlp_ratio": (4.0, 4), "patch_size": (1,), "patch_size_t": (1,), "qk_norm": ("rms_norm",),
        "text_embed_2_dim": (1472,), "image_embed_dim": (1152,), "rope_theta": (256.0, 256),
        "rope_axes_dim": ((16, 56, 56),),
    },
    # the size and the task are the pipeline's
    free=frozenset({
        "num_attention_heads", "num_layers", "text_embed_dim", "target_size", "task_type", "use_meanflow",
    }),
)
