"""The kinds of quantized Linear that msmodelslim writes for Ascend (quant/ascend/kinds.py), in plain torch.

Fields: "scale" is F32 [rows, groups], or U8 E8M0 [rows, ceil(columns / 32)] in the MX kinds; for "w8a8" it is the
deq_scale (weight x activation scale). "offset": weight zero points [rows, groups]. "dual": F32 [rows, ceil(columns /
512)]. "mul": F32 [columns], what activations are multiplied by; it counts as part of the weight. Of "w8a8" alone:
"input_scale" and "input_offset" F32 [], "quant_bias" I32 [rows], and "bias", the layer's bias at the time that
quant_bias was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ..ascend.kinds import BLOCK, DUAL_BLOCK, HOST_FORMAT, KINDS
from ..scales import EXPONENTS, FINITE, NOT_NEGATIVE
from ..tile import Tile
from .base import FLOATS, LOW_RANK, Codec, Field, stack, stacked
from .fp8 import SCALAR

if TYPE_CHECKING:
    from torch import Tensor, dtype

_CODES = {"int8": Field(("int8",), lambda rows, columns: (rows, columns), 0),
          "e4m3": Field(("float8_e4m3fn",), lambda rows, columns: (rows, columns), 0),
          "mxfp8": Field(("float8_e4m3fn",), lambda rows, columns: (rows, columns), 0)}
_PACKED = Field(("uint8",), lambda rows, columns: (rows, columns // 2), 0)
_GROUPS = Field(("float32",), lambda rows, columns: (rows, -1), 0, values=NOT_NEGATIVE)
_E8M0 = Field(("uint8",), lambda rows, columns: (rows, -(-columns // BLOCK)), 0, values=EXPONENTS)
_DUAL = Field(("float32",), lambda rows, columns: (rows, -(-columns // DUAL_BLOCK)), 0, values=NOT_NEGATIVE)
_MUL = Field(("float32",), lambda rows, columns: (columns,), optional=True, values=FINITE)
_STATIC = {"input_scale": SCALAR, "input_offset": SCALAR._replace(values=FINITE),
           "quant_bias": Field(("int32",), lambda rows, columns: (rows,), 0),
           "bias": Field(FLOATS, lambda rows, columns: (rows,), 0, optional=True)}


def _fields(kind: str) -> Mapping[str, Field]:
    weight, activation = KINDS[kind]
    mx_kind = weight.startswith("mx")
    fields = {"codes": _CODES.get(weight, _PACKED), "scale": _E8M0 if mx_kind else _GROUPS}
    fields |= {"dual": _DUAL} if weight == "mxfp4_dual" else {}
    fields |= {} if mx_kind else {"offset": _GROUPS._replace(optional=True, values=FINITE)}
    return fields | (_STATIC if activation == "static" else {}) | {"mul": _MUL} | LOW_RANK


class Ascend(Codec):
    """See the module and base.Codec. `kind` is of kinds.KINDS, and the codec's name."""

    feature = "Ascend"

    def __init__(self, kind: str) -> None:
        self.name, self.title, self.fields = kind, kind.upper(), _fields(kind)
        self.weight, self.activation = KINDS[kind]
        self.word = self.switch = HOST_FORMAT.get(kind, "")
        self.layout = "TensorCoreMXFP8Layout" if self.word == "mxfp8" else ""
        self.why = Text("a format of Ascend")
        self.also = ("MXFP4",) if kind == "w4a4_mxfp4" else ()  # as descriptions may call it

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        from ..ascend.weights import decode

        return decode(tile).to(dtype)

    def decode_rows(self, tile: Tile, first: int, last: int, out: Tensor) -> None:
        from ..ascend.weights import decode_rows

        if tile.place.columns % BLOCK or not decode_rows(tile, first, last, out):
            super().decode_rows(tile, first, last, out)

    def loaded(self, tile: Tile, dtype: dtype) -> Tile:
        bias = tile.get("bias")  # as the layer itself will hold it, so that the two cancel exactly
        return tile if bias is None else tile.having(bias=bias.to(dtype))

    def requantize(self, weight: Tensor, like: Tile, seed: int, **options: Any) -> Tile:
        from ..ascend.weights import requantize

        return requantize(weight, like, seed)

    def host(self, tiles: Sequence[Tile], full_precision: bool) -> dict[str, Tensor] | None:
        """INT8 with a scale a row, and MXFP8, which the host pads to 32 x 32 and scales in tiles."""
        from ..ascend.weights import for_host

        if not self.word or any(tile.fields.keys() != {"codes", "scale"} or tile["scale"].shape[1] > 1
                                and self.weight == "int8" for tile in tiles):
            return None
        whole = stack(tiles, self.fields)
        if self.weight == "int8":
            return {"weight": whole["codes"], "weight_scale": whole["scale"]}
        return for_host(whole["codes"], whole["scale"])

    def of_host(self, weight: Any, input_scale: Tensor | None) -> Tile | None:
        from ..ascend.weights import from_host

        return from_host(weight, self.name) if self.word else None

    def merge(self, tiles: Sequence[Tile]) -> Tile | None:
        return stacked(tiles, self.fields)


CODECS = tuple(map(Ascend, KINDS))
