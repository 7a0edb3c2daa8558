"""A MODEL as one .safetensors file: in the host's formats where it has them, else under this pack's markers.

layers.py decides what is stored, target.py where, writer.py writes it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ... import host
from ...host.texts import Text, joined
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

    Raises CheckpointError for a MODEL without weights, or whose file has been written to since it was loaded, a path
    outside of these folders, a file that exists (unless `overwrite`), a disk that is full, and for a mixture of formats
    that could not be loaded again.
    """
    if form not in FORMATS:
        raise CheckpointError(Text("{form!r} is no format of a saved file", form=form), "",
                              Text("choose one of: {formats}", formats=", ".join(FORMATS)))
    target = target_file(filename)
    refuse_existing(target, overwrite)
    if any(parameter.is_meta for parameter in model.model.diffusion_model.parameters()):
        raise CheckpointError(Text("this MODEL has no weights yet (weights: defer to override)"), "",
                              Text("connect Apply Transformer Override before, or set weights to 'load'"))
    planned = plan(model, form)
    described: list[str] = []

    def check(path: str) -> None:
        described.extend(_read_back(path, planned, model))

    try:
        write(target, planned.layers, planned.metadata, sources=planned.sources, overwrite=overwrite, check=check,
              step=step or host.progress(planned.bytes))
    except NotImplementedError as error:  # a layout of the host's that nothing can be quantized to
        raise CheckpointError(error, "",
                              Text("set format to 'exact', or take the patches off the MODEL")) from error
    return target, joined("\n", _report(model, target, planned, described))


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
            raise CheckpointError(Text("the MODEL mixes formats that ComfyUI does not have with others, and no loader "
                                       "takes them together: {what}", what=error.what), "",
                                  Text("set format to 'stock', or save the MODEL that this one was made from")
                                  ) from error
        return [Text("load it with ComfyUI's Load Diffusion Model; this pack's loaders do not take it: {what}",
                     what=error.what)]
    family.settle(checkpoint, read, "auto")
    check_layers(read, lambda: family.tensors(checkpoint, read), model, lambda name: name not in planned.baked)
    lines: list[str] = [Text("it loads with Load Base Model and as a transformer override")]
    if isinstance(read.architecture, HostModel):
        told, own = read.architecture.network.identity, host.model_identity(model.model)
        other = [key for key, value in told.items() if own.get(key) != value]
        if other or read.architecture.name != host.config_name(model.model):
            raise CheckpointError(Text("ComfyUI would take a file of this {kind} for a {architecture} of other "
                                       "{settings}", kind=host.config_name(model.model),
                                       architecture=read.architecture.name,
                                       settings=", ".join(other[:10]) or Text("kind")), "",
                                  Text("keep the file it came from; save LoRAs and patches apart"))
        untold = sorted(own.keys() - told.keys() - {"prediction"})
        if untold:
            lines.append(Text("note: the file does not tell {settings}, which this MODEL has",
                              settings=", ".join(untold)))
    return lines


def _report(model: Any, target: Path, planned: Plan, described: list[str]) -> list[str]:
    lines = [Text("saved {kind}: {size}", kind=type(model.model).__name__, size=size(target.stat().st_size)),
             Text("file: {file}", file=target),
             Text("layers: {formats}", formats=", ".join(
                 f"{count} {name}" for name, count in Counter(planned.formats.values()).items()))]
    if model.patches:
        count = sum(not is_piece(key) for key in model.patches)
        lines.append(Text("LoRAs and other patches of {count} tensors are in the file", count=count))
        touched_by = Counter(Text("quantized again, to the nearest") if name in planned.baked
                             else Text("beside the quantized weight, as low-rank pairs") if name in planned.own
                             else Text("in a weight of 16 or more bits") for name in touched(model))
        lines += [Text("  {line}", line=Text("{count} quantized layers have theirs {how}", count=count, how=how))
                  for how, count in touched_by.items()]
    elsewhere = host.bound_to_weights(model)
    if elsewhere:
        lines.append(Text("note: not in the file, because it is no weight: {what}", what=elsewhere))
    own = Counter(planned.own.values())
    if own:
        layers = joined(", ", (Text("{count} layers are {format} ({why})", count=count, format=name,
                                    why=planned.why[name]) for name, count in own.items()))
        lines.append(Text("stock ComfyUI CANNOT load this file: {layers}. With this pack installed it can. For a file "
                          "that needs no pack set format to 'stock'", layers=layers))
    else:
        lines.append(Text("stock ComfyUI loads this file without this pack"))
    for done, names in planned.changed.items():
        lines.append(Text("{count} layers in a format of this pack were {done}", count=len(names), done=done))
    return lines + described
