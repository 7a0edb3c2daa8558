"""What makes every native module, from headers alone: Inspect prints it, a load executes it (assemble.py).

A family says what each stored layer is (`Layer`) and, where that is not the architecture's own table, where its rows
and columns go (`Piece`). What is missing, left over or misshapen is found here, once for all families.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..host.texts import Text
from ..quant.stored import FP8_DTYPES, PLAIN_DTYPES, scalar_problem
from .architectures import Architecture, Module
from .architectures.base import tensor_name
from .containers.safetensors import TensorInfo
from .description import CheckpointDescription
from .words import first_ten

if TYPE_CHECKING:
    from torch import Tensor

    from ..quant.tile import Coded

Group = dict[str, TensorInfo]  # one stored module: leaf -> what its header says
Problems = list[str]


class Layer(NamedTuple):
    """A stored layer, or what one native module has of it.

    `format` is its name in reports, `codecs` are those of its tiles, or of the host's formats. `leaves` are its tensors
    in the plan's names, the weight first. `read` makes of the tensors ("weight" and the other leaves) one Coded for
    each native module that has rows of it (one, but for layers that are stored joined); None: it is not quantized,
    weight and bias are taken as they are, from row `first` on where it has more rows than are wanted, and are `kept`
    where another module has rows of them, too. `static`: whether its activation scales are stored (None: it has none).
    """

    name: str
    format: str
    leaves: tuple[str, ...]
    read: ReadTensors | None = None
    static: bool | None = None
    codecs: tuple[str, ...] = ()
    first: int = 0
    kept: bool = False


class ReadTensors(Protocol):
    """A layer and its tensors -> tiles; see Layer."""

    def __call__(self, layer: Layer, part: dict[str, Tensor], /) -> list[Coded]: ...


class Piece(NamedTuple):
    """What a stored layer gives to one native module, as number `split` of its splits, and where that goes."""

    layer: Layer
    rows: int
    split: int = 0
    row: int = 0
    column: int = 0


class Ranges(NamedTuple):
    """A ReadTensors for a layer that is stored as one and is several native modules: `ranges` of its rows (first row,
    rows), in the order of these modules."""

    read: ReadTensors
    ranges: tuple[tuple[int, int], ...]

    def __call__(self, layer: Layer, part: dict[str, Tensor], /) -> list[Coded]:
        from ..quant.codecs import cut

        whole, = self.read(layer, part)
        return [cut(whole, first, rows) for first, rows in self.ranges]


class Planned(NamedTuple):
    """A native module and the pieces that make it: in row order, but for those beside each other."""

    module: Module
    pieces: tuple[Piece, ...] = ()


@dataclass
class LoadPlan:
    """All native modules in the host's order. `description` is the same for people; what forbids the load is there.

    `stored` gives the name in the files of a tensor that the plan calls otherwise. `ignored` are stored names that
    nothing here reads; `hint` is what to do about a checkpoint whose tensors mean nothing.
    """

    description: CheckpointDescription
    architecture: Architecture
    modules: list[Planned] = field(default_factory=list)
    stored: Callable[[str], str] = str
    ignored: Collection[str] = ()
    hint: str = Text("download the checkpoint again, or report it to its publisher")

    @property
    def codecs(self) -> set[str]:
        """The codecs of all layers."""
        return {name for planned in self.modules for piece in planned.pieces for name in piece.layer.codecs}


class ReadLayer(Protocol):
    """How a family reads one stored layer: it takes what belongs to the layer out of `group` (leaf -> header), says
    what is wrong in `problems`, and returns the layer, or None for one that cannot be read."""

    def __call__(self, module: Module, name: str, rows: int, group: Group, problems: Problems) -> Layer | None: ...


def make(plan: LoadPlan, tensors: Mapping[str, TensorInfo], read: ReadLayer) -> LoadPlan:
    """Fill a plan by the architecture's own table, for the sizes and names of its description.

    `tensors` are the headers by the names of that table. Layers are counted in the description; missing, misshapen and
    unexpected tensors become its problems.
    """
    description, dims, naming = plan.description, plan.description.dims, plan.description.naming
    groups = by_layer(tensors)
    dropped: list[str] = []
    modules = list(plan.architecture.modules(dims, naming))
    ranges = _ranges(modules)
    shared: dict[str, Layer | None] = {}  # stored layers that have ranges, each read once
    for module in modules:
        if module.kind == "dropped":
            dropped += [plan.stored(tensor_name(name, leaf)) for name in module.stored for leaf in groups.pop(name)]
            continue
        pieces, row = [], 0
        for i, (name, rows) in enumerate(zip(module.stored, module.rows, strict=True)):
            first, whole = module.ranges[i] if module.ranges else (0, rows)
            layer = shared[name] if name in shared else \
                read(module, name, whole, groups.setdefault(name, {}), description.problems)
            split = 0
            if module.ranges:
                shared[name], split = layer, ranges[name].index((first, rows))
            if layer is not None:
                pieces.append(Piece(_range(layer, ranges[name], split) if module.ranges else layer, rows, split, row))
            row += rows
        plan.modules.append(Planned(module, tuple(pieces)))
    marks = {naming.prefix + mark for mark in plan.architecture.marks(dims)}
    extra = [name for module, leaves in groups.items() for leaf in leaves
             if (name := tensor_name(module, leaf)) not in marks]
    check_extra(description.problems, extra)
    if dropped:
        plan.ignored = {*plan.ignored, *dropped}
        description.notes.append(Text("left out, as ComfyUI has no use for them: {count} tensors ({names})",
                                      count=len(dropped), names=first_ten(dropped)))
    return count(plan)


def _ranges(modules: Collection[Module]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Stored layers of which several native modules have rows -> (first row, rows) of each, in the order of these."""
    found: dict[str, tuple[tuple[int, int], ...]] = {}
    for module in modules:
        for name, rows, (first, _) in zip(module.stored, module.rows, module.ranges, strict=False):
            found[name] = (*found.get(name, ()), (first, rows))
    return found


def _range(layer: Layer, ranges: tuple[tuple[int, int], ...], split: int) -> Layer:
    """What the module of this range has of a stored layer."""
    if layer.read is None:
        return layer._replace(first=ranges[split][0], kept=split + 1 < len(ranges))
    return layer._replace(read=Ranges(layer.read, ranges))


def check_extra(problems: Problems, names: Collection[str]) -> None:
    """Tensors that belong to no layer are a problem."""
    if names:
        problems.append(Text("{count} unexpected tensors: {names}", count=len(names), names=first_ten(names)))


def count(plan: LoadPlan) -> LoadPlan:
    """Count the Linear layers of a plan in its description."""
    description = plan.description
    for planned in plan.modules:
        if not planned.module.linear:
            continue
        for piece in planned.pieces:
            layer = piece.layer
            if layer.name not in description.layers:
                description.layers[layer.name] = layer.format
                description.formats[layer.format] = description.formats.get(layer.format, 0) + 1
                description.static_activations += layer.static is True
                description.dynamic_activations += layer.static is False
    return plan


def by_layer(tensors: Mapping[str, TensorInfo]) -> dict[str, Group]:
    """Module name -> leaf name -> tensor."""
    layers: dict[str, Group] = {}
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        layers.setdefault(module, {})[leaf] = info
    return layers


def take_weight(module: Module, name: str, group: Group, problems: Problems) -> TensorInfo | None:
    """Take a layer's weight out of its group; a missing one is a problem."""
    weight = group.pop(module.stored_leaf, None)
    if weight is None:
        problems.append(Text("missing tensor {name}", name=tensor_name(name, module.stored_leaf)))
    return weight


def take_bias(module: Module, name: str, rows: int, group: Group, problems: Problems) -> None:
    """Take a layer's bias out of its group, where the module has one: floats, [rows]."""
    if not module.bias:
        return
    bias = group.pop("bias", None)
    if bias is None:
        problems.append(Text("missing tensor {name}", name=f"{name}.bias"))
    else:
        check_plain(problems, f"{name}.bias", bias, (rows,))


def plain(module: Module, name: str, rows: int, weight: TensorInfo, group: Group, problems: Problems) -> Layer:
    """A layer that is never quantized, or is not: its weight's shape, and a float dtype. One in FP8 may have one scale,
    which is taken out of its group."""
    if module.kind != "any":
        shape = tuple(weight.shape) if module.kind == "cut" else (rows, *module.inner)
        check_plain(problems, tensor_name(name, module.stored_leaf), weight, shape)
    scale = ("weight_scale",) if weight.dtype in FP8_DTYPES and "weight_scale" in group else ()
    if scale and (problem := scalar_problem({"weight_scale": group.pop("weight_scale")}, "weight_scale")):
        problems.append(Text("{name}: {problem}", name=name, problem=problem))
    return Layer(name, weight.dtype, leaves(module.stored_leaf, *scale, *bias_of(module)))


def bias_of(module: Module) -> tuple[str, ...]:
    """The leaf of a module's bias, if it has one."""
    return ("bias",) if module.bias else ()


@cache
def leaves(weight: str, *others: str) -> tuple[str, ...]:
    """Layer.leaves, one value for all layers that have the same."""
    return (weight, *others)


def check_plain(problems: Problems, name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    """A tensor that is never quantized: its shape, and a float dtype, that of a plain FP8 cast among them."""
    if tuple(info.shape) != shape:
        problems.append(Text("{name} is {shape}, expected {expected}", name=name, shape=list(info.shape),
                             expected=list(shape)))
    elif info.dtype not in PLAIN_DTYPES and info.dtype not in FP8_DTYPES:
        problems.append(Text("{name} is stored as {dtype}, expected BF16, F16 or F32", name=name, dtype=info.dtype))
