"""A ModelSlim checkpoint held against its architecture, from headers and the description alone.

Tensors decide what is there, the description how it is meant: the same I8 weight is another number under W8A8 than
under W8A16. Where the two cannot both be right the layer is a problem, and problems refuse the load.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from typing import Any

from ....quant.ascend.fused import fusion_problem
from ....quant.ascend.kinds import KINDS
from ....quant.ascend.schemes import REFUSED, SCHEMES, Scheme
from ....quant.stored import PLAIN_DTYPES
from ...architectures import Architecture, Dims, Module
from ...architectures.base import tensor_name
from ...containers.checkpoint import Checkpoint
from ...containers.safetensors import TensorInfo
from ...description import CheckpointDescription
from ...files.source import read_json
from ...words import first_ten
from ..reading import architecture_of, by_layer, check_plain, check_sizes, compare_dims, dims_of
from .description import FLOAT, Claims, check_names, description_path, read_claims
from .names import plain_names

FAMILY = "modelslim"
# Wan's own config.json -> the sizes of loaders/architectures/wan.py, and what ComfyUI has fixed for Wan.
_VENDOR_SIZES = {"dim": "hidden", "in_dim": "in", "out_dim": "out", "ffn_dim": "ffn", "num_layers": "layers"}
_VENDOR_FIXED = {"freq_dim": 256, "eps": 1e-6}
# ComfyUI's names of the modules that make features of a model's inputs: latents, text, timestep, guidance, image.
_EMBEDDERS = frozenset((
    "patch_embedding", "text_embedding", "time_embedding", "time_projection", "img_emb",  # Wan
    "img_in", "txt_in", "time_in", "vector_in", "guidance_in",  # FLUX.1, FLUX.2, HunyuanVideo, Qwen-Image
    "time_text_embed", "x_embedder", "t_embedder", "cap_embedder"))  # Qwen-Image, Z-Image


def describe(checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> CheckpointDescription:
    """loaders.describe.describe for a checkpoint with a description.

    Raises CheckpointError when the files cannot be interpreted at all; everything else that forbids loading is listed
    in `problems`.
    """
    path = description_path(checkpoint.source)
    assert path is not None
    where = checkpoint.source.reference
    claims = read_claims(path)
    check_names(claims, checkpoint.tensors, path)
    tensors, stored_names, ignored = plain_names(checkpoint.tensors, where)
    types = {name: claims.types[stored] for name, stored in stored_names.items() if stored in claims.types}
    groups = by_layer(tensors)
    view = copy(checkpoint)
    view.tensors = {name: _unpacked(name, info, groups, types) for name, info in tensors.items()}
    architecture, naming = architecture_of(view)
    dims = dims_of(architecture.dims_from_tensors, view, view.tensors, naming)
    description = CheckpointDescription(
        where, [os.path.basename(h.path) for h in checkpoint.headers], checkpoint.bytes_on_disk, architecture.name,
        naming, dims, FAMILY, producer=claims.writer, declared_in=[claims.file])
    check_sizes(description, checkpoint, architecture, base)
    _compare_vendor_config(description, checkpoint)
    description.notes += [f"{key} is told by neither the tensors nor a config.json; taken as off"
                          for key in sorted(architecture.config_only - dims.keys())]
    for module in architecture.modules(dims, naming):
        for stored, rows in zip(module.stored, module.rows, strict=True):
            _check_layer(description, module, stored, rows, groups.setdefault(stored, {}), types)
    marks = {naming.prefix + mark for mark in architecture.marks(dims)}
    extra = [tensor_name(name, leaf) for name, leaves in groups.items() for leaf in leaves]
    extra = [name for name in extra if name not in marks]
    if extra:
        description.problems.append(f"{len(extra)} unexpected tensors: {first_ten(extra)}")
    description.notes += _notes(claims, ignored)
    return description


def _unpacked(name: str, info: TensorInfo, groups: Mapping[str, Mapping[str, TensorInfo]],
              types: Mapping[str, str]) -> TensorInfo:
    """A quantized weight with the shape that it has unpacked, which is what sizes are read from."""
    module, _, leaf = name.rpartition(".")
    scheme = SCHEMES.get(types.get(name, FLOAT))
    if leaf != "weight" or scheme is None or not scheme.kind or len(info.shape) != 2:
        return info
    return TensorInfo("BF16", scheme.shape(groups[module]), 0, 0)


def _compare_vendor_config(description: CheckpointDescription, checkpoint: Checkpoint) -> None:
    """Hold Wan's own config.json, as the exporter copied it, against the tensors."""
    path = next((path for path in checkpoint.source.texts if os.path.basename(path) == "config.json"), None)
    if path is None:
        return
    config = read_json(path)
    compare_dims(description, {size: config[key] for key, size in _VENDOR_SIZES.items() if key in config},
                 "config.json says")
    for key, value in _VENDOR_FIXED.items():
        if config.get(key, value) != value:
            description.problems.append(f"ComfyUI runs Wan with {key} {value} only, config.json says {config[key]}")


def _never_quantized(module: Module) -> str:
    """Why a module must be FLOAT in a description; empty for the Linear layers that may be quantized.

    Quantized embeddings are not supported, say both SGLang pages that this loader follows (diffusion quantization,
    section ModelSlim; Quantization on Ascend). Which layers that means is in SGLang 0.5.23: its WanTransformer3DModel
    builds the patch embedding and condition_embedder (text, timestep with its projection, image) without a
    quantization config; the blocks' Linears and proj_out get one, so an output projection may be quantized.
    msmodelslim 26.1.0 agrees: Wan2_2BaseModelAdapter.generate_model_visit goes through blocks only, and so do its
    adapters of other architectures, whose embedders are refused by the same rule.
    """
    if module.native.partition(".")[0] in _EMBEDDERS:
        return "an embedding, and quantized embeddings are not supported"
    return "" if module.linear else "no Linear layer, and only those can be quantized"


def _check_layer(description: CheckpointDescription, module: Module, stored: str, rows: int,
                 group: dict[str, TensorInfo], types: Mapping[str, str]) -> None:
    """Check one stored layer and count its type, taking its tensors out of `group`: what stays belongs to no layer."""
    problems, name = description.problems, tensor_name(stored, module.stored_leaf)
    weight = group.pop(module.stored_leaf, None)
    if weight is None:
        problems.append(f"missing tensor {name}")
        return
    claimed = types.get(name, FLOAT)
    never = _never_quantized(module)
    plain = weight.dtype in PLAIN_DTYPES and not group.keys() - {"bias"}  # the tensors are right, whatever is claimed
    if never and claimed != FLOAT and not (module.linear and plain):
        problems.append(f"{stored} is described as {claimed}, but it is {never}; export the model again with this "
                        "layer excluded, so that it stays FLOAT")
        group.clear()
        return
    if not module.linear:
        check_plain(problems, name, weight, (rows, *module.inner))
        if module.bias:
            _check_bias(problems, stored, rows, group.pop("bias", None))
        return
    scheme = SCHEMES.get(claimed)
    leaves = {"weight": weight, **group}
    group.clear()
    if scheme is None:
        why = f" ({REFUSED[claimed]})" if claimed in REFUSED else ""
        problems.append(f"{stored} is described as {claimed}, which this version does not load{why}")
        return
    if claimed != FLOAT and weight.dtype in PLAIN_DTYPES and not leaves.keys() - {"weight", "bias"}:
        description.notes.append(f"{stored} is described as {claimed} but stored as {weight.dtype} without scales; "
                                 "the tensors are right")
        claimed, scheme = FLOAT, SCHEMES[FLOAT]
    problem = _contradiction(stored, claimed, leaves, types) or _unexpected(claimed, scheme, leaves) \
        or scheme.problem(leaves, rows, module.inner[0])
    changed = claimed != FLOAT or "mul_scale" in leaves
    if not problem and changed and (len(module.stored) > 1 or module.swap_halves):
        claims = {types.get(tensor_name(other, module.stored_leaf), FLOAT) for other in module.stored}
        problem = fusion_problem({SCHEMES[claim].kind for claim in claims | {claimed} if claim in SCHEMES})
    if problem:
        how = f"described as {claimed}" if name in types else "not in the description"
        problems.append(f"{stored} ({how}): {problem}")
    if module.bias and "bias" not in leaves and "quant_bias" not in leaves:
        problems.append(f"missing tensor {stored}.bias")
    _count(description, stored, leaves["weight"].dtype if claimed == FLOAT else claimed, scheme)


def _check_bias(problems: list[str], stored: str, rows: int, bias: TensorInfo | None) -> None:
    if bias is None:
        problems.append(f"missing tensor {stored}.bias")
    else:
        check_plain(problems, f"{stored}.bias", bias, (rows,))


def _unexpected(claimed: str, scheme: Scheme, leaves: Mapping[str, Any]) -> str:
    unknown = sorted(leaves.keys() - {"weight", "bias"} - scheme.leaves)
    return f"tensors that {claimed} does not have: {', '.join(unknown)}" if unknown else ""


def _contradiction(stored: str, claimed: str, leaves: Mapping[str, Any], types: Mapping[str, str]) -> str:
    """Where the description gives one layer two types; its floats (bias, smoothing) may be FLOAT."""
    other = {leaf: types[f"{stored}.{leaf}"] for leaf in sorted(leaves) if f"{stored}.{leaf}" in types}
    wrong = [f"{leaf} {kind}" for leaf, kind in other.items() if kind not in (claimed, FLOAT)
             and SCHEMES.get(kind) is not SCHEMES[claimed] and claimed != FLOAT]
    return f"the description contradicts itself: {', '.join(wrong)}" if wrong else ""


def _count(description: CheckpointDescription, stored: str, name: str, scheme: Scheme) -> None:
    description.layers[stored] = name
    description.formats[name] = description.formats.get(name, 0) + 1
    activation = KINDS[scheme.kind].activation if scheme.kind else ""
    description.static_activations += activation == "static"
    description.dynamic_activations += bool(activation) and activation != "static"


def _notes(claims: Claims, ignored: list[str]) -> list[str]:
    notes = []
    if ignored:
        notes.append(f"{len(ignored)} tensors that only quantized attention reads are left out: {first_ten(ignored)}")
    if claims.quantized_attention:
        notes.append(f"attention is quantized in {claims.quantized_attention} layers on an NPU that can; here it is "
                     "not")
    return notes
