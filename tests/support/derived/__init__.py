"""One file for each table of loaders/architectures/tables, of its name: SOURCE, CASES (support/derived_case.py), and REFUSED
where the host runs some combinations only: (a part of a config.json, words of the refusal, empty for what is fine)."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from support.derived_case import Case, Source

_MODULES = {name: import_module(f"support.derived.{name}") for _, name, _ in pkgutil.iter_modules(__path__)}
SOURCES: dict[str, Source] = {name: module.SOURCE for name, module in _MODULES.items()}
CASES: dict[str, tuple[Case, ...]] = {name: module.CASES for name, module in _MODULES.items()}
REFUSED: dict[str, tuple[tuple[dict, str], ...]] = {name: getattr(module, "REFUSED", ()) for name, module in _MODULES.items()}
