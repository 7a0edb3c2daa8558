"""FP8 E4M3 with one scale a tensor: ModelOpt FP8 and generic `fp8`.

Stored per Linear P (nvidia-modelopt 0.47 export, docs/formats/fp8.md; SGLang's converter writes the same
with scales of shape [1]):

    P.weight        F8_E4M3 [out, in]    W = weight.float() * weight_scale
    P.weight_scale  F32     [] or [1]    weight amax / 448
    P.input_scale   F32     [] or [1]    activation amax / 448; absent means a dynamic scale, never 1.0
    P.bias          BF16    [out]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .shards import HOST_FORMAT, ROW_SHARDS, Shard, full_precision_marker, read_scale
from .stored import PLAIN_DTYPES, ByteOrder, Leaves, scalar_problem, wrong_shape

if TYPE_CHECKING:
    from torch import Tensor


class FP8Format:
    """Per-tensor FP8 as a `formats.StoredFormat`."""

    name = "FP8"
    colour = (86, 178, 92)
    words = frozenset({"fp8", "float8_e4m3fn"})  # ModelOpt's and ComfyUI's
    companions = frozenset({"weight_scale", "input_scale", "comfy_quant"})

    def matches(self, leaves: Leaves) -> bool:
        scale = leaves.get("weight_scale")
        return leaves["weight"].dtype == "F8_E4M3" and "weight_scale_inv" not in leaves \
            and (scale is None or scale.dtype in PLAIN_DTYPES)

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        if "weight_scale" not in leaves:
            return ("FP8 weight without weight_scale (its values mean nothing without it; an unscaled FP8 cast loads "
                    "with ComfyUI's own Load Diffusion Model)")
        problem = scalar_problem(leaves, "weight_scale") or scalar_problem(leaves, "input_scale")
        return problem or wrong_shape(leaves, rows, columns)

    def shards(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> list[Shard]:
        return [Shard(name, "fp8", part["weight"], read_scale(name, part, "weight_scale"),
                      input_scale=read_scale(name, part, "input_scale"),
                      full_precision=full_precision_marker(name, part, (HOST_FORMAT["fp8"], ROW_SHARDS)))]


FP8 = FP8Format()
