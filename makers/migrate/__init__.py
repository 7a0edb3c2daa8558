"""Workflows made with other packs' loader nodes -> the same workflows with this pack's."""

from __future__ import annotations

from .workflow import Migrated, migrate

__all__ = ["Migrated", "migrate"]
