"""Inputs about NVFP4, which several nodes share."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io


def byte_order() -> Any:
    return io.Combo.Input("byte_order", options=["auto", "modelopt", "modelopt_tiled", "comfyui"], default="auto",
                          optional=True, advanced=True,
                          tooltip="Of NVFP4 files that do not tell it. auto: by markers, names, shapes and values, and "
                                  "refused where none of them says. modelopt: even columns in the low nibble, block "
                                  "scales row-major. modelopt_tiled: scales in 128 x 4 tiles. comfyui: high nibble, "
                                  "tiles.")
