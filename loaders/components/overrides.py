"""Which inputs of Load Base Text Encoder name what takes the place of a base's text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..files.places import cleaned

NONE = "none"
LISTS = ("override", "override_2")
INPUTS = tuple(name for listed in LISTS for name in (listed, f"{listed}_reference"))


def chosen(inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """The references that the inputs (INPUTS, missing ones are empty) name: of each the free one, where there is one,
    else what is chosen in the list."""
    found = (cleaned(inputs.get(f"{name}_reference")) or cleaned(inputs.get(name)) for name in LISTS)
    return tuple(one for one in found if one not in ("", NONE))
