"""Quantized Transformers: quantized diffusion transformers in ComfyUI, as their vendors published them."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


class QuantizedTransformers(ComfyExtension):
    async def on_load(self) -> None:
        from . import host

        host.register_model_folder()
        host.on_prompt(_keep_prompt)
        table = host.routes()
        if table is None:
            return
        try:
            from .routes import add_routes

            add_routes(table)
        except Exception:  # costs the badges and the browser, not the nodes
            logging.getLogger(__name__).exception("Quantized Transformers: its web routes are not available")

    async def get_node_list(self) -> list[type]:
        from .nodes import node_classes

        return node_classes()


def _keep_prompt(data: Any) -> Any:
    from .nodes.checks import keep_prompt

    return keep_prompt(data)


async def comfy_entrypoint() -> ComfyExtension:
    """ComfyUI's V3 entry point."""
    return QuantizedTransformers()
