"""Which arguments the kernels (decode.py) take for a tile. Plain torch; Triton is not needed here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....host.texts import Text
from ...ascend.kinds import KINDS
from ...codecs import codec
from ...ggml import QUANTIZED
from ...ggml.blocks import NONLINEAR, constant
from ...scales import block_of
from ...tile import Tile

ALL = 1 << 30  # columns of a group where one scale holds for a row
# ggml's types -> (columns that share a scale, whether something is added to them). Those of two and three bits whose
# codes are rows of a grid, and the ones that nobody publishes models of images in, are left out.
GGML = {"Q4_0": (32, False), "Q4_1": (32, True), "Q5_0": (32, False), "Q5_1": (32, True), "Q8_0": (32, False),
        "Q2_K": (16, True), "Q3_K": (16, False), "Q4_K": (32, True), "Q5_K": (32, True), "Q6_K": (16, False),
        "IQ4_NL": (32, False), "IQ4_XS": (32, False)}
_TYPES = {f"ggml_{kind.name.lower()}": kind for kind in QUANTIZED.values() if kind.name in GGML}
_FP8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


class Plan(NamedTuple):
    """The arguments of decode.tile: tensors, strides and constants by their names there. Codes come as bytes."""

    rows: int
    columns: int
    codes: Tensor
    code: str
    scale: Tensor | None = None
    factor: Tensor | None = None
    zero: Tensor | None = None
    offset: Tensor | None = None
    group: Tensor | None = None
    channel: Tensor | None = None
    dual: Tensor | None = None
    mul: Tensor | None = None
    code_row: int = 0
    scale_row: int = 0
    scale_group: int = 0
    kind: str = "float"
    size: int = ALL
    divide: bool = False
    block: int = 1
    block_bytes: int = 1

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the kernels."""
        return (self.codes, self.scale, self.factor, self.zero, self.offset, self.group, self.channel, self.dual,
                self.mul)

    @property
    def strides(self) -> tuple[int, ...]:
        """In the order of the kernels."""
        return self.code_row, self.scale_row, self.scale_group, 0 if self.dual is None else self.dual.shape[1]

    @property
    def constants(self) -> tuple[Any, ...]:
        """In the order of the kernels."""
        return self.code, self.kind, self.size, self.divide, self.block, self.block_bytes


def plan(tile: Tile) -> Plan:
    """The arguments for a tile of CODECS in its codec's own order. Raises ValueError for fields that kernels do not
    take."""
    made = MAKERS[tile.place.codec](tile)
    for tensor in made.tensors:
        if tensor is not None and tensor is not made.codes and not tensor.is_contiguous():
            raise ValueError(Text("{format}: fields that are not contiguous", format=tile.place.codec))
    if made.zero is not None and made.scale is not None and made.zero.shape != made.scale.shape:
        raise ValueError(Text("{format}: as many zero points as scales are expected", format=tile.place.codec))
    return made


def _bytes(codes: Tensor) -> tuple[Tensor, int]:
    """Codes as bytes (I8 stays), and how far apart their rows are."""
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    return codes if codes.dtype == torch.int8 else codes.view(torch.uint8), codes.stride(0)


def _of(tile: Tile, code: str, scale: Tensor, axis: int = 1, size: int = 0, **more: Any) -> Plan:
    """With a scale [rows, groups], or [groups, rows] for axis 0; `size`: columns of a group, told by the shape."""
    rows, columns = tile.place.rows, tile.place.columns
    codes, code_row = _bytes(tile["codes"])
    count = scale.shape[axis]
    strides = (count, 1) if axis else (1, scale.shape[1])
    size = ALL if count == 1 else size or columns // count
    return Plan(rows, columns, codes, code, scale, code_row=code_row, scale_row=strides[0], scale_group=strides[1],
                size=size)._replace(**more)


def _fp8(tile: Tile) -> Plan:
    scale = tile["scale"].reshape(1, 1)
    return _of(tile, "e4m3", scale, scale_row=0)


def _fp8_blocks(tile: Tile) -> Plan:
    codes, scale = tile["codes"], tile["scale"]
    return _of(tile, _FP8[codes.dtype], scale, size=block_of(codes.shape[1], scale.shape[1]))


def _nvfp4(tile: Tile) -> Plan:
    return _fp4(tile, tile["block"], tile["scale"], mul=tile.get("mul"))


def _svdq_nvfp4(tile: Tile) -> Plan:
    return _fp4(tile, tile["scale"], tile["tensor_scale"], channel=tile.get("channel_scale"), mul=tile.get("smooth"),
                divide=True)


def _fp4(tile: Tile, block: Tensor, scale: Tensor, **more: Any) -> Plan:
    return _of(tile, "e2m1_high", block.view(torch.uint8), factor=scale.float().reshape(1), kind="tiles",
               size=16)._replace(**more)


def _svdq_int4(tile: Tile) -> Plan:
    return _of(tile, "int4", tile["scale"], 0, mul=tile["smooth"], divide=True)


def _awq(tile: Tile) -> Plan:
    return _of(tile, "uint4", tile["scale"], 0, offset=tile["zeros"])


def _codebook(tile: Tile) -> Plan:
    return _of(tile, "table", tile["scale"], factor=tile["table"])


def _groups(tile: Tile) -> Plan:
    code = "uint4" if tile.place.codec == "u4_groups" else "byte"
    return _of(tile, code, tile["scale"], **_beside(tile))


def _words(tile: Tile) -> Plan:
    kind: Any = codec(tile.place.codec)
    code = {"u4_gptq": "gptq4", "u8_gptq": "gptq8", "u4_awq": "awq4"}[kind.name]
    return _of(tile, code, tile["scale"], 0, codes=kind.words(tile), **_beside(tile))


def _beside(tile: Tile) -> dict[str, Any]:
    return {name: tile.get(name) for name in ("zero", "offset", "group")}


def _ascend(tile: Tile) -> Plan:
    weight, scale = KINDS[tile.place.codec].codec, tile["scale"]
    mul = tile.get("mul")
    if weight in ("int8", "int4"):
        scale = scale / tile["input_scale"] if "input_scale" in tile.fields else scale
        return _of(tile, "int4" if weight == "int4" else "byte", scale, zero=tile.get("offset"), mul=mul)
    if weight == "e4m3":
        return _of(tile, "e4m3", scale, mul=mul)
    code = "e4m3" if weight == "mxfp8" else "e2m1"
    return _of(tile, code, scale, kind="e8m0", size=32, dual=tile.get("dual"), mul=mul)


def _ggml(tile: Tile) -> Plan:
    kind = _TYPES[tile.place.codec]
    size, added = GGML[kind.name]
    codes, code_row = _bytes(tile["codes"])
    table = constant(NONLINEAR, torch.float32, codes.device) if kind.name.startswith("IQ4") else None
    return Plan(tile.place.rows, tile.place.columns, codes, kind.name.lower(), factor=table, code_row=code_row,
                kind="shifted" if added else "block", size=size, block=kind.block, block_bytes=kind.size)


MAKERS: dict[str, Callable[[Tile], Plan]] = {
    "fp8": _fp8, "fp8_blocks": _fp8_blocks, "nvfp4": _nvfp4, "svdq_int4": _svdq_int4, "svdq_nvfp4": _svdq_nvfp4,
    "awq": _awq, "codebook": _codebook, "u4_groups": _groups, "u8_groups": _groups, "u4_gptq": _words,
    "u8_gptq": _words, "u4_awq": _words, **dict.fromkeys(KINDS, _ascend), **dict.fromkeys(_TYPES, _ggml)}
CODECS = frozenset(MAKERS)
