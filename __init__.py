"""Quantized Transformers: quantized diffusion transformers in ComfyUI, as their vendors published them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


class QuantizedTransformers(ComfyExtension):
    async def on_load(self) -> None:
        from . import host

        host.register_model_folder()

    async def get_node_list(self) -> list[type]:
        from .nodes import node_classes

        return node_classes()


async def comfy_entrypoint() -> ComfyExtension:
    """ComfyUI's V3 entry point."""
    return QuantizedTransformers()
