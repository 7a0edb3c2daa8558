"""UNets of Stable Diffusion: the host's own map, and tiny ones in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, discrete, noise


def convert(native):
    """By comfy/utils.py, for the sizes that the host's detection finds in its own names."""
    import comfy.model_detection
    import comfy.utils

    sizes = comfy.model_detection.detect_unet_config(native, "")
    other = "class_embedding." if sizes["context_dim"] == 128 else "add_embedding."  # of SDXL, and of SD 2.1 unCLIP
    names = {host: name for name, host in comfy.utils.unet_to_diffusers(sizes).items() if not name.startswith(other)}
    return {names[name]: tensor for name, tensor in native.items()}


SOURCE = Source(("SD 1.5", "SD 2", "SD 2.1 unCLIP L", "SDXL", "KOALA 700M", "SSD-1B"), convert=convert)
BETAS = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
SMALL = {"block_out_channels": [32, 64, 64], "layers_per_block": 1, "down_block_types": [
    "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": [
    "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 96, "attention_head_dim": 8}
XL = {"block_out_channels": [32, 64, 64], "layers_per_block": 1, "down_block_types": [
    "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": [
    "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 128, "attention_head_dim": 1,
    "transformer_layers_per_block": [1, 1, 2], "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 160}


def forward(net, x, text):
    return net(x / (1 + SIGMA ** 2) ** 0.5, discrete(BETAS), text, return_dict=False)[0]


def forward_xl(net, x, text, pooled, sizes):
    return net(x / (1 + SIGMA ** 2) ** 0.5, discrete(BETAS), text, return_dict=False,
               added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})[0]


def conds_xl(x, text, pooled, sizes):
    from diffusers.models.embeddings import get_timestep_embedding

    embedded = get_timestep_embedding(sizes.flatten(), 16, flip_sin_to_cos=True, downscale_freq_shift=0)
    return {"c_crossattn": text, "y": torch.cat([pooled, embedded.reshape(1, -1)], -1)}


CASES = (
    Case(SMALL, "SD 1.5", forward, lambda: (noise(1, 4, 8, 8), noise(1, 7, 96)), lambda x, text: {"c_crossattn": text},
         ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q", "input_blocks.1.1.transformer_blocks.0.attn2.to_q"), maps=False,
         prefix="unet."),  # the host's names of an attention's layers have `.processor` in them, as diffusers' once had
    Case(XL, "SDXL", forward_xl,
         lambda: (noise(1, 4, 8, 8), noise(1, 7, 128), noise(1, 64), torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])), conds_xl,
         ("mid_block.attentions.0.transformer_blocks.1.ff.net.2", "middle_block.1.transformer_blocks.1.ff.net.2"),
         prefix="unet."),
)
REFUSED = (
    ({"cross_attention_dim": 768}, ""), ({"cross_attention_dim": 768, "attention_head_dim": 5}, "8 heads where it is 320 wide"),
    ({"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]}, ""),
    ({"cross_attention_dim": 1024, "attention_head_dim": 8}, "5 heads where it is 320 wide"),
)
PUBLISHED = {
    "SD15": {"cross_attention_dim": 768},
    "SD20": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "SD21UnclipH": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
                    "class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
    "SDXL": {"cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True, "block_out_channels": [
        320, 640, 1280], "down_block_types": XL["down_block_types"], "up_block_types": XL["up_block_types"],
        "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816},
}
PUBLISHED["SDXL, inpainting"] = {**PUBLISHED["SDXL"], "in_channels": 9}
PUBLISHED["SD15, inpainting"] = {**PUBLISHED["SD15"], "in_channels": 9}
