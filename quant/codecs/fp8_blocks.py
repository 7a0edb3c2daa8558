"""FP8 with a scale for every row, for blocks of a row, or for blocks of rows and columns; and all E5M2.

Stored per Linear P, the scale F32, BF16 or F16:

    P.weight            F8_E4M3 or F8_E5M2 [out, in]   W = weight.float() * scale
    P.weight_scale      [out] or [out, 1]              a row: SGLang's "rowwise", LightX2V, torch's exports
                        [out, in / 64(, 1)]            blocks of a row
                        [out / 128, in / 128]          blocks (converters' "blockwise")
    P.weight_scale_inv  [out / 128, in / 128]          the same by DeepSeek's name: for all that, it multiplies
                                                       (transformers' FineGrainedFP8, SGLang's weight_block_size)

Sizes of blocks are told by the shapes (quant/scales.py). A tile keeps a scale for every row, so that it can be cut
anywhere between rows, as a layer that ComfyUI fuses needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ..marker import full_precision_marker
from ..scales import POSITIVE, block_of, by_row, shape_problem
from ..stored import PLAIN_DTYPES, ByteOrder, Leaves, read_scale, scalar_problem, wrong_shape
from ..tile import Coded, Place, Tile
from .base import LOW_RANK, Codec, Field, stacked

if TYPE_CHECKING:
    from torch import Tensor, dtype

DTYPES = {"F8_E4M3": (3, -6), "F8_E5M2": (2, -14)}  # mantissa bits, exponent of the smallest normal number
WORDS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise", "rowwise-float8_e4m3fn")


class FP8Blocks(Codec):
    """See base.Codec. "scale" is F32 [rows, blocks of a row]."""

    name, title = "fp8_blocks", "FP8 (blocks)"
    fields = {"codes": Field(("float8_e4m3fn", "float8_e5m2"), lambda rows, columns: (rows, columns), 0),
              "scale": Field(("float32",), lambda rows, columns: (rows, -1), 0, values=POSITIVE), **LOW_RANK}
    why = Text("a scale for every row or block")

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        return _times(tile["codes"].float(), tile["scale"]).to(dtype)

    def decode_rows(self, tile: Tile, first: int, last: int, out: Tensor) -> None:
        import torch

        from ..decode import e4m3, of_rows

        codes, scale = tile["codes"], tile["scale"]
        if codes.dtype == torch.float8_e4m3fn and codes.shape[1] % scale.shape[1] == 0:
            e4m3(of_rows(codes, first, last), of_rows(scale, first, last), out)
        else:
            super().decode_rows(tile, first, last, out)

    def requantize(self, weight: Tensor, like: Tile, seed: int, **options: Any) -> Tile:
        import torch

        from ..ascend.mx import dither

        codes, count = like["codes"], like["scale"].shape[1]
        largest = torch.finfo(codes.dtype).max
        mantissa, lowest = DTYPES["F8_E4M3" if codes.dtype == torch.float8_e4m3fn else "F8_E5M2"]
        block = block_of(weight.shape[1], count)
        padded = torch.nn.functional.pad(weight.float(), (0, block * count - weight.shape[1]))
        scale = (padded.view(len(weight), count, block).abs().amax(-1) / largest).clamp(min=1e-30)
        values = dither(_times(weight.float(), 1 / scale), mantissa, lowest, seed)
        return like.having(codes=values.clamp(-largest, largest).to(codes.dtype), scale=scale)

    def merge(self, tiles: Sequence[Tile]) -> Tile | None:
        return stacked(tiles, self.fields)


def _times(values: Tensor, scale: Tensor) -> Tensor:
    """F32 values [rows, columns] times a scale [rows, blocks]."""
    rows, columns = values.shape
    count = scale.shape[1]
    if count == 1:
        return values * scale
    block = block_of(columns, count)
    if block * count == columns:
        return (values.view(rows, count, block) * scale.unsqueeze(-1)).view(rows, columns)
    return values * scale.repeat_interleave(block, 1)[:, :columns]


class FP8BlocksFormat:
    """As a `formats.StoredFormat`: what FP8Format, which is asked first, does not take."""

    name, codec = "FP8 (blocks)", "fp8_blocks"
    colour = (60, 150, 100)
    words = frozenset(WORDS)
    companions = frozenset({"weight_scale", "weight_scale_inv", "input_scale", "comfy_quant"})

    def matches(self, leaves: Leaves) -> bool:
        scale = _scale(leaves)
        return leaves["weight"].dtype in DTYPES and (scale is None or scale.dtype in PLAIN_DTYPES)

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        if {"weight_scale", "weight_scale_inv"} <= leaves.keys():
            return Text("weight_scale and weight_scale_inv, and one of them is enough")
        scale = _scale(leaves)
        problem = shape_problem(tuple(scale.shape) if scale is not None else (), rows, columns)
        return problem or scalar_problem(leaves, "input_scale") or wrong_shape(leaves, rows, columns)

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        import torch

        codes, leaf = part["weight"], "weight_scale" if "weight_scale" in part else "weight_scale_inv"
        rows, columns = codes.shape
        whole = by_row(f"{name}.{leaf}", part.get(leaf, torch.ones(())), rows)
        read_scale(name, part, "input_scale")
        tile = Tile(Place("fp8_blocks", rows, columns), {"codes": codes, "scale": whole})
        full = full_precision_marker(name, part, WORDS)
        return Coded((tile,), part.get("bias"), full_precision=full)


def _scale(leaves: Leaves) -> Any:
    return leaves.get("weight_scale") or leaves.get("weight_scale_inv")


CODECS, FORMATS = (FP8Blocks(),), (FP8BlocksFormat(),)
