"""Ascend's NPU, through the operators of torch_npu.

Signatures and limits of the operators are those that torch_npu 2.14 documents and checks; calls follow how SGLang and
vLLM-Ascend make them. torch_npu is imported when a function here first needs it.

Weights go to the operators as they are stored; the layouts that an NPU prefers (FRACTAL_NZ) change speed, not numbers,
and are made only for the two operators that take nothing else. Activations other than FP16 and BF16 become BF16.
Shapes that an operator does not take are multiplied by the reference.
"""

from __future__ import annotations

import os
import re
from glob import glob
from typing import Any

import torch

from ..kinds import DUAL_BLOCK, KINDS
from ..layout import AscendLayout, integer_codes
from . import NEEDS, DeviceFacts
from .reference import Reference, patched_bias, smooth

FRACTAL_NZ = 29
OPS = tuple(sorted({op for needs in NEEDS.values() for op in needs.ops}))
# First SoC number of each generation, as torch_npu.npu.get_soc_version() counts them
GENERATIONS = ((260, "A5"), (250, "A3"), (220, "A2"), (200, "310P"), (100, "910"))


def generation(soc: int) -> str:
    """The product generation of a SoC number: 220.. are Ascend 910B (A2), 250.. 910C (A3), 260.. 950 (A5)."""
    return next((name for first, name in GENERATIONS if soc >= first), "")


def device_facts(device_type: str) -> DeviceFacts:
    """What backends.choose_backend needs to know. `device_type` is that of the host's device ("npu", "cuda", "cpu")."""
    try:
        import torch_npu
    except ModuleNotFoundError:
        return DeviceFacts()
    except Exception as error:  # a broken install raises anything, from ImportError to OSError
        return DeviceFacts(import_error=f"{type(error).__name__}: {error}")
    npu = device_type == "npu"
    return DeviceFacts(npu, generation(int(torch_npu.npu.get_soc_version())) if npu else "", cann_version(),
                       str(torch_npu.__version__), "", frozenset(op for op in OPS if hasattr(torch_npu, op)))


def cann_version() -> str:
    """CANN's version from torch_npu, or from its install folder (ASCEND_HOME_PATH); "" when neither tells."""
    try:
        from torch_npu.npu.utils import get_cann_version

        return str(get_cann_version("CANN"))
    except (ImportError, RuntimeError):  # torch_npu before 2.6, or no CANN to ask
        pass
    home = os.environ.get("ASCEND_HOME_PATH", "")
    for path in sorted(glob(os.path.join(home, "**", "ascend_*_install.info"), recursive=True) if home else []):
        with open(path, encoding="utf-8") as file:
            found = re.search(r"^version=(\S+)", file.read(), re.MULTILINE)
        if found:
            return found[1]
    return ""


def paired(scale: torch.Tensor) -> torch.Tensor:
    """U8 E8M0 [N, blocks] -> [ceil(blocks / 2), N, 2], a transposed view; a missing last block gets byte 0."""
    if scale.shape[1] % 2:
        scale = torch.nn.functional.pad(scale, (0, 1))
    return scale.reshape(scale.shape[0], -1, 2).transpose(0, 1)


class TorchNPU(Reference):
    """See the module."""

    name = "torch_npu"
    takes_host_layouts = True

    def linear(self, x: torch.Tensor, codes: torch.Tensor, params: AscendLayout.Params,
               bias: torch.Tensor | None) -> torch.Tensor:
        """See backends.Backend."""
        run = {"static": self.static, "int8": self.token, "int4": self.token, "mxfp8": self.microscaling,
               "mxfp4": self.microscaling, "mxfp4_dual": self.dual}.get(KINDS[params.kind].activation)
        if run is None or not _fits(params):
            return super().linear(x, codes, params, bias)
        seen = x if x.dtype in (torch.float16, torch.bfloat16) else x.to(torch.bfloat16)
        return run(smooth(seen, params), codes, params, bias).to(x.dtype)

    @staticmethod
    def static(x: torch.Tensor, codes: torch.Tensor, p: AscendLayout.Params, bias: torch.Tensor | None) -> torch.Tensor:
        """W8A8: npu_quantize with 1 / input_scale and the offset in F32 (so in x's F32 values), then I8 matmul."""
        import torch_npu

        assert p.input_scale is not None and p.input_offset is not None
        scales = (1 / p.input_scale).reshape(1).repeat(x.shape[1])
        offsets = p.input_offset.reshape(1).repeat(x.shape[1])
        q = torch_npu.npu_quantize(x.float(), scales, offsets, torch.qint8, -1, False)
        out = torch_npu.npu_quant_matmul(q, codes.t(), p.scale.reshape(-1).contiguous(), bias=p.quant_bias,
                                         output_dtype=x.dtype)
        return out if bias is None else out + patched_bias(p, bias)

    @staticmethod
    def token(x: torch.Tensor, codes: torch.Tensor, p: AscendLayout.Params, bias: torch.Tensor | None) -> torch.Tensor:
        """INT8 and INT4, one scale a token. The INT4 matmul takes no float bias, so that is added after it."""
        import torch_npu

        weight, scale = integer_codes(codes, p), p.scale.float().reshape(-1).contiguous()
        if KINDS[p.kind].activation == "int8":
            q, token = torch_npu.npu_dynamic_quant(x)
            return torch_npu.npu_quant_matmul(q, weight.t(), scale, pertoken_scale=token, output_dtype=x.dtype,
                                              bias=None if bias is None else bias.float())
        q, token = torch_npu.npu_dynamic_quant(x, dst_type=torch.quint4x2)
        packed = torch_npu.npu_convert_weight_to_int4pack(weight.to(torch.int32).contiguous())
        out = torch_npu.npu_quant_matmul(q, packed.t(), scale, pertoken_scale=token, output_dtype=x.dtype)
        return out if bias is None else out + bias.float()

    @staticmethod
    def microscaling(x: torch.Tensor, codes: torch.Tensor, p: AscendLayout.Params,
                     bias: torch.Tensor | None) -> torch.Tensor:
        """MXFP8 and MXFP4: activations by npu_dynamic_mx_quant (floor rule), scales in pairs, F32 bias."""
        import torch_npu

        codec, activation = KINDS[p.kind]
        fp4, groups = torch_npu.float4_e2m1fn_x2, [1, 1, 32]
        kind: dict[str, Any] = {}
        wide = None if bias is None else bias.float()
        if activation == "mxfp4":
            q, token = torch_npu.npu_dynamic_mx_quant(x, axis=-1, round_mode="round", dst_type=fp4, block_size=32)
            kind = {"x1_dtype": fp4, "x2_dtype": fp4}
        else:
            q, token = torch_npu.npu_dynamic_mx_quant(x, axis=-1, round_mode="rint", block_size=32,
                                                      dst_type=torch_npu.float8_e4m3fn)
        if codec == "mxfp4" and activation == "mxfp8":
            codes = torch_npu.npu_format_cast(codes, FRACTAL_NZ, customize_dtype=torch_npu.float8_e4m3fn,
                                              input_dtype=fp4)
            kind, groups = {"x2_dtype": fp4}, [0, 0, 32]
            wide = None if wide is None else wide[None]
        return torch_npu.npu_quant_matmul(
            q, codes.t(), paired(p.scale), scale_dtype=torch_npu.float8_e8m0fnu, pertoken_scale=token,
            pertoken_scale_dtype=torch_npu.float8_e8m0fnu, bias=wide, output_dtype=x.dtype, group_sizes=groups, **kind)

    @staticmethod
    def dual(x: torch.Tensor, codes: torch.Tensor, p: AscendLayout.Params, bias: torch.Tensor | None) -> torch.Tensor:
        """Dual-scale MXFP4. The operator takes the weight in FRACTAL_NZ only."""
        import torch_npu

        assert p.dual is not None
        q, level0, level1 = torch_npu.npu_dynamic_dual_level_mx_quant(x, smooth_scale=None)
        weight = torch_npu.npu_format_cast(codes.view(torch.int8), FRACTAL_NZ, customize_dtype=torch.int8)
        return torch_npu.npu_dual_level_quant_matmul(
            q, weight, level0, p.dual.t().contiguous(), level1, p.scale.reshape(p.scale.shape[0], -1, 2),
            bias=None if bias is None else bias.float(), output_dtype=x.dtype)


def _fits(p: AscendLayout.Params) -> bool:
    """Whether the operators take this layer's sizes."""
    rows, columns = p.orig_shape
    if p.transposed or p.offset is not None:
        return False
    codec, activation = KINDS[p.kind]
    if activation in ("int8", "int4") and p.scale.shape[1] > 1:
        return False  # a scale for each group of columns
    if activation == "int4":
        return rows % 8 == 0 and columns % 8 == 0
    if codec == "mxfp4":
        return columns % 64 == 0
    return codec != "mxfp4_dual" or columns % DUAL_BLOCK == 0


BACKEND = TorchNPU()
