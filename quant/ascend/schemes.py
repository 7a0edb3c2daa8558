"""Quant types of `quant_model_description*.json`: the tensors of a layer of each type -> a tile.

Formats: docs/sources/ascend.md, "Stored tensors". Torch is imported inside functions: headers are checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ...host.texts import Text, either
from ..stored import PLAIN_DTYPES, Stored, plain_tile
from .kinds import BLOCK, DUAL_BLOCK, KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from ..tile import Coded

FLOATS = PLAIN_DTYPES


class Scheme(Protocol):
    """One quant type of the description.

    `names` are its spellings there, `leaves` the tensors a layer may have beside weight and bias (the smoothing
    vector, stored as `<layer>.div.mul_scale`, is the leaf "mul_scale"), `unneeded` those of them that nothing reads.
    """

    @property
    def names(self) -> frozenset[str]: ...

    @property
    def leaves(self) -> frozenset[str]: ...

    @property
    def unneeded(self) -> frozenset[str]: ...

    @property
    def kind(self) -> str: ...

    def shape(self, leaves: Mapping[str, Stored]) -> tuple[int, int]:
        """[rows, columns] = [out, in] of the layer, from what is stored."""
        ...

    def problem(self, leaves: Mapping[str, Stored], rows: int, columns: int) -> str:
        """What is wrong with the stored dtypes and shapes for a [rows, columns] weight; empty when nothing is."""
        ...

    def coded(self, name: str, part: dict[str, Tensor], *, bias: bool = True) -> Coded:
        """Layer `name` as a tile. `bias` is whether the native module has one.

        Raises ValueError for scales that are not finite and positive, and for offsets that integer matmuls ignore.
        """
        ...


class FloatScheme:
    """FLOAT: not quantized. A smoothing vector is multiplied into the weight (F32, rounded once)."""

    names = frozenset({"FLOAT"})
    leaves = frozenset({"mul_scale"})
    unneeded: frozenset[str] = frozenset()
    kind = ""

    def shape(self, leaves: Mapping[str, Stored]) -> tuple[int, int]:
        shape = leaves["weight"].shape
        return shape[0], shape[-1]

    def problem(self, leaves: Mapping[str, Stored], rows: int, columns: int) -> str:
        return _mismatch(leaves, {"weight": (FLOATS, ((rows, columns),)), **_common(rows, columns)}, {"weight"})

    def coded(self, name: str, part: dict[str, Tensor], *, bias: bool = True) -> Coded:
        from ..tile import Coded
        from .convert import float_bias, smoothing

        weight, mul = part["weight"], smoothing(name, part)
        if mul is not None:
            weight = (weight.float() * mul).to(weight.dtype)
        return Coded((plain_tile(weight),), float_bias(name, part, bias))


@dataclass(frozen=True)
class QuantScheme:
    """A quantized type: `leaves` are the tensors that it needs (`required`), may have, or has and nobody reads."""

    kind: str
    names: frozenset[str]
    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    unneeded: frozenset[str] = field(default_factory=frozenset)

    @property
    def leaves(self) -> frozenset[str]:
        return self.required | self.optional | self.unneeded | {"mul_scale"}

    def shape(self, leaves: Mapping[str, Stored]) -> tuple[int, int]:
        weight, codec = leaves["weight"], KINDS[self.kind].codec
        rows, columns = weight.shape
        if codec == "int4" and "weight_scale" in leaves:
            rows = leaves["weight_scale"].shape[0]  # the weight may be packed along its rows
        if codec.startswith("mxfp4") and str(weight.dtype) in ("U8", "I8", "torch.uint8", "torch.int8"):
            columns *= 2
        return rows, columns

    def problem(self, leaves: Mapping[str, Stored], rows: int, columns: int) -> str:
        unknown = set(leaves) - self.leaves - {"weight", "bias"}
        if unknown:
            return Text("tensors that {names} does not have: {unknown}", names="/".join(sorted(self.names)),
                        unknown=", ".join(sorted(unknown)))
        return _mismatch(leaves, _expected(self.kind, rows, columns), {"weight", *self.required}) \
            or _odd_size(self.kind, rows, columns)

    def coded(self, name: str, part: dict[str, Tensor], *, bias: bool = True) -> Coded:
        from . import convert

        return convert.coded(self.kind, name, part, bias)


def _scheme(kind: str, *names: str, required: tuple[str, ...] = ("weight_scale",), optional: tuple[str, ...] = (),
            unneeded: tuple[str, ...] = ()) -> QuantScheme:
    return QuantScheme(kind, frozenset(names), frozenset(required), frozenset(optional), frozenset(unneeded))


ALL: tuple[Scheme, ...] = (
    FloatScheme(),
    # weight_scale and weight_offset are in exports of the legacy writer only; deq_scale says the same
    _scheme("w8a8", "W8A8", required=("deq_scale", "input_scale", "input_offset"), optional=("quant_bias",),
            unneeded=("weight_scale", "weight_offset")),
    _scheme("w8a8_dynamic", "W8A8_DYNAMIC", optional=("weight_offset",)),
    _scheme("w4a4_dynamic", "W4A4_DYNAMIC", optional=("weight_offset",)),
    # scale_bias is 8 x a row's sum of scaled codes, for NPU kernels that read int4 as unsigned
    _scheme("w4a8_dynamic", "W4A8_DYNAMIC", optional=("weight_offset",), unneeded=("scale_bias",)),
    _scheme("w8a16", "W8A16", optional=("weight_offset",)),
    _scheme("wfp8afp8_dynamic", "WFP8AFP8_DYNAMIC", optional=("weight_offset",)),
    _scheme("w8a8_mxfp8", "W8A8_MXFP8"),
    _scheme("w4a8_mxfp", "W4A8_MXFP"),
    _scheme("w4a4_mxfp4", "W4A4_MXFP4", "MXFP4"),
    _scheme("w4a4_mxfp4_dualscale", "W4A4_MXFP4_DUALSCALE", required=("weight_scale", "weight_dual_scale")),
)
SCHEMES: dict[str, Scheme] = {name: scheme for scheme in ALL for name in scheme.names}
# Types that descriptions may name and this version refuses, and why (docs/sources/ascend.md, "Description").
REFUSED = {
    "W8A8_TIMESTEP": Text("its activation scales change with the sampling step"),
    "W4A16": Text("its packing is not documented"),
    "W8A8_MIX": Text("its packing is not documented"),
    "FAQuant": Text("attention is not quantized here"),
    "C8": Text("attention is not quantized here"),
    "NF4": Text("its packing is not documented"),
    **dict.fromkeys(("W16A16S", "W8A8S", "W8A8SC", "W16A16SC"), Text("sparse weights need Ascend's own decompression")),
    **dict.fromkeys(("W4A4_FLATQUANT_DYNAMIC", "W8A8_FLATQUANT", "W4A4_FLATQUANT", "W8A8_FLATQUANT_DYNAMIC"),
                    Text("FlatQuant transforms activations with two more matrices a layer")),
    **dict.fromkeys(("W8A8_SVD", "W8A8_SVD_DYNAMIC", "W4A4_SVD", "W4A4_SVD_DYNAMIC"),
                    Text("it has a low-rank branch beside every weight")),
}


_Spec = tuple[frozenset[str], tuple[tuple[int, ...], ...]]  # dtypes and shapes that a leaf may have


def _common(rows: int, columns: int) -> dict[str, _Spec]:
    return {"bias": (FLOATS, ((rows,),)), "mul_scale": (FLOATS, ((columns,),))}


def _expected(kind: str, rows: int, columns: int) -> dict[str, _Spec]:
    """Dtypes and shapes of every leaf of a [rows, columns] layer of this kind."""
    codec = KINDS[kind].codec
    row = ((rows, 1), (rows,))
    grouped = tuple((rows, groups) for groups in range(2, columns + 1) if columns % groups == 0)
    blocks = (frozenset({"U8", "F8_E8M0"}), ((rows, -(-columns // BLOCK)),))
    specs: dict[str, _Spec] = {
        "weight_scale": (FLOATS, row + (grouped if kind in ("w8a16", "w4a8_dynamic") else ())),
        "weight_offset": (FLOATS | {"I8"}, row + (grouped if kind in ("w8a16", "w4a8_dynamic") else ())),
        "scale_bias": (FLOATS, ((rows,), (rows, 1), (rows, 16), (rows, columns))),
        "deq_scale": (frozenset({"F32", "I64"}), row), "quant_bias": (frozenset({"I32"}), ((rows,),)),
        "input_scale": (FLOATS, ((), (1,))), "input_offset": (FLOATS | {"I8"}, ((), (1,))),
        "weight_dual_scale": (FLOATS, ((rows, -(-columns // DUAL_BLOCK), 1), (rows, -(-columns // DUAL_BLOCK)))),
    }
    full: tuple[int, ...] = (rows, columns)
    if codec == "int8":
        specs["weight"] = (frozenset({"I8"}), (full,))
    elif codec == "int4":
        specs["weight"] = (frozenset({"I8"}), (full, (rows // 2, columns)))
    elif codec in ("e4m3", "mxfp8"):
        specs["weight"] = (frozenset({"F8_E4M3"}), (full,))
    else:
        specs["weight"] = (frozenset({"U8", "I8", "F8_E4M3"}), ((rows, columns // 2), full))
    if codec.startswith("mx"):
        specs["weight_scale"] = blocks
    return specs | _common(rows, columns)


def _odd_size(kind: str, rows: int, columns: int) -> str:
    """Sizes that a packing has no way to hold; empty when all is well."""
    codec = KINDS[kind].codec
    if codec.startswith("mxfp4") and columns % BLOCK:
        return Text("{columns} columns, MXFP4 needs a multiple of {block}", columns=columns, block=BLOCK)
    if codec == "int4" and columns % 2:
        return Text("{columns} columns, INT4 needs an even number", columns=columns)
    return ""


def _mismatch(leaves: Mapping[str, Stored], specs: Mapping[str, _Spec], required: set[str]) -> str:
    missing = sorted(required - set(leaves))
    if missing:
        return Text("no {missing}", missing=", ".join(missing))
    for leaf, stored in sorted(leaves.items()):
        dtypes, shapes = specs[leaf]
        if stored.dtype not in dtypes:
            return Text("{leaf} is {found}, expected {expected}", leaf=leaf, found=stored.dtype,
                        expected=either(sorted(dtypes)))
        if tuple(stored.shape) not in shapes:
            return Text("{leaf} is {found}, expected {expected}", leaf=leaf, found=list(stored.shape),
                        expected=either(str(list(shape)) for shape in shapes[:2]))
    return ""
