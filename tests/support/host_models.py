"""Tiny models of the host's own classes (host_sizes), and the host made to know those whose sizes are in its code."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from support.host_sizes import BESIDE, CLASSED, FIXED, HEADERS, MODELS, NARROWER, PUBLISHED, SMALLER

OF_ONE_SIZE = FIXED | SMALLER.keys() | CLASSED.keys()  # a config.json would have to say the sizes in the host's code


def make(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a model's file, F32, of numbers that BF16 has: matrices of unit gain, norms around one."""
    import comfy.ops

    place, kwargs = MODELS[name][:2]
    with detected(name):
        net = getattr(*found(place))(**kwargs, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    g, made = torch.Generator().manual_seed(seed), {}
    beside = {key: torch.empty(shape) for key, shape in BESIDE.get(name, {}).items()}
    for key, tensor in (net.state_dict() | beside).items():
        numbers = torch.randn(tensor.shape, generator=g)
        if tensor.ndim > 1:
            numbers = numbers * tensor[0].numel() ** -0.5
        elif key.endswith("weight"):
            numbers = 1 + 0.25 * numbers
        else:
            numbers = 0.1 * numbers
        made[key] = numbers.to(torch.bfloat16).float()
    return PUBLISHED[name](made) if name in PUBLISHED else made


def found(place: str) -> tuple[Any, str]:
    """The module and the name of a class below comfy.ldm."""
    module, _, kind = f"comfy.ldm.{place}".rpartition(".")
    return importlib.import_module(module), kind


@contextlib.contextmanager
def detected(name: str) -> Iterator[None]:
    """Sizes of a tiny model where the host has them in its code: all of them, or those by which it knows a class."""
    import comfy.model_detection
    import comfy.model_sampling
    import comfy.supported_models

    with pytest.MonkeyPatch.context() as patch:
        for place in SMALLER.get(name, {}):
            patch.setattr(*found(place), smaller(name, place))
        if name.startswith("Stable Cascade"):  # whose schedule is asked for ten thousand numbers, half a second a model
            patch.setattr(comfy.model_sampling.StableCascadeSampling, "sigma", lambda self, timestep: timestep)
        detect = comfy.model_detection.detect_unet_config

        def told(tensors: Any, prefix: str, metadata: Any = None) -> dict[str, Any]:
            with contextlib.suppress(Exception):  # it looks at what it always does, whatever it makes of that
                detect(tensors, prefix, metadata)
            return dict(MODELS[name][1])

        if name in FIXED:
            patch.setattr(comfy.model_detection, "detect_unet_config", told)
            for kind in comfy.supported_models.models:
                patch.setattr(kind, "unet_extra_config", {})
        if name in NARROWER:
            place, sizes = NARROWER[name]
            part = getattr(*found(place))
            init = part.__init__
            patch.setattr(part, "__init__", lambda self, *args, **given: init(self, *args, **{**given, **sizes}))
        if name in CLASSED:
            kind = getattr(comfy.supported_models, CLASSED[name])
            patch.setattr(kind, "unet_config", {key: MODELS[name][1][key] for key in kind.unet_config})
        yield


@cache
def smaller(name: str, place: str) -> Any:
    """A class of the host's with other numbers in its source."""
    return resized(getattr(*found(place)), SMALLER[name][place])


def resized(stock: Any, numbers: dict[int, int], words: dict[str, str] | None = None) -> Any:
    """A class or function with other numbers in its source, and other words."""
    made: dict[str, Any] = {}
    source = re.sub(r"\b\d+\b", lambda number: str(numbers.get(int(number[0]), number[0])), inspect.getsource(stock))
    for old, new in (words or {}).items():
        assert old in source, old
        source = source.replace(old, new)
    exec(source, vars(sys.modules[stock.__module__]), made)  # noqa: S102  # the host's own source, or diffusers'
    return made[stock.__name__]


def metadata_of(name: str) -> dict[str, str]:
    """What a file of this model says in its header."""
    if name in HEADERS:
        return {"config": json.dumps({"transformer": HEADERS[name]})}
    if not name.startswith("LTX-2"):
        return {}
    kwargs = {key: value for key, value in MODELS[name][1].items() if key not in ("image_model", "num_layers", "cross_attention_dim")}
    return {"config": json.dumps({"transformer": kwargs})}
