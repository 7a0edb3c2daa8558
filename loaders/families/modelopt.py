"""ModelOpt's exports, and every file whose layers say by themselves what they are: FP8, ComfyUI's markers, plain casts.

The last family: what no other recognises is described here, or refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from ...quant.formats import formats, identify, name_unsupported
from ...quant.stored import PLAIN, PLAIN_DTYPES, ByteOrder, StoredFormat
from ..architectures import ARCHITECTURES, Architecture, Dims, Module
from ..architectures.base import tensor_name
from ..assemble import NativeStateDict, assemble
from ..containers.checkpoint import Checkpoint
from ..containers.safetensors import TensorInfo
from ..declarations import Declaration, read_declaration
from ..description import CheckpointDescription
from ..words import first_ten
from . import running
from .base import Family, How
from .reading import architecture_of, by_layer, check_plain, check_sizes, dims_of, spellings


class ModelOpt(Family):
    """See base.Family."""

    name = "modelopt"
    by_module = True
    words = {"modelopt-fp8": "ModelOpt FP8", "modelopt-nvfp4": "ModelOpt NVFP4", "fp8": "FP8", "nvfp4": "NVFP4"}

    def recognise(self, checkpoint: Checkpoint) -> bool:
        return True

    def describe(self, checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> CheckpointDescription:
        architecture, naming = architecture_of(checkpoint)
        declaration = read_declaration(checkpoint)
        dims = dims_of(architecture.dims_from_tensors, checkpoint, checkpoint.tensors, naming)
        description = CheckpointDescription(
            checkpoint.source.reference, [os.path.basename(h.path) for h in checkpoint.headers],
            checkpoint.bytes_on_disk, architecture.name, naming, dims, "", byte_order(checkpoint.tensors, declaration),
            declaration.producer, list(declaration.origins))
        check_sizes(description, checkpoint, architecture, base)
        for key in sorted(architecture.config_only - dims.keys()):
            description.notes.append(f"{key} is told by neither the tensors nor a config.json; taken as off. If this "
                                     "is a model that has it, give its folder, or use the file as weights on its base")
        layers = by_layer(checkpoint.tensors)
        marks = {naming.prefix + mark for mark in architecture.marks(dims)}
        for module in architecture.modules(dims, naming):
            for stored, rows in zip(module.stored, module.rows, strict=True):
                _check_layer(description, module, stored, rows, layers.setdefault(stored, {}))
        extra = [tensor_name(name, leaf) for name, leaves in layers.items() for leaf in leaves
                 if tensor_name(name, leaf) not in marks]
        if extra:
            description.problems.append(f"{len(extra)} unexpected tensors: {first_ten(extra)}")
        _compare_with_declaration(description, declaration)
        return description

    def prepare(self, checkpoint: Checkpoint, description: CheckpointDescription,
                how: How) -> tuple[NativeStateDict, Any]:
        running.check_compute(how.compute, description)
        backend, note = running.fp4_backend(how.fp4_backend, description, how.compute)
        architecture = next(a for a in ARCHITECTURES if a.name == description.architecture)
        native = assemble(architecture, description.dims, description.naming, checkpoint.load_tensors(),
                          checkpoint.source.reference, order=description.byte_order,
                          dequantize=how.compute == "dequantize", own_nvfp4=backend is not None,
                          full_precision=frozenset(description.full_precision), step=how.step)
        operations = running.operations(native, how, checkpoint.source.reference, fp4=backend)
        native.notes += [note] if note else []
        return native, operations


FAMILY = ModelOpt()


_PACKED_QKV = re.compile(r"(^|\.)(double_blocks\.\d+\.(img|txt)_attn\.qkv|single_blocks\.\d+\.linear1)\.weight$",
                         re.MULTILINE)


def byte_order(tensors: dict[str, TensorInfo], declaration: Declaration) -> ByteOrder:
    """How the files pack NVFP4: what swap_weight_nibbles says, else packed q/k/v or ComfyUI's markers (high nibble
    first, tiled scales), else ModelOpt's order (docs/sources/sglang.md, "NVFP4 by tensors"). Reported, as bytes do not
    tell."""
    text = "\n".join(tensors)
    packed, comfy = bool(_PACKED_QKV.search(text)), ".comfy_quant" in text or declaration.comfy
    why = "packed q/k/v" if packed else "ComfyUI's markers" if comfy else "ModelOpt's default"
    swap = declaration.swap_weight_nibbles
    if swap is not None:
        why = f"swap_weight_nibbles = {str(swap).lower()}, {why}"
    return ByteOrder(not (packed or comfy) if swap is None else not swap, packed or comfy, why)


def _check_layer(description: CheckpointDescription, module: Module, stored: str, rows: int,
                 group: dict[str, TensorInfo]) -> None:
    """Check one stored layer against its place in the architecture, take its tensors out of `group`, count its format.

    What stays in the groups belongs to no layer.
    """
    problems = description.problems
    weight = group.get(module.stored_leaf)
    if weight is None:
        problems.append(f"missing tensor {tensor_name(stored, module.stored_leaf)}")
        return
    leaves = {module.stored_leaf: group.pop(module.stored_leaf)}
    if module.bias:
        bias = group.pop("bias", None)
        if bias is None:
            problems.append(f"missing tensor {stored}.bias")
        else:
            check_plain(problems, f"{stored}.bias", bias, (rows,))
    if not module.linear:
        check_plain(problems, tensor_name(stored, module.stored_leaf), weight, (rows, *module.inner))
        return
    leaves |= group
    fmt = identify(leaves)
    if fmt is None:
        problems.append(f"{stored} is stored as {name_unsupported(leaves)}, which this version does not load")
        group.clear()
        return
    for leaf in fmt.companions & group.keys():
        del group[leaf]
    problem = fmt.problem(leaves, rows, module.inner[0])
    if problem:
        problems.append(f"{stored}: {problem}")
    _count(description, stored, weight.dtype if fmt is PLAIN else fmt.name, fmt, "input_scale" in leaves)


def _count(description: CheckpointDescription, stored: str, name: str, fmt: StoredFormat, static: bool) -> None:
    description.layers[stored] = name
    description.formats[name] = description.formats.get(name, 0) + 1
    if "input_scale" in fmt.companions:
        if static:
            description.static_activations += 1
        else:
            description.dynamic_activations += 1


def _matching(patterns: tuple[str, ...], names: list[str]) -> Iterator[str]:
    """Names that a ModelOpt ignore list covers: full match, `*` crosses dots
    (docs/sources/sglang.md, "Ignore lists")."""
    if not patterns:
        return
    found = re.compile("|".join(f"(?:{re.escape(p).replace(re.escape('*'), '.*')})" for p in patterns))
    yield from (name for name in names if found.fullmatch(name))


def _compare_with_declaration(description: CheckpointDescription, declaration: Declaration) -> None:
    """Hold the claims against the tensors: notes where only words differ, problems where numbers would."""
    quantized = [name for name, fmt in description.layers.items() if fmt not in PLAIN_DTYPES]
    kinds = {fmt for fmt in description.formats if fmt not in PLAIN_DTYPES}
    described = "fp8" if "FP8" in kinds else "nvfp4" if "NVFP4" in kinds else "".join(sorted(kinds))
    description.family = declaration.family if declaration.family and quantized else described if quantized else "none"
    if "NVFP4" in kinds:
        order = description.byte_order
        description.notes.append(
            f"NVFP4 bytes: even columns in the {'low' if order.low_first else 'high'} nibble, block scales "
            f"{'in 128 x 4 tiles' if order.swizzled else 'row-major'} ({order.why})")
    declared = {"modelopt-fp8": "FP8", "modelopt-nvfp4": "NVFP4"}.get(declaration.family)
    if quantized and declared and declared not in kinds:
        description.notes.append(f"{declaration.family} is declared, but the tensors are {', '.join(sorted(kinds))}; "
                                 "the tensors are right")
    if quantized and not declaration.family:
        description.notes.append("no quantization is declared; the formats are taken from the tensors")
    if declaration.family and not quantized:
        description.notes.append(f"{declaration.family} is declared in {' and '.join(declaration.origins)}, but no "
                                 "tensor is quantized; it is loaded as it is")
    ignored = list(_matching(declaration.ignore, quantized))
    if ignored:
        description.notes.append(f"{len(ignored)} layers are declared as left alone but stored quantized; the tensors "
                                 f"are right: {first_ten(ignored)}")
    if declaration.activation_scheme == "dynamic" and description.static_activations:
        description.problems.append("activation_scheme is declared dynamic, but "
                                    f"{description.static_activations} layers carry a static input_scale")
    if description.dynamic_activations:
        reason = "as declared" if declaration.activation_scheme == "dynamic" else "input_scale is missing"
        description.notes.append(f"dynamic activation scales in {description.dynamic_activations} layers ({reason})")
    words = {fmt.name: fmt.words for fmt in formats()}
    for declared_name, conf in declaration.layers.items():
        word = str(conf.get("format") or "")
        name = next((name for name in spellings(declared_name) if name in description.layers), "")
        stored = description.layers.get(name)
        if stored is not None and word and word not in words.get(stored, ()):
            description.problems.append(f"the metadata declares {name} as {word}, but it is stored as {stored}")
        elif stored is not None and conf.get("full_precision_matrix_mult"):
            description.full_precision.append(name)
