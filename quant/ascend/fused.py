"""Several stored layers of one type as one layer: what ComfyUI keeps in one module (q, k, v, and FLUX's proj_mlp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .kinds import KINDS

if TYPE_CHECKING:
    from torch import Tensor

_ONE_OF_ALL = ("input_scale", "input_offset", "mul_scale")  # of the activation, which all of them read


def fusion_problem(kinds: set[str]) -> str:
    """Why layers of these kinds (of kinds.KINDS; "" for FLOAT) cannot be one; empty when they can.

    Types are of rows, but for the activation's; INT4 may be packed along rows, two of which then share a byte.
    """
    if len(kinds) > 1:
        return "ComfyUI keeps this layer in one with others, which are of other types"
    if any(KINDS[kind].codec == "int4" for kind in kinds if kind):
        return "ComfyUI keeps this layer in one with others, or halves of it exchanged, which is not supported for INT4"
    return ""


def fused(names: list[str], parts: list[dict[str, Tensor]], swap_halves: bool) -> dict[str, Tensor]:
    """The stored tensors of layers of one type (leaf -> tensor, rows first) as those of one layer, rows in order.

    `swap_halves` exchanges the upper and lower half of the rows. Raises ValueError for layers that store different
    tensors, or read the same activation by different scales.
    """
    import torch

    first = parts[0]
    for name, part in zip(names[1:], parts[1:], strict=True):
        if part.keys() != first.keys():
            raise ValueError(f"{name} stores other tensors than {names[0]}, with which ComfyUI keeps it in one: "
                             f"{', '.join(sorted(part.keys() ^ first.keys()))}")
        for leaf in _ONE_OF_ALL:
            if leaf in part and not torch.equal(part[leaf], first[leaf]):
                raise ValueError(f"{name}.{leaf} differs from that of {names[0]}, with which ComfyUI keeps it in one")
    out = {leaf: tensor if leaf in _ONE_OF_ALL else torch.cat([part[leaf] for part in parts])
           for leaf, tensor in first.items()}
    if swap_halves:
        out |= {leaf: torch.cat(tuple(reversed(tensor.chunk(2)))) for leaf, tensor in out.items()
                if leaf not in _ONE_OF_ALL}
    return out
