"""Files with ComfyUI's `comfy_quant` markers: native names, and for every quantized layer one that names its format,
as a tensor of the layer or in the list of layers in the file's metadata.

Read layer by layer, so that any mixture loads: ComfyUI's own formats, and this pack's (row shards, SVDQuant parts,
Ascend's layout). FP8 and NVFP4 alone need no markers, modelopt.py tells them from the tensors. Nothing is converted:
what the host saved, it loads. Only the host knows its padding, so a weight in INT8 or MXFP8 may have up to 31 more rows
and columns than the model's layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ... import host
from ...quant import host_formats
from ...quant.ascend.kinds import BLOCK, HOST_FORMAT, KINDS, MARKER
from ...quant.ascend.native import OWN_LEAVES
from ...quant.formats import formats, identify, name_unsupported
from ...quant.host_formats import HOST_FORMATS
from ...quant.shards import marker
from ...quant.stored import PLAIN_DTYPES, ByteOrder
from ..architectures import ARCHITECTURES, Architecture, Dims, Module
from ..architectures.base import tensor_name
from ..assemble import NativeStateDict, add_module, finish, take
from ..containers.checkpoint import Checkpoint
from ..containers.safetensors import Header, TensorInfo
from ..description import CheckpointDescription
from ..errors import CheckpointError
from ..words import first_ten
from . import running
from .base import Family, How
from .reading import architecture_of, by_layer, check_dims, check_plain, dims_of, spellings

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "_quantization_metadata"
ASCEND = "modelslim (saved)"  # a file with layers in this pack's own layout of ModelSlim's types
ORDER = ByteOrder(low_first=False, swizzled=True, why="ComfyUI's markers")
HOST_NAMES = {"int8_tensorwise": "INT8", "mxfp8": "MXFP8"}  # in reports
COLOURS = {"INT8": (90, 150, 220), "MXFP8": (235, 130, 60)}  # of the layer map: those of ModelSlim's twins
STORED = frozenset().union(*(fmt.words for fmt in formats()))  # formats that quant/formats.py tells from the tensors
LEAVES = frozenset({"comfy_quant", *(f"weight_{leaf}" for leaf in OWN_LEAVES), *host_formats.LEAVES})
_OF_HOST = {host: kind for kind, host in HOST_FORMAT.items()}
HOST_KIND_OF = {name: _OF_HOST[word] for word, name in HOST_NAMES.items()}  # name in reports -> kind of quant.ascend
_WEIGHTS = {"int8": ("I8",), "int4": ("U8",), "e4m3": ("F8_E4M3",), "mxfp8": ("F8_E4M3",), "mxfp4": ("U8",),
            "mxfp4_dual": ("U8",)}


class Comfy(Family):
    """See base.Family."""

    name = "comfy"
    title = "ComfyUI"

    def colours(self) -> Mapping[str, tuple[int, int, int]]:
        return host_formats.COLOURS | COLOURS

    def recognise(self, checkpoint: Checkpoint) -> bool:
        return _is_marked(checkpoint)

    def describe(self, checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> CheckpointDescription:
        architecture, naming = architecture_of(checkpoint)
        dims = dims_of(architecture.dims_from_tensors, checkpoint, checkpoint.tensors, naming)
        description = CheckpointDescription(
            checkpoint.source.reference, [os.path.basename(h.path) for h in checkpoint.headers],
            checkpoint.bytes_on_disk, architecture.name, naming, dims, self.name, ORDER, producer="ComfyUI")
        if naming.style != "native":
            description.problems.append("markers of ComfyUI in a file with diffusers' names")
            return description
        if base is not None:
            check_dims(description, *base)
        words = {layer: str(conf["format"]) for layer, conf in _confs(checkpoint).items()}
        if any(word.startswith(MARKER) for word in words.values()):
            description.family = ASCEND
        groups = by_layer(checkpoint.tensors)
        for module in architecture.modules(dims, naming):
            stored = module.stored[0]
            _check_layer(description, module, stored, groups.setdefault(stored, {}), words.get(stored, ""))
        description.notes += [f"{name} is ComfyUI's own format {host_formats.NAMES[name]!r}, which loads where the "
                              "installed ComfyUI has it" for name in description.formats if name in host_formats.NAMES]
        marks = {naming.prefix + mark for mark in architecture.marks(dims)}
        extra = [name for layer, leaves in groups.items() for leaf in leaves
                 if (name := tensor_name(layer, leaf)) not in marks]
        if extra:
            description.problems.append(f"{len(extra)} unexpected tensors: {first_ten(extra)}")
        return description

    def prepare(self, checkpoint: Checkpoint, description: CheckpointDescription,
                how: How) -> tuple[NativeStateDict, Any]:
        host.require("Ascend")
        _check_host(description)
        running.check_compute(how.compute, description)
        fp4, note = running.fp4_backend(how.fp4_backend, description, how.compute)
        architecture = next(a for a in ARCHITECTURES if a.name == description.architecture)
        where, stored, native = checkpoint.source.reference, checkpoint.load_tensors(), NativeStateDict()
        confs = _confs(checkpoint)
        for module in architecture.modules(description.dims, description.naming):
            try:
                conf = confs.get(module.stored[0], {})
                _add(native, module, stored, conf, how.compute == "dequantize", fp4 is not None)
            except ValueError as error:
                raise CheckpointError(str(error), where, "save the model again") from error
            how.step()
        finish(native, architecture, description.dims, description.naming, stored, where)
        operations = running.operations(native, how, where, fp4)
        native.notes += [*([note] if note else []), *_handed(description, how.compute)]
        return native, operations


FAMILY = Comfy()


def _is_marked(checkpoint: Checkpoint) -> bool:
    """Whether a layer with a marker is stored as only these formats are: integers, or scales in E8M0 or for every row.
    """
    tensors = checkpoint.tensors
    marked = {name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")}
    for layer in marked | _listed(checkpoint).keys():
        weight, scale = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.weight_scale")
        if weight and not scale and weight.dtype == "I8":
            return True
        if weight and scale and f"{layer}.weight_shard_1" not in tensors and (
                weight.dtype == "I8" or scale.dtype in ("U8", "F8_E8M0")
                or scale.dtype == "F32" and len(scale.shape) == 2 and f"{layer}.weight_scale_2" not in tensors):
            return True
    return False


def _listed(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Layer -> what the files' metadata say of it, as a marker would; nothing where they are no such list."""
    found: dict[str, dict[str, Any]] = {}
    for header in checkpoint.headers:
        try:
            layers = json.loads(header.metadata.get(METADATA, "{}"))["layers"].items()
            confs = {str(name): dict(conf) for name, conf in layers}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # declarations.py says what is wrong with it
        for name, conf in confs.items():
            found |= {layer: conf for layer in spellings(name) if f"{layer}.weight" in checkpoint.tensors}
    return found


def _confs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Layer -> what its marker says, which is read from the files, a few bytes each; else what the metadata say.

    Raises CheckpointError for a format that this version does not know.
    """
    confs = dict(_listed(checkpoint))
    where = dict.fromkeys(confs, checkpoint.source.reference)
    for header in checkpoint.headers:
        for name in header.tensors:
            if name.endswith(".comfy_quant"):
                layer = name.removesuffix(".comfy_quant")
                confs[layer], where[layer] = _marker(header, name), header.path
    for layer, conf in confs.items():
        word = str(conf.get("format"))
        known = word.startswith(MARKER) and word.removeprefix(MARKER) in KINDS
        if not (known or word in STORED or word in _OF_HOST or word in HOST_FORMATS):
            raise CheckpointError(f"{layer}.comfy_quant says {word!r}, which this version does not load", where[layer],
                                  "update this pack, or load the original")
    return confs


def _marker(header: Header, name: str) -> dict[str, Any]:
    try:
        conf = json.loads(header.read(name))
        assert isinstance(conf, dict)
    except (ValueError, AssertionError) as error:
        raise CheckpointError(f"{name} is no JSON object", header.path, "save the model again") from error
    return conf


def _check_layer(description: CheckpointDescription, module: Module, stored: str, group: dict[str, TensorInfo],
                 word: str) -> None:
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
    leaves = {"weight": weight, **group}
    fmt = identify(leaves) if word in STORED else None
    if not word:
        check_plain(problems, tensor_name(stored, module.stored_leaf), weight, (rows, *module.inner))
    else:
        problem = _problem(module, weight, group, rows, word)
        if problem:
            problems.append(f"{stored} ({word}): {problem}")
        for leaf in (fmt.companions if fmt else LEAVES) & group.keys():
            del group[leaf]
    if module.linear:
        handed = HOST_FORMATS.get(word)
        name = fmt.name if fmt else handed.name(leaves, module.inner[0]) if handed else \
            HOST_NAMES.get(word) or word.removeprefix(MARKER).upper() or weight.dtype
        description.layers[stored] = name
        description.formats[name] = description.formats.get(name, 0) + 1
        if fmt and "input_scale" in fmt.companions:
            description.static_activations += "input_scale" in leaves
            description.dynamic_activations += "input_scale" not in leaves


def _problem(module: Module, weight: TensorInfo, group: Mapping[str, TensorInfo], rows: int, word: str) -> str:
    if not module.linear:
        return "it is no Linear layer"
    if word in HOST_FORMATS:
        return HOST_FORMATS[word].problem({**group, "weight": weight}, rows, module.inner[0])
    if word in STORED:
        leaves = {**group, "weight": weight}
        fmt = identify(leaves)
        known = fmt is not None and word in fmt.words
        return fmt.problem(leaves, rows, module.inner[0]) if fmt and known else \
            f"it is stored as {fmt.name if fmt else name_unsupported(leaves)}"
    codec = KINDS[_OF_HOST.get(word, word.removeprefix(MARKER))].codec
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


def _check_host(description: CheckpointDescription) -> None:
    """Raise CheckpointError for layers in a format that the host is to make sense of, and does not have."""
    for name in description.formats.keys() & host_formats.NAMES.keys():
        word = host_formats.NAMES[name]
        if word not in host.quantized_formats():
            raise CheckpointError(f"ComfyUI {host.version()} does not have the format {word!r}, which "
                                  f"{description.formats[name]} layers are in ({name})", description.reference,
                                  "update ComfyUI and its comfy-kitchen")


def _handed(description: CheckpointDescription, compute: str) -> list[str]:
    names = [name for name in description.formats if name in host_formats.NAMES]
    how = "dequantized for every matmul, as chosen" if compute == "dequantize" else "multiplied by ComfyUI itself"
    return [f"{' and '.join(names)}: {how}, on {host.device_name()}"] if names else []


def _add(native: NativeStateDict, module: Module, stored: dict[str, Tensor], conf: dict[str, Any], dequantize: bool,
         own_nvfp4: bool) -> None:
    """Move the tensors of one module out of `stored`, as they are but for what the host's own layout cannot say."""
    name, word = module.stored[0], str(conf.get("format", ""))
    if not word or word in STORED:
        full = dequantize or bool(conf.get("full_precision_matrix_mult"))
        add_module(native, module, [take(stored, name, module)], ORDER, full, own_nvfp4)
        return
    for leaf in (module.stored_leaf, "bias", *sorted(LEAVES)):
        if tensor_name(name, leaf) in stored:
            native.tensors[f"{module.native}.{leaf}"] = stored.pop(tensor_name(name, leaf))
    key = f"{module.native}.comfy_quant"
    if dequantize or key not in native.tensors:
        native.tensors[key] = running.dequantized(conf) if dequantize else marker(conf)
    native.words.add(word)
