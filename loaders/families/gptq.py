"""GPTQ (gptqmodel, auto-gptq), AWQ (autoawq) and AutoRound: layers with qweight, qzeros and scales.

Layout, bits and groups follow from the tensors, layer by layer (quant/packed/gptq.py), so lists of what is done to
which layer (dynamic, extra_config, modules_to_not_convert) need no reading. The configuration is needed for one thing:
which version GPTQ's zero points are. It is in config.json, and auto-gptq and gptqmodel write quantize_config.json, too,
or that alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ...host.texts import Text, both
from ...quant.packed.gptq import AWQ, GPTQ, bits_of, group_size, is_awq
from ..containers.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..files.selection import QUANTIZE
from ..files.source import read_json
from ..plan import Group
from .declarations import merge
from .packed import Packed, PackedFamily

_NEEDED = ("qzeros", "scales")
# What is read of quantize_config.json: its other keys say how it was made, and where.
_SAID = ("quant_method", "bits", "group_size", "checkpoint_format", "format")
# checkpoint_format, AWQ's version or AutoRound's packing_format -> version of GPTQ's zero points, 0 for AWQ.
LAYOUTS = {"gptq": 1, "gptq_v2": 2, "gemm": 0, "auto_round:auto_gptq": 1, "auto_round:auto_awq": 0}
# quant_method -> the layout where nothing else is said
METHODS = {"gptq": "gptq", "awq": "gemm",
           **dict.fromkeys(("auto-round", "intel/auto-round"), "auto_round:auto_gptq")}


class Gptq(PackedFamily):
    """See base.Family and packed.PackedFamily."""

    name = "gptq"
    title = "GPTQ, AWQ"
    words = {"gptq": "GPTQ, AWQ"}
    leaves = {"qweight": "weight"}

    def recognise(self, checkpoint: Checkpoint) -> bool:
        ends = {name.rpartition(".")[2] for name in checkpoint.tensors}  # SVDQuant files have qweight and wscales
        return {"qweight", "qzeros"} <= ends and "wscales" not in ends

    def side_file(self, name: str) -> bool:
        return name == QUANTIZE

    def claims(self, checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
        """base.claims, and what quantize_config.json says; where that names no quant_method, it is GPTQ's."""
        merged, origins = super().claims(checkpoint)
        path = next((path for path in checkpoint.source.texts if os.path.basename(path) == QUANTIZE), None)
        if path is None:
            return merged, origins
        said = {key: value for key, value in read_json(path).items() if key in _SAID}
        if not merged and "bits" in said:
            said.setdefault("quant_method", "gptq")
        merge(merged, said, path)
        return merged, (*origins, QUANTIZE) if said else origins

    def layers(self, checkpoint: Checkpoint, claimed: Mapping[str, Any], groups: Mapping[str, Group],
               notes: list[str]) -> dict[str, Packed]:
        layout, size = _layout(claimed, checkpoint.source.reference), claimed.get("group_size")
        size = size if type(size) is int else 0
        found = {}
        for name, leaves in groups.items():
            if "weight" in leaves and checkpoint.stored(f"{name}.weight").endswith(".qweight"):
                found[name] = _layer(leaves, layout, size)
        notes += [] if layout else [Text("no quantization is declared; GPTQ's version is told by the zero points")]
        return found


def _layout(claimed: Mapping[str, Any], where: str) -> str:
    """The layout that is declared, one of LAYOUTS; "" where nothing is."""
    if not claimed:
        return ""
    method = str(claimed.get("quant_method") or "").lower()
    keys = ("packing_format",) if "auto-round" in method else ("checkpoint_format", "format", "version")
    said = next((str(claimed[key]).lower() for key in keys if claimed.get(key)), METHODS.get(method, ""))
    if method not in METHODS or said not in LAYOUTS or (method in ("gptq", "awq") and bool(LAYOUTS[said]) is
                                                        (method == "awq")):
        raise CheckpointError(Text("packed integers of {method} {layout!r}, which this version does not load",
                                   method=method or Text("no quant_method"), layout=said), where,
                              Text("take another checkpoint of this model; supported: {methods} as {layouts}",
                                   methods=", ".join(METHODS), layouts=", ".join(LAYOUTS)))
    return said


def _layer(leaves: Group, layout: str, size: int) -> Packed:
    """What one layer is, by its shapes; a layout that is declared must be theirs."""
    missing = [leaf for leaf in _NEEDED if leaf not in leaves]
    if missing:
        return Packed(None, problem=Text("{names} missing beside qweight", names=both(missing)))
    if any(len(leaves[leaf].shape) != 2 for leaf in ("weight", *_NEEDED)):
        return Packed(None, problem=Text("qweight, qzeros or scales have not two dimensions"))
    awq = is_awq(leaves)
    if layout and awq is bool(LAYOUTS[layout]):
        return Packed(None, problem=Text("{layout} is declared, but qweight {codes} and scales {scales} are {method}'s",
                                         layout=layout, codes=list(leaves["weight"].shape),
                                         scales=list(leaves["scales"].shape), method="AWQ" if awq else "GPTQ"))
    bits = 4 if awq else bits_of(leaves)
    if not bits:
        return Packed(None, problem=Text("qzeros {zeros} and scales {scales} make no 2, 3, 4 or 8 bits",
                                         zeros=list(leaves["qzeros"].shape), scales=list(leaves["scales"].shape)))
    fmt: AWQ | GPTQ = AWQ(size) if awq else GPTQ(bits, LAYOUTS.get(layout, 0), size)
    shape = fmt.shape(leaves)
    if not group_size(shape[1], leaves["scales"].shape[0], size) and "g_idx" not in leaves:
        return Packed(None, problem=fmt.problem(leaves, *shape))
    return Packed(fmt, shape)


FAMILY = Gptq()
