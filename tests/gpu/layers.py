"""Linear layers of any codec and layout, with random contents of the right dtypes and ranges, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

RANK = 32
AMAX = 4.5  # of the activations here, which are normally distributed
# Of GGUF's types one for every way in which ggml packs codes and scales, with the bytes of a block where its F16 scales
# are (ggml-common.h); the others differ in numbers, or need a grid of the package gguf.
GGML = {"ggml_q5_0": (0,), "ggml_q8_0": (0,), "ggml_q4_k": (0, 2), "ggml_q6_k": (208,), "ggml_iq4_xs": (0,)}
SCALES = ("scale", "zeros", "tensor_scale")  # the fields that a weight is proportional to


class Arm(NamedTuple):
    """A codec, where its weight is kept ("host": ComfyUI's own layout, "tiles": this pack's, "shards": three tiles that
    differ in what a tile has once), and the kernel that multiplies it ("" dequantizes; "host": ComfyUI's own code)."""

    codec: str
    layout: str = "host"
    kernel: str = "host"

    @property
    def key(self) -> str:
        return "bf16" if self.codec == "plain" else f"{self.codec} {self.layout} {self.kernel or 'dequantize'}"


BF16 = Arm("plain")


def arms(machine: Any) -> Iterator[Arm]:
    """Every codec in every layout it has, by every kernel that runs it on this machine."""
    from quantized_transformers.quant.codecs import codecs
    from quantized_transformers.quant.kernels import kernels

    for name, codec in codecs().items():
        if name == "plain":
            yield BF16
            continue
        if name.startswith("ggml_") and name not in GGML:
            continue
        found = [one for one in kernels() if name in one.codecs and not one.runs(name, machine)
                 and not (one.device and one.device != machine.kind)]
        if codec.word:
            yield Arm(name)
            yield from (Arm(name, "host", one.name) for one in found if one.takes_host_layouts and one.full_precision)
        run = [one.name for one in found]
        for layout in ("tiles", *(["shards"] if name in ("fp8", "nvfp4") else [])):
            yield from (Arm(name, layout, kernel) for kernel in ("", *run))


def random_tile(name: str, rows: int, columns: int, seed: int = 0, rank: int = RANK) -> Any:
    """A tile of a codec: random contents by the codec's own list of fields, scaled so that weights have a variance of
    1 / columns. On the CPU, from a seed of its own."""
    made = _of_any_scale(name, rows, columns, seed, rank)
    if name in GGML:
        return _ggml(made)
    if name == "plain":
        return made.apply(lambda codes: codes / math.sqrt(columns))
    few = made if rows <= 128 else _of_any_scale(name, 128, columns, seed, rank)
    from quantized_transformers.quant.codecs import codec

    factor = 1 / (float(codec(name).dequantize(few, torch.float32).square().mean().sqrt()) * math.sqrt(columns))
    scales = {leaf: (made[leaf].float() * factor).to(made[leaf].dtype) for leaf in SCALES
              if leaf in made.fields and made[leaf].dtype in (torch.float32, torch.bfloat16)}
    return made.having(**scales)


def _ggml(tile: Any) -> Any:
    """Blocks with scales of a weight's size."""
    from quantized_transformers.quant.codecs import codec

    kind = codec(tile.place.codec)
    blocks = tile["codes"].reshape(-1, kind.kind.size)

    def scale_by(scale: float) -> None:
        for at in GGML[kind.name]:
            blocks[:, at:at + 2] = torch.tensor([scale], dtype=torch.float16).view(torch.uint8)

    scale_by(1e-3)
    spread = float(kind.dequantize(tile, torch.float32).square().mean().sqrt())
    scale_by(1e-3 / (spread * math.sqrt(tile.place.columns)))
    return tile


def _of_any_scale(name: str, rows: int, columns: int, seed: int, rank: int) -> Any:
    from quantized_transformers.quant.codecs import codec
    from quantized_transformers.quant.tile import Place, Tile

    numbers = torch.Generator().manual_seed(seed + 1000003 * rows + columns)
    fields = {}
    for leaf, field in codec(name).fields.items():
        if not field.optional or leaf == "input_scale":
            shape = tuple(size if size >= 0 else rank if leaf in ("down", "up") else 1
                          for size in field.shape(rows, columns))
            fields[leaf] = _random(name, leaf, field.dtypes[0], shape, numbers)
    return Tile(Place(name, rows, columns), fields)


def _random(name: str, leaf: str, dtype: str, shape: tuple[int, ...], numbers: Any) -> Tensor:
    kind = getattr(torch, dtype)
    if leaf == "input_scale":
        return torch.tensor(AMAX / {"fp8": 448, "nvfp4": 2688}.get(name, 127))
    if leaf in ("input_offset", "bias", "quant_bias"):
        return torch.zeros(shape, dtype=kind)
    if leaf == "codes" and dtype in ("uint8", "int8"):
        return torch.randint(*{"uint8": (0, 256), "int8": (-127, 128)}[dtype], shape, generator=numbers, dtype=kind)
    if leaf == "codes":
        return torch.randn(shape, generator=numbers).to(torch.bfloat16 if dtype == "float32" else kind)
    if dtype == "uint8":  # E8M0: 2 ** (scale - 127)
        return torch.randint(118, 122, shape, generator=numbers, dtype=kind)
    even = torch.rand(shape, generator=numbers) + 0.5
    if dtype == "float8_e4m3fn":  # block scales
        return even.to(kind)
    even = even * {"down": 0.02, "up": 0.02, "zeros": -8.0}.get(leaf, 1.0)
    half = name.startswith("svdq") or name == "awq"
    return even.to(torch.bfloat16 if half and leaf != "tensor_scale" else torch.float32)


def tiles_of(arm: Arm, counts: tuple[int, ...], columns: int, rank: int = RANK) -> list[Any]:
    """The tiles of a weight of so many rows: one, or of "shards" several, one below the other."""
    if arm.layout != "shards":
        return [random_tile(arm.codec, sum(counts), columns, rank=rank)]
    made = [random_tile(arm.codec, count, columns, seed=i, rank=rank) for i, count in enumerate(counts)]
    return [tile.having(scale=tile["scale"] * (1 + i / 8)).at(sum(counts[:i])) for i, tile in enumerate(made)]


def thirds(rows: int) -> tuple[int, ...]:
    """Three numbers of rows that make `rows`, as q, k and v do."""
    third = rows // 3 // 16 * 16
    return (third, third, rows - 2 * third)


def leaves(arm: Arm, counts: tuple[int, ...], columns: int, rank: int = RANK) -> dict[str, Tensor]:
    """A weight's native tensors by leaf, the marker among them, as a load would give them to ComfyUI."""
    from quantized_transformers.quant.layouts.join import join

    if arm.codec == "plain":
        return {"weight": random_tile("plain", sum(counts), columns)["codes"]}
    made = join(tiles_of(arm, counts, columns, rank), ["x"], (sum(counts), columns),
                own=() if arm.layout == "host" else {arm.codec})
    wanted = "qt.tiles" if arm.layout != "host" else None
    if wanted and made.layout != wanted:
        raise ValueError(f"{arm.key}: {made.layout}, expected {wanted}")
    return dict(made.tensors)


def operations(arm: Arm, where: Any) -> Any:
    """ComfyUI's mixed-precision operations for this device, with this arm's kernel."""
    from quantized_transformers import host
    from quantized_transformers.quant.linear import with_tiles_of

    dtype = torch.bfloat16 if where.cuda else torch.float32
    picked = host.mixed_operations_in(dtype)
    return picked if arm.kernel == "host" else with_tiles_of(picked, {arm.codec: arm.kernel} if arm.kernel else {})


def linear(arm: Arm, rows: int, columns: int, where: Any, rank: int = RANK) -> torch.nn.Module:
    """A Linear [rows, columns] without bias on the device."""
    dtype = torch.bfloat16 if where.cuda else torch.float32
    if arm.codec == "plain":
        module = torch.nn.Linear(columns, rows, bias=False, dtype=dtype, device="cpu")
    else:
        module = operations(arm, where).Linear(columns, rows, bias=False, device="cpu", dtype=dtype)
    missing, unexpected = module.load_state_dict(leaves(arm, thirds(rows), columns, rank), strict=False)
    if missing or unexpected:
        raise ValueError(f"{arm.key}: missing {missing}, unexpected {unexpected}")
    return module.eval().requires_grad_(False).to(where.device)


def weight(arm: Arm, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """(the weight F64 [rows, columns] by its codecs' definitions, what is added to every output), on the CPU."""
    from quantized_transformers.quant.codecs import codec

    tiles = tiles_of(arm, thirds(rows), columns)
    whole = torch.cat([codec(tile.place.codec).dequantize(tile, torch.float32) for tile in tiles]).double()
    shifts = [codec(tile.place.codec).shift(codec(tile.place.codec).residual(tile, torch.float32)) for tile in tiles]
    return whole, None if shifts[0] is None else torch.cat([shift for shift in shifts if shift is not None]).double()
