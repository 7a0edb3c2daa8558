"""diffusers' nunchaku_lite: Nunchaku's layers in place of Linear ones, under diffusers' names
(diffusers/quantizers/nunchaku; docs/sources/nunchaku.md, "Other writers").

The packing is Nunchaku's own. Otherwise it differs: q, k and v are apart, no activation is unsigned, modulation has its
natural order, groups are not padded, and any Linear may be quantized or not. The architecture's own table says where
its rows go, so every architecture that has diffusers' names loads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ....host.texts import Text, both
from ... import plan as plans
from ...architectures import ARCHITECTURES, Architecture, Dims, Module, Naming, by_class_name, supported
from ...containers.checkpoint import Checkpoint
from ...containers.safetensors import TensorInfo
from ...description import CheckpointDescription
from ...errors import CheckpointError
from ...plan import Group, Layer, LoadPlan, Piece, Planned, Problems
from ...words import first_ten
from ..reading import check_sizes, dims_of
from .plan import AWQ, LEAVES, UNNEEDED, W4A4, Leaves, awq_leaves, leaf_problems, w4a4_leaves
from .recognise import precision
from .writers import LITE, OFFICIAL, listed, patches, quantization, runtime_manifest

if TYPE_CHECKING:
    import torch

    from ....quant.svdquant.parts import Part
    from ....quant.tile import Coded

# A layer in two, stored as `<name>.linears.0` and `.1`: the columns of its input, or the rows of its output.
SPLITS = ("split_linear", "split_linear_input", "split_linear_output")
OPERATIONS = ("svdq_w4a4", "awq_w4a16")
_PART = ".linears."
_CODECS = {"int4": "svdq_int4", "nvfp4": "svdq_nvfp4"}


def read_lite(checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> LoadPlan:
    """base.Family.read for a checkpoint of nunchaku_lite. Raises CheckpointError for a model that this version does not
    know, and for changes of the model that it does not."""
    where = checkpoint.source.reference
    _refuse_unknown(checkpoint)
    names = {_own_name(name): name for name in checkpoint.tensors}
    tensors = {name: checkpoint.tensors[stored] for name, stored in names.items()}
    w4a4 = [name.removesuffix("qweight") for name, info in tensors.items()
            if name.endswith("qweight") and info.dtype != "I32"]
    scales = {tensors[f"{name}wscales"].dtype for name in w4a4 if f"{name}wscales" in tensors}
    kind = precision(Text("a file of {writer}", writer=LITE), scales, where) if w4a4 else "int4"
    architecture, dims = _architecture(checkpoint, tensors)
    downs = [tensors[f"{name}proj_down"].shape for name in w4a4 if f"{name}proj_down" in tensors]
    ranks = sorted({shape[1] for shape in downs if len(shape) == 2})
    description = CheckpointDescription(
        where, [os.path.basename(header.path) for header in checkpoint.headers], checkpoint.bytes_on_disk,
        architecture.name, Naming("diffusers"), dims, f"svdquant-{kind}", ranks=ranks, producer=LITE,
        declared_in=["config.json"] if (checkpoint.config or {}).get("quantization_config") else ["metadata"])
    check_sizes(description, checkpoint, architecture, base)
    plan = plans.make(LoadPlan(description, architecture, stored=lambda name: names[name]), tensors,
                      partial(_layer, names, kind))
    plan.modules = [_in_order(planned) for planned in plan.modules]
    description.notes += _claims(checkpoint, description, kind)
    return plan


def _own_name(stored: str) -> str:
    """A part of a split layer as leaves of the layer: `x.linears.0.qweight` -> `x.0:qweight`."""
    layer, found, part = stored.rpartition(_PART)
    return f"{layer}.{part.replace('.', ':', 1)}" if found and part.partition(".")[0].isdecimal() else stored


def _refuse_unknown(checkpoint: Checkpoint) -> None:
    where, manifest = checkpoint.source.reference, runtime_manifest(checkpoint)
    unknown = sorted({patch for patch in patches(checkpoint) if patch not in SPLITS})
    if unknown:
        raise CheckpointError(Text("this checkpoint of {writer} asks for changes of the model that this version does "
                                   "not know: {names}", writer=LITE, names=", ".join(unknown)), where, OFFICIAL)
    other = sorted({str(target.get("nunchaku_op")) for target in listed(manifest.get("targets"))
                    if isinstance(target, dict) and target.get("nunchaku_op") not in OPERATIONS})
    if other:
        raise CheckpointError(Text("this checkpoint of {writer} has layers that this version does not read: {names}",
                                   writer=LITE, names=", ".join(other)), where, OFFICIAL)


def _architecture(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> tuple[Architecture, Dims]:
    """By the names and sizes that the tensors would have as plain weights."""
    where, claim = checkpoint.source.reference, str((checkpoint.config or {}).get("_class_name") or "")
    whole = dict(_whole(tensors))
    found = next(((one, naming) for one in ARCHITECTURES if (naming := one.naming(whole))
                  and naming.style == "diffusers"), None)
    if found is None or claim and by_class_name(claim) is None:
        raise CheckpointError(Text("this is {model} in the format of {writer}, which this version does not load "
                                   "({supported})", model=claim or Text("a model"), writer=LITE,
                                   supported=supported()), where,
                              Text("load it with diffusers, or take another checkpoint of it"))
    if claim and claim not in found[0].class_names:
        raise CheckpointError(Text("config.json says {claim}, but the tensors are {architecture}", claim=claim,
                                   architecture=found[0].name), where,
                              Text("config.json and weights do not belong together; download both again"))
    return found[0], dims_of(found[0].dims_from_tensors, checkpoint, whole, found[1])


def _whole(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, TensorInfo]]:
    """The headers as if nothing was quantized."""
    for name, info in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in ("qweight", "0:qweight") and len(info.shape) == 2:
            rows, half = info.shape
            yield f"{layer}.weight", info._replace(dtype="BF16", shape=(4 * rows if info.dtype == "I32" else rows,
                                                                        2 * half))
        elif leaf == "bias" or leaf.rpartition(":")[2] not in LEAVES:
            yield name, info


def _layer(names: Mapping[str, str], kind: str, module: Module, name: str, rows: int, group: Group, problems: Problems
           ) -> Layer | None:
    """A plan.ReadLayer."""
    parts = sorted({leaf.partition(":")[0] for leaf in group if ":" in leaf}, key=int) or [""]
    quantized = [leaf for leaf in group if leaf.rpartition(":")[2] == "qweight"]
    if not quantized:
        weight = plans.take_weight(module, name, group, problems)
        if weight is None:
            return None
        plans.take_bias(module, name, rows, group, problems)
        return plans.plain(module, name, rows, weight, group, problems)
    if not module.linear:
        problems.append(Text("{name} is quantized, and is no Linear layer", name=name))
        group.clear()
        return None
    shapes, codecs, taken = [], [], []
    for part in parts:
        own = f"{name}.{part}:" if part else f"{name}."
        leaves = {leaf: group.pop(mark) for leaf in LEAVES if (mark := f"{part}:{leaf}" if part else leaf) in group}
        codes, shape = leaves.get("qweight"), (rows, module.inner[0])
        awq = codes is not None and codes.dtype == "I32"
        if part and codes is not None and len(codes.shape) == 2:  # its own size; whether the parts add up is below
            shape = (codes.shape[0] * (4 if awq else 1), codes.shape[1] * 2)
        wanted = _wanted(shape, kind, leaves, awq)
        # leaves are called as the file does, missing ones as they would be
        shown = partial(_stored_name, names, own)
        problems += leaf_problems(leaves, wanted, module.bias and not part, shown, shown)
        problems += [Text("unexpected tensor {name}", name=shown(leaf)) for leaf in leaves if leaf not in wanted]
        taken += [f"{part}:{leaf}" if part else leaf for leaf in LEAVES if leaf in leaves and leaf != UNNEEDED]
        shapes.append(shape)
        codecs.append("awq" if awq else _CODECS[kind])
    places = _places(shapes, (rows, module.inner[0]))
    if not places or parts not in ([""], [str(i) for i in range(len(parts))]) or parts == ["0"]:
        problems.append(Text("the parts of {name} are {shapes}, expected them to make {shape}", name=name,
                             shapes=", ".join(map(str, map(list, shapes))), shape=[rows, module.inner[0]]))
    word = AWQ if codecs[0] == "awq" else W4A4[kind]
    halves = module.swap_halves and len(parts) == 1
    return Layer(name, word, plans.leaves(*taken), _Reader(shapes, places, halves), codecs=tuple(dict.fromkeys(codecs)))


def _stored_name(names: Mapping[str, str], own: str, leaf: str) -> str:
    return names.get(own + leaf, own + leaf)


def _wanted(shape: tuple[int, int], kind: str, leaves: Mapping[str, TensorInfo], awq: bool) -> Leaves:
    if not awq:
        return w4a4_leaves(*shape, kind, leaves)
    scales = leaves.get("wscales")
    return awq_leaves(*shape, padded=scales is not None and scales.shape[:1] != (shape[1] // 64,))


def _places(shapes: list[tuple[int, int]], whole: tuple[int, int]) -> list[tuple[int, int]]:
    """Row and column of parts that lie beside each other, or one below the other; nothing where they do not make the
    whole."""
    rows, columns = zip(*shapes, strict=True)
    if set(rows) == {whole[0]} and sum(columns) == whole[1]:
        return [(0, sum(columns[:i])) for i in range(len(columns))]
    below = set(columns) == {whole[1]} and sum(rows) == whole[0]
    return [(sum(rows[:i]), 0) for i in range(len(rows))] if below else []


def _in_order(planned: Planned) -> Planned:
    """A quantized layer whose halves the host has exchanged as two pieces."""
    module, pieces = planned
    if not module.swap_halves or len(pieces) != 1 or pieces[0].layer.read is None:
        return planned
    layer, half = pieces[0].layer, module.rows[0] // 2
    return Planned(module._replace(swap_halves=False), (Piece(layer, half, 1, 0), Piece(layer, half, 0, half)))


class _Reader(NamedTuple):
    """A plan.ReadTensors. `shapes` and `places` of the layer's parts; `halves`: its rows as two pieces."""

    shapes: list[tuple[int, int]]
    places: list[tuple[int, int]]
    halves: bool

    def __call__(self, layer: Layer, leaves: dict[str, torch.Tensor], /) -> list[Coded]:
        import torch

        from ....quant.svdquant.parts import split_rows, tile_of
        from ....quant.tile import Coded

        if len(self.shapes) == 1:
            part, bias = _part(layer.name, leaves, self.shapes[0])
            counts = [part.rows // 2] * 2 if self.halves else [part.rows]
            return [Coded((tile_of(one),), own)
                    for one, own in zip(split_rows(part, counts), bias.split(counts), strict=True)]
        tiles, bias = [], torch.zeros(max(row + rows for (row, _), (rows, _) in
                                          zip(self.places, self.shapes, strict=True)))
        for i, (shape, place) in enumerate(zip(self.shapes, self.places, strict=True)):
            own = {leaf.partition(":")[2]: tensor for leaf, tensor in leaves.items() if leaf.startswith(f"{i}:")}
            part, more = _part(f"{layer.name}{_PART}{i}", own, shape)
            tiles.append(tile_of(part).at(*place))
            bias[place[0]:place[0] + part.rows] += more.float()
        return [Coded(tuple(tiles), bias)]


def _part(name: str, leaves: dict[str, torch.Tensor], shape: tuple[int, int]) -> tuple[Part, torch.Tensor]:
    """A part of a layer, and its bias: zeros where it has none. Raises ValueError that names it."""
    import torch

    from ....quant.svdquant.parts import awq_part, w4a4_part

    if "bias" not in leaves:
        leaves["bias"] = torch.zeros(leaves["wscales"].shape[-1], dtype=torch.bfloat16)
    try:
        return awq_part(leaves, *shape) if "wzeros" in leaves else w4a4_part(leaves, *shape)
    except ValueError as error:
        raise ValueError(Text("{layer}: {error}", layer=name, error=error)) from error


def _claims(checkpoint: Checkpoint, description: CheckpointDescription, kind: str) -> Iterator[str]:
    """Who wrote it, and what its config says that the tensors contradict."""
    yield Text("written for {writer}: Nunchaku's packing under diffusers' names, every activation signed",
               writer=LITE)
    config = quantization(checkpoint)
    w4a4, awq = ({**found} if isinstance(found := config.get(key), dict) else {} for key in OPERATIONS)
    if w4a4 and w4a4.get("precision") != kind:
        yield Text("the config says {precision}, but the tensors are {stored}; the tensors are right",
                   precision=w4a4.get("precision"), stored=kind)
    if w4a4 and description.ranks and w4a4.get("rank") not in description.ranks:
        yield Text("the config says rank {rank}, but the tensors have {ranks}; the tensors are right",
                   rank=w4a4.get("rank"), ranks=both(map(str, description.ranks)))
    targets = {str(name).partition(_PART)[0] for found in (w4a4, awq) for name in listed(found.get("targets"))}
    stored = {name for name, fmt in description.layers.items() if fmt in (AWQ, *W4A4.values())}
    if config and targets != stored:
        yield Text("{count} layers are quantized as the config does not say, or not as it says; the tensors are right: "
                   "{names}", count=len(targets ^ stored), names=first_ten(sorted(targets ^ stored)))
