"""Loading Nunchaku's files, whose bytes are all laid out anew on the way (repacked)."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

from support.bench import FRESH_MEMORY, Row, child, spent

TITLE = "loading a Nunchaku file of FLUX.1's width (sparse, in the page cache), over reading every byte into fresh memory"
LINUX = True
ENVIRONMENT = FRESH_MEMORY


def cases(folder: Path) -> list[tuple[str, Path]]:
    made = [(precision, folder / f"svdq-{precision}_r32-flux.1-dev.safetensors") for precision in ("int4", "nvfp4")]
    child(write, [[precision, str(path)] for precision, path in made])
    return made


def write(files: list[tuple[str, str]], double: int = 2, single: int = 4) -> None:
    """Files of FLUX.1's width and less depth: 0.9 GB."""
    import diffusers
    import torch

    from support import svdquant_tables as tables

    with torch.device("meta"):
        net = diffusers.FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    for precision, path in files:
        tables.header_only(Path(path), shapes, tables.flux_table(double, single, 3072), precision, 32, tables.flux_plain, True)


def measure(precision: str, path: str) -> list[Row]:
    import comfy.ldm.flux.model
    import comfy.sd  # noqa: F401

    import quantized_transformers.quant.kernels.choose
    import quantized_transformers.quant.linear  # noqa: F401
    from quantized_transformers.loaders import model
    from quantized_transformers.loaders import prepare as preparing
    from support.anon import Peak

    size = os.path.getsize(path)
    assemble, of_assemble = preparing.assemble, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = process_time()
        made = assemble(*args, **kwargs)
        of_assemble.append(process_time() - start)
        return made

    preparing.assemble = timed

    def load() -> Any:
        return model.rebuild(model.Request(path))

    def read() -> Any:
        made = []
        with open(path, "rb", buffering=0) as file:
            while len(block := bytearray(1 << 25)) == file.readinto(block):
                made.append(block)
        return made

    took = spent({"load": load, "read": read}, 2)
    gc.collect()
    with Peak() as peak:
        made = load()
    repack = median(of_assemble[1:3])  # without the first round, and the load for its memory
    del made
    return [Row(f"{precision}: load", took["load"] / took["read"]),
            Row(f"{precision}: repack, with its reads", repack / took["read"], 2),
            Row(f"{precision}: the same, a GB of the file", repack / size * 1e9, 0.8, unit="s"),
            Row(f"{precision}: memory, over the file's size", peak.more / size, 1.3)]
