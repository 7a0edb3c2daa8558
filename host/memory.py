"""Networks of the host's without memory: what they hold has shapes and dtypes, and no bytes."""

from __future__ import annotations

from typing import Any


def without_memory() -> Any:
    """A context in which weights are made on the meta device, and what the host computes while it makes a network is
    real, which under torch.device("meta") it is not: Cosmos' VAE counts its wavelets by a tensor, PixArt reads numbers
    of one, and Stable Cascade's noise schedule would take a minute of meta tensors."""
    import torch
    from torch.overrides import TorchFunctionMode

    factories = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn}  # what weights are made by

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function in factories and kwargs.get("device") is None:
                kwargs = {**kwargs, "device": "meta"}
            if function is torch.Tensor.copy_ and args[1].is_meta and not args[0].is_meta:
                return args[0]  # what was computed, where a weight would be loaded
            return function(*args, **kwargs)

    return Mode()
