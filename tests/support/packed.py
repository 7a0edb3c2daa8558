"""Linears as packers of weights write them, by the packers' formulas: float weight -> (tensors by leaf, the weight meant).

The weight is made of codes, zero points and scales before they are packed, so nothing here unpacks. Real exports
(tests/data/exports) hold the same formulas to the tools themselves.
"""

from __future__ import annotations

import torch

Layer = tuple[dict[str, torch.Tensor], torch.Tensor]


def words(codes: torch.Tensor, bits: int, axis: int, across: bool = False) -> torch.Tensor:
    """Codes -> I32 along an axis, lowest bits first, 32 // bits a word; or (`across`) as one stream of bits."""
    codes = codes.movedim(axis, -1).long()
    if across:
        stream = (codes[..., None] >> torch.arange(bits) & 1).flatten(-2)
        stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 32)).unflatten(-1, (-1, 32))
        packed = (stream << torch.arange(32)).sum(-1)
    else:
        per = 32 // bits
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
        packed = (codes << bits * torch.arange(per)).sum(-1)
    return signed(packed).movedim(-1, axis).contiguous()


def signed(packed: torch.Tensor) -> torch.Tensor:
    """Integers below 2^32 -> I32 of the same bits."""
    return (packed - (packed >> 31 << 32)).to(torch.int32)


def grouped(weight: torch.Tensor, bits: int, size: int, *, zeros: bool, order: torch.Tensor | None = None,
            scale_dtype: torch.dtype = torch.bfloat16, negative: bool = False):
    """(codes from 0 to 2^bits - 1 [N, K], zero points [N, G], scales [N, G], the weight meant). `order`: the group of
    every column; `negative`: every other scale is."""
    rows, columns = weight.shape
    group = torch.arange(columns) // size if order is None else order
    count, top = int(group.max()) + 1, (1 << bits) - 1
    low = torch.stack([weight[:, group == g].amin(1) for g in range(count)], 1)
    high = torch.stack([weight[:, group == g].amax(1) for g in range(count)], 1)
    span = high - low if zeros else 2 * torch.maximum(high, -low)
    scale = (span / top).clamp(min=1e-6).to(scale_dtype)
    if negative:
        scale[:, ::2] *= -1
    zero = (-low / scale.float()).round().clamp(0, top) if zeros else torch.full(scale.shape, float(1 << bits - 1))
    if zeros and negative:
        zero = torch.where(scale > 0, zero, top - (-low / -scale.float()).round().clamp(0, top))
    codes = (weight / scale.float()[:, group] + zero[:, group]).round().clamp(0, top)
    return codes, zero, scale, (codes - zero[:, group]) * scale.float()[:, group]


def act_order(columns: int, size: int, seed: int = 0) -> torch.Tensor:
    """The group of every column when columns are ordered by something else: I32."""
    return (torch.randperm(columns, generator=torch.Generator().manual_seed(seed)) // size).to(torch.int32)


# ------------------------------------------------------------------------------------- compressed-tensors
def ct_packed(weight: torch.Tensor, bits: int = 4, size: int = 128, zeros: bool = False, order: bool = False) -> Layer:
    size = size or weight.shape[1]
    group = act_order(weight.shape[1], size) if order else None
    codes, zero, scale, meant = grouped(weight, bits, size, zeros=zeros, order=group)
    made = {"weight_packed": words(codes, bits, 1), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    made |= {"weight_zero_point": words(zero, bits, 0)} if zeros else {}
    return made | ({} if group is None else {"weight_g_idx": group}), meant


def ct_int(weight: torch.Tensor, bits: int = 8, size: int = 0) -> Layer:
    codes, zero, scale, meant = grouped(weight, bits, size or weight.shape[1], zeros=False)
    return {"weight": (codes - zero.repeat_interleave(size or weight.shape[1], 1)).to(torch.int8), "weight_scale": scale}, meant


def ct_fp8(weight: torch.Tensor, rows: int, columns: int = 0) -> Layer:
    """A scale for blocks of `rows` x `columns`; 0: of all."""
    n, k = weight.shape
    r, c = rows or n, columns or k
    padded = torch.nn.functional.pad(weight, (0, -k % c, 0, -n % r)).unflatten(1, (-1, c)).unflatten(0, (-1, r))
    scale = (padded.abs().amax((1, 3)) / 448).to(torch.bfloat16)
    spread = scale.float().repeat_interleave(r, 0)[:n].repeat_interleave(c, 1)[:, :k]
    codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale if rows else scale.reshape(1)}, codes.float() * spread


# ------------------------------------------------------------------------------------------------- GPTQ and AWQ
def gptq(weight: torch.Tensor, bits: int = 4, size: int = 128, version: int = 1, *, zeros: bool = False, order: bool = False,
         negative: bool = False, index: bool = True) -> Layer:
    """Version 1: less 0x11111111 (of 4 bits) from the word, borrows included; 3 bits each by itself, modulo 8."""
    size = size or weight.shape[1]
    group = act_order(weight.shape[1], size) if order else torch.arange(weight.shape[1]) // size
    codes, zero, scale, meant = grouped(weight, bits, size, zeros=zeros, order=group, scale_dtype=torch.float16, negative=negative)
    if version == 1 and bits == 3:
        zero = (zero - 1) % 8
    qzeros = words(zero.t(), bits, 1, bits == 3)
    if version == 1 and bits != 3:
        qzeros = signed((qzeros.long() - sum(1 << i for i in range(0, 32, bits))) % 2 ** 32)
    made = {"qweight": words(codes.t(), bits, 0, bits == 3), "scales": scale.t().contiguous(), "qzeros": qzeros}
    return made | ({"g_idx": group.to(torch.int32)} if index else {}), meant


def awq(weight: torch.Tensor, size: int = 128) -> Layer:
    """Nibble p of a word holds row [0, 2, 4, 6, 1, 3, 5, 7][p] of its eight."""
    codes, zero, scale, meant = grouped(weight, 4, size, zeros=True, scale_dtype=torch.float16)
    places = [0, 2, 4, 6, 1, 3, 5, 7]
    pack = [words(part.t().unflatten(1, (-1, 8))[..., places].flatten(1), 4, 1) for part in (codes, zero)]
    return {"qweight": pack[0], "qzeros": pack[1], "scales": scale.t().contiguous()}, meant


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _fp4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values up to 6 -> (codes, the nearest E2M1)."""
    index = (values.abs()[..., None] - E2M1).abs().argmin(-1)
    return index + 8 * (values < 0), E2M1[index] * torch.where(values < 0, -1, 1)


def _pairs(codes: torch.Tensor) -> torch.Tensor:
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def ct_nvfp4(weight: torch.Tensor) -> Layer:
    whole = 2688 / weight.abs().amax()
    block = weight.unflatten(1, (-1, 16))
    scale = (block.abs().amax(-1) / 6 * whole).clamp(2 ** -9, 448).to(torch.float8_e4m3fn)
    step = (scale.double() / whole.double()).float()[..., None]
    codes, values = _fp4(block / step)
    return {"weight_packed": _pairs(codes.flatten(1)), "weight_scale": scale, "weight_global_scale": whole.reshape(1)}, \
        (values * step).flatten(1)


def ct_mx(weight: torch.Tensor, bits: int) -> Layer:
    block = weight.unflatten(1, (-1, 32))
    exponent = (block.abs().amax(-1).clamp(min=2.0 ** -100).log2().floor() - (2 if bits == 4 else 8)).int()
    step = torch.exp2(exponent.float())[..., None]
    scale = (exponent + 127).to(torch.uint8)
    if bits == 4:
        codes, values = _fp4((block / step).clamp(-6, 6))
        return {"weight_packed": _pairs(codes.flatten(1)), "weight_scale": scale}, (values * step).flatten(1)
    codes = (block / step).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes.flatten(1), "weight_scale": scale}, (codes.float() * step).flatten(1)


# ------------------------------------------------------------------------------------------------- quanto
def quanto(weight: torch.Tensor, bits: int = 4, size: int = 128) -> Layer:
    """By optimum/quanto/tensor: groups one below the other, halves (quarters) of them over each other in a byte."""
    rows = weight.reshape(-1, size)
    low = rows.amin(1, keepdim=True)
    scale, shift = ((rows.amax(1, keepdim=True) - low) / ((1 << bits) - 1)).bfloat16(), (-low).bfloat16()
    codes = ((rows + shift) / scale).round().clamp(0, (1 << bits) - 1).to(torch.uint8)
    packed = sum(part << i * bits for i, part in enumerate(codes.chunk(8 // bits)))
    meant = codes.float() * scale.float() - shift.float()
    return {"weight._data._data": packed, "weight._scale": scale, "weight._shift": shift, "input_scale": torch.ones(()),
            "output_scale": torch.ones(())}, meant.reshape(weight.shape)


# ------------------------------------------------------------------------------------------------- SDNQ
def sdnq_bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes -> bytes, by the formulas of sdnq's packed_int/pack.py."""
    def top(last: torch.Tensor, shifts: tuple[int, ...], mask: int) -> torch.Tensor:
        return torch.stack([last << shift for shift in shifts], -1) & mask

    if bits in (2, 4):
        return sum(part << i * bits for i, part in enumerate(codes.reshape(-1, 8 // bits).unbind(-1)))
    c = codes.reshape(-1, 4 if bits == 6 else 8)
    if bits == 7:
        return c[:, :7] | top(c[:, 7], (1, 2, 3, 4, 5, 6, 7), 128)
    if bits == 6:
        return c[:, :3] | top(c[:, 3], (2, 4, 6), 192)
    if bits == 5:
        return torch.cat([c[:, :3] | c[:, 5:8] << 5, c[:, 3:5] | c[:, 5:7] << 2 & 96 | top(c[:, 7], (3, 4), 128)], -1)
    return c[:, :3] | c[:, 3:6] << 3 | torch.cat([c[:, 6:8] << 6, (c[:, 6] << 4 & 64 | c[:, 7] << 5 & 128).unsqueeze(-1)], -1)


def sdnq(weight: torch.Tensor, kind: str, size: int = 0, rank: int = 0) -> Layer:
    rows, columns = weight.shape
    low, made = torch.zeros(()), {}
    if rank:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        made = {"svd_up": (u[:, :rank] * s[:rank]).bfloat16(), "svd_down": v[:rank].bfloat16().contiguous()}
        low = made["svd_up"].float() @ made["svd_down"].float()
    block = (weight - low).unflatten(1, (-1, size or columns))
    if kind.startswith("uint"):
        zero = block.amin(-1, keepdim=True)
        scale = (block.amax(-1, keepdim=True) - zero) / (2 ** int(kind[4:]) - 1)
        codes = ((block - zero) / scale).round().to(torch.uint8)
        meant, made["zero_point"] = codes.float() * scale + zero, zero
    else:
        bits = int(kind[3:]) if kind.startswith("int") else 0
        top = (1 << bits - 1) - 1 if bits else 448
        scale = block.abs().amax(-1, keepdim=True) / top
        codes = (block / scale).to(torch.float8_e4m3fn) if top == 448 else (block / scale).round().to(torch.int8)
        meant = codes.float() * scale
        codes = (codes + (1 << bits - 1)).to(torch.uint8) if 0 < bits < 8 else codes
    made |= {"scale": scale if size else scale[:, 0],
             "weight": codes if size else codes.flatten(1)}
    if "int" in kind and not kind.endswith("8"):
        made["weight"] = sdnq_bytes(codes, int(kind[-1]))
    if "zero_point" in made and not size:
        made["zero_point"] = made["zero_point"][:, 0]
    return made, meant.flatten(1) + low
