"""What Nunchaku's files call the layers of each architecture, and files of these names and sizes without numbers."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Cut(NamedTuple):
    """A stored layer that has these rows or columns of a diffusers Linear. `biased`: and its whole bias."""

    rows: slice = slice(None)
    columns: slice = slice(None)
    biased: bool = False


Table = dict[str, tuple[list[str], Any]]


def _block(at: str, *rows: tuple[str, list[str], Any]) -> Table:
    return {f"{at}.{name}": ([f"{at}.{linear}" for linear in linears], how) for name, linears, how in rows}


def flux_table(double: int, single: int, hidden: int) -> Table:
    table: Table = {}
    for i in range(double):
        table |= _block(
            f"transformer_blocks.{i}",
            ("norm1.linear", ["norm1.linear"], 6), ("norm1_context.linear", ["norm1_context.linear"], 6),
            ("qkv_proj", ["attn.to_q", "attn.to_k", "attn.to_v"], ""),
            ("qkv_proj_context", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"], ""),
            ("out_proj", ["attn.to_out.0"], ""), ("out_proj_context", ["attn.to_add_out"], ""),
            ("mlp_fc1", ["ff.net.0.proj"], ""), ("mlp_fc2", ["ff.net.2"], "unsigned"),
            ("mlp_context_fc1", ["ff_context.net.0.proj"], ""), ("mlp_context_fc2", ["ff_context.net.2"], "unsigned"))
    for i in range(single):
        table |= _block(
            f"single_transformer_blocks.{i}", ("norm.linear", ["norm.linear"], 3),
            ("qkv_proj", ["attn.to_q", "attn.to_k", "attn.to_v"], ""), ("mlp_fc1", ["proj_mlp"], ""),
            ("out_proj", ["proj_out"], slice(0, hidden)), ("mlp_fc2", ["proj_out"], slice(hidden, 5 * hidden)))
    return table


def flux2_table(double: int, single: int, hidden: int, names: int) -> Table:
    """FLUX.2's layers: `names` 0 under FLUX.1's names, 1 under those of Nunchaku's Python runtime."""
    table: Table = {}
    for i in range(double):
        table |= _block(f"transformer_blocks.{i}", *((both[names], linears, "") for both, linears in (
            (("qkv_proj", "attn.to_qkv"), ["attn.to_q", "attn.to_k", "attn.to_v"]),
            (("qkv_proj_context", "attn.to_added_qkv"), ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
            (("out_proj", "attn.to_out.0"), ["attn.to_out.0"]), (("out_proj_context", "attn.to_add_out"), ["attn.to_add_out"]),
            (("mlp_fc1", "ff.linear_in"), ["ff.linear_in"]), (("mlp_fc2", "ff.linear_out"), ["ff.linear_out"]),
            (("mlp_context_fc1", "ff_context.linear_in"), ["ff_context.linear_in"]),
            (("mlp_context_fc2", "ff_context.linear_out"), ["ff_context.linear_out"]))))
    for i in range(single):
        table |= _block(f"single_transformer_blocks.{i}", *((f"{'attn.' * names}{name}", [linear], cut)
                                                           for name, linear, cut in (
            ("qkv_proj", "attn.to_qkv_mlp_proj", Cut(slice(0, 3 * hidden))),
            ("mlp_fc1", "attn.to_qkv_mlp_proj", Cut(slice(3 * hidden, 9 * hidden))),
            ("out_proj", "attn.to_out", Cut(columns=slice(0, hidden))),
            ("mlp_fc2", "attn.to_out", Cut(columns=slice(hidden, 4 * hidden))))))
    return table


def qwen_table(layers: int) -> Table:
    table: Table = {}
    for i in range(layers):
        table |= _block(
            f"transformer_blocks.{i}", ("img_mod.1", ["img_mod.1"], 6), ("txt_mod.1", ["txt_mod.1"], 6),
            ("attn.to_qkv", ["attn.to_q", "attn.to_k", "attn.to_v"], ""),
            ("attn.add_qkv_proj", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"], ""),
            ("attn.to_out.0", ["attn.to_out.0"], ""), ("attn.to_add_out", ["attn.to_add_out"], ""),
            ("img_mlp.net.0.proj", ["img_mlp.net.0.proj"], ""), ("img_mlp.net.2", ["img_mlp.net.2"], "unsigned"),
            ("txt_mlp.net.0.proj", ["txt_mlp.net.0.proj"], ""), ("txt_mlp.net.2", ["txt_mlp.net.2"], "unsigned"))
    return table


REFINERS = [f"{stack}.{i}" for stack in ("noise_refiner", "context_refiner") for i in range(2)]


def z_image_table(layers: int, refiners: bool) -> Table:
    table: Table = {}
    for at in [f"layers.{i}" for i in range(layers)] + REFINERS * refiners:
        table |= _block(
            at, ("attention.to_qkv", ["attention.to_q", "attention.to_k", "attention.to_v"], ""),
            ("attention.to_out.0", ["attention.to_out.0"], ""),
            ("feed_forward.net.0.proj", ["feed_forward.w3", "feed_forward.w1"], ""),
            ("feed_forward.net.2", ["feed_forward.w2"], ""))
    return table


def flux_plain(name: str) -> str:
    """What FLUX.1 files call an unquantized tensor of this diffusers name."""
    return name.replace(".attn.norm_", ".norm_")


LEGACY = (("proj_down", "lora_down"), ("proj_up", "lora_up"), ("smooth_factor_orig", "smooth_orig"),
           ("smooth_factor", "smooth"))


def header_only(path: Path, shapes: dict[str, tuple[int, ...]], table: Table, precision: str, rank: int,
                rename: Callable[[str], str] = lambda name: name, legacy: bool = False) -> None:
    """A sparse file of a checkpoint of these sizes, all zeros but the smooth factors: `shapes` are diffusers' tensors by
    name."""
    left, entries = dict(shapes), {}
    half, new = ("BF16", 2), dict(LEGACY) if legacy else {}
    for name, (linears, how) in table.items():
        rows = sum(shapes[f"{linear}.weight"][0] for linear in linears)
        columns = shapes[f"{linears[0]}.weight"][1]
        cut = how if isinstance(how, Cut) else Cut(columns=how) if isinstance(how, slice) else Cut()
        rows, columns = len(range(*cut.rows.indices(rows))), len(range(*cut.columns.indices(columns)))
        if isinstance(how, int):
            groups = -(-columns // 1024) * 16
            leaves = {"qweight": (("I32", 4), (rows // 4, columns // 2)), "wscales": (half, (groups, rows)),
                      "wzeros": (half, (groups, rows)), "bias": (half, (rows,))}
        else:
            int4 = precision == "int4"
            leaves = {"qweight": (("I8", 1), (rows, columns // 2)), "bias": (half, (rows,)),
                      "wscales": (half if int4 else ("F8_E4M3", 1), (columns // (64 if int4 else 16), rows)),
                      "smooth_factor": (half, (columns,)), "smooth_factor_orig": (half, (columns,)),
                      "proj_down": (half, (columns, rank)), "proj_up": (half, (rows, rank))}
        entries |= {f"{name}.{new.get(leaf, leaf)}": entry for leaf, entry in leaves.items()}
        for linear in linears:
            left.pop(f"{linear}.weight", None)
            left.pop(f"{linear}.bias", None)
    entries |= {rename(name): (half, shape) for name, shape in left.items()}
    header, at, ones = {}, 0, []
    for name, ((dtype, size), shape) in entries.items():
        end = at + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        if name.endswith((".smooth", ".smooth_factor")):
            ones.append((at, shape[0]))
        at = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
        for start, count in ones:  # activations are divided by it
            file.seek(8 + len(text) + start)
            file.write(b"\x80\x3f" * count)
