"""Stored tensors → the host's native state dict, one module at a time, with every stored tensor accounted for.

Bytes that need no re-layout stay the memory-mapped views they were loaded as. Copies are made only of BF16 tensors that
the host fuses, of FP8 shards that share one scale, and of the one modulation whose halves are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..quant import fp8
from .architectures import Architecture, Dims, Module, Naming
from .architectures.base import tensor_name
from .errors import CheckpointError, first_ten

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class NativeStateDict:
    """Tensors under the host's names, and what the report says about them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    layouts: dict[str, int] = field(default_factory=dict)
    per_shard: int = 0
    dynamic: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def needs_row_shards(self) -> bool:
        """Whether a module uses this pack's layout, so that the host needs our operations."""
        return fp8.SHARDS in self.layouts


def assemble(architecture: Architecture, dims: Dims, naming: Naming, stored: dict[str, Tensor], where: str, *,
             dequantize: bool = False, step: Callable[[], None] = lambda: None) -> NativeStateDict:
    """Build the native state dict, emptying `stored` (name → tensor) on the way.

    `dequantize` asks the host for full-precision matmul in every quantized module; `step` is called once a module.
    Raises CheckpointError for an invalid scale, a missing tensor, or tensors that nothing consumed.
    """
    native = NativeStateDict()
    for module in architecture.modules(dims, naming):
        try:
            _add(native, module, [_take(stored, name, module) for name in module.stored], dequantize)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{module.stored[0]}: no tensor {error}" if isinstance(error, KeyError) else
                                  str(error), where, "download the checkpoint again, or report it to its publisher"
                                  ) from error
        step()
    import torch

    for mark in architecture.marks(dims):
        stored.pop(naming.prefix + mark, None)
        native.tensors[mark] = torch.zeros(0)
    if stored:
        raise CheckpointError(f"{len(stored)} stored tensors were not used: {first_ten(stored)}", where,
                              "report this; the checkpoint holds more than its architecture")
    return native


def _take(stored: dict[str, Tensor], name: str, module: Module) -> dict[str, Tensor]:
    """Pop the tensors of one stored layer: leaf → tensor; the weight is "weight" whatever it is stored as."""
    part = {"weight": stored.pop(tensor_name(name, module.stored_leaf))}
    leaves = (("bias",) if module.bias else ()) + (tuple(fp8.FP8.companions) if module.linear else ())
    return part | {leaf: stored.pop(f"{name}.{leaf}") for leaf in leaves if f"{name}.{leaf}" in stored}


def _add(native: NativeStateDict, module: Module, parts: list[dict[str, Tensor]], dequantize: bool) -> None:
    native_name = module.native

    def join(rows: list[Tensor]) -> Tensor:
        return fp8.swap_rows(rows[0]) if module.swap_halves else fp8.join_rows(rows)

    if any("weight_scale" in part for part in parts):
        named = [(name, p) for name, part in zip(module.stored, parts, strict=True) for p in fp8.saved_shards(part)]
        fused = fp8.fuse([n for n, _ in named], [p for _, p in named], swap_halves=module.swap_halves,
                         dequantize=dequantize)
        native.tensors.update({f"{native_name}.{leaf}": tensor for leaf, tensor in fused.tensors.items()})
        native.layouts[fused.layout] = native.layouts.get(fused.layout, 0) + 1
        native.per_shard += "weight_shard_1" in fused.tensors
        native.dynamic += fused.dynamic
        native.notes += fused.notes
    else:
        weights = [part["weight"] for part in parts]
        native.tensors[tensor_name(native_name, module.leaf)] = join(weights)
    if module.bias:
        biases = [part["bias"] for part in parts]
        native.tensors[f"{native_name}.bias"] = join(biases)
