"""Stored tensors -> the host's native state dict, one module at a time, with every stored tensor accounted for.

Bytes that need no re-layout stay the memory-mapped views they were loaded as. Copies are made only of BF16 tensors that
the host fuses, of shards that share one scale, of NVFP4 in another byte order than the host's, and of the one
modulation whose halves are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from ..quant import fuse, nvfp4
from ..quant.formats import formats, identify
from ..quant.stored import MODELOPT_ORDER, PLAIN, ByteOrder, StoredFormat
from ..quant.svdquant.saved import SAVED_PARTS, kinds_of
from .architectures import Architecture, Dims, Module, Naming
from .architectures.base import tensor_name
from .containers.safetensors import dtype_name
from .errors import CheckpointError
from .words import first_ten

if TYPE_CHECKING:
    from torch import Tensor

# Modules whose width ComfyUI's detection reads from the weight's columns, half as many when NVFP4 packs them
# (ComfyUI's comfy/model_detection.py).
DETECTED = frozenset({"img_in", "txt_in", "vector_in.in_layer", "txt_in.input_embedder", "cap_embedder.1",
                      "x_embedder"})
COMPANIONS = tuple(sorted(frozenset().union(*(fmt.companions for fmt in formats()))))


@dataclass
class NativeStateDict:
    """Tensors under the host's names, and what the report says about them.

    `layouts` counts the modules in each layout that `add_module` made, `words` are the formats of others' markers;
    `part_kinds` are the kinds of SVDQuant parts that are among them, `runs` lines on how they run; `copied` is called
    while the host copies the tensors, to let go of what they were copied from.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    layouts: dict[str, int] = field(default_factory=dict)
    per_shard: int = 0
    dynamic: int = 0
    words: set[str] = field(default_factory=set)
    part_kinds: set[str] = field(default_factory=set)
    copied: Callable[[], None] = lambda: None
    runs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def assemble(architecture: Architecture, dims: Dims, naming: Naming, stored: dict[str, Tensor], where: str, *,
             order: ByteOrder = MODELOPT_ORDER, dequantize: bool = False, own_nvfp4: bool = False,
             full_precision: Collection[str] = (), step: Callable[[], None] = lambda: None) -> NativeStateDict:
    """Build the native state dict, emptying `stored` (name -> tensor) on the way.

    `order` is how the files pack NVFP4, `own_nvfp4` is for kernels other than the host's. `dequantize` asks the host
    for full-precision matmul in every quantized module, `full_precision` in those of these stored layers; `step` is
    called once a module.
    Raises CheckpointError for an invalid scale, a missing tensor, or tensors that nothing consumed.
    """
    native = NativeStateDict()
    for module in architecture.modules(dims, naming):
        try:
            add_module(native, module, [take(stored, name, module) for name in module.stored], order,
                       dequantize or any(name in full_precision for name in module.stored), own_nvfp4)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{module.stored[0]}: no tensor {error}" if isinstance(error, KeyError) else
                                  str(error), where, "download the checkpoint again, or report it to its publisher"
                                  ) from error
        step()
    finish(native, architecture, dims, naming, stored, where)
    return native


def finish(native: NativeStateDict, architecture: Architecture, dims: Dims, naming: Naming, stored: dict[str, Tensor],
           where: str) -> None:
    """Add the architecture's marks. Raises CheckpointError for stored tensors that neither they nor a module used."""
    import torch

    for mark in architecture.marks(dims):
        stored.pop(naming.prefix + mark, None)
        native.tensors[mark] = torch.zeros(0)
    if stored:
        raise CheckpointError(f"{len(stored)} stored tensors were not used: {first_ten(stored)}", where,
                              "report this; the checkpoint holds more than its architecture")


def take(stored: dict[str, Tensor], name: str, module: Module) -> dict[str, Tensor]:
    """Pop the tensors of one stored layer: leaf -> tensor; the weight is "weight" whatever it is stored as."""
    part = {"weight": stored.pop(tensor_name(name, module.stored_leaf))}
    leaves = (("bias",) if module.bias else ()) + (COMPANIONS if module.linear else ())
    return part | {leaf: stored.pop(f"{name}.{leaf}") for leaf in leaves if f"{name}.{leaf}" in stored}


def add_module(native: NativeStateDict, module: Module, parts: list[dict[str, Tensor]], order: ByteOrder,
               dequantize: bool, own_nvfp4: bool) -> None:
    """Add one native module from its stored parts. Raises ValueError or KeyError for scales that do not fit."""
    def join(rows: list[Tensor]) -> Tensor:
        return fuse.swap_rows(rows[0]) if module.swap_halves else fuse.join_rows(rows)

    if len(parts) == 1 and _format(parts[0]) is SAVED_PARTS:
        native.part_kinds |= kinds_of(parts[0]["comfy_quant"])
        native.tensors.update({f"{module.native}.{leaf}": tensor for leaf, tensor in parts[0].items()})
        return
    shards = [shard for name, part in zip(module.stored, parts, strict=True)
              for shard in _format(part).shards(name, part, order)]
    if any(shard.kind == "nvfp4" for shard in shards) and module.native in DETECTED:
        native.notes.append(f"{module.native}: NVFP4 dequantized, because ComfyUI detects the model by its width")
        shards = [replace(s, kind="plain", data=nvfp4.dequantize(s)) if s.kind == "nvfp4" else s for s in shards]
    if all(shard.kind == "plain" for shard in shards):
        native.tensors[tensor_name(module.native, module.leaf)] = join([shard.data for shard in shards])
    else:
        done = fuse.fuse(shards, swap_halves=module.swap_halves, dequantize=dequantize, own_nvfp4=own_nvfp4)
        native.tensors.update({f"{module.native}.{leaf}": tensor for leaf, tensor in done.tensors.items()})
        native.layouts[done.layout] = native.layouts.get(done.layout, 0) + 1
        native.per_shard += "weight_shard_1" in done.tensors
        native.dynamic += done.dynamic
        native.notes += done.notes
    if module.bias:
        native.tensors[f"{module.native}.bias"] = join([part["bias"] for part in parts])


class _Leaf(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def _format(part: dict[str, Tensor]) -> StoredFormat:
    """The stored format of a layer's tensors; plain for dtypes that no quantized format has."""
    return identify({leaf: _Leaf(dtype_name(t.dtype), tuple(t.shape)) for leaf, t in part.items()}) or PLAIN
