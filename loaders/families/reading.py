"""What every family does with a checkpoint's headers: the architecture, its sizes, tensors by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ... import host
from ...host.texts import Text
from ..architectures import (
    ARCHITECTURES,
    Architecture,
    Dims,
    Naming,
    by_class_name,
    diffusers_classes,
    name_other,
    passthrough,
    supported,
)
from ..architectures.component import Component
from ..architectures.derived import Translated
from ..architectures.passthrough import PREFIXES as WHOLES
from ..containers.checkpoint import Checkpoint
from ..containers.safetensors import TensorInfo
from ..description import CheckpointDescription
from ..errors import CheckpointError, OtherKind
from .names import PREFIXES

Read = TypeVar("Read")
# Ends of names that only one writer has, with the line's end -> what its layers are stored as.
_PACKED = {".svd_down\n": Text("SDNQ's tensors (without the config.json that says of which types they are)"),
           ".W_q\n": Text("HQQ's integers"), ".nbits\n": Text("HQQ's integers"),
           ".q_weight\n": Text("ExLlamaV2's integers")}


def spellings(layer: str) -> tuple[str, ...]:
    """What tensors may call a layer that metadata list: some writers list it with a prefix that the tensors do not have
    (any more: names.adopt), or the other way round."""
    found = [layer]
    while prefix := next((prefix for prefix in (*WHOLES, *PREFIXES) if layer.startswith(prefix)), ""):
        layer = layer.removeprefix(prefix)
        found.append(layer)
    return (*found, *(prefix + layer for prefix in WHOLES))


def architecture_of(checkpoint: Checkpoint,
                    tensors: Mapping[str, TensorInfo] | None = None) -> tuple[Architecture, Naming]:
    """Recognise the architecture from tensor names, checked against config.json's claim. One that this pack has no
    table for, or that a file's header makes of a table's names, is asked of the host, by the shapes of `tensors` (the
    checkpoint's own, with whole weights).

    Raises CheckpointError that says what the file is instead when it is none of the supported ones.
    """
    where, stored = checkpoint.source.reference, checkpoint.tensors if tensors is None else tensors
    claim = diffusers_classes.class_of(checkpoint.config)
    if claim and diffusers_classes.of_class(claim):
        return _derived(checkpoint, stored, claim)
    for architecture in ARCHITECTURES:
        naming = architecture.naming(checkpoint.tensors)
        if naming:
            if claim and by_class_name(claim) is None:
                raise CheckpointError(Text("config.json says {claim}, which this version does not load ({supported})",
                                           claim=claim, supported=supported()), where,
                                      Text("load it with another loader, or use a version of this pack that lists it"))
            if claim and claim not in architecture.class_names:
                raise CheckpointError(Text("config.json says {claim}, but the tensors are {architecture}", claim=claim,
                                           architecture=architecture.name), where,
                                      Text("config.json and weights do not belong together; download both again"))
            model = passthrough.by_header(stored, checkpoint.metadata) if naming.style == "native" else None
            return (model, Naming("native", model.prefix)) if model else (architecture, naming)
    refuse_packed(checkpoint)
    if not claim and (found := _translated(checkpoint, stored)):
        return found, Naming("diffusers")
    what, do = name_other(checkpoint.stored_tensors)
    try:
        model = passthrough.recognise(stored, checkpoint.metadata)
    except ValueError as error:
        raise CheckpointError(Text("this is {what}, and not one that ComfyUI makes sense of ({error})", what=what,
                                   error=error), where,
                              Text("download it again; if it is complete, load it with another loader")) from error
    if model is not None:
        return model, Naming("native", model.prefix)
    if claim:
        what = Text("{what} (config.json says {claim})", what=what, claim=claim)
    raise OtherKind(Text("this is {what}, not a transformer this version loads ({supported})", what=what,
                         supported=supported()), where, do)


def _derived(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], claim: str) -> tuple[Architecture, Naming]:
    """The architecture of a class that has a derived table, by its tensors in diffusers' names, or the host's."""
    model = _translated(checkpoint, tensors)
    if model is None:
        refuse_packed(checkpoint)
        if not host.is_there():
            raise CheckpointError(Text("what a {claim} is made of is asked of ComfyUI, which is not there",
                                       claim=claim), checkpoint.source.reference,
                                  Text("put this pack into ComfyUI's custom_nodes folder, or set COMFYUI_PATH"))
        try:
            native = passthrough.recognise(tensors, checkpoint.metadata)
        except ValueError:
            native = None
        hosts = {name for one in diffusers_classes.of_class(claim) for name in one.hosts}
        if native is None or native.name not in hosts:
            raise CheckpointError(Text("config.json says {claim}, but the tensors are none of it", claim=claim),
                                  checkpoint.source.reference,
                                  Text("config.json and weights do not belong together; download both again"))
        return native, Naming("native", native.prefix)
    return model, Naming("diffusers")


def _translated(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> Translated | None:
    try:
        model = diffusers_classes.recognise(tensors, checkpoint.metadata, checkpoint.config or {})
    except ValueError as error:
        refuse_packed(checkpoint)
        raise CheckpointError(error, checkpoint.source.reference,
                              Text("download it again; if it is complete, this model cannot run in ComfyUI")) from error
    return model


def refuse_packed(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError that names the writer, for layers packed as only one does, which nothing here reads. For
    checkpoints that turned out to have something wrong: it reads all names."""
    text = "\n".join((*checkpoint.stored_tensors, ""))
    what = next((what for end, what in _PACKED.items() if end in text), "")
    points = [name.removesuffix("zero_point") for name in checkpoint.stored_tensors if name.endswith(".zero_point")]
    if not what and any(layer + "scale" in checkpoint.stored_tensors for layer in points):
        what = Text("SDNQ's integers (without the config.json that says of which types they are)")
    if what:
        raise CheckpointError(Text("the layers are stored as {what}, which this version does not load", what=what),
                              checkpoint.source.reference,
                              Text('take another checkpoint of this model (README, "Which node for which file")'))


def dims_of(read: Callable[..., Read], checkpoint: Checkpoint, *arguments: Any) -> Read:
    """Sizes, or what has them, by one of an architecture's readers; its ValueError as a CheckpointError that says
    where."""
    try:
        return read(*arguments)
    except ValueError as error:
        refuse_packed(checkpoint)
        raise CheckpointError(error, checkpoint.source.reference,
                              Text("download it again; if it is complete, this model cannot run in ComfyUI")) from error


def described(checkpoint: Checkpoint, family: str, base: tuple[Architecture, Dims] | None,
              tensors: Mapping[str, TensorInfo] | None = None,
              **known: Any) -> tuple[Architecture, CheckpointDescription]:
    """The architecture of a checkpoint, and its description with everything but the layers: sizes are read from
    `tensors`, the checkpoint's own with whole weights, and compared by `check_sizes`. `known` are further fields.

    Raises CheckpointError for what is none of the supported architectures, or another one than the base's.
    """
    tensors = checkpoint.tensors if tensors is None else tensors
    asked = base[0] if base is not None and isinstance(base[0], Component) else None
    architecture, naming = (asked, Naming("native")) if asked else architecture_of(checkpoint, tensors)
    dims = dims_of(architecture.dims_from_tensors, checkpoint, tensors, naming)
    description = CheckpointDescription(
        checkpoint.source.reference, [os.path.basename(header.path) for header in checkpoint.headers],
        checkpoint.bytes_on_disk, architecture.name, naming, dims, family, **known)
    if isinstance(architecture, passthrough.HostModel) and architecture.name not in host.TRIED:
        description.notes.append(Text("{architecture} is known to this ComfyUI only: it is loaded by what ComfyUI "
                                      "{version} says of it, and was never tried with this version of the pack",
                                      architecture=architecture.name, version=host.version()))
    if isinstance(architecture, Translated):
        description.notes += architecture.notes
    check_sizes(description, checkpoint, architecture, base)
    return architecture, description


def check_sizes(description: CheckpointDescription, checkpoint: Checkpoint, architecture: Architecture,
                base: tuple[Architecture, Dims] | None) -> None:
    """Note how the files were chosen, and compare the sizes that the tensors tell with the base's, else with those of a
    config.json that names its class; note what nothing tells."""
    if checkpoint.source.choice:
        description.notes.append(checkpoint.source.choice)
    if base is not None:
        check_dims(description, *base)
    elif checkpoint.config and checkpoint.config.get("_class_name") and architecture.class_names:
        compare_dims(description, dims_of(architecture.dims_from_config, checkpoint, checkpoint.config),
                     Text("config.json says"))
    description.notes += [Text("{key} is told by neither the tensors nor a config.json; taken as off. If this is a "
                               "model that has it, give its folder, or use the file as weights on its base", key=key)
                          for key in sorted(architecture.config_only - description.dims.keys())]


def check_dims(description: CheckpointDescription, architecture: Architecture, dims: Dims) -> None:
    """Hold a description against the base model that it must fit; sizes that it does not tell are taken over.

    Raises CheckpointError for another architecture; other sizes become problems.
    """
    if architecture.name != description.architecture:
        raise CheckpointError(Text("the override is {override}, but the base model is {base}",
                                   override=description.architecture, base=architecture.name),
                              description.reference, Text("choose an override made for this base"))
    compare_dims(description, dims, Text("the base model has"))


def compare_dims(description: CheckpointDescription, dims: Dims, whose: str) -> None:
    for key, value in dims.items():
        stored = description.dims.setdefault(key, value)  # a size that the tensors do not tell is taken over
        if stored != value:
            description.problems.append(Text("{whose} {key} = {value}, but the tensors have {stored}", whose=whose,
                                             key=key, value=value, stored=stored))
