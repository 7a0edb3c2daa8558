"""The LoRAs of a server: one set for all of its clients, so a client looks before and after every picture
(docs/sources/sglang.md, "Server: what it leaves to its clients").

A LoRA is known on the server by a nickname that is made of its path alone. What a server was started with is part of
its name (identity.py), and is what a client without LoRAs of its own wants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from .identity import ROLES, Identity, Part

TARGETS = ("all", *ROLES)
MERGES = ("auto", "merge", "dynamic")
NOTHING = Identity(Part(""))
SECONDS = 600.0  # a server may fetch one, and merge it into large weights


@dataclass(frozen=True)
class LoRA:
    """`path` is a repo id, or a path on the server's machine; `alpha` 0 is the file's own. Without a path it is one
    that the server has loaded by `nickname`."""

    path: str
    strength: float = 1.0
    target: str = "all"
    merge_mode: str = "auto"
    alpha: int = 0
    nickname: str = ""

    @property
    def name(self) -> str:
        """What it is called on the server."""
        return self.nickname or f"qt-{hashlib.sha256(self.path.encode()).hexdigest()[:12]}"

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        del found["nickname"]
        return found

    @classmethod
    def of_json(cls, value: Any) -> LoRA:
        """Raises ValueError, TypeError or KeyError for what is none."""
        found = cls(value["path"], float(value["strength"]), value["target"], value["merge_mode"], int(value["alpha"]))
        if (not isinstance(found.path, str) or not found.path.strip() or found.target not in TARGETS
                or found.merge_mode not in MERGES or found.alpha < 0 or not abs(found.strength) < 1e6):
            raise ValueError("no LoRA")
        return found


def of_start(identity: Identity | None) -> tuple[LoRA, ...]:
    """Those that a server was started with, as `serve` nicknames them."""
    return tuple(LoRA("", strength, nickname=f"qt-{part.mark}") for part, strength in (identity or NOTHING).loras)


def request(loras: Sequence[LoRA]) -> dict[str, Any]:
    """The body of /v1/set_lora for these. Of two lists for one transformer the server keeps the second, so where some
    are for all and some for one, each transformer's are listed. Raises CheckpointError for two ways of merging."""
    modes = {lora.merge_mode for lora in loras}
    if len(modes) > 1:
        raise CheckpointError(Text("a server merges all LoRAs in one way, and {modes} are wanted",
                                   modes=", ".join(sorted(modes))), "",
                              Text("give all Server LoRA the same merge_mode"))
    if {lora.target for lora in loras} == {"all"}:
        listed = [(lora, "all") for lora in loras]
    else:
        listed = [(lora, role) for role in ROLES for lora in loras if lora.target in ("all", role)]
    return {"lora_nickname": [lora.name for lora, _ in listed], "lora_path": [lora.path or None for lora, _ in listed],
            "target": [target for _, target in listed], "strength": [lora.strength for lora, _ in listed],
            "lora_alpha": [lora.alpha or None for lora, _ in listed], "merge_mode": modes.pop()}


def differs(active: dict[str, Any], loras: Sequence[LoRA]) -> str:
    """How what is on (/v1/list_loras, "active") is not these LoRAs; empty where it is."""
    for role in dict.fromkeys((*ROLES, *active)):
        mine = [lora for lora in loras if lora.target in ("all", role)]
        have = active.get(role)
        if not have:
            if mine and (role == ROLES[0] or any(lora.target == role for lora in mine)):
                return Text("{role} has none on", role=role)
            continue
        if role not in ROLES and loras:  # a critic, which draws nothing
            continue
        try:
            names, strengths = list(have[0]["nicknames"]), [float(value) for value in have[0]["strengths"]]
            path = str(have[0].get("path") or "")
        except (LookupError, TypeError, ValueError, AttributeError):
            return Text("{role} has something on that the server does not explain", role=role)
        same = (names == [lora.name for lora in mine]
                and all(abs(a - lora.strength) < 1e-6 for a, lora in zip(strengths, mine, strict=False))
                and len(strengths) == len(mine))
        if not same or all(lora.path for lora in mine) and path != ",".join(lora.path for lora in mine):
            shown = ", ".join(f"{name} x {strength:g}" for name, strength in zip(names, strengths, strict=False))
            return Text("{role} has {shown} on", role=role, shown=f"{shown} ({path})" if path else shown)
    return ""
