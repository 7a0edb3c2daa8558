"""How many bytes a checkpoint's layers take, on disk and on a device, from its headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .. import host
from ..loaders.containers.safetensors import TensorInfo
from ..loaders.description import CheckpointDescription
from ..quant.stored import PLAIN_DTYPES

# Of a component or more: how many floats the host keeps in its own dtype, their dtype on disk, bytes of the rest.
Weights = list[tuple[int, str, int]]


def most_common_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype that most bytes are stored in."""
    sizes: dict[str, int] = {}
    for info in tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.end - info.start
    return max(sizes, key=lambda name: sizes[name]) if sizes else ""


def with_formats(description: CheckpointDescription | None,
                 tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, TensorInfo, str]]:
    """Each tensor with the format of the Linear that it belongs to ("" for none)."""
    prefix = description.naming.prefix if description else ""
    owners = {name.removeprefix(prefix): fmt for name, fmt in description.layers.items()} if description else {}
    for name, info in tensors.items():
        owner = name.removeprefix(prefix)
        while owner and owner not in owners:
            owner = owner.rpartition(".")[0]
        yield name, info, owners[owner] if owner else ""


def format_bytes(description: CheckpointDescription, tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Stored bytes of the layers of each format, with their scales and biases."""
    out: dict[str, int] = {}
    for _, info, fmt in with_formats(description, tensors):
        out[fmt] = out.get(fmt, 0) + info.end - info.start
    return out


def weights_of(tensors: Mapping[str, TensorInfo], description: CheckpointDescription | None = None) -> Weights:
    """What a device needs to know to say how many bytes the weights will take there.

    Scales and low-rank parts of quantized layers stay as they are stored; biases and other layers are the host's.
    """
    count = stored = 0
    for name, info, fmt in with_formats(description, tensors):
        inner = fmt not in ("", *PLAIN_DTYPES) and not name.endswith(".bias")
        if info.dtype in PLAIN_DTYPES and not inner:
            count += (info.end - info.start) // (4 if info.dtype == "F32" else 2)
        else:
            stored += info.end - info.start
    return [(count, most_common_dtype(tensors), stored)]


def expected_bytes(weights: Weights) -> int:
    """Bytes that the weights take on the device: quantized ones as stored, others in the dtype the host keeps them in.

    Activations, and what a node adds (LoRAs), come on top.
    """
    return sum(stored + count * host.float_bytes(count, dtype) for count, dtype, stored in weights)
