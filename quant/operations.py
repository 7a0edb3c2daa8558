"""The host's operations with Linears for every format that a model's markers name, stacked in one place."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from .ascend.kinds import HOST_FORMAT, MARKER
from .exact import with_exact_answers
from .shards import ROW_SHARDS
from .svdquant.parts import FORMAT


def stacked(operations: Any, words: Collection[str], *, ascend: Any = "comfy_kitchen", svdquant: str = "dequantize",
            nvfp4: str | None = None, copied: Callable[[], None] = lambda: None) -> Any:
    """Subclass the host's mixed-precision `operations` (a class) for layers in these formats of `comfy_quant` markers.

    `ascend` multiplies Ascend's kinds, and the host's formats of these (a name of ascend.backends, or a backend);
    `svdquant` the parts of SVDQuant weights; `nvfp4` names the layout of NVFP4 row shards. `copied` is called after
    each layer of a model with SVDQuant parts. Other formats are the host's own, its refusals answered.
    """
    operations = with_exact_answers(operations)
    if ROW_SHARDS in words:
        from .ops import with_row_shards
        from .row_shards import NVFP4_NAME

        operations = with_row_shards(operations, nvfp4 or NVFP4_NAME)
    if FORMAT in words:
        from .svdquant.ops import with_svdquant

        operations = with_svdquant(operations, svdquant, copied)
    if ascend != "comfy_kitchen" or any(word.startswith(MARKER) or word in HOST_FORMAT.values() for word in words):
        from .ascend.ops import with_ascend

        operations = with_ascend(operations, ascend)  # the outermost: it copies every quantized weight right
    return operations
