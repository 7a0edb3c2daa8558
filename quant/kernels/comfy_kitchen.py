"""comfy-kitchen's kernels.

FP8 and NVFP4: the activation is quantized once, each tile is one GEMM. Ascend's integer kinds: its INT8 matmul with an
NPU's activation rules; their other kinds, and whatever else it has no matmul for, multiply dequantized.

SVDQuant (docs/sources/nunchaku.md, "Arithmetic"): the quantized activation of (x [+ 0.171875]) / smooth times the
codes, plus bias, plus the low-rank branch on raw x. Activations ("Activation rules"): INT4 scale = absmax / 7
(unsigned: / 15) of 64 channels, codes from that scale, as nunchaku. NVFP4: block scale = amax / 6 as E4M3 with a tensor
scale of 1 (nunchaku has none), codes taken from the ROUNDED scale, which is the host kernel's rule; nunchaku's kernel
takes them from the unrounded one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from comfy_kitchen import quantize_per_tensor_fp8, scaled_mm_nvfp4
from comfy_kitchen.scaled_mm_v2 import scaled_mm_v2
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from torch import Tensor
from torch.nn.functional import linear as matmul

from ...host.texts import Text, joined
from ..ascend.kinds import HOST_FORMAT, KINDS
from ..codecs import codec
from ..exact import REFUSALS
from ..svdquant.parts import KIND
from ..tile import Tile
from . import int8
from .base import HALF, NATIVE, SLOW, USABLE, Activation, Kernel, Speed, add_low_rank, dense
from .reference import integer_linear, smooth

if TYPE_CHECKING:
    from ...host import Machine

E4M3_MAX = 448.0  # torch casts what is beyond 464 to NaN, so clamp


HOST = {"fp8": "FP8", "nvfp4": "NVFP4"}  # codec -> the host's matmul
# How it differs from an NPU, for the kinds where it does.
RULES = {
    "w8a8_dynamic": Text("activations are divided by their scale, in the model's dtype (an NPU multiplies by its "
                         "reciprocal in F32), and the bias is added after rounding to the model's dtype"),
    "w8a8_mxfp8": Text("activations get the ceiling of the shared exponent (an NPU takes the floor: other in ~13 % of "
                       "blocks), or stay unquantized where the GPU has no MXFP8 matmul"),
    **dict.fromkeys((kind for kind, (weight, _) in KINDS.items() if weight in ("e4m3", "mxfp4", "mxfp4_dual")),
                    Text("activations stay unquantized (comfy-kitchen has no such matmul)")),
}


def _ascend(name: str, machine: Machine) -> Speed:
    """The speed of a kind of Ascend's."""
    kind, rules = KINDS[name], [RULES[name]] if name in RULES else []
    if machine.kind == "npu":
        return Speed(SLOW, joined("; ", [Text("comfy-kitchen multiplies on the NPU by its own rules"), *rules]))
    if name == "w8a8_mxfp8" and "MXFP8" in machine.matmuls or \
            kind.codec == "int8" and kind.integer and machine.kind != "cpu" and "INT8" in machine.matmuls:
        matmul = "MXFP8" if kind.codec == "mxfp8" else "INT8"
        return Speed(NATIVE, joined("; ", [Text("native {format} matmul", format=matmul), *rules]))
    off = HOST_FORMAT.get(name) == "int8_tensorwise" and "INT8" not in machine.matmuls
    if off:
        words = Text("emulated (weights dequantized), because ComfyUI has INT8 off for this device")
    else:
        words = Text("in INT8 arithmetic without fast kernels") if kind.integer else \
            Text("emulated (weights dequantized)")
    return Speed(USABLE, joined("; ", [words, *rules]))


def _svdquant(kind: str, machine: Machine) -> Speed:
    """The speed of SVDQuant's kinds (docs/sources/nunchaku.md, "Back ends")."""
    if machine.gfx:
        fast = kind != "nvfp4" and machine.gfx.startswith(("gfx11", "gfx12"))
        return Speed(NATIVE, Text("comfy-kitchen's HIP kernels: untested")) if fast else \
            Speed(SLOW, Text("comfy-kitchen has no {format} kernel here", format=kind.upper()))
    if machine.capability is None:
        return Speed(SLOW, Text("slow, 2 to 6 times slower than dequantized weights")
                     if kind == "int4" and machine.kind == "cpu" else
                     Text("comfy-kitchen has no {format} kernel here", format=kind.upper()))
    least = (10, 0) if kind == "nvfp4" else (8, 0)
    if machine.capability < least:
        return Speed(SLOW, Text("comfy-kitchen has no {format} kernel here", format=kind.upper()))
    if kind == "nvfp4":
        return Speed(NATIVE, Text("ComfyUI's NVFP4 matmul with a low-rank branch: fast on {gpu}", gpu=machine.sm))
    if machine.capability < (9, 0):
        return Speed(NATIVE, Text("comfy-kitchen's INT4 kernels: fast on {gpu}", gpu=machine.sm))
    if machine.capability < (10, 0):
        return Speed(NATIVE, Text("comfy-kitchen's INT4 kernels: speed unknown on {gpu}, whose tensor cores have no "
                                  "INT4", gpu=machine.sm))
    return Speed(NATIVE, Text("comfy-kitchen's INT4 kernels: untested on {gpu}", gpu=machine.sm))


class ComfyKitchen(Kernel):
    """See the module."""

    name, title, host_switches = "comfy_kitchen", "comfy-kitchen", True
    codecs = frozenset({"fp8", "nvfp4", *KINDS, *KIND})

    def speed(self, name: str, machine: Machine) -> Speed:
        if name in HOST:
            matmul = HOST[name]
            native = matmul in machine.matmuls
            return Speed(NATIVE if native else SLOW, Text("native {format} matmul", format=matmul) if native else
                         Text("it has no {format} matmul", format=matmul))
        return _svdquant(KIND[name], machine) if name in KIND else _ascend(name, machine)

    def quantizes(self, name: str, machine: Machine) -> str:
        if name in HOST:
            from ...host import MATMULS

            matmul = HOST[name]
            return "" if machine.kind == "cpu" or matmul in machine.matmuls else \
                Text("{device} has no {format} matrix multiplication (NVIDIA {generation} or newer has)",
                     device=machine.name, format=matmul, generation=MATMULS[matmul])
        if name not in KINDS:
            return ""
        if machine.kind == "npu":
            return Text("comfy-kitchen does not run on an NPU")
        kept = not KINDS[name].integer and bool(KINDS[name].activation) \
            and not (name == "w8a8_mxfp8" and "MXFP8" in machine.matmuls)
        return Text("activations stay unquantized") if kept else ""

    def decodes(self, name: str, like: Tensor) -> bool:
        return name not in RUN and not (name in KINDS and KINDS[name].integer)

    def linear(self, act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
        name = tile.place.codec
        run = RUN.get(name)
        if run is not None:
            return run(act, tile, bias)
        if name in KINDS and KINDS[name].integer:
            return integer_linear(act.x, tile, bias, int8.product)
        return dense(act.x, tile, bias)

    def exact(self, act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
        """With the activation quantized, where only the matmul was refused."""
        quantize = {"fp8": fp8_activation, "nvfp4": nvfp4_activation}.get(tile.place.codec)
        if quantize is not None:
            try:
                seen: Tensor = quantize(act, tile).dequantize()
            except REFUSALS:
                return dense(act.x, tile, bias)
            weight = codec(tile.place.codec).residual(tile.having(mul=None), act.x.dtype)  # the activation has it
            return add_low_rank(matmul(seen, weight, bias), act.x, tile)
        return dense(act.x, tile, bias)


def fp8_activation(act: Activation, tile: Tile) -> QuantizedTensor:
    """clamp(x / scale, +-448) as E4M3; the scale is the stored one, or amax / 448 of this very x."""
    scale = tile.get("input_scale")

    def make() -> QuantizedTensor:
        x, own = act.x, scale
        if own is None:
            own = torch.amax(x.abs()).float() / E4M3_MAX
            # an all-zero input, and fp16's range: 1/scale must stay finite
            own = own.clamp(min=max(1e-30, 2 / torch.finfo(x.dtype).max))
        layout = get_layout_class("TensorCoreFP8E4M3Layout")
        params = layout.Params(scale=own.float().reshape(()), orig_dtype=x.dtype, orig_shape=tuple(x.shape))
        return QuantizedTensor(quantize_per_tensor_fp8(x, own, torch.float8_e4m3fn), "TensorCoreFP8E4M3Layout", params)

    made: QuantizedTensor = act.once(("fp8", id(scale)), make)
    return made


def nvfp4_activation(act: Activation, tile: Tile) -> QuantizedTensor:
    """NVFP4 as the host quantizes activations; without a stored scale amax / 2688."""
    scale, mul = tile.get("input_scale"), tile.get("mul")
    made: QuantizedTensor = act.once(("nvfp4", id(scale), id(mul)), lambda: QuantizedTensor.from_float(
        smooth(act.x, tile), "TensorCoreNVFP4Layout", scale=scale))
    return made


def _fp8(act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
    """One FP8 GEMM. Raises where the device has none."""
    x = fp8_activation(act, tile)
    out = scaled_mm_v2(x._qdata.contiguous(), tile["codes"].t(), scale_a=x._params.scale, scale_b=tile["scale"],
                       bias=bias, out_dtype=act.x.dtype)
    return add_low_rank(out, act.x, tile)


def _nvfp4(act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
    x = nvfp4_activation(act, tile)
    out = scaled_mm_nvfp4(x._qdata, tile["codes"], tensor_scale_a=x._params.scale.reshape(()),
                          tensor_scale_b=tile["scale"], block_scale_a=x._params.block_scale,
                          block_scale_b=tile["block"], bias=bias, out_dtype=act.x.dtype)
    return add_low_rank(out[:act.x.shape[0]], act.x, tile)


def _svdq_int4(act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
    """comfy-kitchen's own layout: CUDA (16 bit only), HIP, or eager anywhere. Before SM 8.0 its CUDA kernels, called
    past its own gate, trap."""
    x, place = act.x, tile.place
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return dense(x, tile, bias)
    dtype = x.dtype if x.dtype in HALF or not x.is_cuda else torch.bfloat16
    scale, smooth, down, up = (tile[name].to(dtype) for name in ("scale", "smooth", "down", "up"))
    theirs = get_layout_class("TensorCoreSVDQuantW4A4Layout")
    params = theirs.Params(scale=scale, orig_dtype=dtype, orig_shape=(place.rows, place.columns), proj_down=down,
                           proj_up=up, smooth_factor=smooth, act_unsigned=place.codec == "svdq_int4_unsigned")
    weight = QuantizedTensor(tile["codes"].view(torch.int8), "TensorCoreSVDQuantW4A4Layout", params)
    return matmul(x.to(dtype).contiguous(), weight, None if bias is None else bias.to(dtype)).to(x.dtype)


def _svdq_nvfp4(act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
    """The host's NVFP4 GEMM on x / smooth, times the channel scales, then bias and the low-rank branch on raw x."""
    x, p = act.x, tile.place
    theirs = get_layout_class("TensorCoreNVFP4Layout")
    params = theirs.Params(scale=tile["tensor_scale"], orig_dtype=x.dtype, orig_shape=(p.rows, p.columns),
                           block_scale=tile["scale"])
    weight = QuantizedTensor(tile["codes"], "TensorCoreNVFP4Layout", params)
    one = torch.ones((), device=x.device)
    seen = QuantizedTensor.from_float((x / tile["smooth"].to(x.dtype)).contiguous(), "TensorCoreNVFP4Layout", scale=one)
    out, channel = matmul(seen, weight), tile.get("channel_scale")
    if channel is not None:
        out = out * channel.to(x.dtype)
    return add_low_rank(out if bias is None else out + bias, x, tile)


def _awq(act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
    """comfy-kitchen's AWQ kernels, which take any number of rows (16 bit only). They compute (q - 8) * s + z."""
    x = act.x
    if not x.is_cuda:
        return dense(x, tile, bias)
    dtype = x.dtype if x.dtype in HALF else torch.bfloat16
    zeros = tile["zeros"].float() + 8 * tile["scale"].float()  # F32: in 16 bit it would be rounded twice
    theirs = get_layout_class("TensorCoreAWQW4A16Layout")
    params = theirs.Params(scale=tile["scale"].to(dtype), zeros=zeros.to(dtype), orig_dtype=dtype,
                           orig_shape=(tile.place.rows, tile.place.columns))
    weight = QuantizedTensor(tile["codes"].view(torch.int8), "TensorCoreAWQW4A16Layout", params)
    out = matmul(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)
    return add_low_rank(out, x, tile)


RUN: dict[str, Callable[[Activation, Tile, Any], Tensor]] = {
    "fp8": _fp8, "nvfp4": _nvfp4, "svdq_int4": _svdq_int4, "svdq_int4_unsigned": _svdq_int4,
    "svdq_nvfp4": _svdq_nvfp4, "awq": _awq}
KERNEL = ComfyKitchen()


def get(variant: str) -> Kernel:
    """The kernel; it has no variants."""
    return KERNEL
