"""compressed-tensors (vLLM's llm-compressor): a Linear's tensors, by the `weights` of its group in `config_groups`.

"weight" stands for weight_packed where there is that one. N rows, K columns, G groups, b bits, c = 32 // b.

    pack-quantized    weight I32 [N, ceil(K / c)], lowest bits first, code + 2^(b-1); weight_scale [N, G] or [1];
                      weight_zero_point I32 [ceil(N / c), G], packed along rows in the same way (asymmetric only);
                      weight_g_idx I32 [K] (actorder "group"); weight_shape I64 [2] = N, K
    int-quantized     weight I8 [N, K], -2^(b-1) .. 2^(b-1) - 1; weight_zero_point I8 [N, G]
    float-quantized, naive-quantized, mxfp8-quantized   as FP8, FP8 (blocks), MXFP8 (quant/codecs)
    nvfp4-pack-quantized   weight U8 [N, K/2], even column in the low nibble; weight_scale E4M3 [N, K/16];
                      weight_global_scale, input_global_scale F32 [1]: what scales are DIVIDED by
    mxfp4-pack-quantized   weight U8 [N, K/2] likewise; weight_scale U8 [N, K/32], E8M0

W = (code - zero point) * weight_scale (compressed_tensors' quantization/lifecycle/forward.py and compressors/).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ..codecs.fp8 import FP8_FORMAT
from ..codecs.fp8_blocks import FP8BlocksFormat
from ..codecs.groups import tile
from ..codecs.int8 import FORMATS as INT8
from ..codecs.int8 import INT8Format
from ..codecs.mxfp8 import FORMATS as MXFP8
from ..codecs.nvfp4 import NVFP4_FORMAT
from ..scales import POSITIVE, checked
from ..stored import MODELOPT_ORDER, ByteOrder, Leaves, StoredFormat, scalar_problem
from ..tile import Coded, Place, Tile
from .bits import FLOATS, WORD, IntegerFormat, kept_bytes, shapes_problem, unpack

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """What a config group says of its weights. `size`: columns of a group, 0 for whole rows; `block`: of a block's rows
    and columns, as stored; `quantized_input`: whether activations are quantized, too."""

    bits: int
    kind: str
    strategy: str
    size: int
    block: tuple[int, ...]
    symmetric: bool
    ordered: bool
    quantized_input: bool


def weights_of(group: dict[str, Any]) -> Weights:
    """A group of `config_groups`. Raises ValueError for one that says nothing of weights, or what is not known."""
    spec = group.get("weights")
    if not isinstance(spec, dict):
        raise ValueError(Text("says nothing of weights"))
    bits, kind = spec.get("num_bits", 8), spec.get("type", "int")
    size, block = spec.get("group_size") or 0, spec.get("block_structure") or ()
    strategy = spec.get("strategy") or ("group" if size > 0 else "block" if block else "tensor")
    if type(bits) is not int or not 1 <= bits <= 8 or kind not in ("int", "float") or type(size) is not int:
        raise ValueError(Text("has weights of {bits} bits {kind!r} in groups of {size}, which this version does not "
                              "load", bits=bits, kind=kind, size=size))
    if block and not (isinstance(block, list) and len(block) == 2 and all(
            type(side) is int and side > 0 and not side & (side - 1) for side in block)):
        raise ValueError(Text("has blocks of {block}, expected two powers of two", block=block))
    return Weights(bits, kind, strategy, max(size, 0) if "group" in strategy else 0, tuple(block),
                   spec.get("symmetric", True) is not False, spec.get("actorder") == "group",
                   group.get("input_activations") is not None)


def words_of(shape: tuple[int, int], weights: Weights) -> tuple[int, int]:
    """The shape in which a weight of this shape is packed."""
    return shape[0], -(-shape[1] // (WORD // weights.bits))


def format_of(leaves: Leaves, weights: Weights) -> StoredFormat | None:
    """The format of a quantized layer, or None when its tensors are no such format's."""
    weight, scale = leaves["weight"], leaves.get("weight_scale")
    if scale is None:
        return None
    if weight.dtype == "I8" and weights.kind == "int":
        plain = weights.bits == 8 and "weight_zero_point" not in leaves and "weight_g_idx" not in leaves
        by_row = plain and not (len(scale.shape) == 2 and scale.shape[1] > 1)
        return _Int8() if by_row and weights.quantized_input else Integers(weights, packed=False)
    if weight.dtype == "I32" and weights.kind == "int":
        return Integers(weights, packed=True)
    if weight.dtype == "U8":
        return NVFP4() if scale.dtype == "F8_E4M3" else MXFP4() if scale.dtype == "U8" else None
    if weight.dtype == "F8_E4M3":
        return next(fmt for fmt in (FP8_FORMAT, *MXFP8, _Blocks(weights.block)) if fmt.matches(leaves))
    return None


def _input_zero_point(leaves: Leaves) -> str:
    point = leaves.get("input_zero_point")
    return "" if point is None or tuple(point.shape) in ((), (1,)) else \
        Text("input_zero_point is {shape}, expected one value", shape=list(point.shape))


class _Int8(INT8Format):
    """INT8 by row or tensor: the activation gets a scale a token, so a static one, and its zero point, are not used."""

    companions = frozenset({"weight_scale", "input_scale", "input_zero_point"})

    def __init__(self) -> None:
        super().__init__(INT8[0].name, INT8[0].codec, INT8[0].colour, INT8[0].blocks)

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        return super().problem(leaves, rows, columns) or _input_zero_point(leaves)


class _Blocks(FP8BlocksFormat):
    """FP8 (blocks), held against the size of blocks that is declared."""

    def __init__(self, block: tuple[int, ...]) -> None:
        self.block = block

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        scale = tuple(leaves["weight_scale"].shape)
        if self.block and scale != (wanted := (-(-rows // self.block[0]), -(-columns // self.block[1]))):
            return Text("weight_scale is {found}, expected {expected} for blocks of {block}", found=list(scale),
                        expected=list(wanted), block=list(self.block))
        return super().problem(leaves, rows, columns)


class Integers(IntegerFormat):
    """Integers that are kept as they are, activations untouched: `packed` in words, or one a byte."""

    def __init__(self, weights: Weights, packed: bool) -> None:
        super().__init__(weights.bits, "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape",
                         "input_scale", "input_zero_point")
        self.weights, self.packed = weights, packed

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        weights, c = self.weights, WORD // self.weights.bits
        size = weights.size or columns
        groups = 1 if weights.strategy == "tensor" else -(-columns // size)
        stored, zeros = ("I32", words_of((rows, columns), weights)), ("I32", (-(-rows // c), groups))
        if not self.packed:
            stored, zeros = ("I8", (rows, columns)), ("I8", (rows, groups))
        scale = tuple(leaves["weight_scale"].shape)
        if not weights.symmetric and "weight_zero_point" not in leaves:
            return Text("weight_zero_point is missing, and the weights are declared asymmetric")
        if weights.ordered and "weight_g_idx" not in leaves:
            return Text("weight_g_idx is missing, and its order of columns is declared")
        if weights.strategy == "tensor":
            if "weight_zero_point" in leaves:
                return Text("a zero point for a whole tensor, which this version does not load")
            if problem := scalar_problem(leaves, "weight_scale"):
                return problem
        return shapes_problem(leaves, {
            "weight": stored, "weight_zero_point": zeros, "weight_shape": ("I64", (2,)),
            "weight_scale": (FLOATS, scale if weights.strategy == "tensor" else (rows, groups)),
            "weight_g_idx": ("I32", (columns,))}) or _input_zero_point(leaves)

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        import torch

        bits, half = self.weights.bits, 1 << self.weights.bits - 1
        zero, group, paired = part.get("weight_zero_point"), part.get("weight_g_idx"), False
        if self.packed:
            rows, columns = (int(size) for size in part["weight_shape"])
            kept = kept_bytes(part["weight"][:rows], bits) if columns % 2 == 0 else None
            if kept is not None:
                codes, paired = kept[:, :columns // 2 if bits < 8 else columns], bits < 8
            else:
                codes = unpack(part["weight"], bits, 1)[:rows, :columns]
            zero = None if zero is None else unpack(zero, bits, 0)[:rows]
        else:
            signed, (rows, columns) = part["weight"].to(torch.int16), part["weight"].shape
            if bool(((signed < -half) | (signed >= half)).any()):
                raise ValueError(Text("{name}.weight has codes of more than {bits} bits", name=name, bits=bits))
            codes = (signed + half).to(torch.uint8)
            zero = None if zero is None else zero.to(torch.int16) + half
        scale = part["weight_scale"].reshape(-1, 1).expand(rows, 1) if self.weights.strategy == "tensor" \
            else part["weight_scale"]
        if group is not None and bool((group == -1).all()):  # as it is made, and never set
            group = None
        zero = torch.full(tuple(scale.shape), half, dtype=torch.uint8) if zero is None else zero
        return Coded((tile(name, codes, scale, bits=bits, zero=zero, group=group, size=self.weights.size,
                           twos=paired),), part.get("bias"))


class NVFP4:
    """NVFP4 whose scales of tensors are divisors; see the module."""

    name, codec, colour = NVFP4_FORMAT.name, NVFP4_FORMAT.codec, NVFP4_FORMAT.colour
    words: frozenset[str] = frozenset()
    companions = frozenset({"weight_scale", "weight_global_scale", "input_global_scale"})

    def matches(self, leaves: Leaves) -> bool:
        return leaves["weight"].dtype == "U8" and "weight_global_scale" in leaves

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        called = {_SCALES.get(leaf, leaf): found for leaf, found in leaves.items()}
        if "weight_global_scale" not in leaves:
            return Text("NVFP4 weight without weight_global_scale")
        return NVFP4_FORMAT.problem(called, rows, columns)

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        def divided(leaf: str, found: Tensor) -> Tensor:
            if leaf not in _SCALES:
                return found
            return (1 / checked(f"{name}.{leaf}", found, POSITIVE).double()).float()

        called = {_SCALES.get(leaf, leaf): divided(leaf, found) for leaf, found in part.items()}
        return NVFP4_FORMAT.coded(name, called, MODELOPT_ORDER)


_SCALES = {"weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}


class MXFP4:
    """MXFP4: tiles of ModelSlim's kind, whose bytes are the same."""

    name, codec, colour = "MXFP4", "w4a4_mxfp4", (150, 90, 190)
    words: frozenset[str] = frozenset()
    companions = frozenset({"weight_scale"})

    def matches(self, leaves: Leaves) -> bool:
        scale = leaves.get("weight_scale")
        return leaves["weight"].dtype == "U8" and scale is not None and scale.dtype == "U8"

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        if columns % 2:
            return Text("MXFP4 needs an even number of columns, this layer has {columns}", columns=columns)
        return shapes_problem(leaves, {"weight": ("U8", (rows, columns // 2)),
                                       "weight_scale": ("U8", (rows, -(-columns // 32)))})

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        codes, scale = part["weight"], part["weight_scale"]
        place = Place(self.codec, codes.shape[0], 2 * codes.shape[1])
        return Coded((Tile(place, {"codes": codes, "scale": scale}),), part.get("bias"))
