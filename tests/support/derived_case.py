"""What the tests know of a class with a derived table (support/derived/<table>.py): where its table is from, and how it
runs in diffusers and in the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

SIGMA = torch.tensor([0.5])


class Source(NamedTuple):
    """`models` of support/host_models.py that together have every tensor of the class, `converter` of diffusers, numbers
    in its source that are a real size -> those of the tiny model, what it expects before every name, (pattern, name) of
    what publishers call otherwise than the host's modules, as the host knows, what is wrong in the converter's source ->
    what is right, and what only the host's files have, which nothing it runs reads. `real`: what published configurations
    say, where it is not diffusers' default.

    Without a converter the table is written by hand, or by `rule`, and the forwards alone say that it is right; one
    without rows says that diffusers' class has the host's names and shapes (tables.by_table). `by_hand` are names that the
    converter leaves out or as they are (patterns, each with what it becomes, one after the other). `convert`, where the
    host has the table: the same by it. `apart`: the beginnings of names that are in a component beside the transformer."""

    models: tuple[str, ...]
    converter: str = ""
    sizes: dict[int, int] = {}
    prefix: str = ""
    published: tuple[str, str] = ("^$", "")
    by_hand: tuple[tuple[str, str], ...] = ()
    mended: dict[str, str] = {}
    unread: tuple[str, ...] = ()
    real: tuple[dict[str, Any], ...] = ()
    convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    rule: Callable[[], dict[str, list[str]]] | None = None
    apart: tuple[str, ...] = ()


class Case(NamedTuple):
    """A tiny model: diffusers' `config`, the host's `model` of its sizes (support/host_models.py; any
    name where it is not among SOURCE's models and the host detects it by its shapes), `forward` of diffusers'
    (what the host's gives, of what the host takes), the `inputs`, latents first, and `conds`: what the host is given
    beside the latents, of the inputs. `lora`: a Linear in diffusers' names and in the host's, of a LoRA; `maps`: whether
    the host takes LoRAs in diffusers' names (comfy/lora.py). `companions`: the configurations of the components beside it
    that are part of the host's model. `kind`: diffusers' class, where it is not the first. `prefix`: of
    diffusers' LoRAs."""

    config: dict[str, Any]
    model: str
    forward: Callable[..., torch.Tensor]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    conds: Callable[..., dict[str, Any]]
    lora: tuple[str, str]
    maps: bool = True
    companions: dict[str, dict[str, Any]] = {}
    kind: str = ""
    prefix: str = "transformer."


def discrete(betas: torch.Tensor) -> torch.Tensor:
    """The time step of SIGMA on a schedule in F64, as ModelSamplingDiscrete of comfy/model_sampling.py finds it."""
    kept = (1 - betas).cumprod(0)
    return ((1 - kept) / kept).log().div(2).sub(SIGMA.log()).abs().argmin()[None].float()


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    """Seeded numbers, others for other shapes."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def patches(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> tokens of 2 x 2, [B, HW/4, 4C]."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def pictures(tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """What `patches` made tokens of."""
    b, _, c = tokens.shape
    return tokens.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def grid(h: int, w: int) -> torch.Tensor:
    """(0, y, x) of every token."""
    return torch.stack([torch.zeros(h, w), torch.arange(h)[:, None].expand(h, w), torch.arange(w).expand(h, w)],
                       -1).reshape(-1, 3).float()


def picture(width: int, tokens: int = 7, channels: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and an encoded prompt."""
    return noise(1, channels, 8, 12), noise(1, tokens, width)
