"""Saved files as version 0.1 of this pack wrote them: the same tensors under its names and markers.

Held once against files that 0.1 itself had saved (commit ba99f08: FP8, NVFP4, dynamic FP8, SVDQuant INT4 and AWQ, and
eight of ModelSlim's types), name by name and byte by byte.
"""

from __future__ import annotations

import json
from typing import Any

import torch

SVDQ = {"svdq_int4": ("int4", False), "svdq_int4_unsigned": ("int4", True), "svdq_nvfp4": ("nvfp4", False),
        "awq": ("awq", False)}


def marker(conf: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


def as_version_0_1(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with markers "qt.tiles" -> the same with those of 0.1."""
    out = dict(tensors)
    for name, mark in tensors.items():
        conf = json.loads(bytes(mark.tolist())) if name.endswith(".comfy_quant") else {}
        if conf.get("format") != "qt.tiles":
            continue
        layer, tiles = name.removesuffix("comfy_quant"), conf["tiles"]
        full = {"full_precision_matrix_mult": True} if conf.get("full_precision_matrix_mult") else {}
        fields = [{field: out[layer + leaf] for field, leaf in tile["fields"].items()} for tile in tiles]
        for leaf in {leaf for tile in tiles for leaf in tile["fields"].values()}:
            out.pop(layer + leaf)
        kinds = {tile["codec"] for tile in tiles}
        if kinds <= {"fp8", "nvfp4", "plain"}:
            made, word = row_shards(tiles, fields), {"format": "qt.row_shards"}
        elif kinds <= SVDQ.keys():
            made, word = parts(tiles, fields), {"format": "qt.svdquant", "parts": [place(tile) for tile in tiles]}
        else:
            kind, = kinds
            made, word = ascend(kind, fields[0]), {"format": f"qt.ascend.{kind}"}
        out |= {layer + leaf: tensor for leaf, tensor in made.items()}
        out[name] = marker(word | full)
    return out


def integers(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What this version saves as floats of the same size, for ComfyUI 0.30's save nodes."""
    return tensor.view(dtype)


def row_shards(tiles, fields) -> dict[str, torch.Tensor]:
    one, made = torch.ones(()), {}
    for i, (tile, own) in enumerate(zip(tiles, fields, strict=True)):
        codes = integers(own["codes"], torch.uint8) if tile["codec"] == "nvfp4" else own["codes"]
        made[f"weight_shard_{i}" if i else "weight"] = codes
        made |= {f"weight_block_{i}": own["block"]} if "block" in own else {}
    made["weight_scale"] = torch.stack([own.get("scale", one) for own in fields])
    inputs = [own["input_scale"] for own in fields if "input_scale" in own]
    return made | ({"input_scale": inputs[0]} if inputs else {})


def place(tile: dict[str, Any]) -> dict[str, Any]:
    kind, unsigned = SVDQ[tile["codec"]]
    return {"kind": kind, "rows": tile["rows"], "columns": tile["columns"], "row": tile.get("row", 0),
            "column": tile.get("column", 0), "unsigned": unsigned, "packed": bool(tile.get("order")),
            "alpha": tile.get("number", 1.0)}


def parts(tiles, fields) -> dict[str, torch.Tensor]:
    names = {("codes", 0): "weight", ("scale", 0): "weight_scale"}
    return {names.get((field, i), f"weight_{field}_{i}"): tensor
            for i, own in enumerate(fields) for field, tensor in own.items()}


def ascend(kind: str, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    codes = torch.int8 if kind in ("w8a8", "w8a8_dynamic", "w8a16") else \
        torch.float8_e4m3fn if kind in ("wfp8afp8_dynamic", "w8a8_mxfp8") else torch.uint8
    made = {"weight" if field == "codes" else f"weight_{field}": tensor for field, tensor in own.items()}
    made["weight"] = integers(made["weight"], codes)
    if "mx" in kind:
        made["weight_scale"] = integers(made["weight_scale"], torch.uint8)
    if "weight_quant_bias" in made:
        made["weight_quant_bias"] = integers(made["weight_quant_bias"], torch.int32)
    return made
