"""Test-only ComfyUI nodes: conditioning for tiny FLUX.1 models, and latents as pictures without a VAE."""

import comfy.latent_formats
import torch


class TinyConditioning:
    """Seeded text states [1, tokens, text] and pooled states [1, pooled] of a tiny model, with guidance 4."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("INT", {"default": 64}), "pooled": ("INT", {"default": 32}),
                             "tokens": ("INT", {"default": 7}), "seed": ("INT", {"default": 5})}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "tests"

    def make(self, text, pooled, tokens, seed):
        g = torch.Generator().manual_seed(seed)
        states = torch.randn(1, tokens, text, generator=g)
        return ([[states, {"pooled_output": torch.randn(1, pooled, generator=g), "guidance": 4.0}]],)


class LatentColours:
    """The host's own latent preview colours (16 channels -> RGB), four pixels a latent."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "paint"
    CATEGORY = "tests"

    def paint(self, samples):
        flux = comfy.latent_formats.Flux()
        rgb = torch.einsum("bchw,cr->bhwr", samples["samples"].float(), torch.tensor(flux.latent_rgb_factors))
        rgb = ((rgb + torch.tensor(flux.latent_rgb_factors_bias) + 1) / 2).clamp(0, 1)
        return (rgb.repeat_interleave(4, 1).repeat_interleave(4, 2),)


NODE_CLASS_MAPPINGS = {"QTTest_TinyConditioning": TinyConditioning, "QTTest_LatentColours": LatentColours}
