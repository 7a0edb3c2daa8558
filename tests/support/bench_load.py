"""Loading a diffusers folder by the pack, and the same weights as one native file by stock ComfyUI."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from support.bench import FRESH_MEMORY, Row, spent
from support.synthetic import flux_twins, wan_twins

TITLE = "loading a folder of FLUX.1 in FP8 or NVFP4, or of Wan in W8A8, over stock ComfyUI loading the same weights from one native file"
LINUX = True
ENVIRONMENT = FRESH_MEMORY


def cases(folder: Path) -> list[tuple[str, Path, Path]]:
    """A fifth of FLUX.1's depth, a tenth where bytes are laid out anew: what does not grow with it (headers, the one swapped
    modulation) weighs nearly as little here as in the real model, within the memory of a small machine."""
    return [("FP8", *flux_twins(folder, 4, 8)), ("NVFP4", *flux_twins(folder, 2, 4, "NVFP4")), ("W8A8", *wan_twins(folder, 3))]


def measure(kind: str, folder: str, file: str) -> list[Row]:
    import comfy.sd

    import quantized_transformers.quant.kernels.choose
    import quantized_transformers.quant.linear  # noqa: F401
    from quantized_transformers.loaders import assemble, model
    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import read
    from quantized_transformers.loaders.locate import locate
    from support.anon import Peak

    def laid_out_anew() -> int:
        """Bytes that cannot stay a view of the file."""
        checkpoint = Checkpoint(locate(folder))
        family, plan = read(checkpoint)
        tensors = family.tensors(checkpoint, plan)
        mapped = {t.data_ptr() for t in tensors.mapped.values()}
        native = assemble.assemble(plan, tensors)
        return sum(t.nbytes for t in native.tensors.values() if t.data_ptr() not in mapped)

    def ours() -> Any:
        return model.rebuild(model.Request(folder))

    def stock() -> Any:
        return comfy.sd.load_diffusion_model(file)

    took = spent({"ours": ours, "stock": stock}, 3)
    if kind != "FP8":
        return [Row(f"{kind}: load", took["ours"] / took["stock"], 1.05)]
    more = {}
    for load in (ours, stock):
        gc.collect()
        with Peak() as peak:
            made = load()
        more[load] = peak.more
        del made
    return [Row("load", took["ours"] / took["stock"], 1.1),
            Row("memory beyond stock's, over what is laid out anew", (more[ours] - more[stock]) / laid_out_anew(), 1.05)]
