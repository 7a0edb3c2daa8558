"""ModelSlim models as ComfyUI's save nodes write them: native names, and a `comfy_quant` marker in every quantized
layer that names the host's format or this pack's (quant/ascend/kinds.py). And models in the host's formats that this
pack only hands on (quant/host_formats.py).

Nothing is converted: what the host saved, it loads. Only the host knows its padding, so a weight may have up to 31 more
rows and columns than the model's layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from ....quant import host_formats
from ....quant.ascend.kinds import BLOCK, HOST_FORMAT, KINDS, MARKER
from ....quant.ascend.native import OWN_LEAVES
from ....quant.host_formats import HOST_FORMATS
from ....quant.stored import PLAIN, PLAIN_DTYPES
from ...architectures import Architecture, Dims, Module
from ...architectures.base import tensor_name
from ...containers.checkpoint import Checkpoint
from ...containers.safetensors import Header, TensorInfo
from ...description import CheckpointDescription
from ...errors import CheckpointError
from ...words import first_ten
from ..reading import architecture_of, by_layer, check_dims, check_plain, dims_of

FAMILY, HANDED = "modelslim (saved)", "comfy"  # HANDED: no layer is of ModelSlim's kinds
LEAVES = frozenset({"comfy_quant", *(f"weight_{leaf}" for leaf in OWN_LEAVES), *host_formats.LEAVES})
_OF_HOST = {host: kind for kind, host in HOST_FORMAT.items()}
_WEIGHTS = {"int8": ("I8",), "int4": ("U8",), "e4m3": ("F8_E4M3",), "mxfp8": ("F8_E4M3",), "mxfp4": ("U8",),
            "mxfp4_dual": ("U8",)}


def is_saved(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a layer with a marker is stored as only these formats are: integers, or scales in E8M0 or for every row.
    """
    for name in tensors:
        if name.endswith(".comfy_quant"):
            layer = name.removesuffix("comfy_quant")
            weight, scale = tensors.get(f"{layer}weight"), tensors.get(f"{layer}weight_scale")
            if weight and not scale and weight.dtype == "I8":
                return True
            if weight and scale and f"{layer}weight_shard_1" not in tensors and (
                    weight.dtype == "I8" or scale.dtype in ("U8", "F8_E8M0")
                    or scale.dtype == "F32" and len(scale.shape) == 2 and f"{layer}weight_scale_2" not in tensors):
                return True
    return False


def describe(checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> CheckpointDescription:
    """loaders.describe.describe for a saved file. Raises CheckpointError when it cannot be interpreted at all."""
    architecture, naming = architecture_of(checkpoint)
    dims = dims_of(architecture.dims_from_tensors, checkpoint, checkpoint.tensors, naming)
    description = CheckpointDescription(
        checkpoint.source.reference, [os.path.basename(h.path) for h in checkpoint.headers], checkpoint.bytes_on_disk,
        architecture.name, naming, dims, FAMILY, producer="ComfyUI")
    if naming.style != "native":
        description.problems.append("markers of ComfyUI in a file with diffusers' names")
        return description
    if base is not None:
        check_dims(description, *base)
    kinds = _kinds(checkpoint)
    if kinds and not KINDS.keys() & kinds.values():
        description.family = HANDED
    groups = by_layer(checkpoint.tensors)
    for module in architecture.modules(dims, naming):
        stored = module.stored[0]
        _check_layer(description, module, stored, groups.setdefault(stored, {}), kinds.get(stored, ""))
    description.notes += [f"{name} is ComfyUI's own format {host_formats.NAMES[name]!r}, which loads where the "
                          "installed ComfyUI has it" for name in description.formats if name in host_formats.NAMES]
    marks = {naming.prefix + mark for mark in architecture.marks(dims)}
    extra = [name for layer, leaves in groups.items() for leaf in leaves
             if (name := tensor_name(layer, leaf)) not in marks]
    if extra:
        description.problems.append(f"{len(extra)} unexpected tensors: {first_ten(extra)}")
    return description


def _kinds(checkpoint: Checkpoint) -> dict[str, str]:
    """Layer -> kind of quant/ascend/kinds.py or word of quant/host_formats.py, by the markers, which are read from the
    files: a few bytes each."""
    kinds = {}
    for header in checkpoint.headers:
        for name in header.tensors:
            if name.endswith(".comfy_quant"):
                word = str(_marker(header, name).get("format"))
                kind = _OF_HOST.get(word, word.removeprefix(MARKER))
                if kind not in KINDS and kind not in HOST_FORMATS:
                    raise CheckpointError(f"{name} says {word!r}, which this version does not load beside ModelSlim's "
                                          "and ComfyUI's integer formats", header.path,
                                          "update this pack, or load the original")
                kinds[name.removesuffix(".comfy_quant")] = kind
    return kinds


def _marker(header: Header, name: str) -> dict[str, Any]:
    try:
        conf = json.loads(header.read(name))
        assert isinstance(conf, dict)
    except (ValueError, AssertionError) as error:
        raise CheckpointError(f"{name} is no JSON object", header.path, "save the model again") from error
    return conf


def _check_layer(description: CheckpointDescription, module: Module, stored: str, group: dict[str, TensorInfo],
                 kind: str) -> None:
    problems, rows = description.problems, sum(module.rows)
    weight = group.pop(module.stored_leaf, None)
    if weight is None:
        problems.append(f"missing tensor {tensor_name(stored, module.stored_leaf)}")
        return
    if module.bias:
        bias = group.pop("bias", None)
        if bias is None:
            problems.append(f"missing tensor {stored}.bias")
        else:
            check_plain(problems, f"{stored}.bias", bias, (rows,))
    if not kind:
        check_plain(problems, tensor_name(stored, module.stored_leaf), weight, (rows, *module.inner))
    else:
        problem = _problem(module, weight, group, rows, kind)
        if problem:
            problems.append(f"{stored} ({kind}): {problem}")
        for leaf in LEAVES & group.keys():
            del group[leaf]
    if module.linear:
        handed = HOST_FORMATS.get(kind)
        name = handed.name({"weight": weight}, module.inner[0]) if handed else kind.upper() or PLAIN.name
        description.layers[stored] = name
        description.formats[name] = description.formats.get(name, 0) + 1


def _problem(module: Module, weight: TensorInfo, group: Mapping[str, TensorInfo], rows: int, kind: str) -> str:
    if not module.linear:
        return "it is no Linear layer"
    if kind in HOST_FORMATS:
        return HOST_FORMATS[kind].problem({**group, "weight": weight}, rows, module.inner[0])
    codec = KINDS[kind].codec
    columns = module.inner[0] // 2 if weight.dtype == "U8" else module.inner[0]
    if weight.dtype not in _WEIGHTS[codec]:
        return f"weight is {weight.dtype}, expected {' or '.join(_WEIGHTS[codec])}"
    shape = tuple(weight.shape)
    if len(shape) != 2 or not (0 <= shape[0] - rows < BLOCK and 0 <= shape[1] - columns < BLOCK):
        return f"weight is {list(shape)}, expected {[rows, columns]}"
    scale = group.get("weight_scale")
    dtypes = ("U8", "F8_E8M0") if codec.startswith("mx") else PLAIN_DTYPES
    if scale is None or scale.dtype not in dtypes:
        return f"weight_scale is {scale.dtype if scale else 'missing'}, expected {' or '.join(sorted(dtypes))}"
    return ""
