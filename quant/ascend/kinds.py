"""The kinds of quantized Linear that ModelSlim writes: how the weight is coded, and what happens to activations."""

from __future__ import annotations

from typing import NamedTuple

BLOCK, DUAL_BLOCK = 32, 512  # columns that share one E8M0 scale, and one second-level scale of dual-scale MXFP4
LEVELS = {"int8": 127, "int4": 7}  # largest code of the symmetric per-token activations


class Kind(NamedTuple):
    """`codec` of the weight and rule of the `activation`, as codecs/ascend.py and kernels/reference.py implement them.

    codec: "int8" (I8 [N, K]), "int4" (U8 [N, K/2]), "e4m3" (a scale a row), "mxfp8", "mxfp4" (E8M0 per 32 columns),
    "mxfp4_dual" (and F32 per 512). activation: "static" (asymmetric INT8, one stored scale), "int8", "int4", "e4m3"
    (a dynamic scale a token), "mxfp8", "mxfp4", "mxfp4_dual" (dynamic blocks), or "" for none.
    """

    codec: str
    activation: str

    @property
    def integer(self) -> bool:
        """Whether it is an integer matmul."""
        return self.activation in ("static", "int8", "int4")


KINDS = {
    "w8a8": Kind("int8", "static"),
    "w8a8_dynamic": Kind("int8", "int8"),
    "w4a4_dynamic": Kind("int4", "int4"),
    "w4a8_dynamic": Kind("int4", "int8"),
    "w8a16": Kind("int8", ""),
    "wfp8afp8_dynamic": Kind("e4m3", "e4m3"),
    "w8a8_mxfp8": Kind("mxfp8", "mxfp8"),
    "w4a8_mxfp": Kind("mxfp4", "mxfp8"),
    "w4a4_mxfp4": Kind("mxfp4", "mxfp4"),
    "w4a4_mxfp4_dualscale": Kind("mxfp4_dual", "mxfp4_dual"),
}
HOST_FORMAT = {"w8a8_dynamic": "int8_tensorwise", "w8a8_mxfp8": "mxfp8"}  # kinds that the host's own layouts hold
