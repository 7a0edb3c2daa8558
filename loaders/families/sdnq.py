"""SDNQ's folders (Disty0's and others'): `quant_method: sdnq` in config.json. A layer's type and groups follow from its
tensors (quant/packed/sdnq.py); the configuration is needed to know that codes mean one of the types that load, as other
types have the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...quant.packed.sdnq import TYPES, format_of
from ..containers.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..plan import Group
from .declarations import claims
from .packed import Packed, PackedFamily

_REFUSED = ("use_hadamard", "use_codebook", "modules_quant_config")  # what would change the numbers


class SDNQFamily(PackedFamily):
    """See base.Family and packed.PackedFamily."""

    name = "sdnq"
    title = "SDNQ"
    words = {"sdnq": "SDNQ"}

    def recognise(self, checkpoint: Checkpoint) -> bool:
        return claims(checkpoint)[0].get("quant_method") == "sdnq"

    def layers(self, checkpoint: Checkpoint, claimed: Mapping[str, Any], groups: Mapping[str, Group],
               notes: list[str]) -> dict[str, Packed]:
        others = claimed.get("modules_dtype_dict")
        types = {str(claimed.get("weights_dtype")), *(others if isinstance(others, dict) else ())} - set(TYPES)
        asked = [key for key in _REFUSED if claimed.get(key)]
        if types or asked:
            raise CheckpointError(f"SDNQ's {', '.join([*sorted(types), *asked])}, which this version does not load",
                                  checkpoint.source.reference, f"take another checkpoint of this model; supported: "
                                  f"{', '.join(TYPES)}, with or without SVD")
        found = {}
        for name, leaves in groups.items():
            if {"weight", "scale"} <= leaves.keys():
                fmt = format_of(leaves)
                found[name] = Packed(None, problem=fmt) if isinstance(fmt, str) else Packed(fmt, fmt.shape(leaves))
        return found


FAMILY = SDNQFamily()
