"""Stage 5: FLUX.1 at 512 x 512, where launching kernels may take longer than running them, and some of its blocks under
torch.compile (all 57 would take minutes to compile)."""

from __future__ import annotations

from typing import Any

from .machine import Where
from .models import ARMS, measured, step
from .rows import Rows

LIMIT = 400


def run(rows: Rows, where: Where) -> None:
    for name in ("bf16", "fp8", "nvfp4"):
        measured(rows, f"512, {name}", "FLUX.1", ARMS[name], where, lambda patcher: step(patcher, where, 512))
    for name in ("bf16", "fp8"):
        measured(rows, f"blocks, {name}", "FLUX.1", ARMS[name], where, lambda patcher: step(patcher, where), **blocks(where))
        measured(rows, f"compiled blocks, {name}", "FLUX.1", ARMS[name], where,
                 lambda patcher: step(compiled(patcher, where), where), **blocks(where))


def blocks(where: Where) -> dict[str, int]:
    """A fifth of FLUX.1."""
    return {} if where.tiny else {"num_layers": 4, "num_single_layers": 8}


def compiled(patcher: Any, where: Where) -> Any:
    """As ComfyUI's own TorchCompileModel node does; on a CPU traced alone, which needs no compiler."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = patcher.clone()
    set_torch_compile_wrapper(model=clone, backend="inductor" if where.cuda else "eager")
    return clone
