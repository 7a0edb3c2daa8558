"""A torch_npu that computes on the CPU what an NPU would, and refuses every argument the real one does not document.

`SCHEMAS` are the operators' own declarations, read out of torch_npu 2.14's library; limits on dtypes, shapes, strides
and groups are those of its operator documentation and meta functions. Arithmetic is support/ascend.py's.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import ascend

SCHEMAS = {
    "npu_quantize": "(Tensor input, Tensor scales, Tensor? zero_points, int dtype, int axis=1, bool div_mode=True) "
                    "-> Tensor",
    "npu_dynamic_quant": "(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
                         'str quant_mode="pertoken", float dst_type_max=0.0) -> (Tensor, Tensor)',
    "npu_dynamic_mx_quant": '(Tensor input, *, int axis=-1, str round_mode="rint", int dst_type=296, '
                            "int block_size=32, int? scale_alg=0, float dst_type_max=0.0, float max_low_bound=0.0) "
                            "-> (Tensor, Tensor)",
    "npu_dynamic_dual_level_mx_quant": '(Tensor input, *, Tensor? smooth_scale=None, str round_mode="rint") '
                                       "-> (Tensor, Tensor, Tensor)",
    "npu_convert_weight_to_int4pack": "(Tensor weight, int inner_k_tiles=0) -> Tensor",
    "npu_format_cast": "(Tensor input, int acl_format, *, int? customize_dtype=None, int? input_dtype=None) -> Tensor",
    "npu_quant_matmul": "(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, "
                        "Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, "
                        "int? pertoken_scale_dtype=None, int? scale_dtype=None, int[]? group_sizes=None, "
                        "Tensor? y_scale=None) -> Tensor",
    "npu_weight_quant_batchmatmul": "(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? antiquant_offset=None, "
                                    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None, "
                                    "int antiquant_group_size=0, int inner_precise=0, int? weight_dtype=None) -> Tensor",
    "npu_dual_level_quant_matmul": "(Tensor x1, Tensor x2, Tensor x1_level0_scale, Tensor x2_level0_scale, "
                                   "Tensor x1_level1_scale, Tensor x2_level1_scale, *, Tensor? bias=None, "
                                   "int output_dtype=15) -> Tensor",
}
E5M2, FP8, E8M0, FP4 = 291, 292, 293, 296  # what torch_npu.float8_e4m3fn and the others are
HALVES = (torch.float16, torch.bfloat16)
BY_GENERATION = {"npu_convert_weight_to_int4pack": ("A2", "A3"), "npu_weight_quant_batchmatmul": ("A2", "A3"), "npu_dynamic_mx_quant": ("A5",),
                 "npu_dynamic_dual_level_mx_quant": ("A5",), "npu_dual_level_quant_matmul": ("A5",)}


class NPUError(AssertionError):
    """Arguments that the real operator does not take. No RuntimeError as the real one's, which would be answered by
    the exact path (quant/exact.py) and not be seen."""


def check(condition: bool, text: str) -> None:
    if not condition:
        raise NPUError(text)


def bind(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, as the operator's declaration says; NPUError for unknown ones and wrong types."""
    declared = torch._C.parse_schema(name + SCHEMAS[name]).arguments
    positional = [a for a in declared if not a.kwarg_only]
    check(len(args) <= len(positional), f"{name}: {len(args)} positional arguments, {len(positional)} at most")
    given = dict(zip((a.name for a in positional), args, strict=False)) | kwargs
    for unknown in set(given) - {a.name for a in declared}:
        raise NPUError(f"{name} has no argument {unknown}")
    bound = {}
    for argument in declared:
        check(argument.name in given or argument.has_default_value(), f"{name}: {argument.name} is missing")
        value = given.get(argument.name, argument.default_value)
        kind = str(argument.type)
        wanted: tuple[type, ...] = {"Tensor": (torch.Tensor,), "int": (int, torch.dtype), "str": (str,), "bool": (bool,),
                                    "float": (float,), "List[int]": (list, tuple)}[kind.removeprefix("Optional[").rstrip("]")
                                                                                 if "List" not in kind else "List[int]"]
        check(value is None and kind.startswith("Optional") or isinstance(value, wanted),
              f"{name}: {argument.name} is {type(value).__name__}, declared {kind}")
        bound[argument.name] = value
    return bound


def _to(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(dtype)


def _pair(byte: np.ndarray) -> torch.Tensor:
    """E8M0 bytes [M, blocks] -> U8 [M, ceil(blocks / 2), 2]."""
    return torch.from_numpy(np.pad(byte, ((0, 0), (0, byte.shape[1] % 2))).reshape(len(byte), -1, 2).copy())


def _int32(codes: np.ndarray) -> torch.Tensor:
    """Eight int4 codes in an int32, the first in the lowest bits."""
    wide = (codes.astype(np.int64) % 16).reshape(*codes.shape[:-1], -1, 8) << (4 * np.arange(8))
    return torch.from_numpy(wide.sum(-1).astype(np.uint32).view(np.int32).copy())


def _int4(packed: torch.Tensor) -> np.ndarray:
    codes = (packed.contiguous().numpy().view(np.uint32)[..., None].astype(np.int64) >> (4 * np.arange(8))) & 15
    codes = codes - 16 * (codes > 7)
    return codes.reshape(*packed.shape[:-1], -1)


class FakeTorchNPU(types.ModuleType):
    """Install as sys.modules["torch_npu"]. `calls` records the operators used."""

    def __init__(self, soc: int = 260, cann: str = "8.5.0", without: tuple[str, ...] = ()) -> None:
        super().__init__("torch_npu")
        self.__version__ = "2.14.0"
        self.float8_e4m3fn, self.float8_e8m0fnu, self.float4_e2m1fn_x2 = FP8, E8M0, FP4
        self.generation = "A5" if soc >= 260 else "A3" if soc >= 250 else "A2"
        self.calls: list[str] = []
        self.fractal: list[torch.Tensor] = []  # tensors in FRACTAL_NZ
        utils = types.ModuleType("torch_npu.npu.utils")
        utils.get_cann_version = lambda module="CANN": cann
        self.npu = types.ModuleType("torch_npu.npu")
        self.npu.get_soc_version, self.npu.utils = lambda: soc, utils
        self.modules = {"torch_npu": self, "torch_npu.npu": self.npu, "torch_npu.npu.utils": utils}
        for name in set(SCHEMAS) - set(without):
            setattr(self, name, self._operator(name))

    def _operator(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = bind(name, args, kwargs)
            check(self.generation in BY_GENERATION.get(name, (self.generation,)), f"{name} is not on {self.generation}")
            self.calls.append(name)
            return getattr(self, f"_{name}")(**bound)

        return call

    def _npu_quantize(self, input, scales, zero_points, dtype, axis, div_mode):
        check(not div_mode and dtype == torch.qint8 and axis == -1, "only the mode that ModelSlim layers use")
        check(input.dtype in (torch.float32, *HALVES) and scales.dtype == input.dtype, "dtypes of input and scales")
        check(scales.dim() == 1 and scales.shape[0] in (1, input.shape[-1]), "scales is [K] or [1]")
        check(zero_points.shape == scales.shape and zero_points.dtype == scales.dtype, "zero_points as scales")
        codes = np.rint(ascend.numpy(input) * ascend.numpy(scales) + ascend.numpy(zero_points))
        return torch.from_numpy(np.clip(codes, -128, 127).astype(np.int8))

    def _npu_dynamic_quant(self, input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max):
        check(input.dtype in HALVES and input.dim() > 1, f"input is {input.dtype}")
        check(smooth_scales is None and group_index is None and quant_mode == "pertoken" and dst_type_max == 0, "options")
        check(dst_type in (None, torch.int8, torch.quint4x2), f"dst_type {dst_type}")
        four = dst_type == torch.quint4x2
        check(not four or self.generation in ("A2", "A3") and input.shape[-1] % 8 == 0, "int4: A2 or A3, K % 8")
        codes, scale = ascend.tokens(ascend.numpy(input), 7 if four else 127)
        return _int32(codes) if four else torch.from_numpy(codes.astype(np.int8)), torch.from_numpy(scale)

    def _npu_dynamic_mx_quant(self, input, axis, round_mode, dst_type, block_size, scale_alg, dst_type_max,
                              max_low_bound):
        check(input.dtype in (torch.float32, *HALVES) and axis in (-1, input.dim() - 1) and block_size == 32, "input")
        check(scale_alg == 0 and dst_type_max == 0 and max_low_bound == 0, "scale algorithm")
        check(dst_type in (FP8, torch.float8_e4m3fn, FP4), f"dst_type {dst_type}")
        four = dst_type == FP4
        check(round_mode in (("rint", "floor", "round") if four else ("rint",)), f"round_mode {round_mode}")
        check(not four or input.shape[-1] % 2 == 0, "FP4: K is even")
        codes, byte = ascend.mx(ascend.numpy(input), "e2m1" if four else "e4m3", round_mode == "round")
        values = torch.from_numpy(ascend.pairs(codes) if four else codes)
        return values if four else values.view(torch.float8_e4m3fn), _pair(byte)

    def _npu_dynamic_dual_level_mx_quant(self, input, smooth_scale, round_mode):
        check(input.dtype in HALVES and smooth_scale is None and round_mode == "rint", "options")
        x = ascend.numpy(input)
        dual = np.abs(ascend.blocks(x, 512)).max(-1).astype(np.float32) / np.float32(6)
        level = (ascend.blocks(x, 512) / np.where(dual == 0, np.float32(1), dual)[..., None]).reshape(len(x), -1)[:, :x.shape[1]]
        codes, byte = ascend.mx(ascend.numpy(_to(level, input.dtype)), "e2m1")
        return torch.from_numpy(ascend.pairs(codes)), torch.from_numpy(dual), _pair(byte)

    def _npu_convert_weight_to_int4pack(self, weight, inner_k_tiles):
        check(weight.dtype == torch.int32 and weight.dim() == 2 and weight.is_contiguous(), "contiguous int32 [n, k]")
        check(weight.shape[1] % 8 == 0 and bool(((weight >= -8) & (weight < 8)).all()), "-8..7, a multiple of 8")
        return _int32(weight.numpy())

    def _npu_format_cast(self, input, acl_format, customize_dtype, input_dtype):
        check(acl_format == 29 and input.is_contiguous(), "FRACTAL_NZ of a contiguous tensor")
        check((customize_dtype, input_dtype) in ((FP8, FP4), (torch.int8, None)), "dtypes of the two matmuls that need it")
        self.fractal.append(input.clone())
        return self.fractal[-1]

    def _is_fractal(self, tensor: torch.Tensor) -> bool:
        return any(tensor.data_ptr() == held.data_ptr() for held in self.fractal)

    def _npu_quant_matmul(self, x1, x2, scale, offset, pertoken_scale, bias, output_dtype, x1_dtype, x2_dtype,
                          pertoken_scale_dtype, scale_dtype, group_sizes, y_scale):
        check(offset is None and y_scale is None and x1.dim() == x2.dim() == 2, "options")
        check(output_dtype in HALVES, f"output_dtype {output_dtype}")
        if scale_dtype is not None:
            check(scale_dtype == pertoken_scale_dtype == E8M0 and self.generation == "A5", "MX needs E8M0 scales and A5")
            return self._mx_matmul(x1, x2, scale, pertoken_scale, bias, output_dtype, x1_dtype, x2_dtype, group_sizes)
        check(group_sizes is None and x1_dtype is None and x2_dtype is None and x1.is_contiguous(), "options")
        if x1.dtype == torch.int32:
            check(x2.dtype == torch.int32 and x2.t().is_contiguous() and x2.shape[0] == x1.shape[1], "int4: [k/8, n]")
            check(x2.shape[1] % 8 == 0 and bias is None and pertoken_scale is not None, "int4: n % 8, no bias")
            a, b = _int4(x1), _int4(x2.t())
        else:
            check(x1.dtype == x2.dtype == torch.int8 and x1.shape[1] == x2.shape[0], "int8 [m, k] times [k, n]")
            a, b = x1.numpy().astype(np.int64), x2.t().numpy().astype(np.int64)
        check(scale.dtype == torch.float32 and scale.dim() == 1 and scale.shape[0] in (1, len(b)), "scale is F32 [n]")
        total = a @ b.T
        if pertoken_scale is None:
            check(bias is None or bias.dtype == torch.int32 and bias.shape == (len(b),), "bias is I32 [n]")
            return _to((total + (0 if bias is None else bias.numpy())).astype(np.float32) * scale.numpy(), output_dtype)
        check(pertoken_scale.dtype == torch.float32 and pertoken_scale.shape == (len(a),), "pertoken_scale is F32 [m]")
        check(bias is None or bias.dtype == torch.float32 and bias.shape == (len(b),), "bias is F32 [n]")
        out = total.astype(np.float32) * scale.numpy() * pertoken_scale.numpy()[:, None]
        return _to(out + (0 if bias is None else bias.numpy()), output_dtype)

    def _npu_weight_quant_batchmatmul(self, x, weight, antiquant_scale, antiquant_offset, quant_scale, quant_offset, bias,
                                      antiquant_group_size, inner_precise, weight_dtype):
        """Its documentation's formula, and op-plugin's own checks (WeightQuantBatchMatmulV2KernelNpuOpApi.cpp)."""
        check(quant_scale is None and quant_offset is None and inner_precise == 0 and weight_dtype is None, "options")
        check(x.dtype in HALVES and x.dim() == weight.dim() == 2 and x.numel() > 0, "x is [m, k] in 16 bits, not empty")
        check(weight.dtype in (torch.int8, torch.int32), "weight is int8, or int4 in int32")
        turned = weight.t().is_contiguous() and not weight.is_contiguous()
        check(turned or weight.is_contiguous(), "weight is contiguous, or transposed")
        values = weight.numpy().astype(np.int64) if weight.dtype == torch.int8 else \
            _int4(weight.t()).T if turned else _int4(weight)
        k, n = values.shape
        check(k == x.shape[1], f"k of x is {x.shape[1]}, of weight {k}")
        check(k <= 65535 and n <= 65535, "k and n are 65535 at most")
        size = antiquant_group_size
        check(size == 0 or size % 32 == 0 and 32 <= size <= k - 1, f"antiquant_group_size is {size}")
        shapes = [(-(-k // size), n)] if size else [(1,), (1, 1), (n,), (1, n)]
        check(tuple(antiquant_scale.shape) in shapes and antiquant_scale.dtype == x.dtype, "antiquant_scale")
        check(antiquant_offset is None or antiquant_offset.shape == antiquant_scale.shape
              and antiquant_offset.dtype == antiquant_scale.dtype, "antiquant_offset is as antiquant_scale")
        check(bias is None or tuple(bias.shape) in ((n,), (1, n)) and bias.is_contiguous()
              and bias.dtype == (torch.float32 if x.dtype == torch.bfloat16 else torch.float16), "bias")
        scale, offset = (np.repeat(t.double().reshape(-1, n if t.numel() > 1 else 1).numpy(), size or 1, 0)[:k]
                         for t in (antiquant_scale, torch.zeros(1) if antiquant_offset is None else antiquant_offset))
        out = x.double().numpy() @ ((values + offset) * scale)
        return _to(out + (0 if bias is None else bias.double().numpy()), x.dtype)

    def _mx_matmul(self, x1, x2, scale, pertoken, bias, output_dtype, x1_dtype, x2_dtype, group_sizes):
        mixed = x1_dtype is None and x2_dtype == FP4
        check((x1_dtype, x2_dtype) in ((None, None), (FP4, FP4), (None, FP4)), "x1_dtype and x2_dtype")
        check(list(group_sizes) == ([0, 0, 32] if mixed else [1, 1, 32]), f"group_sizes {group_sizes}")
        check(x2.t().is_contiguous() and (self._is_fractal(x2) or not mixed), "x2 is a transposed view (in FRACTAL_NZ)")
        rows, columns = x2.shape[1], x2.shape[0] * (1 if x2_dtype is None else 2)
        check(x1.shape[1] * (1 if x1_dtype is None else 2) == columns, "k of x1 and x2")
        check(not mixed or columns % 64 == 0, "mixed: k % 64")
        check(scale.dtype == torch.uint8 and tuple(scale.shape) == (-(-columns // 64), rows, 2), "scale is [k/64, n, 2]")
        check(scale.transpose(0, 1).is_contiguous(), "scale is a transposed view")
        check(pertoken.dtype == torch.uint8 and tuple(pertoken.shape) == (len(x1), -(-columns // 64), 2), "pertoken_scale")
        check(bias is None or bias.dtype == torch.float32 and tuple(bias.shape) == ((1, rows) if mixed else (rows,)),
              "bias is F32 [n], or [1, n] for FP8 x FP4")
        a = self._values(x1, pertoken, x1_dtype)
        b = self._values(x2.t(), scale.transpose(0, 1), x2_dtype)
        out = a.astype(np.float64) @ b.T.astype(np.float64)
        return _to(out + (0 if bias is None else bias.numpy().reshape(-1)), output_dtype)

    @staticmethod
    def _values(codes: torch.Tensor, scale: torch.Tensor, dtype: int | None) -> np.ndarray:
        check(codes.dtype == (torch.float8_e4m3fn if dtype is None else torch.uint8), f"codes are {codes.dtype}")
        raw = codes.contiguous().view(torch.uint8).numpy()
        raw = raw if dtype is None else ascend.nibbles(raw)
        byte = scale.reshape(len(raw), -1).numpy()[:, :-(-raw.shape[1] // 32)]
        return ascend.from_mx(raw, byte, "e4m3" if dtype is None else "e2m1")

    def _npu_dual_level_quant_matmul(self, x1, x2, x1_level0_scale, x2_level0_scale, x1_level1_scale, x2_level1_scale,
                                     bias, output_dtype):
        columns = x1.shape[1] * 2
        check(x2.dtype == torch.int8 and self._is_fractal(x2) and x2.shape[1] * 2 == columns, "x2 in FRACTAL_NZ [n, k/2]")
        check(tuple(x2_level0_scale.shape) == (-(-columns // 512), len(x2)) and x2_level0_scale.is_contiguous(), "level 0")
        check(tuple(x2_level1_scale.shape) == (len(x2), -(-columns // 64), 2), "level 1")
        check(x2_level0_scale.dtype == torch.float32 and x2_level1_scale.dtype == torch.uint8, "dtypes of scales")
        check(bias is None or bias.dtype == torch.float32, "bias is F32")
        check(output_dtype in HALVES, f"output_dtype {output_dtype}")
        a = ascend.blocks(self._values(x1, x1_level1_scale, FP4), 512) * x1_level0_scale.numpy()[..., None]
        b = ascend.blocks(self._values(x2.view(torch.uint8), x2_level1_scale, FP4), 512) * x2_level0_scale.t().numpy()[..., None]
        out = a.reshape(len(a), -1).astype(np.float64) @ b.reshape(len(b), -1).T.astype(np.float64)
        return _to(out + (0 if bias is None else bias.numpy()), output_dtype)


def install(monkeypatch: Any, **options: Any) -> FakeTorchNPU:
    """A fake that `import torch_npu` finds until the test ends."""
    fake = FakeTorchNPU(**options)
    for name, module in fake.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake
