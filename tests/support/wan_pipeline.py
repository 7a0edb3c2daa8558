"""A whole tiny WanPipeline (T2V) as diffusers saves it: random weights, so its videos are noise, but each seed has its own."""

from __future__ import annotations

import json
from pathlib import Path

from support import text_encoders, vaes, wan

SIZE, FRAMES = 64, 5


def complete(out: Path) -> Path:
    """Write it to `out`: transformer, text encoder and tokenizer, VAE, scheduler, index."""
    from diffusers import UniPCMultistepScheduler

    index = {"_class_name": "WanPipeline", "_diffusers_version": "0.37.0", **text_encoders.save("wan", out),
             **vaes.save("wan", out), "transformer": ["diffusers", "WanTransformer3DModel"],
             "scheduler": ["diffusers", "UniPCMultistepScheduler"], "transformer_2": [None, None], "boundary_ratio": None}
    wan.make().save_pretrained(out / "transformer")
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).save_pretrained(out / "scheduler")
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return out
