"""A MODEL as one .safetensors file: in the host's formats where it has them, else under this pack's markers.

layers.py decides what is stored, target.py where, writer.py writes it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ... import host
from ...loaders import describe as descriptions
from ...loaders.architectures.passthrough import HostModel
from ...loaders.containers.checkpoint import Checkpoint
from ...loaders.errors import CheckpointError
from ...loaders.files.source import Source
from ...loaders.words import size
from ...quant.patches.saving import is_piece
from .check import check_layers, touched
from .layers import FORMATS, Plan, plan
from .target import refuse_existing, target_file
from .writer import write

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["FORMATS", "save", "target_file"]


def save(model: Any, filename: str, form: str = "exact", overwrite: bool = False,
         step: Callable[[int], None] | None = None) -> tuple[Path, str]:
    """(the file, the report). The diffusion model of any MODEL under ComfyUI's own names, with its LoRAs and other
    weight patches in it.

    `filename` is relative to ComfyUI's output folder, or an absolute path in it or in a model folder. `form` "exact"
    stores every layer as it is, with LoRAs as low-rank pairs beside quantized weights; "stock" dequantizes to 16 bits
    what the host has no format for, those layers among them; "baked" quantizes them again. The file appears whole
    or not at all; `step` is called with the bytes written (default: the node's progress bar and Cancel).

    Raises CheckpointError for a MODEL without weights, a path outside of these folders, a file that exists (unless
    `overwrite`), a disk that is full, and for a mixture of formats that could not be loaded again.
    """
    if form not in FORMATS:
        raise CheckpointError(f"{form!r} is no format of a saved file", "", f"choose {' or '.join(FORMATS)}")
    target = target_file(filename)
    refuse_existing(target, overwrite)
    if any(parameter.is_meta for parameter in model.model.diffusion_model.parameters()):
        raise CheckpointError("this MODEL has no weights yet (weights: defer to override)", "",
                              "connect Apply Transformer Override before, or set weights to 'load'")
    planned = plan(model, form)
    described: list[str] = []

    def check(path: str) -> None:
        described.extend(_read_back(path, planned, model))

    try:
        write(target, planned.layers, planned.metadata, overwrite=overwrite, check=check,
              step=step or host.progress(planned.bytes))
    except NotImplementedError as error:  # a layout of the host's that nothing can be quantized to
        raise CheckpointError(str(error), "", "set format to 'exact', or take the patches off the MODEL") from error
    return target, "\n".join(_report(model, target, planned, described))


class _Unfinished(Checkpoint):
    """A file whose name the host's reader does not know yet."""

    def load_tensors(self) -> dict[str, torch.Tensor]:
        from safetensors import safe_open

        with safe_open(self.source.files[0], framework="pt") as file:
            return {name: file.get_tensor(name) for name in self.tensors}


def _read_back(path: str, planned: Plan, model: Any) -> list[str]:
    """Lines for the report on who loads the file, whose headers are read. Raises CheckpointError for one that nobody
    would, or that is another model to ComfyUI, which knows a file by its names and shapes."""
    try:
        checkpoint = _Unfinished(Source(path, os.path.dirname(path), (path,)))
        family, read = descriptions.read(checkpoint)
        read.description.require_loadable()
    except CheckpointError as error:
        if planned.own:
            raise CheckpointError("the MODEL mixes formats that ComfyUI does not have with others, and no loader takes "
                                  f"them together: {error.what}", "",
                                  "set format to 'stock', or save the MODEL that this one was made from") from error
        return ["load it with ComfyUI's Load Diffusion Model; this pack's loaders do not take it: "
                + error.what.splitlines()[0]]
    family.settle(checkpoint, read, "auto")
    check_layers(read, lambda: family.tensors(checkpoint, read), model, lambda name: name not in planned.baked)
    lines = ["it loads with Load Base Model and as a transformer override"]
    if isinstance(read.architecture, HostModel):
        told, own = read.architecture.network.identity, host.model_identity(model.model)
        other = [key for key, value in told.items() if own.get(key) != value]
        if other or read.architecture.name != host.config_name(model.model):
            raise CheckpointError(f"ComfyUI would take a file of this {host.config_name(model.model)} for a "
                                  f"{read.architecture.name} of other {', '.join(other[:10]) or 'kind'}", "",
                                  "keep the file it came from; save LoRAs and patches apart")
        untold = sorted(own.keys() - told.keys() - {"prediction"})
        lines += [f"note: the file does not tell {', '.join(untold)}, which this MODEL has"] if untold else []
    return lines


def _report(model: Any, target: Path, planned: Plan, described: list[str]) -> list[str]:
    lines = [f"saved {type(model.model).__name__}: {size(target.stat().st_size)}", f"file: {target}",
             "layers: " + ", ".join(f"{count} {name}" for name, count in Counter(planned.formats.values()).items())]
    if model.patches:
        count = sum(not is_piece(key) for key in model.patches)
        lines.append(f"LoRAs and other patches of {count} tensors are in the file")
        layers = Counter("quantized again, to the nearest" if name in planned.baked
                         else "beside the quantized weight, as low-rank pairs" if name in planned.own
                         else "in a weight of 16 or more bits" for name in touched(model))
        lines += [f"  {count} quantized layers have theirs {how}" for how, count in layers.items()]
    elsewhere = host.bound_to_weights(model)
    if elsewhere:
        lines.append(f"note: not in the file, because it is no weight: {elsewhere}")
    own = Counter(planned.own.values())
    if own:
        lines.append("stock ComfyUI CANNOT load this file: "
                     + ", ".join(f"{count} layers are {name} ({planned.why[name]})" for name, count in own.items())
                     + ". With this pack installed it can. For a file that needs no pack set format to 'stock'")
    else:
        lines.append("stock ComfyUI loads this file without this pack")
    for text, names in planned.changed.items():
        lines.append(f"{len(names)} layers in a format of this pack were {text}")
    return lines + described
