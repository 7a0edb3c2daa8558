"""Formats of ComfyUI's own `comfy_quant` markers that this pack hands to the host as they are: named, checked, kept.

Who makes sense of the bytes is the host (its QUANT_ALGOS) with comfy-kitchen's layouts, which say what the tensors of a
layer are: tensor/convrot_w4a4.py, w4a8_int8.py, awq_w4a16.py of comfy-kitchen 0.2.40, and for int4_tensorwise
comfy-quants' page of the format. On a host without the format the load is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..host.texts import Text, either
from .scales import FINITE, NOT_NEGATIVE
from .stored import Stored

F32, HALF = frozenset({"F32"}), frozenset({"F32", "BF16", "F16"})
Shape = tuple[int, ...]


class Field(NamedTuple):
    """A tensor of a layer: its dtypes, whether its shape fits a [rows, columns] weight, that shape in words, and what
    its numbers may be (a rule of scales.py; "": anything, as codes are)."""

    dtypes: frozenset[str]
    fits: Callable[[Shape, int, int], bool]
    words: str
    values: str = ""
    optional: bool = False


class HostFormat(NamedTuple):
    """`name` (of a layer with these leaves) and `colour` appear in reports; `fields` are by leaf."""

    names: tuple[str, ...]
    colour: tuple[int, int, int]
    fields: Mapping[str, Field]

    def name(self, leaves: Mapping[str, Stored], columns: int) -> str:
        """What a layer is called: several bit widths may go by one marker, and the packed row tells which."""
        wider = leaves["weight"].shape[-1] * 2 > columns
        return self.names[-1 if wider else 0]

    def problem(self, leaves: Mapping[str, Stored], rows: int, columns: int) -> str:
        """What is wrong with the stored dtypes and shapes of a [rows, columns] weight; empty when nothing is."""
        for leaf, field in self.fields.items():
            stored = leaves.get(leaf)
            if stored is None and not field.optional:
                return Text("{leaf} is missing", leaf=leaf)
            if stored is not None and stored.dtype not in field.dtypes:
                return Text("{leaf} is {found}, expected {expected}", leaf=leaf, found=stored.dtype,
                            expected=either(sorted(field.dtypes)))
            if stored is not None and not field.fits(tuple(stored.shape), rows, columns):
                return Text("{leaf} is {found}, expected {expected} for {weight}", leaf=leaf, found=list(stored.shape),
                            expected=field.words, weight=[rows, columns])
        return ""


def _row(shape: Shape, rows: int, columns: int) -> bool:
    return shape in ((rows,), (rows, 1))


def _groups(shape: Shape, rows: int, columns: int) -> bool:
    return len(shape) == 2 and shape[0] == rows and bool(shape[1]) and columns % shape[1] == 0


def _columns_first(shape: Shape, rows: int, columns: int) -> bool:
    return _groups(shape[::-1], rows, columns)


def _packed(*eighths: int) -> Field:
    """Codes of one or more widths, in eighths of a byte."""
    return Field(frozenset({"I8"}), lambda shape, rows, columns: shape in [(rows, columns * n // 8) for n in eighths],
                 either(Text("rows x {eighths}/8 of the columns", eighths=n) for n in eighths))


HOST_FORMATS = {
    "convrot_w4a4": HostFormat(("ConvRot W4A4",), (60, 150, 110), {
        "weight": _packed(4), "weight_scale": Field(F32, _row, Text("one value a row"), NOT_NEGATIVE)}),
    "asym_w4a8_int8": HostFormat(("W4A8 (INT8)", "W6A8 (INT8)"), (120, 175, 90), {
        "weight": _packed(4, 6),
        "weight_s_rel": Field(frozenset({"F8_E4M3", "U8", "F32"}), _groups, Text("rows x groups"), NOT_NEGATIVE),
        "weight_s_channel": Field(F32, lambda shape, rows, columns: shape == (rows,), Text("one value a row"),
                                  NOT_NEGATIVE),
        "weight_codebook": Field(F32, lambda shape, rows, columns: shape == (16,), Text("16 values"), FINITE,
                                 optional=True)}),
    "awq_w4a16": HostFormat(("AWQ W4A16",), (150, 190, 120), {
        "weight": _packed(4), "weight_scale": Field(HALF, _columns_first, Text("groups x rows"), FINITE),
        "weight_zeros": Field(HALF, _columns_first, Text("groups x rows"), FINITE)}),
    "int4_tensorwise": HostFormat(("INT4",), (95, 185, 105), {
        "weight": _packed(4), "weight_scale": Field(F32, _row, Text("one value a row"), NOT_NEGATIVE)}),
}
TWO_A_BYTE = frozenset({"convrot_w4a4", "awq_w4a16", "int4_tensorwise"})
LEAVES = frozenset(leaf for fmt in HOST_FORMATS.values() for leaf in fmt.fields) - {"weight"}
COLOURS = {name: fmt.colour for fmt in HOST_FORMATS.values() for name in fmt.names}
NAMES = {name: word for word, fmt in HOST_FORMATS.items() for name in fmt.names}  # in reports -> in markers
