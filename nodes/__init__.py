"""The pack's nodes. A module that fails to import costs its own nodes, not the pack."""

from __future__ import annotations

import importlib
import logging
from functools import cache

NODES = {
    "load_base": ("QT_LoadBaseModel",),
    "load_parts": ("QT_LoadBaseTextEncoder", "QT_LoadBaseVAE"),
    "apply_override": ("QT_ApplyTransformerOverride",),
    "nunchaku": ("QT_NunchakuSVDQLoader",),
    "ascend": ("QT_ModelSlimLoader", "QT_AscendMXFP8Quantize"),
    "load_lora": ("QT_LoadLoRA", "QT_KeepDecoded"),
    "inspect_checkpoint": ("QT_InspectCheckpoint",),
    "build": ("QT_RepackModelSlimWan", "QT_BuildGGUF"),
    "build_quantized": ("QT_BuildFP8Transformer", "QT_BuildNVFP4Transformer"),
    "save_quantized": ("QT_SaveQuantizedModel",),
    "compare": ("QT_CompareModels",),
    "server": ("QT_ServerModel", "QT_ServerLoRA"),
    "server_draw": ("QT_ServerImage", "QT_ServerVideo"),
}
logger = logging.getLogger(__name__)


@cache  # the web routes ask again: what is broken is logged once
def node_classes() -> list[type]:
    """Every node class whose module imports; the others are logged with their traceback."""
    classes: list[type] = []
    for module_name, names in NODES.items():
        try:
            module = importlib.import_module(f".{module_name}", __name__)
            classes += [getattr(module, name) for name in names]
        except Exception:
            logger.exception("Quantized Transformers: %s is not available", ", ".join(names))
    return classes
