"""Ascend's number formats written a second time (numpy, table look-ups, no code of the pack), and a fake torch_npu.

Source: docs/sources/ascend.md. Tables come from the bit layouts, rounding is a search for the nearest entry.
"""

from __future__ import annotations

import numpy as np
import torch

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
# E4M3: 4 exponent bits with bias 7, 3 mantissa bits; code 127 is NaN
E4M3 = np.array([(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:127],
                np.float32)


def numpy(tensor: torch.Tensor) -> np.ndarray:
    """Any tensor as a numpy array; floats as F32, FP8 by its bits and the table above."""
    if tensor.dtype == torch.float8_e4m3fn:
        codes = tensor.contiguous().view(torch.uint8).numpy()
        return np.append(E4M3, np.nan).astype(np.float32)[codes & 127] * np.where(codes & 128, -1, 1).astype(np.float32)
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def nearest(values: np.ndarray, table: np.ndarray, half_away: bool = False) -> np.ndarray:
    """Codes of the entries of an ascending table that are nearest to magnitudes; saturates; ties to the even code."""
    upper = np.clip(np.searchsorted(table, values), 1, len(table) - 1)
    below, above = values - table[upper - 1], table[upper] - values
    tie = upper if half_away else upper - upper % 2
    return np.where(below < above, upper - 1, np.where(below > above, upper, tie)).astype(np.int64)


def e8m0(byte: np.ndarray) -> np.ndarray:
    """2^(byte - 127), F64."""
    return np.exp2(byte.astype(np.float64) - 127)


def blocks(x: np.ndarray, size: int) -> np.ndarray:
    """[M, K] -> [M, ceil(K / size), size], zeros at the end."""
    missing = -x.shape[1] % size
    return np.pad(x, ((0, 0), (0, missing))).reshape(x.shape[0], -1, size)


def mx(x: np.ndarray, kind: str, half_away: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """F32 [M, K] -> (codes U8 with the sign in the top bit, byte)."""
    table, emax, sign = (E4M3, 8, 128) if kind == "e4m3" else (E2M1, 2, 8)
    parts = blocks(x.astype(np.float64), 32)
    amax = np.abs(parts).max(-1)
    byte = np.where(amax == 0, 0, np.maximum(np.frexp(amax)[1] - 1 + 127 - emax, 0))  # frexp: amax / 2^e in .5..1
    scaled = np.where(byte[..., None] == 0, 0.0, parts / e8m0(byte)[..., None])
    codes = nearest(np.abs(scaled).astype(np.float64), table.astype(np.float64), half_away) + sign * (scaled < 0)
    return codes.reshape(x.shape[0], -1)[:, :x.shape[1]].astype(np.uint8), byte.astype(np.uint8)


def from_mx(codes: np.ndarray, byte: np.ndarray, kind: str) -> np.ndarray:
    """Codes and bytes -> F32 [M, K]."""
    table, sign = (E4M3, 128) if kind == "e4m3" else (E2M1, 8)
    values = table.astype(np.float64)[codes & (sign - 1)] * np.where(codes & sign, -1, 1)
    return (blocks(values, 32) * e8m0(byte)[..., None]).reshape(len(codes), -1)[:, :codes.shape[1]].astype(np.float32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """U8 [N, K / 2] -> codes [N, K], the even column in the low nibble."""
    packed = packed.view(np.uint8)
    out = np.zeros((packed.shape[0], packed.shape[1] * 2), np.uint8)
    out[:, 0::2], out[:, 1::2] = packed % 16, packed // 16
    return out


def pairs(codes: np.ndarray) -> np.ndarray:
    """Codes [N, K] -> U8 [N, K / 2]."""
    return (codes[:, 0::2] % 16 + 16 * (codes[:, 1::2].astype(np.int64) % 16)).astype(np.uint8)


def row_pairs(codes: np.ndarray) -> np.ndarray:
    """I8 -8..7 [N, K] -> I8 [N / 2, K], the even row in the low nibble."""
    return pairs(codes.T.astype(np.int64) % 16).T.copy().view(np.int8)


def decode(kind: str, part: dict[str, torch.Tensor]) -> np.ndarray:
    """F32 [N, K] of the stored tensors of one layer, by the table of docs/sources/ascend.md, "Stored tensors"."""
    p = {leaf: numpy(tensor) for leaf, tensor in part.items()}
    weight = p["weight"]
    if kind == "W8A8":
        deq = part["deq_scale"]
        bits = deq.numpy().astype(np.uint64).astype(np.uint32).view(np.float32) if deq.dtype == torch.int64 else p["deq_scale"]
        out = weight.astype(np.float32) * (bits / p["input_scale"].reshape(())).reshape(-1, 1)
    elif kind in ("W8A8_DYNAMIC", "W4A4_DYNAMIC", "W4A8_DYNAMIC", "W8A16"):
        scale = p["weight_scale"]
        if weight.shape[0] != scale.shape[0]:
            codes = np.zeros((scale.shape[0], weight.shape[1]), np.int64)
            codes[0::2], codes[1::2] = weight.view(np.uint8) % 16, weight.view(np.uint8) // 16
            weight = codes - 16 * (codes > 7)
        offset = p.get("weight_offset", np.zeros_like(scale)).astype(np.float32)
        wide = weight.shape[1] // scale.shape[1]
        out = (weight.astype(np.float32) - np.repeat(offset, wide, 1)) * np.repeat(scale, wide, 1)
    elif kind == "WFP8AFP8_DYNAMIC":
        out = weight * p["weight_scale"].reshape(-1, 1)
    elif kind == "W8A8_MXFP8":
        out = from_mx(part["weight"].view(torch.uint8).numpy(), p["weight_scale"], "e4m3")
    else:
        out = from_mx(nibbles(part["weight"].view(torch.uint8).numpy()), p["weight_scale"], "e2m1")
        if kind.endswith("DUALSCALE"):
            dual = p["weight_dual_scale"].reshape(len(out), -1)
            out = (blocks(out, 512) * dual[..., None]).reshape(len(out), -1)[:, :out.shape[1]]
    return (out * p["mul_scale"] if "mul_scale" in p else out).astype(np.float32)


def tokens(x: np.ndarray, level: int, divide: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """F32 [M, K] -> integer codes and scale [M], as npu_dynamic_quant; `divide`: as comfy-kitchen, x / scale."""
    one = np.float32(level)
    amax = np.abs(x).max(1).astype(np.float32)
    safe = np.where(amax == 0, np.float32(1), amax)
    quotient = x / (safe / one)[:, None] if divide else x * (one / safe)[:, None]
    codes = np.clip(np.rint(quotient), -level - 1, level)
    return codes.astype(np.int64), (amax / one if divide else amax * (np.float32(1) / one))


def make(kind: str, rows: int = 48, columns: int = 128, seed: int = 0, bias: bool = True) -> dict[str, torch.Tensor]:
    """A random layer of a type as ModelSlim writes it: leaf -> tensor."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * 0.05
    part: dict[str, torch.Tensor] = {"bias": torch.randn(rows, generator=g)} if bias else {}
    scale = weight.abs().amax(1, keepdim=True)
    if kind == "FLOAT":
        part["weight"] = weight.bfloat16()
    elif kind == "W8A8":
        scale, input_scale, offset = scale / 127, 0.031, -7
        codes = (weight / scale).round()
        deq = (scale * input_scale).flatten()
        total = (part["bias"] if bias else 0) / deq - offset * codes.sum(1)
        part |= {"weight": codes.to(torch.int8), "deq_scale": deq, "input_scale": torch.tensor([input_scale]),
                 "input_offset": torch.tensor([float(offset)]), "quant_bias": total.round().to(torch.int32)}
    elif kind in ("W8A8_DYNAMIC", "W8A16", "W4A4_DYNAMIC", "W4A8_DYNAMIC"):
        level = 7 if kind.startswith("W4") else 127
        codes = (weight / (scale / level)).round().to(torch.int8)
        part |= {"weight": codes, "weight_scale": scale / level, "weight_offset": torch.zeros(rows, 1)}
        if kind == "W4A8_DYNAMIC":
            part |= {"weight": torch.from_numpy(row_pairs(codes.numpy())), "scale_bias": torch.zeros(rows, columns)}
    elif kind == "WFP8AFP8_DYNAMIC":
        part |= {"weight": (weight / (scale / 448)).to(torch.float8_e4m3fn), "weight_scale": scale / 448,
                 "weight_offset": torch.zeros(rows, 1)}
    elif kind == "W8A8_MXFP8":
        codes, byte = mx(weight.numpy(), "e4m3")
        part |= {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), "weight_scale": torch.from_numpy(byte)}
    else:
        values = weight.numpy()
        if kind.endswith("DUALSCALE"):
            dual = np.abs(blocks(values, 512)).max(-1) / 6
            part["weight_dual_scale"] = torch.from_numpy(dual[..., None].astype(np.float32))
            values = (blocks(values, 512) / dual[..., None]).reshape(rows, -1)[:, :columns]
        codes, byte = mx(values, "e2m1", True)
        part |= {"weight": torch.from_numpy(pairs(codes)), "weight_scale": torch.from_numpy(byte)}
    return part


def forward(kind: str, part: dict[str, torch.Tensor], x: torch.Tensor, activations: bool = True,
            divide: bool = False) -> np.ndarray:
    """The layer's output F32 [M, N] in an NPU's arithmetic, not yet rounded to x's dtype.

    `activations` False leaves x as it is (only the weight is quantized); `divide` is that of `tokens`.
    """
    values = numpy(x)
    mul = part.get("mul_scale")
    if mul is not None:
        values = numpy(x * mul.to(x.dtype))
    weight = decode(kind, {leaf: tensor for leaf, tensor in part.items() if leaf != "mul_scale"})
    bias = numpy(part["bias"]) if "bias" in part else np.float32(0)
    if not activations:
        return (values.astype(np.float64) @ weight.T.astype(np.float64) + bias).astype(np.float32)
    if kind == "W8A8":
        inverse = np.float32(1) / np.float32(part["input_scale"])
        codes = np.clip(np.rint(values * inverse + np.float32(part["input_offset"])), -128, 127).astype(np.int64)
        deq = part["deq_scale"]
        deq = deq.to(torch.int32).view(torch.float32).numpy() if deq.dtype == torch.int64 else deq.numpy()
        total = codes @ numpy(part["weight"]).astype(np.float64).T + part["quant_bias"].numpy()  # exact below 2^53
        return total.astype(np.float32) * deq
    if kind in ("W8A8_DYNAMIC", "W4A4_DYNAMIC", "W4A8_DYNAMIC"):
        codes, scale = tokens(values, 7 if kind == "W4A4_DYNAMIC" else 127, divide)
        weight_scale = numpy(part["weight_scale"])
        integers = np.rint(weight / weight_scale).astype(np.float64)
        return ((codes @ integers.T).astype(np.float32) * weight_scale.T) * scale[:, None] + bias
    if kind == "WFP8AFP8_DYNAMIC":
        amax = np.abs(values).max(1, keepdims=True)
        scaled = values * (np.float32(448) / np.where(amax == 0, np.float32(1), amax))
        seen = E4M3[nearest(np.abs(scaled), E4M3)] * np.sign(scaled) * (amax * (np.float32(1) / np.float32(448)))
    elif kind in ("W8A8_MXFP8", "W4A8_MXFP"):
        seen = from_mx(*mx(values, "e4m3"), "e4m3")
    elif kind == "W4A4_MXFP4":
        seen = from_mx(*mx(values, "e2m1", True), "e2m1")
    elif kind == "W4A4_MXFP4_DUALSCALE":
        dual = np.abs(blocks(values, 512)).max(-1).astype(np.float32) / np.float32(6)
        level = blocks(values, 512) / np.where(dual == 0, np.float32(1), dual)[..., None]
        level = numpy(torch.from_numpy(level).to(x.dtype)).reshape(len(values), -1)[:, :values.shape[1]]
        seen = blocks(from_mx(*mx(level, "e2m1"), "e2m1"), 512) * dual[..., None]
        seen = seen.reshape(len(values), -1)[:, :values.shape[1]]
    else:
        seen = values
    return (seen.astype(np.float64) @ weight.T.astype(np.float64) + bias).astype(np.float32)
