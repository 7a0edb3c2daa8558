"""The committed miniature: its size, its parity with diffusers' own pipeline, and that it draws what it learned."""

from __future__ import annotations

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.components import text_encoder, vae
from support import miniature
from support.common import rel_l2, stored

pytestmark = pytest.mark.parity

STEPS, SEED = 4, 3
BOUND = 25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return miniature.complete(tmp_path_factory.mktemp("miniature") / "pipeline")


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def host(folder):
    """(MODEL, CLIP, VAE) as the nodes load them."""
    return (model.load(model.Request(str(folder))).patcher, text_encoder.load(text_encoder.Request(str(folder))).clip,
            vae.load(vae.Request(str(folder))).vae)


def noise():
    side = miniature.SIZE // 8
    return torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(SEED))


def sampled(host, prompt, steps):
    """What ComfyUI samples, as its latents."""
    import comfy.sample

    patcher, clip, _ = host
    condition = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    x = noise()
    return comfy.sample.sample(patcher, x, steps, 1.0, "euler", "simple", condition, condition, torch.zeros_like(x),
                               disable_pbar=True, seed=SEED)


def unpacked(tokens):
    """FluxPipeline's latents [1, N, 64] as ComfyUI has them."""
    side = miniature.SIZE // 16
    return torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), 2)


def test_size():
    tensors = stored(miniature.FOLDER / "transformer")
    assert sum(t.numel() for t in tensors.values()) <= 2e6
    assert {t.dtype for part in ("transformer", "vae") for t in stored(miniature.FOLDER / part).values()} == {torch.bfloat16}
    assert sum(f.stat().st_size for f in miniature.FOLDER.rglob("*")) <= 6e6


@pytest.mark.parametrize("prompt", [miniature.PROMPTS[1], "a photo of a rocket"])
def test_equals_diffusers_pipeline(host, pipeline, prompt):
    """Prompt to picture: tokens, both text encoders, schedule, sampler, transformer and VAE, in F32. Several forwards
    of 4e-7 each (docs/limits.md, FLUX.1) that add up, and none of the differences of BF16."""
    x = torch.nn.functional.pixel_unshuffle(noise(), 2).flatten(2).transpose(1, 2)
    theirs = unpacked(pipeline(prompt, latents=x, num_inference_steps=STEPS, height=miniature.SIZE, width=miniature.SIZE,
                               output_type="latent").images)
    theirs = theirs / miniature.SCALE + miniature.SHIFT  # what a VAE decodes; ComfyUI's sampler ends with it, too
    ours = sampled(host, prompt, STEPS)
    assert rel_l2(ours, theirs) < 1e-5
    with torch.inference_mode():
        picture = pipeline.vae.decode(theirs).sample[0].permute(1, 2, 0).clamp(-1, 1)
        assert rel_l2(host[2].decode(ours)[0] * 2 - 1, picture) < 1e-5


@pytest.mark.parametrize("picture", range(len(miniature.PROMPTS)))
def test_draws_what_it_learned(host, picture):
    """Its VAE alone gives the pictures back with 26.0 to 33.4 dB, and it draws them as well (25.8 to 33.1); none of the
    pictures is nearer than 12 dB to another."""
    phrase, mirrored = miniature.PHRASES[picture % len(miniature.PHRASES)]
    with torch.inference_mode():
        latents = sampled(host, phrase.format(miniature.PROMPTS[picture]), miniature.STEPS)
        drawn = host[2].decode(latents)[0] * 2 - 1
    assert miniature.psnr(drawn, miniature.pictures()[picture, mirrored].permute(1, 2, 0), 2) > BOUND
