"""What a checkpoint is: architecture, quantization family, format of every layer, what is missing or contradictory.

Works from headers and config.json alone; no tensor bytes are read. Tensors decide; claims that disagree without
changing the numbers become notes, those that would change them become problems, and problems refuse the load.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..quant.formats import formats, identify, name_unsupported
from ..quant.stored import PLAIN, PLAIN_DTYPES, ByteOrder, StoredFormat
from . import attention
from .architectures import ARCHITECTURES, Architecture, Dims, Module, Naming, by_class_name, name_other, supported
from .architectures.base import tensor_name
from .containers.checkpoint import Checkpoint
from .containers.safetensors import TensorInfo
from .declarations import Declaration, read_declaration
from .errors import CheckpointError
from .families.nunchaku.recognise import is_svdquant
from .words import first_ten


@dataclass
class CheckpointDescription:
    """A plain value: printable and JSON-able.

    `formats` counts stored Linear layers by format, `layers` gives each one's format by stored module name; `problems`
    is empty when the checkpoint can be loaded. `full_precision` are the layers whose metadata ask for full-precision
    matmul, `ranks` the low ranks of SVDQuant layers. Sizes are bytes.
    """

    reference: str
    files: list[str]
    bytes_on_disk: int
    architecture: str
    naming: Naming
    dims: Dims
    family: str
    byte_order: ByteOrder = ByteOrder()
    producer: str = ""
    declared_in: list[str] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    full_precision: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    static_activations: int = 0
    dynamic_activations: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def require_loadable(self) -> None:
        """Raise CheckpointError naming the first ten problems, if there are any."""
        if self.problems:
            shown = "\n  - ".join(self.problems[:10])
            more = f"\n  - and {len(self.problems) - 10} more" if len(self.problems) > 10 else ""
            raise CheckpointError(f"this {self.architecture} checkpoint cannot be loaded:\n  - {shown}{more}",
                                  self.reference, "download it again, or report it to its publisher")

    def to_json(self) -> dict[str, Any]:
        """The description as JSON-able values."""
        return {**vars(self), "naming": self.naming.style, "byte_order": self.byte_order._asdict()}


def architecture_of(checkpoint: Checkpoint) -> tuple[Architecture, Naming]:
    """Recognise the architecture from tensor names, checked against config.json's claim.

    Raises CheckpointError that says what the file is instead when it is none of the supported ones.
    """
    where = checkpoint.source.reference
    claim = str((checkpoint.config or {}).get("_class_name") or "")
    for architecture in ARCHITECTURES:
        naming = architecture.naming(checkpoint.tensors)
        if naming:
            if claim and by_class_name(claim) is None:
                raise CheckpointError(f"config.json says {claim}, which this version does not load ({supported()})",
                                      where, "load it with another loader, or use a version of this pack that lists it")
            if claim and claim not in architecture.class_names:
                raise CheckpointError(f"config.json says {claim}, but the tensors are {architecture.name}", where,
                                      "config.json and weights do not belong together; download both again")
            return architecture, naming
    what, do = name_other(checkpoint.tensors)
    if claim:
        what += f" (config.json says {claim})"
    raise CheckpointError(f"this is {what}, not a transformer this version loads ({supported()})", where, do)


def describe(checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None = None) -> CheckpointDescription:
    """Describe an opened checkpoint, of whichever family.

    `base` is the architecture and the sizes it must fit (an override's base model); where it is given, a config.json
    beside the weights is read for its quantization only. Raises CheckpointError when the files cannot be interpreted
    at all; everything else that forbids loading is listed in `problems`.
    """
    description = _describe(checkpoint, base)
    attention.note(description, checkpoint)
    return description


def _describe(checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> CheckpointDescription:
    if is_svdquant(checkpoint.tensors):
        from .families.nunchaku.describe import describe_svdquant

        return describe_svdquant(checkpoint, base)
    from .families import modelslim

    if modelslim.is_ours(checkpoint):
        return modelslim.describe(checkpoint, base)
    architecture, naming = architecture_of(checkpoint)
    declaration = read_declaration(checkpoint)
    dims = dims_of(architecture.dims_from_tensors, checkpoint, checkpoint.tensors, naming)
    description = CheckpointDescription(
        checkpoint.source.reference, [os.path.basename(h.path) for h in checkpoint.headers], checkpoint.bytes_on_disk,
        architecture.name, naming, dims, "", byte_order(checkpoint.tensors, declaration),
        declaration.producer, list(declaration.origins))
    check_sizes(description, checkpoint, architecture, base)
    for key in sorted(architecture.config_only - dims.keys()):
        description.notes.append(f"{key} is told by neither the tensors nor a config.json; taken as off. If this is a "
                                 "model that has it, give its folder, or use the file as weights on its base")
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


def dims_of(read: Callable[..., Dims], checkpoint: Checkpoint, *arguments: Any) -> Dims:
    """Sizes by one of an architecture's readers; its ValueError as a CheckpointError that says where."""
    try:
        return read(*arguments)
    except ValueError as error:
        raise CheckpointError(str(error), checkpoint.source.reference,
                              "download it again; if it is complete, this model cannot run in ComfyUI") from error


_PACKED_QKV = re.compile(r"(^|\.)(double_blocks\.\d+\.(img|txt)_attn\.qkv|single_blocks\.\d+\.linear1)\.weight$",
                         re.MULTILINE)


def byte_order(tensors: dict[str, TensorInfo], declaration: Declaration) -> ByteOrder:
    """How the files pack NVFP4: what swap_weight_nibbles says, else packed q/k/v or ComfyUI's markers (high nibble
    first, tiled scales), else ModelOpt's order (specs/modelopt.md section 4.3). Reported, as bytes do not tell."""
    text = "\n".join(tensors)
    packed, comfy = bool(_PACKED_QKV.search(text)), ".comfy_quant" in text or declaration.comfy
    why = "packed q/k/v" if packed else "ComfyUI's markers" if comfy else "ModelOpt's default"
    swap = declaration.swap_weight_nibbles
    if swap is not None:
        why = f"swap_weight_nibbles = {str(swap).lower()}, {why}"
    return ByteOrder(not (packed or comfy) if swap is None else not swap, packed or comfy, why)


def by_layer(tensors: dict[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Module name -> leaf name -> tensor."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        layers.setdefault(module, {})[leaf] = info
    return layers


def check_sizes(description: CheckpointDescription, checkpoint: Checkpoint, architecture: Architecture,
                base: tuple[Architecture, Dims] | None) -> None:
    """Note how the files were chosen, and compare the sizes that the tensors tell with the base's, else with those of a
    config.json that names its class."""
    if checkpoint.source.choice:
        description.notes.append(checkpoint.source.choice)
    if base is not None:
        check_dims(description, *base)
    elif checkpoint.config and checkpoint.config.get("_class_name"):
        compare_dims(description, dims_of(architecture.dims_from_config, checkpoint, checkpoint.config),
                     "config.json says")


def check_dims(description: CheckpointDescription, architecture: Architecture, dims: Dims) -> None:
    """Hold a description against the base model that it must fit; sizes that it does not tell are taken over.

    Raises CheckpointError for another architecture; other sizes become problems.
    """
    if architecture.name != description.architecture:
        raise CheckpointError(f"the override is {description.architecture}, but the base model is {architecture.name}",
                              description.reference, "choose an override made for this base")
    compare_dims(description, dims, "the base model has")


def compare_dims(description: CheckpointDescription, dims: Dims, whose: str) -> None:
    for key, value in dims.items():
        stored = description.dims.setdefault(key, value)  # a size that the tensors do not tell is taken over
        if stored != value:
            description.problems.append(f"{whose} {key} = {value}, but the tensors have {stored}")


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
    _count(description, stored, fmt, "input_scale" in leaves)


def check_plain(problems: list[str], name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    """A tensor that is never quantized: its shape, and a float dtype."""
    if tuple(info.shape) != shape:
        problems.append(f"{name} is {list(info.shape)}, expected {list(shape)}")
    elif info.dtype not in PLAIN_DTYPES:
        problems.append(f"{name} is stored as {info.dtype}, expected BF16, F16 or F32")


def _count(description: CheckpointDescription, stored: str, fmt: StoredFormat, static: bool) -> None:
    description.layers[stored] = fmt.name
    description.formats[fmt.name] = description.formats.get(fmt.name, 0) + 1
    if "input_scale" in fmt.companions:
        if static:
            description.static_activations += 1
        else:
            description.dynamic_activations += 1


def _matching(patterns: tuple[str, ...], names: list[str]) -> Iterator[str]:
    """Names that a ModelOpt ignore list covers: full match, `*` crosses dots (specs/modelopt.md section 2.5)."""
    if not patterns:
        return
    found = re.compile("|".join(f"(?:{re.escape(p).replace(re.escape('*'), '.*')})" for p in patterns))
    yield from (name for name in names if found.fullmatch(name))


def _compare_with_declaration(description: CheckpointDescription, declaration: Declaration) -> None:
    """Hold the claims against the tensors: notes where only words differ, problems where numbers would."""
    quantized = [name for name, fmt in description.layers.items() if fmt != PLAIN.name]
    kinds = {fmt for fmt in description.formats if fmt != PLAIN.name}
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
    for name, conf in declaration.layers.items():
        word = str(conf.get("format") or "")
        stored = description.layers.get(name)
        if stored is not None and word and word not in words[stored]:
            description.problems.append(f"the metadata declares {name} as {word}, but it is stored as {stored}")
        elif stored is not None and conf.get("full_precision_matrix_mult"):
            description.full_precision.append(name)


def describe_config(checkpoint: Checkpoint) -> tuple[Architecture, Dims]:
    """Architecture and sizes from config.json alone, for a model whose weights come from an override.

    Raises CheckpointError for classes this version does not load.
    """
    config = checkpoint.config or {}
    claim = str(config.get("_class_name") or "")
    architecture = by_class_name(claim)
    if architecture is None:
        raise CheckpointError(f"config.json says {claim or 'no _class_name'}, not a transformer this version loads "
                              f"({supported()})", checkpoint.source.config or checkpoint.source.reference,
                              "pick the folder of a supported base model")
    return architecture, dims_of(architecture.dims_from_config, checkpoint, config)
