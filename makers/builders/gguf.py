"""build-gguf: a transformer in BF16, F16 or F32 as one GGUF file, under the model's own names, as ComfyUI-GGUF's
converter and llama-quantize make it (gguf_rules.py), in the types that gguf-py quantizes to.

The numbers are gguf-py's own: each span of a tensor goes through gguf.quants.quantize. Spans are whole blocks, which
are quantized by themselves.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ... import host
from ...host.texts import Text, joined
from ...loaders import describe
from ...loaders.architectures import Module, Naming
from ...loaders.architectures.base import tensor_name
from ...loaders.containers.checkpoint import Checkpoint
from ...loaders.containers.writing import Declared, Parts, Piece, Put
from ...loaders.errors import CheckpointError
from ...loaders.files.source import Source
from ...loaders.patterns import Expression
from ...loaders.plan import Layer, LoadPlan, Planned
from ...loaders.words import first_ten, size
from ...quant.ggml import TYPES
from ...quant.stored import PLAIN_DTYPES
from ..publish import Step
from ..save.writer import write_laid_out
from .component import Component
from .gguf_file import GGUFLayout, Stored, check, gguf_py, lay_out, target_file
from .gguf_rules import FILE_TYPES, KINDS, LONGEST_NAME, QUANTIZED, Choice, choose, rules_of
from .output import Built, statistics_line
from .presets import NONE, PRESETS, Preset, compiled, left_alone, preset_of, unmatched, variants

if TYPE_CHECKING:
    from torch import Tensor

F16_MAX = 65504.0
HEADER = ("config",)  # what ComfyUI reads of a native file's own header; this pack hands it on from a GGUF, too


class Part(NamedTuple):
    """Elements of a stored tensor: `values` from number `first` on."""

    name: str
    first: int
    values: int


class Native(NamedTuple):
    """A tensor as the model calls it [shape], and the parts of stored ones that it is made of, in order; none of them:
    a mark, whose name is all that counts. `dtypes` are those of the parts."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dtypes: frozenset[str]
    linear: bool = False
    module: str = ""


def build_gguf(*, output: str, base: str, kind: str = "Q8_0", model_type: str = "auto",
               keep_patterns: Sequence[str] = (), overwrite: bool = False,
               progress: Callable[[int], Step] | None = None) -> Built:
    """Write the GGUF file `output` from the transformer `base`: a path or a repo id on this machine, in diffusers'
    names or the model's own.

    `kind` is one of KINDS. Layers that stay in 16 bits: with `model_type` "auto" those that ComfyUI-GGUF's tools leave
    (gguf_rules.RULES), with the name of a preset also those that build-fp8 leaves with it, with "none" none but what
    `keep_patterns` match (re.search on the model's own module names), which count always. `progress(total bytes)`
    returns the function that is told how many bytes were written (default: the node's progress bar and Cancel).
    Statistics: quantized_weights, kept_weights (in 16 bits by a rule or pattern), undivided_weights (in 16 bits: their
    columns are no multiple of a block), other_tensors.

    Raises CheckpointError for a base that is quantized or holds NaN, a model that ComfyUI-GGUF has no name for, a value
    that F16 does not hold, and a file that cannot be written; the file appears whole or not at all.
    """
    if kind not in KINDS:
        raise CheckpointError(Text("unknown GGUF type {kind!r}", kind=kind), "",
                              Text("choose one of: {kinds}", kinds=", ".join(KINDS)))
    user = compiled(keep_patterns)
    gguf_py()
    component = Component(base, bare=True)
    _, plan = describe.read(component.checkpoint)
    plan.description.require_loadable()
    target = target_file(output, component.paths, overwrite)
    rules = rules_of(plan.architecture.name, component.folder)
    if model_type == "none":
        rules = rules._replace(high=())
    kept = _kept(plan, component, model_type, user)
    natives = {native.name: native for native in _natives(plan, component)}
    choices = {name: choose(name, native.shape, native.dtypes, native.linear, kind, rules, native.module in kept)
               for name, native in natives.items()}
    _refuse_long(natives, component)
    if kind in QUANTIZED and not any(choice.why == "quantized" for choice in choices.values()):
        raise CheckpointError(Text("there is nothing to quantize: every weight is to be kept in 16 bits"),
                              component.folder, Text("give fewer patterns, or another type"))
    tensors = {name: Stored(choice.kind, choice.shape, natives[name].shape) for name, choice in choices.items()}
    texts = {key: text for key, text in component.checkpoint.metadata.items() if key in HEADER}
    layout = lay_out(tensors, rules.name, FILE_TYPES[kind], texts if plan.description.naming.style == "native" else {})
    pieces = [Piece((Declared(name, "U8", (tensors[name].bytes,)),), partial(_write, component, native, choices[name]))
              for name, native in natives.items()]
    total = sum(piece.bytes for piece in pieces)

    def checked(path: str) -> None:
        check(path, tensors, layout)
        _read_back(path, plan)

    write_laid_out(target, layout, pieces, sources=component.frozen, overwrite=overwrite, check=checked,
                   step=(progress or host.progress)(total))
    why = Counter(choice.why for choice in choices.values())
    statistics: dict[str, int | bool] = {"quantized_weights": why["quantized"], "kept_weights": why["kept"],
                                         "undivided_weights": why["columns"], "other_tensors": why[""]}
    lines = _report(plan, component, target, kind, rules.name, model_type, statistics, choices, layout)
    lines += [Text("note: {note}", note=note) for note in _notes(natives, kind, user, why)]
    return Built(joined("\n", lines), statistics, target)


def _kept(plan: LoadPlan, component: Component, model_type: str, user: list[Expression]) -> set[str]:
    """Native modules that a preset or the user keeps in 16 bits. Presets know diffusers' names."""
    own = (known.class_name for known in PRESETS.values() if known.class_name in plan.architecture.class_names)
    claim = component.class_name or next(own, plan.architecture.name)
    preset: Preset = NONE if model_type == "auto" else preset_of(model_type, claim, component.folder.name)
    kept = {planned.module.native for planned in plan.modules
            if any(pattern.search(planned.module.native) for pattern in user)}
    if preset.class_name:
        modules = list(plan.architecture.modules(plan.description.dims, Naming("diffusers")))
        names = [f"{name}.weight" for module in modules for name in module.stored]
        patterns = [*compiled(preset.keep), *left_alone(preset, names)]
        kept |= {module.native for module in modules for name in module.stored
                 for variant in variants(name, preset.class_name) if any(p.search(variant) for p in patterns)}
    return kept


def _natives(plan: LoadPlan, component: Component) -> Iterator[Native]:
    """Every tensor of the model in the host's order. Raises CheckpointError for a base that is quantized."""
    quantized = sorted({piece.layer.name for planned in plan.modules for piece in planned.pieces
                        if piece.layer.read is not None or piece.layer.format not in PLAIN_DTYPES})
    if quantized:
        raise CheckpointError(Text("the base is not in BF16, F16 or F32: {names}", names=first_ten(quantized)),
                              component.folder, Text("give the BF16 model; nothing is quantized twice"))
    for planned in plan.modules:
        module = planned.module
        yield _native(plan, component, planned, 0, tensor_name(module.native, module.leaf))
        if module.bias:
            yield _native(plan, component, planned, 1, f"{module.native}.bias")
    for mark in plan.architecture.marks(plan.description.dims):
        yield Native(mark, (1,), (), frozenset({"F32"}))


def _native(plan: LoadPlan, component: Component, planned: Planned, leaf: int, name: str) -> Native:
    """The weight (leaf 0) or bias (leaf 1) of a native module."""
    module = planned.module
    whole = not leaf and (module.kind in ("any", "cut") or not module.rows[0])  # of whatever shape it is stored in
    width = 1 if leaf else prod(module.inner)
    parts, dtypes = [], set()
    shape: tuple[int, ...] = (sum(module.rows),) if leaf else (sum(module.rows), *module.inner)
    for piece in planned.pieces:
        stored = _stored(plan, component, piece.layer, leaf)
        info = component.tensors[stored]
        dtypes.add(info.dtype)
        if whole:
            shape = info.shape
            parts.append(Part(stored, 0, prod(shape)))
        else:
            parts.append(Part(stored, piece.layer.first * width, piece.rows * width))
    if module.swap_halves:
        parts = _halves_swapped(parts)
    return Native(name, shape, tuple(parts), frozenset(dtypes), not leaf and _is_linear(module), module.native)


def _is_linear(module: Module) -> bool:
    return module.linear and module.leaf == "weight"


def _stored(plan: LoadPlan, component: Component, layer: Layer, leaf: int) -> str:
    """What the files call the weight (0) or bias (1) of a stored layer."""
    return component.checkpoint.stored(plan.stored(tensor_name(layer.name, layer.leaves[0] if not leaf else "bias")))


def _halves_swapped(parts: list[Part]) -> list[Part]:
    """The second half of all elements before the first."""
    left = sum(part.values for part in parts) // 2
    first, second = [], []
    for name, start, values in parts:
        here = min(left, values)
        first += [Part(name, start, here)] if here else []
        second += [Part(name, start + here, values - here)] if values > here else []
        left -= here
    return second + first


def _refuse_long(natives: dict[str, Native], component: Component) -> None:
    names = [name for name in natives if len(name.encode()) > LONGEST_NAME]
    if names:
        raise CheckpointError(Text("names of more than {most} characters do not fit into GGUF: {names}",
                                   most=LONGEST_NAME, names=first_ten(names)),
                              component.folder, Text("this model cannot be a GGUF file"))


def _write(component: Component, native: Native, choice: Choice, put: Put) -> Parts:
    """A tensor to `put`, span by span."""
    import torch

    kind = TYPES[choice.kind]
    if not native.parts:
        yield put(native.name, 0, torch.zeros(prod(native.shape) * kind.size, dtype=torch.uint8))

    def use(before: int, name: str, start: int, part: Tensor, largest: float) -> int:
        if largest > F16_MAX and choice.kind not in ("F32", "BF16", "MXFP4"):
            raise CheckpointError(Text("{name} holds {largest:g}, and {kind} ends at F16's {most:g}", name=name,
                                       largest=largest, kind=choice.kind, most=F16_MAX),
                                  component.where(name), Text("convert the model to BF16 first, or choose type BF16"))
        return put(native.name, (before + start) // kind.block * kind.size, _blocks(part, choice.kind))

    done = 0
    for part in native.parts:
        yield from component.spans(part.name, partial(use, done, part.name), None, part.first, part.values)
        done += part.values


def _blocks(values: Tensor, kind: str) -> Tensor:
    """Floats [count] as the bytes of a type, U8: whole blocks of it."""
    import torch

    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind)
    if plain is not None:
        return values.to(plain).view(torch.uint8)
    import numpy

    from ...quant.convert.blocks import BLOCK

    gguf = gguf_py()
    made = []
    for start in range(0, values.numel(), BLOCK):  # MXFP4 needs 16 times their memory
        # one row: gguf-py works on 16 at a time, and takes ten times as long for short ones
        row = values[start:start + BLOCK].float().numpy().reshape(1, -1)
        made.append(gguf.quants.quantize(row, gguf.GGMLQuantizationType[kind]).reshape(-1))
    return torch.from_numpy(numpy.concatenate(made))


def _read_back(path: str, plan: LoadPlan) -> None:
    """Raise CheckpointError unless this pack would load the file as the model that was read."""
    described = describe.describe(Checkpoint(Source(path, os.path.dirname(path), (path,))))
    described.require_loadable()
    told, found = ((d.architecture, {key: size for key, size in d.dims.items() if size})
                   for d in (plan.description, described))
    if told != found:
        raise CheckpointError(Text("the file would be taken for {found} {sizes}, and the base is {architecture} "
                                   "{base_sizes}", found=found[0], sizes=found[1], architecture=told[0],
                                   base_sizes=told[1]), "",
                              Text("keep the file it comes from: the tensors of a GGUF file do not tell this model"))


def _report(plan: LoadPlan, component: Component, target: Path, kind: str, architecture: str, model_type: str,
            statistics: dict[str, int | bool], choices: dict[str, Choice], layout: GGUFLayout) -> list[str]:
    types = Counter(choice.kind for choice in choices.values())
    return [Text("GGUF transformer {architecture} -> {target}", architecture=plan.architecture.name, target=target),
            Text("{kind}, general.architecture {architecture}, model type {model_type}", kind=kind,
                 architecture=architecture, model_type=model_type), statistics_line(statistics),
            Text("tensors: {types}", types=", ".join(f"{count} {name}" for name, count in types.most_common())),
            Text("{written} (read: {read})", written=size(layout.bytes),
                 read=size(component.checkpoint.bytes_on_disk))]


def _notes(natives: dict[str, Native], kind: str, user: list[Expression], why: Counter[str]) -> list[str]:
    notes = unmatched({pattern.pattern: pattern.search for pattern in user},
                      [native.module for native in natives.values()])
    if why["columns"]:
        notes.append(Text("{count} weights stay in 16 bits: their columns are no multiple of {block}",
                          count=why["columns"], block=TYPES[kind].block))
    if kind.startswith("TQ"):
        notes.append(Text("{kind} knows -1, 0 and 1 times a scale: it is for models that were trained so", kind=kind))
    return notes

