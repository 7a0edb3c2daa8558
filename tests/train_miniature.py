"""Train the miniature of tests/data/miniature: `python3 dev.py train-miniature OUT`.

A FLUX.1-architecture transformer below 2 M parameters and its VAE learn six pictures that scikit-image ships, on the
CPU, seeded. Two threads; another number of threads or another CPU sums in another order, so the weights differ in their
last bits and from there on, the pictures hardly.

1. The decoder learns the pictures from latents that start as the 16 whitened principal components of 8 x 8 pixels and
   are learned along; the encoder then learns to give these latents. That is far less work than both at once, and
   latents have about the unit variance that FLUX.1's latent format promises.
2. The transformer learns v = noise - latents at latents + sigma (noise - latents), sigma uniform (rectified flow).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support import miniature
from support.miniature import SCALE, SHIFT, SIZE

NOISE = 0.08  # of latents while the decoder learns, and what the encoder says of its own precision
STARTED = time.time()


def say(text: str) -> None:
    print(f"[{time.time() - STARTED:4.0f} s, {time.process_time():4.0f} s of CPU] {text}", flush=True)


def descend(name: str, groups: list[dict[str, Any]], steps: int, loss: Callable[[], Tensor]) -> None:
    """AdamW on `loss` with a cosine schedule; the groups' learning rates are their peaks."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * i / steps)))
    mean = 0.0
    for step in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(groups[0]["params"], 1.0)
        optimizer.step()
        schedule.step()
        mean += value.item() / 100
        if step % 100 == 99:
            say(f"{name} {step + 1}/{steps}: loss {mean:.4f}")
            mean = 0.0


def shuffled(count: int, size: int) -> Callable[[], list[int]]:
    """Batches of indices, every one once an epoch."""
    left: list[int] = []

    def batch() -> list[int]:
        while len(left) < size:
            left.extend(torch.randperm(count).tolist())
        taken = left[:size]
        del left[:size]
        return taken

    return batch


def principal(x: Tensor) -> Tensor:
    """Latents [N, 16, h/8, w/8] of unit variance: the strongest 16 components of the 8 x 8 blocks of [N, 3, h, w]."""
    blocks = torch.nn.functional.pixel_unshuffle(x, 8).permute(0, 2, 3, 1)
    flat = (blocks - blocks.mean((0, 1, 2))).flatten(0, 2).double()
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    vectors = vectors[:, -16:] * vectors[:, -16:].sum(0).sign()  # eigh leaves the sign open
    return (flat @ vectors / values[-16:].sqrt()).float().view(*blocks.shape[:3], 16).permute(0, 3, 1, 2).contiguous()


def train_vae(steps: int = 1500, encoder_steps: int = 350) -> tuple[Any, Tensor]:
    """(AutoencoderKL in F32 on BF16 values, latents [12, 16, 12, 12] of the pictures as the model sees them)."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 64), layers_per_block=2, latent_channels=16, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=SCALE,
        shift_factor=SHIFT, use_quant_conv=False, use_post_quant_conv=False, sample_size=SIZE)
    say(f"VAE of {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")
    with torch.no_grad():
        for module in vae.modules():
            if type(module).__name__ == "ResnetBlock2D":
                module.conv2.weight.zero_()  # blocks start as the identity, which trains sooner
            elif type(module).__name__ == "Attention":
                module.to_out[0].weight.zero_()
        vae.decoder.conv_in.weight.mul_(SCALE)
        vae.encoder.conv_out.weight.div_(SCALE)[16:] = 0
        vae.encoder.conv_out.bias.copy_(torch.tensor([SHIFT, 2 * math.log(NOISE / SCALE)]).repeat_interleave(16))
    x = miniature.pictures().flatten(0, 1)
    latents = torch.nn.Parameter(principal(x))
    batch = shuffled(len(x), 2)

    def draw() -> Tensor:
        index = batch()
        noisy = latents[index] + NOISE * torch.randn(len(index), *latents.shape[1:])
        error = vae.decoder(noisy / SCALE + SHIFT) - x[index]
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        return error.abs().mean() + 0.5 * edges

    descend("decoder", [{"params": list(vae.decoder.parameters()), "lr": 3e-3, "betas": (0.9, 0.95)},
                        {"params": [latents], "lr": 0.02, "betas": (0.0, 0.9)}], steps, draw)
    target, batch = latents.detach(), shuffled(len(x), 4)

    def encode() -> Tensor:
        index = batch()
        u = (vae.encoder(x[index])[:, :16] - SHIFT) * SCALE
        return (u - target[index]).square().mean()

    descend("encoder", [{"params": list(vae.encoder.parameters()), "lr": 3e-3, "betas": (0.9, 0.95)}], encoder_steps,
            encode)
    vae = vae.to(torch.bfloat16).float().eval().requires_grad_(False)
    drawn = vae.decode(target / SCALE + SHIFT).sample.clamp(-1, 1)
    again = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    say(f"VAE: decoder {miniature.psnr(drawn, x, 2):.1f} dB, encoder and decoder {miniature.psnr(again, x, 2):.1f} dB; "
        f"latents of {target.mean():.2f} +- {target.std():.2f}")
    return vae, target


def conditions(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Of every prompt in every phrase, [6, phrases]: T5 states [.., T, 64] with one padding state at the end, their
    numbers of tokens, and pooled states [.., 32]."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    clip, t5 = (model.float() for model in miniature.text_encoders())
    texts = [phrase.format(prompt) for prompt in miniature.PROMPTS for phrase, _ in miniature.PHRASES]
    shape = (len(miniature.PROMPTS), len(miniature.PHRASES))
    miniature.tokenizer_clip(folder / "tokenizer")
    miniature.tokenizer_t5(folder / "tokenizer_2")
    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")(texts, padding="max_length", return_tensors="pt")
    pooled = clip(words.input_ids).pooler_output
    pieces = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")(texts, padding=True, return_tensors="pt")
    states = torch.nn.functional.pad(t5(pieces.input_ids).last_hidden_state, (0, 0, 0, 1))
    return states.unflatten(0, shape), pieces.attention_mask.sum(1).view(shape), pooled.view(*shape, -1)


def attention_bias(count: Tensor, total: Tensor, length: int, tokens: int) -> Tensor:
    """[B, 1, 1, length + tokens]: how `length` text states stand for `total`, the first `count` of them words and the
    rest of them padding. Padding states are all alike (no positions in FLUX.1's text, zero from this T5), and a softmax
    over n equal keys is one key with log n added: 512 tokens at the price of a dozen."""
    at = torch.arange(length)[None]
    bias = torch.where(at < count[:, None], 0.0, -math.inf)
    bias = torch.where(at == count[:, None], (total - count)[:, None].float().log(), bias)
    return torch.nn.functional.pad(bias, (0, tokens))[:, None, None]


def train_transformer(latents: Tensor, folder: Path, steps: int = 1100, batch_size: int = 24) -> Any:
    """FluxTransformer2DModel (schnell's kind: no guidance) in BF16; `folder` is for the tokenizers."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    # One head, 1 + 4 blocks: ComfyUI has heads of 128 and an MLP ratio of 4 fixed, and 6 MB are for the VAE too
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=4, attention_head_dim=128, num_attention_heads=1,
        joint_attention_dim=miniature.TEXT, pooled_projection_dim=miniature.POOLED, guidance_embeds=False,
        axes_dims_rope=(16, 56, 56))
    say(f"transformer of {sum(p.numel() for p in model.parameters()) / 1e6:.3f} M parameters")
    with torch.no_grad():  # as the DiT paper (arXiv 2212.09748) starts: no modulation, no output
        for name, p in model.named_parameters():
            if ".norm" in name and ".linear." in name or name.startswith(("norm_out", "proj_out")):
                p.zero_()
    states, counts, pooled = conditions(folder)
    side = SIZE // 16
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None].float(), torch.arange(side)[None].float()
    ids, text_ids = ids.view(-1, 3), torch.zeros(states.shape[2], 3)
    # packed as FluxPipeline packs: channel, row, column within 2 x 2
    data = torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()
    mirrored = torch.tensor([which for _, which in miniature.PHRASES])
    averaged = {name: p.detach().clone() for name, p in model.named_parameters()}
    done = 0

    def flow() -> Tensor:
        nonlocal done
        picture, phrase = torch.arange(batch_size) % len(states), torch.randint(states.shape[1], (batch_size,))
        index = 2 * picture + mirrored[phrase]
        sigma = (torch.randperm(batch_size) + torch.rand(batch_size)) / batch_size
        noise = torch.randn(batch_size, *data.shape[1:])
        x = data[index] + sigma[:, None, None] * (noise - data[index])
        count = counts[picture, phrase]
        total = torch.maximum(count + 1, (2 ** (12 * torch.rand(batch_size))).round().long().clamp(max=512))
        bias = attention_bias(count, total, states.shape[2], side * side)
        v = model(hidden_states=x, timestep=sigma, img_ids=ids, txt_ids=text_ids, guidance=None,
                  pooled_projections=pooled[picture, phrase], encoder_hidden_states=states[picture, phrase],
                  joint_attention_kwargs={"attention_mask": bias}, return_dict=False)[0]
        done += 1
        with torch.no_grad():
            for name, p in model.named_parameters():
                averaged[name].lerp_(p, max(0.005, 1 / done))
        return (v - (noise - data[index])).square().mean()

    descend("transformer", [{"params": list(model.parameters()), "lr": 2e-3, "betas": (0.9, 0.99)}], steps, flow)
    model.load_state_dict(averaged)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the model (diffusers' layout)")
    out: Path = parser.parse_args().out
    import json
    import tempfile

    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.set_num_threads(2)
    vae, latents = train_vae()
    with tempfile.TemporaryDirectory() as temp:
        transformer = train_transformer(latents, Path(temp))
    transformer.save_pretrained(out / "transformer")
    vae.to(torch.bfloat16).save_pretrained(out / "vae")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(out / "scheduler")
    index = {"_class_name": "FluxPipeline", "_diffusers_version": version("diffusers"),
             "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
             "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    say(f"written to {out}: {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
