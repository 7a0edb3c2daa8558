"""API workflows for tiny models, as a service would queue them."""

from __future__ import annotations

import asyncio
from typing import Any

_loop = asyncio.new_event_loop()  # which opens sockets when it is made, and none later


def text_to_image(model: list, prefix: str, seed: int = 7, steps: int = 4, size: int = 256) -> dict[str, Any]:
    """Nodes from a MODEL link to a saved picture and latent. Node ids start with `prefix`."""
    return {
        f"{prefix}cond": {"class_type": "QTTest_TinyConditioning",
                          "inputs": {"text": 64, "pooled": 32, "tokens": 7, "seed": 5}},
        f"{prefix}empty": {"class_type": "EmptySD3LatentImage",
                           "inputs": {"width": size, "height": size, "batch_size": 1}},
        f"{prefix}sample": {"class_type": "KSampler", "inputs": {
            "model": model, "seed": seed, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
            "positive": [f"{prefix}cond", 0], "negative": [f"{prefix}cond", 0], "latent_image": [f"{prefix}empty", 0],
            "denoise": 1.0}},
        f"{prefix}paint": {"class_type": "QTTest_LatentColours", "inputs": {"samples": [f"{prefix}sample", 0]}},
        f"{prefix}save": {"class_type": "SaveImage",
                          "inputs": {"images": [f"{prefix}paint", 0], "filename_prefix": f"{prefix}picture"}},
        f"{prefix}latent": {"class_type": "SaveLatent",
                            "inputs": {"samples": [f"{prefix}sample", 0], "filename_prefix": f"{prefix}latent"}},
    }


def queued(node: Any, **inputs: Any) -> bool | str:
    """What a node class of ours says when a prompt of that node alone is posted."""
    import inspect
    from types import SimpleNamespace

    from quantized_transformers.nodes.checks import keep_prompt

    keep_prompt({"prompt": {"1": {"class_type": node.__name__, "inputs": inputs}}})
    asked = type(node.__name__, (node,), {"hidden": SimpleNamespace(unique_id="1")})  # as the host makes it
    taken = inspect.signature(node.validate_inputs).parameters
    found = asked.validate_inputs(**{name: value for name, value in inputs.items() if name in taken})
    return _loop.run_until_complete(found) if inspect.iscoroutine(found) else found


def load_base(reference: str, weights: str = "load", **inputs: Any) -> dict[str, Any]:
    return {"class_type": "QT_LoadBaseModel", "inputs": {
        "base_model": "black-forest-labs/FLUX.1-dev", "component": "transformer", "weights": weights,
        "reference": reference, **inputs}}


def apply_override(model: list, reference: str, kind: str = "auto", **inputs: Any) -> dict[str, Any]:
    return {"class_type": "QT_ApplyTransformerOverride", "inputs": {
        "model": model, "override": "lmsys/flux1-dev-modelopt-fp8-sglang-transformer", "kind": kind,
        "reference": reference, **inputs}}
