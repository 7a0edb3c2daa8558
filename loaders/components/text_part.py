"""One text encoder on its way to the host: its files' headers, what they make by the same plan as a transformer's, and
its tensors under the host's names, quantized layers as they are stored."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ... import host
from ...host.texts import Text, joined
from ...quant.stored import PLAIN_DTYPES
from .. import damage
from ..architectures.component import Component
from ..assemble import NativeStateDict, assemble
from ..containers.checkpoint import Checkpoint
from ..describe import read
from ..errors import CheckpointError
from ..files.source import Source
from ..prepare import check
from ..words import first_ten
from .text_encoders import llama_cpp
from .text_encoders.base import Encoder

if TYPE_CHECKING:
    import torch

    from ..description import CheckpointDescription
    from ..families.base import Family
    from ..plan import LoadPlan

EYES = "eyes"
Prefix = str | tuple[str, ...]


@dataclass
class Part:
    """One encoder. `checkpoints` are the files of it: one, or one of its eyes beside it; `replaced`: they are not the
    base's, `blind`: its eyes are nowhere. `sizes` are the entries of the host's model config that differ, `given` the
    host's tensors; `native` and `described` what was made of each checkpoint."""

    folder: str
    encoder: Encoder
    config: dict[str, Any]
    tokenizer_source: Source
    checkpoints: list[Checkpoint]
    replaced: bool = False
    blind: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, torch.Tensor] = field(default_factory=dict)
    given: dict[str, torch.Tensor] = field(default_factory=dict)
    native: list[NativeStateDict] = field(default_factory=list)
    described: list[CheckpointDescription] = field(default_factory=list)

    @property
    def quantized(self) -> bool:
        """Whether layers are this pack's, or of the host's quantized formats."""
        return any(native.layouts for native in self.native)

    def copied(self) -> None:
        """While the host copies the tensors: let go of what they were copied from."""
        for native in self.native:
            native.copied()


def know(checkpoint: Checkpoint, encoder: Encoder, config: dict[str, Any], only: Prefix = "",
         without: Prefix = "") -> None:
    """Let a checkpoint's tensors go by the host's names, in which llama.cpp's are put right, and leave out what the
    host has no use for; names begin with `only`, and not with `without`. Raises CheckpointError for two tensors of one
    name."""
    names: dict[str, str] = {}
    foreign = llama_cpp.is_here(checkpoint.tensors)
    for name, stored in _named(checkpoint, encoder, foreign).items():
        new = encoder.called(name, config)
        if new is None or not new.startswith(only) or without and new.startswith(without):
            continue
        if new in names:
            raise CheckpointError(Text("{one} and {other} are both {name}", one=names[new], other=stored, name=new),
                                  checkpoint.source.reference, Text("download the text encoder again"))
        names[new] = stored
    for kept, others in encoder.twins.items():
        _leave_twins(checkpoint, names, kept, others)
    right = llama_cpp.put_right({name: checkpoint.tensors[stored].shape for name, stored in names.items()},
                                checkpoint.metadata, checkpoint.source.reference) if foreign else {}
    checkpoint.know_as(names, right)


def _named(checkpoint: Checkpoint, encoder: Encoder, foreign: bool) -> dict[str, str]:
    """transformers' name -> the file's."""
    if foreign:
        return llama_cpp.called(checkpoint.tensors, checkpoint.metadata)
    saved = f"{encoder.host_name}.transformer."  # what ComfyUI's CLIPSave puts before names
    return {name.removeprefix(saved): name for name in checkpoint.tensors}


def _leave_twins(checkpoint: Checkpoint, names: dict[str, str], kept: str, others: Sequence[str]) -> None:
    """Leave out the duplicates `others` of the tensor `kept`; the first of them becomes it where that is not stored.

    Raises CheckpointError when a duplicate has other values: one of the two would be lost.
    """
    import torch

    for other in others:
        twin = names.pop(other, None)
        if twin is None or names.setdefault(kept, twin) == twin:
            continue
        tensors = checkpoint.load_tensors()
        if not torch.equal(tensors[names[kept]], tensors[twin]):
            raise CheckpointError(Text("{name} and {twin} should be the same tensor, but differ", name=names[kept],
                                       twin=twin),
                                  checkpoint.source.reference, Text("download the text encoder again"))


def fits(checkpoint: Checkpoint, encoder: Encoder, config: dict[str, Any]) -> str:
    """"": a file holds this encoder; EYES: it holds what may lie apart of it; else why it holds neither."""
    names = _named(checkpoint, encoder, llama_cpp.is_here(checkpoint.tensors))
    called = {new: stored for name, stored in names.items() if (new := encoder.called(name, config))}
    if encoder.known.tensor not in called:
        seen = encoder.apart and sum(name.startswith(encoder.apart) for name in called) > len(called) // 2
        return EYES if seen else Text("another model")
    width = (config.get("text_config") or config).get(encoder.known.width)
    stored = checkpoint.tensors[called[encoder.known.tensor]].shape
    return "" if width in (None, *stored) else Text("{encoder} of width {width}, the base's is {base} wide",
                                                    encoder=encoder.title, width=stored[0], base=width)


def assemble_part(part: Part) -> None:
    """Read, check and convert all of an encoder. Raises CheckpointError for anything that is not certain to be right.
    """
    encoder, (checkpoint, *eyes) = part.encoder, part.checkpoints
    without = encoder.apart if eyes or part.blind else ""
    if llama_cpp.is_here(checkpoint.tensors):
        part.config = llama_cpp.config_of(part.config, checkpoint.metadata)
    know(checkpoint, encoder, part.config, without=without)
    if part.replaced:
        part.config = encoder.told(part.config, checkpoint.tensors)
    part.sizes = encoder.host_config(part.config)
    part.given |= _native(part, checkpoint, without=without)
    for one in eyes:
        know(one, encoder, part.config, only=encoder.apart)
        part.given |= _native(part, one, only=encoder.apart)
    encoder.complete(part.given)


def planned(checkpoint: Checkpoint, encoder: Encoder, config: dict[str, Any], only: Prefix = "",
            without: Prefix = "") -> tuple[Family, LoadPlan]:
    """The family of a checkpoint whose names are known (`know`), and the plan of its modules; as describe.read."""
    listed = [module for module in encoder.modules(config, checkpoint.tensors)
              if module.native.startswith(only) and not (without and module.native.startswith(without))]
    return read(checkpoint, (Component(encoder.title, listed), {}))


def _native(part: Part, checkpoint: Checkpoint, only: Prefix = "", without: Prefix = "") -> dict[str, torch.Tensor]:
    """The host's tensors of one checkpoint: of the modules that begin with `only`, and not with `without`."""
    family, plan = planned(checkpoint, part.encoder, part.config, only, without)
    plan.description.require_loadable()
    family.settle(checkpoint, plan, "auto")
    if plan.codecs:
        host.require("quantized layers")
    check(family, plan)
    native = assemble(plan, family.tensors(checkpoint, plan), deep=damage.at_load())
    part.native.append(native)
    part.described.append(plan.description)
    return native.tensors


def formats_of(descriptions: Collection[CheckpointDescription]) -> str:
    """The formats of an encoder's layers in words; "" for one that is not quantized."""
    found: dict[str, int] = {}
    for description in descriptions:
        for name, count in description.formats.items():
            found[name] = found.get(name, 0) + count
    if not found.keys() - PLAIN_DTYPES:
        return ""
    return ", ".join(f"{count} {name}" for name, count in found.items())


def unknown(checkpoint: Checkpoint, wanted: Collection[str], why: Sequence[str]) -> CheckpointError:
    """What to say of a file that is none of a base's text encoders."""
    reasons = [reason for reason in why if reason and reason != "another model"]
    what = joined("; ", reasons) or Text("its tensors are others ({names})",
                                         names=first_ten(sorted(checkpoint.tensors)[:3]))
    return CheckpointError(Text("this is none of the base's text encoders ({wanted}): {why}", wanted=", ".join(wanted),
                                why=what),
                           checkpoint.source.reference, Text("take a file of one of them"))
