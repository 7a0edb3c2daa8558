"""FP8 E4M3 with one scale a tensor: ModelOpt FP8 and generic `fp8`.

Stored per Linear P (nvidia-modelopt 0.47 export, docs/formats/fp8.md; SGLang's converter writes the same
with scales of shape [1]):

    P.weight        F8_E4M3 [out, in]    W = weight.float() * weight_scale
    P.weight_scale  F32     [] or [1]    weight amax / 448 (BF16 and F16 occur); in a file without any, the values
                                         are the weight
    P.input_scale   F32     [] or [1]    activation amax / 448; absent means a dynamic scale, never 1.0
    P.bias          BF16    [out]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ..marker import full_precision_marker
from ..scales import POSITIVE
from ..stored import PLAIN_DTYPES, ByteOrder, Leaves, read_scale, scalar_problem, wrong_shape
from ..tile import Coded, Place, Tile
from .base import LOW_RANK, Codec, Field, scalar, stack

if TYPE_CHECKING:
    from torch import Tensor, dtype

SCALAR = Field(("float32",), lambda rows, columns: (), values=POSITIVE)
INPUT_SCALE = SCALAR._replace(optional=True)  # of the activation; absent means a dynamic one


class FP8(Codec):
    """See base.Codec."""

    name, title = "fp8", "FP8"
    word = switch = "float8_e4m3fn"
    layout = "TensorCoreFP8E4M3Layout"
    one_input = True
    why = Text("a scale for each of q, k, v, or activation scales computed on the fly")
    fields = {"codes": Field(("float8_e4m3fn",), lambda rows, columns: (rows, columns), 0), "scale": SCALAR,
              "input_scale": INPUT_SCALE, **LOW_RANK}

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        from comfy_kitchen import dequantize_per_tensor_fp8

        return dequantize_per_tensor_fp8(tile["codes"], tile["scale"], dtype)

    def decode_rows(self, tile: Tile, first: int, last: int, out: Tensor) -> None:
        from ..decode import e4m3, of_rows

        e4m3(of_rows(tile["codes"], first, last), tile["scale"], out)

    def requantize(self, weight: Tensor, like: Tile, seed: int, **options: Any) -> Tile:
        from comfy_kitchen.tensor import get_layout_class

        codes, params = get_layout_class("TensorCoreFP8E4M3Layout").quantize(
            weight, scale="recalculate", stochastic_rounding=seed, **options)
        return like.having(codes=codes, scale=params.scale.reshape(()))

    def host(self, tiles: Sequence[Tile], full_precision: bool) -> dict[str, Tensor] | None:
        if not full_precision and "input_scale" not in tiles[0].fields or not one_scale(tiles):
            return None
        return leaves(stack(tiles, self.fields), scale="weight_scale")

    def of_host(self, weight: Any, input_scale: Tensor | None) -> Tile | None:
        if weight._layout_cls != self.layout:
            return None
        return Tile(Place(self.name, *weight._params.orig_shape), {"codes": weight._qdata}).having(
            scale=scalar(weight._params.scale), input_scale=scalar(input_scale))

    def merge(self, tiles: Sequence[Tile]) -> Tile | None:
        return stack(tiles, self.fields) if one_scale(tiles) else None


def one_scale(tiles: Sequence[Tile]) -> bool:
    """Whether one scale holds for all tiles, which have nothing but what the host's layout has."""
    import torch

    return not any({"down", "up"} & tile.fields.keys() for tile in tiles) \
        and all(torch.equal(tile["scale"], tiles[0]["scale"]) for tile in tiles[1:])


def leaves(tile: Tile, **names: str) -> dict[str, Tensor]:
    """A tile's fields as the host's leaves: codes are the weight, `names` (field -> leaf) the others."""
    found = {"codes": "weight", "input_scale": "input_scale", **names}
    return {found[name]: tensor for name, tensor in tile.fields.items()}


class FP8Format:
    """Per-tensor FP8 as a `formats.StoredFormat`."""

    name, codec = "FP8", "fp8"
    colour = (86, 178, 92)
    words = frozenset({"fp8", "float8_e4m3fn"})  # ModelOpt's and ComfyUI's
    companions = frozenset({"weight_scale", "input_scale", "comfy_quant"})

    def matches(self, leaves: Leaves) -> bool:
        scale = leaves.get("weight_scale")
        return leaves["weight"].dtype == "F8_E4M3" and "weight_scale_inv" not in leaves \
            and (scale is None or scale.dtype in PLAIN_DTYPES and tuple(scale.shape) in ((), (1,)))

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        problem = scalar_problem(leaves, "weight_scale") or scalar_problem(leaves, "input_scale")
        return problem or wrong_shape(leaves, rows, columns)

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        import torch

        scales = {"scale": read_scale(name, part, "weight_scale"), "input_scale": read_scale(name, part, "input_scale")}
        codes, cast = part["weight"], scales["scale"] is None
        scales["scale"] = torch.ones(()) if cast else scales["scale"]
        tile = Tile(Place("fp8", codes.shape[0], codes.shape[1]), {"codes": codes}).having(**scales)
        full = full_precision_marker(name, part, ("float8_e4m3fn", "qt.row_shards"))
        return Coded((tile,), part.get("bias"), full_precision=full or cast)  # a cast asks for no quantized activations


FP8_FORMAT = FP8Format()
CODECS, FORMATS = (FP8(),), (FP8_FORMAT,)
