"""Two checkpoints of one architecture, layer by layer: the signal-to-noise ratio of the weights they stand for.

Both are brought to the host's native layers and decoded in F32 (decode.py), one layer at a time, by plain reads of the
files.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...host.texts import Text, joined
from ...loaders.architectures import Architecture, Dims, Module, Naming
from ...loaders.architectures.base import tensor_name
from ...loaders.assemble import Layers, NativeStateDict, add
from ...loaders.containers.checkpoint import Checkpoint
from ...loaders.describe import read
from ...loaders.description import CheckpointDescription
from ...loaders.errors import CheckpointError
from ...loaders.files.mapped import Mapped
from ...loaders.files.source import Source
from ...loaders.words import size
from ..decode import Decode, decoder
from .metrics import NOTHING, Sums, sums

if TYPE_CHECKING:
    import torch

Part = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class LayerNoise:
    """One layer: its name (diffusers' where the architecture has one), rows and columns, the format of each side, and
    how they differ."""

    name: str
    shape: tuple[int, ...]
    before: str
    after: str
    sums: Sums

    def to_json(self) -> dict[str, Any]:
        """JSON-able values; `snr_db` is null for two that are equal, which `identical` says."""
        identical = not self.sums.noise
        finite = not identical and self.sums.aa > 0
        return {"name": self.name, "shape": list(self.shape), "reference_format": self.before, "format": self.after,
                "snr_db": self.sums.snr if finite else None, "relative_l2": self.sums.relative if finite or identical
                else None, "cosine": self.sums.cosine, "max_error": self.sums.largest, "identical": identical}


@dataclass
class WeightComparison:
    """`layers` are the Linear weights in the order of the model, `others` every other tensor (biases, norms,
    embeddings that are no Linear)."""

    reference: CheckpointDescription
    candidate: CheckpointDescription
    layers: list[LayerNoise] = field(default_factory=list)
    others: list[LayerNoise] = field(default_factory=list)

    @property
    def worst_first(self) -> list[LayerNoise]:
        return sorted(self.layers, key=lambda layer: layer.sums.snr)

    @property
    def total(self) -> Sums:
        """All Linear weights as one vector."""
        return sum((layer.sums for layer in self.layers), NOTHING)

    def report(self) -> str:
        """The table, worst first, and the total."""
        width = max((len(layer.name) for layer in self.layers), default=0)
        kinds = max((len(layer.after) for layer in self.layers), default=0)
        lines = [Text("{architecture}, {count} Linear layers", architecture=self.reference.architecture,
                      count=len(self.layers)),
                 Text("reference: {reference} ({size})", reference=self.reference.reference,
                      size=size(self.reference.bytes_on_disk)),
                 Text("candidate: {reference} ({size})", reference=self.candidate.reference,
                      size=size(self.candidate.bytes_on_disk)), "",
                 Text("layer{space}  format{space2}     SNR dB    rel. L2", space=" " * (width - 5),
                      space2=" " * (kinds - 6))]
        lines += [_row(f"{layer.name:{width}}", f"{layer.after:{kinds}}", layer.sums) for layer in self.worst_first]
        lines.append(_row(Text("all Linear weights{space}", space=" " * (width - 18)), " " * kinds, self.total))
        changed = sorted((other for other in self.others if other.sums.noise), key=lambda other: other.sums.snr)
        same = len(self.others) - len(changed)
        lines.append(Text("other tensors (biases, norms, convolutions): {same} identical, {changed} differ, most of "
                          "all {name} (rel. L2 {relative:.1e})", same=same, changed=len(changed), name=changed[0].name,
                          relative=changed[0].sums.relative) if changed else
                     Text("other tensors (biases, norms, convolutions): {same} identical, 0 differ", same=same))
        return joined("\n", lines)

    def to_json(self) -> dict[str, Any]:
        """JSON-able values, layers worst first."""
        total = LayerNoise("", (), "", "", self.total).to_json()
        return {"architecture": self.reference.architecture, "reference": self.reference.reference,
                "candidate": self.candidate.reference, "reference_bytes": self.reference.bytes_on_disk,
                "candidate_bytes": self.candidate.bytes_on_disk,
                "total": {key: total[key] for key in ("snr_db", "relative_l2", "cosine", "identical")},
                "layers": [layer.to_json() for layer in self.worst_first],
                "others": [other.to_json() for other in self.others if other.sums.noise]}


def compare_weights(reference: Source, candidate: Source, step: Callable[[], None] = lambda: None) -> WeightComparison:
    """Compare two located checkpoints; `step` is called after each module.

    Raises CheckpointError for a checkpoint that cannot be loaded or whose files change meanwhile, and for two of
    different architectures or sizes.
    """
    first, second = _Opened(reference), _Opened(candidate)
    _refuse_others(first.description, second.description)
    decode, result = decoder(), WeightComparison(first.description, second.description)
    named = {_key(module): module for module in first.architecture.modules(first.dims, Naming("diffusers"))}
    with ExitStack() as stack:
        first.layers(stack)
        second.layers(stack)
        for key in first.modules:
            _compare_module(key, named[key], first, second, decode, result)
            step()
    for opened in (first, second):
        opened.checkpoint.frozen.check()
    return result


def _compare_module(key: str, module: Module, first: _Opened, second: _Opened, decode: Decode,
                    result: WeightComparison) -> None:
    a, b = first.weights(key, decode), second.weights(key, decode)
    names = [tensor_name(name, "" if module.leaf == "weight" else module.stored_leaf).rstrip(".")
             for name in module.stored]
    if module.ranges:  # rows of a layer that is stored as one
        names = [f"{name}[{first}:{first + rows}]" for name, rows, (first, _) in
                 zip(names, module.rows, module.ranges, strict=True)]
    into = result.layers if module.linear else result.others
    formats = [opened.formats(key, len(names)) for opened in (first, second)]
    at = 0
    for i, (name, rows) in enumerate(zip(names, module.rows, strict=True)):
        x, y = (side["weight"][at:at + rows] for side in (a, b))
        into.append(LayerNoise(name, tuple(x.shape), formats[0][i], formats[1][i], sums(x, y)))
        if "bias" in a and "bias" in b:
            x, y = (side["bias"][at:at + rows] for side in (a, b))
            result.others.append(LayerNoise(f"{name}.bias", tuple(x.shape), "", "", sums(x, y)))
        at += rows


def _refuse_others(first: CheckpointDescription, second: CheckpointDescription) -> None:
    what = ""
    if first.architecture != second.architecture:
        what = Text("the reference is {first}, the candidate is {second}", first=first.architecture,
                    second=second.architecture)
    elif differences := [Text("{name} {first} and {second}", name=key, first=first.dims[key], second=second.dims[key])
                         for key in sorted(first.dims.keys() & second.dims.keys())
                         if first.dims[key] != second.dims[key]]:
        what = Text("the two are {architecture} of other sizes: {differences}", architecture=first.architecture,
                    differences=joined(", ", differences))
    if what:
        raise CheckpointError(what, second.reference, Text("compare two checkpoints of one model"))


def _key(module: Module) -> str:
    return tensor_name(module.native, module.leaf)


class _Read(dict[str, "torch.Tensor"]):
    """Memory-mapped tensors that are read from their file when they are taken."""

    def __init__(self, mapped: Part) -> None:
        super().__init__(mapped)
        self._files = Mapped(mapped.values())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files.own(super().__getitem__(name))

    def pop(self, name: str, *_: Any) -> torch.Tensor:
        return self._files.own(super().pop(name))


class _Opened:
    """One of the two: its description, and its native layers one at a time. Every layer can be taken once."""

    def __init__(self, source: Source) -> None:
        self.checkpoint = Checkpoint(source)
        self.family, self.plan = read(self.checkpoint)
        self.description = self.plan.description
        self.description.require_loadable()
        self.family.settle(self.checkpoint, self.plan, "auto")
        self.architecture: Architecture = self.plan.architecture
        self.dims: Dims = self.description.dims
        self.modules = {_key(planned.module): planned for planned in self.plan.modules}

    def layers(self, stack: ExitStack) -> None:
        """Open the files for as long as `stack` is."""
        tensors = self.family.tensors(self.checkpoint, self.plan)
        tensors.mapped = _Read(tensors.mapped)
        stack.enter_context(tensors.opened())
        self._layers = Layers(tensors)

    def weights(self, key: str, decode: Decode) -> Part:
        """"weight" and, where there is one, "bias" of a native module, in F32."""
        planned, native = self.modules[key], NativeStateDict()
        module = planned.module
        try:
            with self.checkpoint.frozen.held(module.stored[0]):
                add(native, planned, self._layers)
        except (KeyError, ValueError) as error:
            raise CheckpointError(Text("{name}: {error}", name=module.stored[0], error=error),
                                  self.description.reference, self.plan.hint) from error
        prefix = f"{module.native}." if module.native else ""
        part = {name.removeprefix(prefix): tensor for name, tensor in native.tensors.items()}
        if not module.linear:
            return {("weight" if leaf == module.leaf else leaf): tensor.float() for leaf, tensor in part.items()}
        weight, bias = decode(module.native, part, sum(module.rows), module.inner[0])
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def formats(self, key: str, count: int) -> list[str]:
        """The stored format of each of the `count` layers, in diffusers' names, of a native one."""
        names = [piece.layer.format for piece in self.modules[key].pieces]
        return names if len(names) == count else [" + ".join(dict.fromkeys(names))] * count


def _row(name: str, kind: str, found: Sums) -> str:
    """A line of the report; `name` and `kind` are as wide as their columns."""
    relative = f"{found.relative:9.2e}"
    if not found.noise:
        return Text("{name}  {kind}  identical  {relative}", name=name, kind=kind, relative=relative)
    return Text("{name}  {kind}  {snr}  {relative}", name=name, kind=kind, snr=f"{found.snr:9.2f}", relative=relative)
