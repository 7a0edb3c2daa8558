"""What an architecture tells the loader: sizes, and a declarative map from native modules to the stored ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from ...host.texts import Text
from ..containers.safetensors import TensorInfo
from ..words import first_ten

Dims = dict[str, int]  # the sizes that tell two models of one architecture apart; keys are the architecture's own
MAX_BLOCKS = 256  # published: 100
Size = str | int  # a number, or a name that the sizes of a model give a number


class Naming(NamedTuple):
    """How the stored tensors are called: "diffusers" or "native", the prefix before every name, and what a native
    norm's one tensor is called where ComfyUI and the vendor differ (vendors write "scale", ComfyUI saves "weight")."""

    style: str
    prefix: str = ""
    norm: str = "weight"


class Module(NamedTuple):
    """One native module and the stored modules whose rows make it up.

    `native` is the host's name. `stored` are the stored names in row order, `rows` how many rows each has, `inner` the
    other dimensions of the weight: (columns,) for a Linear, () for a norm, (in, t, h, w) for a Conv3d. `leaf` is the
    native name of the weight and `stored_leaf` the stored one; a bare parameter has its own name there. `swap_halves`:
    the stored upper and lower half of the rows are exchanged in the native one. `kind`: "" goes by the shape, "linear"
    and "plain" say it, "any" is a buffer, or what the host alone makes sense of: any dtype and shape; "cut" are floats
    of any shape, which the host makes others of; "dropped" is a whole module that it leaves out, however it is stored;
    "embedding" is a table of rows that is only looked up, which may be quantized as a Linear is.
    `detected`: the host's detection reads the weight's columns, `by_rows`: its rows. `shape`: the native shape, where
    the stored one is another. `ranges`, where other modules have the other rows of the stored ones: the first row that
    this one has of each, and how many each stores.
    """

    native: str
    stored: tuple[str, ...]
    rows: tuple[int, ...]
    inner: tuple[int, ...] = ()
    bias: bool = True
    leaf: str = "weight"
    stored_leaf: str = "weight"
    swap_halves: bool = False
    kind: str = ""
    detected: bool = False
    by_rows: bool = False
    shape: tuple[int, ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def linear(self) -> bool:
        """Whether this is a Linear or an embedding, the only kinds of module that can be stored quantized."""
        return self.kind in ("linear", "embedding") if self.kind else len(self.inner) == 1 and self.leaf == "weight"


def tensor_name(module: str, leaf: str) -> str:
    """The name of a tensor in its module; a bare top-level parameter has no module."""
    return f"{module}.{leaf}" if module else leaf


class Inputs(NamedTuple):
    """What a model is given beside the latents, as ComfyUI's own text encoders give it, for runs without any.

    `text`: (tokens, width) of an encoded prompt. `pooled`: width of a pooled one, 0 where the model takes none.
    `patch`: side of the square of latents that becomes one token; 0 for a UNet, which has none.
    """

    text: tuple[int, int]
    pooled: int = 0
    patch: int = 2


class Entry(NamedTuple):
    """A row of an architecture's table: the stored parts of one native module, with sizes still by name."""

    parts: tuple[str, ...]
    rows: tuple[Size, ...]
    inner: tuple[Size, ...] = ()
    bias: bool = True
    leaf: str = "weight"
    stored_leaf: str = "weight"
    swap_halves: bool = False


def linear(part: str, rows: Size, columns: Size, bias: bool = True, swap_halves: bool = False) -> Entry:
    """A Linear [rows, columns] stored as one."""
    return Entry((part,), (rows,), (columns,), bias, swap_halves=swap_halves)


def fused(parts: tuple[str, ...], rows: tuple[Size, ...], columns: Size, bias: bool = True) -> Entry:
    """A Linear whose rows are stored as several, in this order."""
    return Entry(parts, rows, (columns,), bias)


def norm(part: str, size: Size, bias: bool = False, leaf: str = "weight") -> Entry:
    """A norm's weight [size]; `leaf` is the native name where it is not "weight"."""
    return Entry((part,), (size,), (), bias, leaf)


def conv(part: str, rows: Size, *inner: Size) -> Entry:
    """A convolution [rows, in, ...] with bias."""
    return Entry((part,), (rows,), inner)


def parameter(leaf: str, stored_leaf: str, rows: Size, *inner: Size, part: str = "") -> Entry:
    """A bare parameter [rows, ...]: native and stored name of the tensor, and the stored module that holds it."""
    return Entry((part,), (rows,), inner, False, leaf, stored_leaf)


def expand(table: Mapping[str, Entry], sizes: Mapping[str, int], naming: Naming, native: str = "",
           stored: str = "") -> Iterator[Module]:
    """The modules of a table below the blocks `native` and `stored` (with their final dot, or empty)."""

    def numbers(named: tuple[Size, ...]) -> tuple[int, ...]:
        return tuple([size if isinstance(size, int) else sizes[size] for size in named])

    def join(block: str, name: str) -> str:
        return block + name if name else block.removesuffix(".")

    for name, entry in table.items():
        rows, inner = numbers(entry.rows), numbers(entry.inner)
        here = join(native, name)
        if naming.style == "diffusers":
            yield Module(here, tuple(join(stored, part) for part in entry.parts), rows, inner, entry.bias, entry.leaf,
                         entry.stored_leaf, entry.swap_halves)
        else:
            leaf = naming.norm if entry.leaf == "scale" else entry.leaf
            yield Module(here, ((naming.prefix + here).removesuffix("."),), (sum(rows),), inner, entry.bias, entry.leaf,
                         leaf)


def count_blocks(names: Iterable[str], block: str) -> int:
    """How many different N are in names that start with `block`.N. (0 when there is none).

    Raises ValueError where they are not 0, 1, 2 and so on: the time that a model takes goes by what is there, never by
    a number that a name says.
    """
    found = set(re.findall(rf"^{re.escape(block)}\.(\d+)\.", "\n".join(names), re.MULTILINE))  # one scan in C
    if len(found) > MAX_BLOCKS:
        raise ValueError(Text("{count:,} blocks {block}.N, and no more than {most:,} are read", count=len(found),
                              block=block, most=MAX_BLOCKS))
    lost = [str(number) for number in range(len(found)) if str(number) not in found]
    if lost:
        raise ValueError(Text("{count} blocks {block}.N are there, and not those of the numbers {lost}",
                              count=len(found), block=block, lost=first_ten(lost)))
    return len(found)


def shape_of(tensors: Mapping[str, TensorInfo], name: str, dimensions: int = 2) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from, NVFP4's two columns a byte counted as two.

    Raises ValueError when it is missing or has other dimensions.
    """
    info = tensors.get(name)
    if info is None or len(info.shape) != dimensions:
        raise ValueError(Text("missing or misshapen tensor {name}: {shape}", name=name,
                              shape=list(info.shape) if info else Text("not there")))
    packed = info.dtype == "U8" and dimensions == 2
    return (info.shape[0], 2 * info.shape[1]) if packed else info.shape


def config_int(config: Mapping[str, Any], key: str, default: int) -> int:
    """A count from config.json, or diffusers' default for a key it leaves out. Raises ValueError for anything else."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value < 0:
        raise ValueError(Text("config.json: {key} is {value!r}, expected a number", key=key, value=value))
    return int(value)


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any], name: str) -> None:
    """Raise ValueError where config.json says something else than what ComfyUI has fixed for this architecture."""
    other = [key for key, value in fixed.items() if config.get(key) is not None and config[key] != value]
    if other:
        raise ValueError(Text("ComfyUI runs {name} with {fixed} only; config.json says {said}", name=name,
                              fixed=", ".join(f"{key} {fixed[key]}" for key in other),
                              said=", ".join(f"{key} {config[key]}" for key in other)))


class Architecture(Protocol):
    """A diffusion transformer this pack can load. Stateless; one instance each.

    `class_names` are the diffusers classes, `config_only` the sizes that tensors may not tell.
    """

    name: str
    class_names: frozenset[str]
    config_only: frozenset[str]

    def naming(self, names: Collection[str]) -> Naming | None:
        """The naming of these stored tensors when they are this architecture, else None."""
        ...

    def dims_from_tensors(self, tensors: Mapping[str, TensorInfo], naming: Naming) -> Dims:
        """The sizes that the stored tensors tell. Raises ValueError when one needed is missing.

        One that only a config or a base model tells is left out; `modules` and `marks` do without it.
        """
        ...

    def dims_from_config(self, config: Mapping[str, Any]) -> Dims:
        """The sizes that a diffusers config.json tells. Raises ValueError for values the host cannot run."""
        ...

    def dims_from_model(self, unet_config: Mapping[str, Any]) -> Dims | None:
        """The sizes that a host model's unet_config tells (some may be left out), or None for another architecture."""
        ...

    def modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        """Every module of a model of these sizes, in the host's order."""
        ...

    def marks(self, dims: Dims) -> tuple[str, ...]:
        """Names of empty tensors that switch the host's behaviour for these sizes and are stored nowhere."""
        ...

    def inputs(self, dims: Dims) -> Inputs:
        """What a model of these sizes, those of `dims_from_model`, is given beside the latents."""
        ...
