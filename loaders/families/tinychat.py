"""Nunchaku's text encoder (awq-int4-flux.1-t5xxl): layers with qweight, scales and scaled_zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...host.texts import Text, both
from ...quant.packed.tinychat import TinyChat
from ..containers.checkpoint import Checkpoint
from ..plan import Group
from .packed import Packed, PackedFamily

_FORMAT = TinyChat()
_NEEDED = ("scales", "scaled_zeros")


class Tinychat(PackedFamily):
    """See base.Family and packed.PackedFamily."""

    name = "tinychat"
    title = "Nunchaku AWQ INT4"
    words = {"tinychat": "Nunchaku AWQ INT4"}
    leaves = {"qweight": "weight"}

    def recognise(self, checkpoint: Checkpoint) -> bool:
        return any(name.endswith(".scaled_zeros") for name in checkpoint.tensors)

    def claims(self, checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
        return {}, ()  # its header has the config of the whole model, and nothing of the layers

    def layers(self, checkpoint: Checkpoint, claimed: Mapping[str, Any], groups: Mapping[str, Group],
               notes: list[str]) -> dict[str, Packed]:
        found = {}
        for name, leaves in groups.items():
            if "weight" in leaves and checkpoint.stored(f"{name}.weight").endswith(".qweight"):
                missing = [leaf for leaf in _NEEDED if leaf not in leaves]
                problem = Text("{names} missing beside qweight", names=both(missing)) if missing else \
                    "" if len(leaves["weight"].shape) == 2 else Text("qweight has not two dimensions")
                found[name] = Packed(None, problem=problem) if problem else Packed(_FORMAT, _FORMAT.shape(leaves))
        return found


FAMILY = Tinychat()
