"""A native layer, quantized or not -> the weight that it stands for, in F32.

The layer is loaded by the very Linear that would run it (the host's, or this pack's for its own markers), so whatever
can be loaded can be decoded, and there is no second opinion on what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .. import host
from ..host.texts import Text
from ..loaders.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Part = Mapping[str, "torch.Tensor"]
Decode = Callable[[str, Part, int, int], tuple["torch.Tensor", "torch.Tensor | None"]]


def decoder() -> Decode:
    """A function (name, leaf -> tensor, rows, columns) -> (weight F32 [rows, columns], bias F32 [rows] or None).

    The weight is the effective one: codes times scales, divided by smoothing factors, plus the low-rank branch. The
    bias is the one that goes with a plain matmul (SVDQuant's unsigned layers store another). The function raises
    CheckpointError, naming the layer, for tensors that its format does not have.
    """
    import torch

    from ..quant.layouts.tiled import is_tiled, plain_bias
    from ..quant.linear import with_tiles_of

    operations = with_tiles_of(host.mixed_operations_in(torch.float32))

    def decode(name: str, part: Part, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        linear = operations.Linear(columns, rows, bias="bias" in part, device="cpu", dtype=torch.float32)
        try:
            lost = linear.load_state_dict({leaf: tensor.to("cpu") for leaf, tensor in part.items()}, strict=False)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(Text("{name} cannot be decoded: {error}", name=name, error=error), "",
                                  Text("load the checkpoint to see what is wrong")) from error
        if lost.unexpected_keys or lost.missing_keys:
            raise CheckpointError(Text("{name} has tensors that its format does not know, or lacks some: {tensors}",
                                       name=name, tensors=", ".join((*lost.unexpected_keys, *lost.missing_keys))), "",
                                  Text("report this"))
        weight, bias = linear.weight, linear.bias
        if is_tiled(weight):
            bias = plain_bias(weight, bias)
        weight = weight.dequantize() if hasattr(weight, "_layout_cls") else weight
        return weight.detach(), None if bias is None else bias.detach()

    return decode
