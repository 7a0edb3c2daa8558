"""Decoded weights kept beside the quantized ones while a MODEL samples: speed for memory that is free.

A run begins as ever; its first step shows what activations each layer gets, and what memory a step takes beside the
weights. From the second on, before each step, the host is asked what is free: layers that decode their weight for every
product (Linear.decoding) keep it, the largest first, as far as that goes, and let go of it where memory has become
short, or runs out. After the run nothing is left. A kept weight is bit by bit what the layer decodes; only the order of
sums in F32 may differ.

Nothing of it is in the modules' parameters or buffers, nor in copies of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from .. import host
from . import multiply
from .kernels import by_tiles
from .layouts.tiled import is_tiled, parameter, params_of, plain_shift, shifts
from .tile import Tile

KEY = "qt.kept"
logger = logging.getLogger(__name__)


@dataclass
class Kept:
    """What a layer has beside its weight during a run. `like` [tokens, 0] stands for the activations that it was given;
    `weight` is the decoded one, as plain tiles, of the codes `of`; `shift` [rows] goes with it onto the stored bias."""

    like: Tensor | None = None
    weight: Any = None
    of: Tensor | None = None
    shift: Tensor | None = None
    bytes: int = 0

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the layer has none."""

    def times(self, layer: Any, x: Any) -> Tensor | None:
        """x [..., K] times the kept weight, plus bias; None where there is none for this x."""
        if type(x) is not Tensor or x.requires_grad:
            return None
        like = self.like
        if self.weight is None:
            tokens = x.numel() // max(x.shape[-1], 1)
            if like is None or len(like) < tokens:
                self.like = x.new_empty(tokens, 0)
            return None
        if like is None or x.dtype != like.dtype or x.device != like.device or self.of is not layer.weight._qdata:
            return None
        host.before_layer()
        bias = layer.bias
        if self.shift is not None:
            bias = self.shift if bias is None else bias.float() + self.shift
        return multiply.linear(x, self.weight, bias)

    def decode(self, layer: Any) -> None:
        """Keep the weight of a layer for activations such as it was given."""
        weight, found = layer.weight, layer.decoding(self.like)
        tiles = [Tile(tile.place._replace(codec="plain"), {"codes": make()}).having(
            down=tile.get("down"), up=tile.get("up")) for tile, make in found]
        more = is_tiled(weight) and bool(found[0][0].fields)  # else the weight was decoded with all that it has
        self.shift = plain_shift(weight) if is_tiled(weight) else None
        self.weight = parameter(*params_of(tiles, weight.dtype, tuple(weight.shape),
                                           delta=weight._params.delta if more else None))
        self.of, self.bytes = weight._qdata, sum(tile["codes"].nbytes for tile in tiles)

    def forget(self) -> None:
        """Let go of the weight."""
        self.weight = self.of = self.shift = None
        self.bytes = 0


class Run:
    """One sampling run: `step` around every evaluation of the model, `end` when it is over. `most`: bytes, 0 for what
    is free."""

    def __init__(self, patcher: Any, most: int) -> None:
        self.patcher, self.device, self.most = patcher, patcher.load_device, most
        self.layers: dict[Any, Kept] = {}
        self.sizes: dict[Any, int] = {}  # of those that can be kept, the largest first
        self.steps, self.activations, self.full = 0, 0, False

    @property
    def bytes(self) -> int:
        """What is kept."""
        return sum(kept.bytes for kept in self.layers.values())

    def step(self, call: Callable[[], Any]) -> Any:
        """`call()` with what can be kept for it."""
        if self.steps:
            self._settle()
        else:  # the model has been loaded
            self.layers = {layer: Kept() for layer in layers(self.patcher)}
            for layer, kept in self.layers.items():
                layer.kept = kept
        self.steps += 1
        out, done = self._measured(call)
        if not done:
            logger.warning("Keep Weights Decoded: memory ran out, so nothing is kept any more in this run.")
            self.full = True
            self._forget(self.layers)
            out = call()
        if self.steps == 2:
            count = sum(kept.weight is not None for kept in self.layers.values())
            away = sum(not resident(layer, self.layers[layer].like) for layer in self.sizes)
            logger.info("Keep Weights Decoded: kept %d of %d layers decoded, %.2f GB%s.", count, len(self.sizes),
                        self.bytes / 1e9, f"; {away} are streamed by ComfyUI" if away else "")
        return out

    def end(self) -> None:
        """Leave nothing behind."""
        for layer, kept in self.layers.items():
            kept.forget()
            if layer.kept is kept:
                layer.kept = None
        self.layers = {}

    def _measured(self, call: Callable[[], Any]) -> tuple[Any, bool]:
        """(what `call` gives, whether it came to its end: not where memory ran out and some can be given back)."""
        host.forget_peak(self.device)
        before = host.allocated_memory(device=self.device)
        try:
            out = call()
        except Exception as error:
            if self.bytes and host.is_out_of_memory(error):
                return None, False
            raise
        self.activations = max(self.activations, host.allocated_memory(True, self.device) - before)
        return out, True

    def _settle(self) -> None:
        """Keep what there is memory for now."""
        if self.steps == 1:
            found = {layer: size_of(layer, kept.like) for layer, kept in self.layers.items()
                     if kept.like is not None and can_keep(layer, kept.like)}
            self.sizes = dict(sorted(found.items(), key=lambda one: -one[1]))
            host.empty_cache()  # so that what stays does not lie among what a step takes and gives back
        self._forget(layer for layer, kept in self.layers.items() if layer.kept is not kept)  # the host has moved it
        held = self.bytes
        room = held + host.spare_memory(self.device, self.activations)
        room = min(room, self.most) if self.most else room
        for layer in reversed(self.sizes):
            if held <= room:
                break
            held -= self.layers[layer].bytes
            self._forget([layer])
            self.full = True  # what has become short once will again
        for layer, size in self.sizes.items():
            kept = self.layers[layer]
            if self.full or kept.weight is not None or held + size > room or layer.kept is not kept \
                    or not resident(layer, kept.like):
                continue
            try:
                kept.decode(layer)
            except Exception as error:
                if not host.is_out_of_memory(error):
                    raise
                self.full = True
            held += kept.bytes

    def _forget(self, layers: Iterable[Any]) -> None:
        for layer in layers:
            self.layers[layer].forget()


def layers(patcher: Any) -> Iterator[Any]:
    """The Linears of a MODEL whose weight is quantized, and may be decoded by this pack."""
    return (module for module in patcher.model.diffusion_model.modules()
            if hasattr(module, "decoding") and isinstance(module.weight, QuantizedTensor))


def can_keep(layer: Any, like: Tensor) -> bool:
    """Whether a layer decodes its weight for activations such as these, wherever it is now. Not in 16 bit where shifts
    of its bias would be rounded otherwise: by each tile, or in F32 with the product."""
    found = layer.decoding(like)
    if like.dtype != torch.float32 and is_tiled(layer.weight) and shifts(layer.weight):
        return len(found) == 1 and not by_tiles.takes(like)
    return bool(found)


def resident(layer: Any, like: Tensor | None) -> bool:
    """Whether all of a layer is where it computes, and the host does not stream it."""
    return like is not None and "_v" not in layer.__dict__ and all(
        tensor is None or tensor.device == like.device for tensor in (layer.weight, layer.bias))


def size_of(layer: Any, like: Tensor) -> int:
    """Bytes of a layer's decoded weight."""
    return layer.weight.numel() * (4 if by_tiles.takes(like) else like.element_size())


def attach(patcher: Any, most: int) -> None:
    """Keep decoded weights whenever this MODEL, or a clone of it, samples: of at most so many bytes (0: all that is
    free)."""
    host.around_sampling(patcher, KEY, partial(Run, most=most))
