"""LoRAs by the host's own loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .check import needs
from .folders import model_file

if TYPE_CHECKING:
    import torch

BELOW = "diffusion_model."  # what its names of a MODEL's transformer begin with


class Pair(NamedTuple):
    """The plain LoRA of one layer: up [rows, rank] @ down [rank, ...] * alpha / rank (None: 1). `names` are the tensors
    that it was read of; `plain`: whether that is all there is to it."""

    up: torch.Tensor
    down: torch.Tensor
    alpha: float | None
    names: frozenset[str]
    plain: bool


def lora_files() -> list[str]:
    """The names of what is in the host's folders of LoRAs; none outside of it."""
    try:
        import folder_paths
    except ImportError:
        return []
    return list(folder_paths.get_filename_list("loras"))


def lora_path(name: str) -> str:
    """The path of a name of `lora_files`; empty when it is not there."""
    return model_file("loras", name)


@needs("LoRAs in diffusers' names")
def lora_names(patcher: Any) -> Mapping[str, Any]:
    """The names that LoRAs have for the layers of a MODEL, as the host knows them."""
    import comfy.lora

    return dict(comfy.lora.model_lora_keys_unet(patcher.model, {}))


@needs("LoRAs in diffusers' names")
def lora_pair(name: str, tensors: Mapping[str, torch.Tensor]) -> Pair | None:
    """The LoRA that a file has for the layer of this name, by whichever of the suffixes that the host knows; None for
    none, or one that is no product of two."""
    from comfy.weight_adapter import LoRAAdapter

    alpha, dora, read = tensors.get(f"{name}.alpha"), tensors.get(f"{name}.dora_scale"), set[str]()
    found = LoRAAdapter.load(name, tensors, None if alpha is None else alpha.item(), dora, read)
    if found is None:
        return None
    up, down, scale, mid, _, shape = found.weights[:6]
    return Pair(up, down, scale, frozenset(read), mid is None and dora is None and shape is None)


@needs("LoRAs in diffusers' names")
def load_lora(patcher: Any, tensors: dict[str, torch.Tensor], strength: float) -> Any:
    """The MODEL with a LoRA, as the host's own node loads it."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)[0]


def layer_shapes(patcher: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of a MODEL's transformer, quantized ones as what they stand for."""
    return {name: tuple(parameter.shape) for name, parameter in patcher.model.diffusion_model.named_parameters()}
