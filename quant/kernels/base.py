"""What a kernel is: who multiplies an activation by tiles of a codec.

A new kernel is one module with `get` and one line in the registry (`MODULES`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear as matmul

from ...host.texts import Text
from ..codecs import codec
from ..tile import Tile
from . import by_tiles

if TYPE_CHECKING:
    from ...host import Machine
    from .choose import Wanted

HALF = (torch.float16, torch.bfloat16)


class Activation:
    """x [M, K], and what kernels have made of it: tiles that quantize it alike share that."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave the last time for this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def columns(self, first: int, count: int) -> Activation:
        """Some of the columns."""
        if count == self.x.shape[1]:
            return self
        found: Activation = self.once(("columns", first, count), lambda: Activation(self.x[:, first:first + count]))
        return found


class Speed(NamedTuple):
    """How a kernel runs a codec: NATIVE, USABLE (what "auto" takes where nothing is native) or SLOW, and that in words.
    """

    level: str
    words: str


NATIVE, USABLE, SLOW = "native", "usable", "slow"


class Kernel:
    """Who multiplies tiles. `title` is its name in messages, `codecs` are those it has a matmul for.

    `device`: the only type of device that it is for. `by_name`: it is taken only where it is asked for. `whole_file`:
    it is for files all of whose layers in its codecs it runs. `own_layout`: it takes tiles only, also where the host's
    layout would hold them. `host_switches`: whether it is off where the host has the codec's format off.
    `takes_host_layouts`: whether it also multiplies weights in the host's own layouts (host_tiles.py). `at_load`:
    whether weights of its codecs are dequantized once, when they are loaded. `full_precision`: whether activations stay
    as they are, so that layers that ask for that keep it.
    """

    name: str
    title: str
    codecs: Collection[str] = ()
    device = ""
    by_name = False
    own_layout = False
    whole_file = False
    host_switches = False
    takes_host_layouts = False
    at_load = False
    full_precision = False

    def probe(self, machine: Machine) -> Any:
        """What it finds of what it needs (Machine.found), without side effects."""
        return None

    def runs(self, name: str, machine: Machine) -> str:
        """What keeps it from multiplying the codec of this name there, a sentence or two; empty when nothing does."""
        return ""

    def speed(self, name: str, machine: Machine) -> Speed:
        """How fast to expect it where it runs."""
        raise NotImplementedError

    def quantizes(self, name: str, machine: Machine) -> str:
        """What keeps activations from being quantized, too, as `compute: native` asks; empty when nothing does."""
        return self.runs(name, machine)

    def asked(self, wanted: Wanted, names: Collection[str], machine: Machine) -> tuple[str, str]:
        """(the name under which a widget of its own asks for it, for its codecs of `names`; a note for the report)."""
        return "", ""

    def refuses(self, tile: Tile) -> str:
        """Why it dequantizes a tile of its codecs all the same, in a few words; empty when it does not."""
        return ""

    def warning(self, machine: Machine) -> str:
        """What somebody who wanted this kernel should know, though it was not taken."""
        return ""

    def linear(self, act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
        """x [M, K] times a tile [N, K], plus bias [N], in x's dtype; with the tile's low-rank branch, if it has one.

        Activations are quantized by the codec's rule as far as the kernel has it. Raises one of exact.REFUSALS for what
        it does not take; `exact` answers then.
        """
        raise NotImplementedError

    def exact(self, act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
        """The same by the codec's definition."""
        return dense(act.x, tile, bias)

    def decodes(self, name: str, like: Tensor) -> bool:
        """Whether `linear` multiplies activations of this dtype and device, as many as `like` [tokens, 0] has rows, by
        the weight of a codec as a whole, in full precision: so that it can be kept decoded (kept.py)."""
        return False

    def decoded(self, tile: Tile, like: Tensor) -> Tensor:
        """That weight [rows, columns], without its low-rank branch, for tiles of which it `decodes` the codec."""
        return decoded(tile, like)

    def ordered(self, tile: Tile) -> Tile:
        """A tile in the order of bytes that `linear` takes."""
        return codec(tile.place.codec).natural(tile)


def dense(x: Tensor, tile: Tile, bias: Tensor | None) -> Tensor:
    """x times the dequantized tile, full-precision activations; the low-rank branch as it is."""
    kind = codec(tile.place.codec)
    tile = kind.natural(tile)
    if by_tiles.takes(x):
        if tile.place.codec != "plain":
            return add_low_rank(by_tiles.linear(x, (tile,), bias), x, tile)
        if tile["codes"].dtype == torch.float32:
            return add_low_rank(by_tiles.times(x, tile["codes"], bias), x, tile)
    weight = kind.residual(tile, torch.float32 if kind.shifts else x.dtype)
    shift = kind.shift(weight)
    if shift is not None:
        bias = (shift if bias is None else bias.float() + shift).to(x.dtype)
    return add_low_rank(matmul(x, weight.to(x.dtype), bias), x, tile)


def dense_below(x: Tensor, tiles: Sequence[Tile], bias: Tensor | None) -> Tensor:
    """`dense` of tiles one below the other, all as wide as x, where by_tiles takes x: in one product if they are small,
    and without a copy of the outputs."""
    tiles = [codec(tile.place.codec).natural(tile) for tile in tiles]
    out = by_tiles.linear(x, tiles, bias)
    if any("down" in tile.fields for tile in tiles):
        for tile, part in zip(tiles, out.split([tile.place.rows for tile in tiles], 1), strict=True):
            down, up = tile.get("down"), tile.get("up")
            if down is not None and up is not None and down.shape[1]:
                part.addmm_(x @ down.to(x.dtype), up.to(x.dtype).t())
    return out


def decoded(tile: Tile, like: Tensor) -> Tensor:
    """The weight that `dense` multiplies activations such as these by (Kernel.decodes), bit by bit, without the
    low-rank branch."""
    kind = codec(tile.place.codec)
    tile = kind.natural(tile)
    if by_tiles.takes(like) and (tile.place.codec != "plain" or tile["codes"].dtype == torch.float32):
        return by_tiles.decoded(tile)
    return kind.residual(tile, torch.float32 if kind.shifts else like.dtype).to(like.dtype)


def add_low_rank(out: Tensor, x: Tensor, tile: Tile) -> Tensor:
    """out plus the low-rank branch, in natural order, on the raw activation."""
    down, up = tile.get("down"), tile.get("up")
    if down is None or up is None or not down.shape[1]:
        return out
    return torch.addmm(out, x @ down.to(x.dtype), up.to(x.dtype).t())


class Dequantize(Kernel):
    """Every tile dequantized for its matmul: exact, for any codec on any device."""

    name, title = "", "dequantized weights"

    def speed(self, name: str, machine: Machine) -> Speed:
        # calculated by bytes (docs/formats/fp8.md); nobody has measured it for other codecs
        if name == "fp8":
            return Speed(SLOW, Text("weights stay quantized in memory and are dequantized for every matmul, in full "
                                    "precision (costs about 6-13 % of the linear layers' time on a GPU)"))
        return Speed(SLOW, Text("weights stay quantized in memory and are dequantized for every matmul, in full "
                                "precision"))

    def decodes(self, name: str, like: Tensor) -> bool:
        return True

    def linear(self, act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
        return dense(act.x, tile, bias)


DEQUANTIZE = Dequantize()
