"""Stage 0: what runs here, and whether everything that the others need can be imported. If not, nothing else is tried."""

from __future__ import annotations

import importlib
from typing import Any

from .machine import Where, versions
from .rows import Rows

LIMIT = 120
NEEDED = ("comfy.sd", "comfy.sample", "nodes", "quantized_transformers.nodes.load_base",
          "quantized_transformers.nodes.apply_override", "quantized_transformers.nodes.build_quantized",
          "quantized_transformers.loaders.model", "quantized_transformers.makers.bench.measure")


def run(rows: Rows, where: Where) -> None:
    rows.measure("imports", _imports)
    rows.measure("versions", lambda: versions(where))


def _imports() -> dict[str, Any]:
    for name in NEEDED:
        importlib.import_module(name)
    return {"modules": len(NEEDED)}
