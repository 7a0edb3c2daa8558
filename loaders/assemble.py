"""A plan and its files -> the host's native state dict, one module at a time, with every stored tensor accounted for.

Bytes that need no re-layout stay the memory-mapped views they were loaded as. Copies are made only of unquantized
tensors that the host fuses, of tiles that share one scale, of bytes in another order than the host's, and of the one
modulation whose halves are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..host.texts import Text
from ..quant.stored import read_scale
from . import damage
from .architectures import Module
from .architectures.base import tensor_name
from .architectures.passthrough import HostModel
from .errors import CheckpointError
from .plan import Layer, LoadPlan, Piece, Planned
from .words import first_ten, grouped

if TYPE_CHECKING:
    from torch import Tensor

    from ..quant.tile import Coded, Tile
    from .containers.checkpoint import Checkpoint

# Modules whose width ComfyUI's detection reads from the weight's columns, half as many when two codes share a byte
# (ComfyUI's comfy/model_detection.py).
DETECTED = frozenset({"img_in", "txt_in", "vector_in.in_layer", "txt_in.input_embedder", "cap_embedder.1",
                      "x_embedder"})


@dataclass
class NativeStateDict:
    """Tensors under the host's names, and what the report says about them.

    `layouts` counts the quantized modules by what their markers say, `codecs` are those of this pack's tiles; `joined`
    modules have several tiles, `dynamic` ones activation scales that are computed. `copied` is called while the host
    copies the tensors, to let go of what they were copied from; `runs` are lines on how they run. `unread`: native
    modules -> their stored weights, whose scales lie among codes that nothing has read yet (damage.watch).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    layouts: dict[str, int] = field(default_factory=dict)
    codecs: set[str] = field(default_factory=set)
    joined: int = 0
    dynamic: int = 0
    copied: Callable[[], None] = lambda: None
    runs: list[str] = field(default_factory=list)
    unread: dict[str, list[damage.Rows]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    layer_notes: list[str] = field(default_factory=list)  # "layer: text"


class Tensors:
    """The tensors of a plan's files by stored name, memory-mapped, each of them taken once."""

    def __init__(self, checkpoint: Checkpoint, plan: LoadPlan) -> None:
        self.mapped, self.stored = checkpoint.load_tensors(), plan.stored
        self.in_file = lambda name: checkpoint.in_file(plan.stored(name))  # for messages
        self.copied: Callable[[], None] = lambda: None  # called while the host copies what was made of them

    def take(self, layer: Layer) -> dict[str, Tensor]:
        """The tensors of a layer: "weight" and its other leaves. Raises KeyError for one that is not there."""
        return {leaf if i else "weight": self.mapped.pop(self.stored(tensor_name(layer.name, leaf)))
                for i, leaf in enumerate(layer.leaves)}

    def left(self) -> Collection[str]:
        """Stored names of tensors that nothing has taken."""
        return self.mapped.keys()

    def opened(self) -> AbstractContextManager[object]:
        """A context for all reading."""
        return nullcontext()


class Layers:
    """Stored layers as tiles, read when the first of their pieces is asked for and let go with the last. `deep`: also
    scales that lie among codes are looked at, which reads the whole layer."""

    def __init__(self, tensors: Tensors, deep: bool = True) -> None:
        self.tensors, self.deep = tensors, deep
        self._open: dict[str, list[Coded | None]] = {}
        self._kept: dict[str, dict[str, Tensor]] = {}

    def plain(self, piece: Piece) -> dict[str, Tensor]:
        """The rows of a piece of a layer that is not quantized."""
        layer = piece.layer
        part = self._kept.pop(layer.name, None) or self.tensors.take(layer)
        if layer.kept:
            self._kept[layer.name] = dict(part)
        return _rows(part, layer, piece.rows)

    def take(self, layer: Layer, split: int = 0) -> Coded:
        """One piece of a quantized layer; each can be taken once. Raises ValueError for scales that mean nothing."""
        if layer.name not in self._open:
            assert layer.read is not None
            part = self.tensors.take(layer)
            pieces = layer.read(layer, part)
            tiles = [tile for piece in pieces for tile in piece.tiles]
            damage.refuse(layer, part, tiles, self.tensors.in_file, self.deep)
            self._open[layer.name] = list(_apart(pieces))
        splits = self._open[layer.name]
        taken, splits[split] = splits[split], None
        assert taken is not None
        if not any(splits):
            del self._open[layer.name]
        return taken


def _apart(pieces: Sequence[Coded]) -> Iterator[Coded]:
    """Pieces of one stored layer with tensors of their own: no file can be saved of modules whose tensors are one in
    memory."""
    earlier: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.data_ptr() in earlier else tensor

    for piece in pieces:
        yield piece._replace(tiles=tuple([tile.apply(own) for tile in piece.tiles]))
        earlier.update(tensor.data_ptr() for tile in piece.tiles for tensor in tile.fields.values())


def assemble(plan: LoadPlan, tensors: Tensors, *, dequantize: bool = False, own: Collection[str] = (),
             step: Callable[[], None] = lambda: None,
             refuses: Callable[[Tile], str] = lambda tile: "", deep: bool = True) -> NativeStateDict:
    """Build the native state dict, emptying `tensors` on the way.

    `dequantize` asks the host for full-precision matmul in every quantized module, `own` are codecs that go into this
    pack's layout for other kernels than the host's; `step` is called once a module. `refuses` says why a tile is
    dequantized though its codec has a kernel, which becomes a note ("" for those that are not); `deep` is that of
    Layers. Raises CheckpointError for an invalid scale, a missing tensor, or tensors that nothing used.
    """
    import torch

    native, where, layers = NativeStateDict(copied=tensors.copied), plan.description.reference, Layers(tensors, deep)
    with tensors.opened():
        for planned in plan.modules:
            try:
                add(native, planned, layers, dequantize, own, refuses)
            except (ValueError, KeyError) as error:
                first = planned.pieces[0].layer.name
                what = Text("{layer}: no tensor {name}", layer=first, name=error) if isinstance(error, KeyError) else \
                    Text("{error}", error=error)
                raise CheckpointError(what, where, plan.hint) from error
            step()
    tensors.copied()
    for mark in plan.architecture.marks(plan.description.dims):
        tensors.mapped.pop(plan.description.naming.prefix + mark, None)
        native.tensors[mark] = torch.zeros(0)
    if isinstance(plan.architecture, HostModel):
        native.tensors.update(plan.architecture.made)
    left = sorted(set(tensors.left()) - set(plan.ignored))
    if left:
        raise CheckpointError(Text("{count} stored tensors were not used: {names}", count=len(left),
                                   names=first_ten(left)), where,
                              Text("report this; the checkpoint holds more than its architecture"))
    native.notes += grouped(native.layer_notes)
    return native


def add(native: NativeStateDict, planned: Planned, layers: Layers, dequantize: bool = False,
        own: Collection[str] = (), refuses: Callable[[Tile], str] = lambda tile: "") -> None:
    """Add one native module. Raises ValueError or KeyError for tensors that do not fit."""
    module, pieces = planned
    if all(piece.layer.read is None for piece in pieces):
        parts = [layers.plain(piece) for piece in pieces]
        _put(native, module, tensor_name(module.native, module.leaf), [part["weight"] for part in parts])
        if module.bias:
            _put(native, module, f"{module.native}.bias", [part["bias"] for part in parts])
        return
    from ..quant.stored import plain_tile
    from ..quant.tile import Coded

    found = []
    for piece in pieces:
        if piece.layer.read is None:
            part = layers.plain(piece)
            found.append(Coded((plain_tile(part["weight"]),), part.get("bias")))
        else:
            found.append(layers.take(piece.layer, piece.split))
    if found[0].native is not None:
        _pass_on(native, module, found[0].native, dequantize)
        return
    if not layers.deep:
        native.unread |= _unread(planned, found, layers.tensors.in_file)
    _quantized(native, planned, found, layers, dequantize, own, refuses)


def _unread(planned: Planned, found: list[Coded], stored: Callable[[str], str]) -> dict[str, list[damage.Rows]]:
    """A module with layers whose scales have not been looked at -> the weights of these."""
    from ..quant.codecs import codec

    names = [damage.Rows(stored(tensor_name(piece.layer.name, piece.layer.leaves[0])), piece.row, piece.rows)
             for piece, one in zip(planned.pieces, found, strict=True)
             if any(codec(tile.place.codec).deep for tile in one.tiles)]
    return {planned.module.native: names} if names else {}


def _quantized(native: NativeStateDict, planned: Planned, found: list[Coded], layers: Layers, dequantize: bool,
               own: Collection[str], refuses: Callable[[Tile], str]) -> None:
    import torch

    from ..quant.codecs import codec
    from ..quant.layouts import stored
    from ..quant.layouts.join import join
    from ..quant.stored import plain_tile

    module, pieces = planned
    tiles = [tile.at(piece.row + tile.place.row, piece.column + tile.place.column)
             for piece, one in zip(pieces, found, strict=True) for tile in one.tiles]
    native.layer_notes += [note for one in found for note in one.notes]
    if len(pieces) > 1 or module.swap_halves:  # one alone may have the rows that the host's kernels pad
        for piece, one in zip(pieces, found, strict=True):
            rows = max((tile.place.row + tile.place.rows for tile in one.tiles), default=0)
            if rows > piece.rows:
                raise ValueError(Text("{layer} is padded to {rows} rows, expected {expected} in a layer that ComfyUI "
                                      "fuses", layer=piece.layer.name, rows=rows, expected=piece.rows))
    packed = any(tile["codes"].shape[1] != tile.place.columns for tile in tiles)  # GPTQ's and AWQ's words among them
    wide = packed and (module.detected or module.native in DETECTED)
    if wide or len(tiles) > 1 and module.by_rows:  # of several tiles the host sees the first
        kinds = ", ".join(dict.fromkeys(codec(tile.place.codec).title for tile in tiles))
        native.notes.append(Text("{module}: {formats} dequantized, because ComfyUI detects the model by its width",
                                 module=module.native, formats=kinds) if wide else
                            Text("{module}: {formats} dequantized, because ComfyUI detects the model by its height, "
                                 "and its parts have scales of their own", module=module.native, formats=kinds))
        for piece, one in zip(pieces, found, strict=True):  # what is read here is not read again
            damage.refuse(piece.layer, {}, one.tiles, layers.tensors.in_file, deep=True)
        native.unread.pop(module.native, None)
        tiles = [plain_tile(codec(tile.place.codec).dequantize(tile, torch.float32)).at(tile.place.row)
                 for tile in tiles]
    delta = next((one.delta for one in found if one.delta is not None), None)
    if all(tile.place.codec == "plain" for tile in tiles):
        if delta is not None:
            raise ValueError(Text("{layer}: a delta beside a weight that is not quantized", layer=pieces[0].layer.name))
        _put(native, module, tensor_name(module.native, module.leaf), [tile["codes"] for tile in tiles])
    else:
        if module.swap_halves:
            if len(tiles) > 1:
                raise ValueError(Text("{layer}: halves of a fused layer cannot be exchanged",
                                      layer=pieces[0].layer.name))
            tiles = [codec(tiles[0].place.codec).swapped(tiles[0])]
        shape = (sum(module.rows), module.inner[0])
        if module.kind == "embedding":  # which the host looks rows up in where they are in two of its formats only
            own = {tile.place.codec for tile in tiles}
        # What this pack's kernels alone multiply is dequantized by its kernel; a saved file does not keep that choice.
        asked = dequantize and all(codec(tile.place.codec).requantizes for tile in tiles)
        done = join(tiles, [piece.layer.name for piece in pieces], shape, own=own,
                    full_precision=asked or any(one.full_precision for one in found))
        native.tensors.update({f"{module.native}.{leaf}": tensor for leaf, tensor in done.tensors.items()})
        native.layouts[done.layout] = native.layouts.get(done.layout, 0) + 1
        native.codecs |= {tile.place.codec for tile in tiles} if done.layout == stored.FORMAT else set()
        native.joined += done.tiles > 1
        native.dynamic += done.dynamic
        native.notes += done.notes
        native.layer_notes += [Text("{module}: dequantized for every matmul, because of {why}", module=module.native,
                                    why=why)
                               for why in map(refuses, done.own) if why]
        if delta is not None:
            if done.layout != stored.FORMAT:
                raise ValueError(Text("{layer}: a delta beside a weight that ComfyUI's own layout holds",
                                      layer=pieces[0].layer.name))
            native.tensors[f"{module.native}.weight_delta"] = delta
    _add_bias(native, planned, found)


def _add_bias(native: NativeStateDict, planned: Planned, found: list[Coded]) -> None:
    """One bias: that of pieces which lie beside each other is the sum, in F32."""
    import torch

    module, pieces = planned
    if not module.bias:
        for piece, one in zip(pieces, found, strict=True):
            if one.bias is not None and one.bias.any():
                raise ValueError(Text("{layer} has a bias, and this model has none there", layer=piece.layer.name))
        return
    biases = [one.bias for one in found]
    if any(piece.column for piece in pieces):
        total = torch.zeros(sum(module.rows))
        for piece, bias in zip(pieces, biases, strict=True):
            assert bias is not None
            total[piece.row:piece.row + len(bias)] += bias.float()
        biases = [total]
    _put(native, module, f"{module.native}.bias", [bias for bias in biases if bias is not None])


def _pass_on(native: NativeStateDict, module: Module, leaves: Mapping[str, Tensor], dequantize: bool) -> None:
    """A layer in the host's own format as it is stored."""
    import json

    from ..quant.marker import marker

    conf = json.loads(leaves["comfy_quant"].numpy().tobytes())
    if dequantize:
        leaves = {**leaves, "comfy_quant": marker({**conf, "full_precision_matrix_mult": True})}
    native.tensors.update({f"{module.native}.{leaf}": tensor for leaf, tensor in leaves.items()})
    word = str(conf["format"])
    native.layouts[word] = native.layouts.get(word, 0) + 1


def _rows(part: dict[str, Tensor], layer: Layer, rows: int) -> dict[str, Tensor]:
    """The rows that are wanted of unquantized tensors, as views; one in FP8 times its scale, if it has one."""
    scale = read_scale(layer.name, part, "weight_scale")
    if scale is not None:
        part = {leaf: tensor for leaf, tensor in part.items() if leaf != "weight_scale"}
        part["weight"] = part["weight"].float() * scale
    return {leaf: tensor if tensor.shape[:1] == (rows,) or not rows else tensor[layer.first:layer.first + rows]
            for leaf, tensor in part.items()}


def _put(native: NativeStateDict, module: Module, name: str, parts: list[Tensor]) -> None:
    """Add a tensor of all parts' rows: the stored view itself for a single part, one copy for several. FP8 becomes
    BF16, which has all its numbers."""
    import torch

    from ..quant.memory import cat

    fp8 = torch.float8_e4m3fn, torch.float8_e5m2
    parts = [part.to(torch.bfloat16) if part.dtype in fp8 else part for part in parts]
    whole = parts[0] if len(parts) == 1 else cat(parts)
    whole = whole.reshape(module.shape) if module.shape else whole
    # diffusers' scale|shift against the vendor's shift|scale
    native.tensors[name] = cat(whole.chunk(2)[::-1]) if module.swap_halves else whole
