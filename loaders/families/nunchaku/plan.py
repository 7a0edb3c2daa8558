"""Which stored layers make up every native module, checked against the headers: shapes, dtypes, nothing left over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ....host.texts import Text, either
from ...architectures import Dims, Module, Naming
from ...architectures.base import tensor_name
from ...containers.safetensors import TensorInfo
from ...words import first_ten
from .recognise import HALF, PRECISIONS, Found
from .table import Entry
from .writers import NUNCHAKU

W4A4 = {"int4": "SVDQ INT4", "nvfp4": "SVDQ NVFP4"}  # names of the stored formats in reports and layer maps
AWQ = "AWQ INT4"
COLOURS = {"SVDQ INT4": (214, 140, 60), "SVDQ NVFP4": (150, 110, 214), AWQ: (200, 90, 140)}
UNNEEDED = "smooth_factor_orig"  # what smoothing was before it was fused away: never part of the arithmetic
LEAVES = ("qweight", "wscales", "wzeros", "wtscale", "wcscales", "smooth_factor", UNNEEDED, "proj_down", "proj_up",
          "bias")
_FLOATS = (*HALF, "F32")


class Layer(NamedTuple):
    """One stored quantized layer: name, entry, the rows it gives to each of its native modules, and its columns."""

    name: str
    entry: Entry
    counts: tuple[int, ...]
    columns: int

    @property
    def rows(self) -> int:
        return sum(self.counts)


class Piece(NamedTuple):
    """The rows that a stored layer gives to one native Linear, as number `split` of its splits, and where they go."""

    layer: Layer
    split: int
    row: int
    column: int


class Rows(NamedTuple):
    """`rows` rows from `first` of a stored unquantized module, which has `total` rows."""

    stored: str
    first: int
    rows: int
    total: int


class Planned(NamedTuple):
    """A native module from quantized pieces, or from unquantized rows."""

    module: Module
    pieces: tuple[Piece, ...] = ()
    plain: tuple[Rows, ...] = ()


@dataclass
class Plan:
    """All native modules in the host's order, and what the headers have against them.

    `layers` are the quantized layers that the file holds, by stored name; `kept` those that it holds unquantized.
    """

    modules: list[Planned] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def counts(self) -> tuple[int, int]:
        """(W4A4 layers, AWQ layers)."""
        awq = sum(layer.entry.awq > 0 for layer in self.layers.values())
        return len(self.layers) - awq, awq


def make_plan(found: Found, dims: Dims) -> Plan:
    """Plan the load of a recognised file as a model of these sizes; what forbids it is in `problems`."""
    plan, used = Plan(), set[str]()
    modules = list(found.family.architecture.modules(dims, Naming("diffusers")))
    natives = {module.native: module for module in modules}
    pieces: dict[str, list[Piece]] = {}
    optional: dict[str, bool] = {}
    for name, block, entry, may_be_plain in found.family.entries(dims):
        layer, places = _place(name, block, entry, natives, dims["hidden"])
        optional[name] = may_be_plain
        for native, piece in zip(entry.natives, places, strict=True):
            pieces.setdefault(block + native, []).append(piece)
        if f"{name}.qweight" in found.tensors:
            plan.layers[name] = layer
    for module in modules:
        plan.modules.append(_planned(plan, found, module, tuple(pieces.get(module.native, ())), used))
    biased = {piece.layer.name for planned in plan.modules if planned.module.bias for piece in planned.pieces}
    for layer in plan.layers.values():
        plan.problems += _layer_problems(layer, found, layer.name in biased, used)
    marks = set(found.family.architecture.marks(dims))
    extra = [found.stored[name] for name in found.tensors if name not in used and name not in marks]
    if extra:
        plan.problems.append(Text("{count} unexpected tensors: {names}", count=len(extra), names=first_ten(extra)))
    _check_counts(plan, optional)
    _check_tensor_scales(plan, found)
    plan.problems = list(dict.fromkeys(plan.problems))  # native modules share stored layers
    return plan


def _place(name: str, block: str, entry: Entry, natives: dict[str, Module], hidden: int) -> tuple[Layer, list[Piece]]:
    modules = [natives[block + native] for native in entry.natives]
    counts = tuple(entry.rows * hidden or sum(module.rows) for module in modules)
    layer = Layer(name, entry, counts, entry.columns * hidden or modules[0].inner[0])
    return layer, [Piece(layer, i, entry.row * hidden, entry.column * hidden) for i in range(len(modules))]


def _planned(plan: Plan, found: Found, module: Module, pieces: tuple[Piece, ...], used: set[str]) -> Planned:
    """The module from its quantized pieces where the file has them, else from unquantized tensors."""
    missing = [piece.layer.name for piece in pieces if piece.layer.name not in plan.layers]
    if pieces and not missing:
        return Planned(module, pieces)
    if len(missing) < len(pieces):
        plan.problems += [Text("missing tensor {name}", name=f"{found.prefix}{name}.qweight") for name in missing]
        return Planned(module)
    rows = tuple(_plain_rows(found, module, pieces))
    if not rows:
        names = missing or [found.family.stored_plain(name) for name in module.stored]
        leaf = "qweight" if missing else module.stored_leaf
        plan.problems += [Text("missing tensor {name}", name=found.prefix + tensor_name(name, leaf)) for name in names]
        return Planned(module)
    plan.kept += [name for name in missing if name not in plan.kept]
    for part in rows:
        weight = tensor_name(part.stored, module.stored_leaf)
        plan.problems += _plain_problems(found, weight, (part.total, *module.inner), used)
        if module.bias:
            plan.problems += _plain_problems(found, f"{part.stored}.bias", (part.total,), used)
    return Planned(module, plain=rows)


def _plain_rows(found: Found, module: Module, pieces: tuple[Piece, ...]) -> Iterator[Rows]:
    """Where the unquantized rows of a module are: under diffusers' names, or in Nunchaku's joined layer. Nothing yields
    when they are nowhere."""
    names = [found.family.stored_plain(name) for name in module.stored]
    if all(tensor_name(name, module.stored_leaf) in found.tensors for name in names):
        yield from (Rows(name, 0, rows, rows) for name, rows in zip(names, module.rows, strict=True))
    elif len(pieces) == 1 and not pieces[0].layer.entry.awq and f"{pieces[0].layer.name}.weight" in found.tensors:
        layer, split = pieces[0].layer, pieces[0].split
        yield Rows(layer.name, sum(layer.counts[:split]), layer.counts[split], layer.rows)


def _plain_problems(found: Found, name: str, shape: tuple[int, ...], used: set[str]) -> Iterator[str]:
    used.add(name)
    info = found.tensors.get(name)
    if info is None:
        yield Text("missing tensor {name}", name=found.prefix + name)
    elif tuple(info.shape) != shape:
        yield Text("{name} is {shape}, expected {expected}", name=found.stored[name], shape=list(info.shape),
                   expected=list(shape))
    elif info.dtype not in _FLOATS:
        yield Text("{name} is stored as {dtype}, expected BF16, F16 or F32", name=found.stored[name],
                   dtype=info.dtype)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _layer_problems(layer: Layer, found: Found, biased: bool, used: set[str]) -> Iterator[str]:
    """Hold every leaf of a quantized layer against its size (docs/formats/svdquant-int4.md has the table)."""
    leaves = {leaf: info for leaf in LEAVES if (info := found.tensors.get(f"{layer.name}.{leaf}"))}
    codes = ("I8",) if found.writer == NUNCHAKU else ("I8", "U8")
    wanted = awq_leaves(layer.rows, layer.columns) if layer.entry.awq else \
        w4a4_leaves(layer.rows, layer.columns, found.precision, leaves, codes)
    used |= {f"{layer.name}.{leaf}" for leaf in wanted}
    yield from leaf_problems(leaves, wanted, biased, lambda leaf: f"{found.prefix}{layer.name}.{leaf}",
                             lambda leaf: found.stored[f"{layer.name}.{leaf}"])


Leaves = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]  # leaf -> shape and dtypes


def leaf_problems(leaves: Mapping[str, TensorInfo], wanted: Leaves, biased: bool, name: Callable[[str], str],
                  shown: Callable[[str], str]) -> Iterator[str]:
    """What a layer's leaves have against the `wanted` ones. `biased`: it must have a bias. `name` of a leaf that is
    missing, `shown` of one that is there."""
    optional = {"wtscale", "wcscales", UNNEEDED} | (set() if biased else {"bias"})
    for leaf, (shape, dtypes) in wanted.items():
        info = leaves.get(leaf)
        if info is None:
            if leaf not in optional:
                yield Text("missing tensor {name}", name=name(leaf))
        elif tuple(info.shape) != shape and (leaf, tuple(info.shape)) != ("wtscale", ()):
            yield Text("{name} is {shape}, expected {expected}", name=shown(leaf), shape=list(info.shape),
                       expected=list(shape))
        elif info.dtype not in dtypes:
            yield Text("{name} is stored as {dtype}, expected {dtypes}", name=shown(leaf), dtype=info.dtype,
                       dtypes=either(dtypes))


def awq_leaves(rows: int, columns: int, padded: bool = True) -> Leaves:
    """The leaves of an AWQ layer; `padded`: its groups are, to 16."""
    groups = _up(-(-columns // 64), 16 if padded else 1)
    return {"qweight": ((rows // 4, columns // 2), ("I32",)), "wscales": ((groups, rows), HALF),
            "wzeros": ((groups, rows), HALF), "bias": ((rows,), HALF)}


def w4a4_leaves(rows: int, columns: int, precision: str, stored: Mapping[str, TensorInfo],
                codes: tuple[str, ...] = ("I8",)) -> Leaves:
    """The leaves of a W4A4 layer of the rank that the `stored` ones have."""
    n, k = _up(rows, 128), _up(columns, 128)
    down = stored.get("proj_down")
    rank = _up(max(1, down.shape[1]), 16) if down is not None and len(down.shape) == 2 else 0
    scales = tuple(dtype for dtype, of in PRECISIONS.items() if of == precision)
    group = 64 if precision == "int4" else 16
    leaves: Leaves = {
        "qweight": ((n, k // 2), codes), "wscales": ((k // group, n), scales), "smooth_factor": ((k,), HALF),
        UNNEEDED: ((k,), _FLOATS), "proj_down": ((k, rank), HALF), "proj_up": ((n, rank), HALF), "bias": ((n,), HALF)}
    if precision == "nvfp4":
        leaves |= {"wtscale": ((1,), _FLOATS), "wcscales": ((n,), HALF)}
    return leaves


def _check_counts(plan: Plan, optional: dict[str, bool]) -> None:
    """Every layer that Nunchaku quantizes is quantized; refiners are all quantized, or none of them."""
    kept = [name for name in plan.kept if not optional[name]]
    if kept:
        plan.problems.append(Text("{count} layers that Nunchaku quantizes are not quantized: {names}", count=len(kept),
                                  names=first_ten(kept)))
    refiners = [name for name, may_be_plain in optional.items() if may_be_plain]
    quantized = [name for name in refiners if name in plan.layers]
    if quantized and len(quantized) < len(refiners):
        plan.problems.append(Text("{count} of {all} refiner layers are quantized, expected all or none",
                                  count=len(quantized), all=len(refiners)))


def _check_tensor_scales(plan: Plan, found: Found) -> None:
    """Nunchaku takes a missing tensor or channel scale of NVFP4 as 1. Writers store one for every layer, or for none: a
    layer that alone has none has lost it."""
    if found.precision != "nvfp4":
        return
    layers = [name for name, layer in plan.layers.items() if not layer.entry.awq]
    without = [name for name in layers if not {f"{name}.wtscale", f"{name}.wcscales"} & found.tensors.keys()]
    if without and len(without) < len(layers):
        plan.problems.append(Text("{count} of {all} layers have neither wtscale nor wcscales, expected all or none: "
                                  "{names}", count=len(without), all=len(layers), names=first_ten(without)))
