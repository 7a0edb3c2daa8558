"""What goes through the host's code in place of a tensor: of a patched weight that nobody has to compute, and of one
that is computed only when it is written into a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Device:
    """What says that a tensor has to be moved to be read; the host's save nodes have such a thing, too."""

    type: str = "lazy"
    index: int = 0


UNCHANGED = (Tensor.to, Tensor.cpu, Tensor.add_)


class StandIn(Tensor):
    """On the meta device, so that arithmetic with it costs nothing. Moved, or with a patch added, it stays what it is,
    and copied into a weight it changes nothing: the host keeps such as what hooks made of a weight, or as what there
    was before."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function is Tensor.copy_ or function in UNCHANGED and isinstance(args[0], cls):
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def stand_in(like: Tensor) -> StandIn:
    """For a tensor of this shape and dtype."""
    return torch.empty(like.shape, dtype=like.dtype, device="meta").as_subclass(StandIn)


class Lazy(Tensor):
    """Shape and dtype of a tensor that `make` computes when somebody moves it to the CPU: each time anew, so that no
    save keeps two layers of a model in memory."""

    make: Callable[[], Tensor]

    device: Any = _Device()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.make().detach().to(device="cpu", dtype=self.dtype).contiguous()

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def detach(self) -> Lazy:  # torch.nn.Parameter(it) is it, which is how the host would wrap it
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Lazy:
        return self


def lazy(shape: Any, dtype: torch.dtype, make: Callable[[], Tensor]) -> Lazy:
    """A tensor of this shape and dtype that is computed when it is written."""
    found = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(Lazy)
    found.make = make
    return found


class Dense(Tensor):
    """A float weight where the host expects a quantized one, which has a state_dict."""

    leaves: dict[str, Tensor] | None = None  # what a file has instead: suffix -> tensor

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """As QuantizedTensor.state_dict."""
        leaves = {"": self.as_subclass(Tensor)} if self.leaves is None else self.leaves
        return {f"{prefix}{suffix}": tensor for suffix, tensor in leaves.items()}


def dense(weight: Tensor, leaves: dict[str, Tensor] | None = None) -> Dense:
    """A float weight, with what a file has instead."""
    found = weight.as_subclass(Dense)
    found.leaves = leaves
    return found


class PlainBias(Tensor):
    """A bias as it goes with the dequantized weight, which moved to the CPU, as the host does to write a file, is the
    one that is stored beside the quantized weight."""

    stored: Tensor

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.stored.to(*args, **kwargs)


def plain_bias(bias: Tensor, stored: Tensor) -> PlainBias:
    """Both of them."""
    found = bias.as_subclass(PlainBias)
    found.stored = stored
    return found
