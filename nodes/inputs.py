"""Inputs and outputs that several nodes share.

ComfyUI imports the nodes at every start, and asks them for no more than what they are called and connect to: what lists
hold (lists.py), checks (checks.py) and all that loads is imported when it is asked for.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

CATEGORY = "loaders/quantized"
REFERENCE_TIP = ("A path (folder, .safetensors file or index) or a repo id such as owner/name. "
                 "When it is not empty it wins over the list.")


class Listed(io.Combo.Input):
    """A choice whose options and default are those of a list in lists.py, as it is whenever they are read: for a page,
    and for a prompt, but not while ComfyUI starts."""

    def __init__(self, id: str, name: str, **others: Any) -> None:
        self.list = name
        super().__init__(id, **others)

    @property
    def options(self) -> list[str]:
        from . import lists

        return lists.made(self.list).values

    @options.setter
    def options(self, value: object) -> None:
        """ComfyUI's class sets it, to nothing."""

    @property
    def default(self) -> str:
        from . import lists

        return lists.made(self.list).start

    @default.setter
    def default(self, value: object) -> None:
        """ComfyUI's class sets it, to nothing."""


def checkpoints(name: str, listed: str, tooltip: str) -> Any:
    """The list of what a node can load (lists.py)."""
    return Listed(name, listed, optional=True, tooltip=tooltip)


def reported(report: str) -> Any:
    """The output of a node that gives a report and shows it, in the language of the page whose prompt runs."""
    from ..host.texts import said

    words = said(report)
    return io.NodeOutput(words, ui=ui.PreviewText(words))


def loaded(value: Any, report: str) -> Any:
    """The outputs of a node that loads something and says what it was."""
    from ..host.texts import said

    return io.NodeOutput(value, said(report))


def reference() -> Any:
    return io.String.Input("reference", optional=True, default="",
                           tooltip=REFERENCE_TIP)


def revision() -> Any:
    return io.String.Input("revision", optional=True, default="", advanced=True,
                           tooltip="Branch, tag or commit of a repo id. Empty: the one on disk.")


def download_missing() -> Any:
    return io.Boolean.Input("download_missing", optional=True, default=False, advanced=True,
                            tooltip="Fetch what is missing of a repo id from its hub (Hugging Face, ModelScope), into "
                                    "its cache: only the files that this node needs. Off: nothing touches the network.")


def compute() -> Any:
    return io.Combo.Input("compute", options=["auto", "native", "dequantize"], default="auto", optional=True,
                          tooltip="auto: quantized matmul where the device has it, else dequantized for every matmul. "
                                  "native: insist on quantized matmul. dequantize: quantized in memory, full precision "
                                  "in every matmul.")


def byte_order() -> Any:
    return io.Combo.Input("byte_order", options=["auto", "modelopt", "modelopt_tiled", "comfyui"], default="auto",
                          optional=True, advanced=True,
                          tooltip="Of NVFP4 files that do not tell it. auto: by markers, names, shapes and values, and "
                                  "refused where none of them says. modelopt: even columns in the low nibble, block "
                                  "scales row-major. modelopt_tiled: scales in 128 x 4 tiles. comfyui: high nibble, "
                                  "tiles.")
