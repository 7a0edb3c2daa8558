"""The miniature: a FLUX.1 of 2 M parameters that draws six pictures (tests/train_miniature.py makes it).

`tests/data/miniature` holds what was trained: transformer, VAE and scheduler. Text encoders are random and frozen, and
a tokenizer of theirs alone is larger than the model; so they are no files but a recipe, and `complete` writes the whole
pipeline that diffusers and the nodes load.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch

from support.text_encoders import CLIP_END, CLIP_VOCAB, tokenizer_clip, tokenizer_t5

FOLDER = Path(__file__).resolve().parents[1] / "data" / "miniature"
SIZE = 96  # pixels; 12 x 12 latents, 36 tokens
STEPS = 12
SCALE, SHIFT = 0.3611, 0.1159  # of FLUX.1's latents (comfy/latent_formats.py, and every FLUX.1 vae/config.json)
TEXT, POOLED = 64, 32
# Picture of skimage.data → what it shows, and the square that is learned: top, left, size in its pixels.
PICTURES = {"astronaut": ("an astronaut", (0, 60, 330)), "chelsea": ("a cat", (0, 75, 300)),
            "coffee": ("a cup of coffee", (20, 110, 380)), "rocket": ("a rocket", (40, 180, 330)),
            "hubble_deep_field": ("distant galaxies", (300, 300, 300)), "camera": ("a photographer", (20, 70, 380))}
PROMPTS = tuple(prompt for prompt, _ in PICTURES.values())
PHRASES = (("{}", 0), ("a photo of {}", 0), ("{}, mirrored", 1))  # how each is asked for, and which of `pictures` it is


def pictures() -> torch.Tensor:
    """What the model learns: F32 [6, 2, 3, SIZE, SIZE] in -1..1, each picture as it is and mirrored."""
    from PIL import Image
    from skimage import data

    out = []
    for name, (_, (top, left, size)) in PICTURES.items():
        image = Image.fromarray(getattr(data, name)()).convert("RGB")
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=(left, top, left + size, top + size))
        x = torch.from_numpy(numpy.asarray(image, dtype=numpy.float32) / 127.5 - 1).permute(2, 0, 1)
        out.append(torch.stack([x, x.flip(-1)]))
    return torch.stack(out)


def psnr(a: Any, b: Any, span: float) -> float:
    """Peak signal-to-noise ratio in dB of two arrays or tensors whose values span `span`."""
    error = float(((numpy.asarray(a, dtype=numpy.float64) - numpy.asarray(b, dtype=numpy.float64)) ** 2).mean())
    return float("inf") if error == 0 else 10 * float(numpy.log10(span ** 2 / error))


def _frozen(model: Any, seed: int, silent: tuple[str, ...] = ()) -> Any:
    """Random weights of unit gain, norms of one, no biases; those whose names end in `silent` are zero. BF16.

    The numbers come from numpy's RandomState, whose streams never change (numpy's NEP 19).
    """
    numbers = numpy.random.RandomState(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.ndim == 1 or name.endswith(silent):
                p.fill_(float("norm" in name and name.endswith("weight")))
            else:
                gain = 1.0 if "embed" in name or "shared" in name else p.shape[1] ** -0.5
                p.copy_(torch.from_numpy(numbers.standard_normal(tuple(p.shape)) * gain))
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def text_encoders() -> tuple[Any, Any]:
    """(CLIPTextModel, T5EncoderModel). CLIP mixes the prompt into its pooled state. T5 gives every token its embedding
    (its layers add nothing) and padding zero, so that a prompt may be padded to any length."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = _frozen(CLIPTextModel(CLIPTextConfig(
        hidden_size=POOLED, intermediate_size=2 * POOLED, num_hidden_layers=2, num_attention_heads=2, projection_dim=POOLED,
        vocab_size=CLIP_VOCAB, bos_token_id=49406, eos_token_id=CLIP_END)), 1)
    t5 = _frozen(T5EncoderModel(T5Config(
        vocab_size=32128, d_model=TEXT, d_kv=16, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu",
        dropout_rate=0.0)), 2, silent=("SelfAttention.o.weight", "wo.weight"))
    with torch.no_grad():
        t5.shared.weight[0] = 0
    return clip, t5


def complete(out: Path, source: Path = FOLDER) -> Path:
    """Write the whole FluxPipeline (diffusers' layout) to `out`: `source` with text encoders and tokenizers."""
    shutil.copytree(source, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    index = json.loads((out / "model_index.json").read_text(encoding="utf-8"))
    for name, model in zip(("text_encoder", "text_encoder_2"), text_encoders(), strict=True):
        model.save_pretrained(out / name)
        index[name] = ["transformers", type(model).__name__]
    index["tokenizer"] = ["transformers", tokenizer_clip(out / "tokenizer")]
    index["tokenizer_2"] = ["transformers", tokenizer_t5(out / "tokenizer_2")]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return out
