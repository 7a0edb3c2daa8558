"""The hubs that repos are downloaded from: one module each, as base.Hub says, and a line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from .base import Hub

MODULES = ("huggingface",)


def named(reference: str) -> tuple[Hub, str]:
    """The hub of a reference, and the reference without the hub's prefix."""
    hubs = [cast("Hub", import_module(f".{name}", __package__)) for name in MODULES]
    for hub in hubs:
        if hub.PREFIX and reference.startswith(hub.PREFIX):
            return hub, reference.removeprefix(hub.PREFIX)
    return hubs[0], reference
