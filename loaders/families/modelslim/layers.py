"""A ModelSlim checkpoint held against its architecture, from headers and the description alone.

Tensors decide what is there, the description how it is meant: the same I8 weight is another number under W8A8 than
under W8A16. Where the two cannot both be right the layer is a problem, and problems refuse the load.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ....quant.ascend.kinds import KINDS
from ....quant.ascend.schemes import REFUSED, SCHEMES, Scheme
from ....quant.stored import PLAIN_DTYPES
from ... import plan as plans
from ...architectures import Architecture, Dims, Module
from ...architectures.base import tensor_name
from ...containers.checkpoint import Checkpoint
from ...containers.safetensors import TensorInfo
from ...description import CheckpointDescription
from ...files.source import read_json
from ...plan import Group, Layer, LoadPlan, ReadTensors
from ...words import first_ten
from ..reading import architecture_of, check_sizes, compare_dims, dims_of
from .description import FLOAT, Claims, check_names, description_path, read_claims
from .names import plain_names

if TYPE_CHECKING:
    from torch import Tensor

    from ....quant.tile import Coded

FAMILY = "modelslim"
# Wan's own config.json -> the sizes of loaders/architectures/wan.py, and what ComfyUI has fixed for Wan.
_VENDOR_SIZES = {"dim": "hidden", "in_dim": "in", "out_dim": "out", "ffn_dim": "ffn", "num_layers": "layers"}
_VENDOR_FIXED = {"freq_dim": 256, "eps": 1e-6}
# ComfyUI's names of the modules that make features of a model's inputs: latents, text, timestep, guidance, image.
_EMBEDDERS = frozenset((
    "patch_embedding", "text_embedding", "time_embedding", "time_projection", "img_emb",  # Wan
    "img_in", "txt_in", "time_in", "vector_in", "guidance_in",  # FLUX.1, FLUX.2, HunyuanVideo, Qwen-Image
    "time_text_embed", "x_embedder", "t_embedder", "cap_embedder"))  # Qwen-Image, Z-Image


def read_plan(checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> LoadPlan:
    """base.Family.read for a checkpoint with a description.

    Raises CheckpointError when the files cannot be interpreted at all; everything else that forbids loading is listed
    in the description's `problems`.
    """
    path = description_path(checkpoint.source)
    assert path is not None
    where = checkpoint.source.reference
    claims = read_claims(path)
    check_names(claims, checkpoint.tensors, path)
    tensors, stored_names, ignored = plain_names(checkpoint.tensors, where)
    types = {name: claims.types[stored] for name, stored in stored_names.items() if stored in claims.types}
    groups = plans.by_layer(tensors)
    view = copy(checkpoint)
    view.tensors = {name: _unpacked(name, info, groups, types) for name, info in tensors.items()}
    architecture, naming = architecture_of(view)
    dims = dims_of(architecture.dims_from_tensors, view, view.tensors, naming)
    description = CheckpointDescription(
        where, [os.path.basename(h.path) for h in checkpoint.headers], checkpoint.bytes_on_disk, architecture.name,
        naming, dims, FAMILY, producer=claims.writer, declared_in=[claims.file])
    check_sizes(description, checkpoint, architecture, base)
    _compare_vendor_config(description, checkpoint)
    plan = LoadPlan(description, architecture, stored=lambda name: stored_names.get(name, name), ignored=ignored,
                    hint=Text("copy the export again, or report it to its publisher"))
    plans.make(plan, tensors, partial(_read_layer, description.notes, types))
    description.notes += _notes(claims, ignored)
    return plan


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
                 Text("config.json says"))
    for key, value in _VENDOR_FIXED.items():
        if config.get(key, value) != value:
            description.problems.append(Text("ComfyUI runs Wan with {key} {value} only, config.json says {said}",
                                             key=key, value=value, said=config[key]))


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
        return Text("an embedding, and quantized embeddings are not supported")
    return "" if module.linear else Text("no Linear layer, and only those can be quantized")


def _read_layer(notes: list[str], types: Mapping[str, str], module: Module, name: str, rows: int, group: Group,
                problems: list[str]) -> Layer | None:
    """plan.ReadLayer: a stored layer and its type in the description."""
    stored = tensor_name(name, module.stored_leaf)
    weight = plans.take_weight(module, name, group, problems)
    if weight is None:
        return None
    claimed = types.get(stored, FLOAT)
    never = _never_quantized(module)
    plain = weight.dtype in PLAIN_DTYPES and not group.keys() - {"bias"}  # the tensors are right, whatever is claimed
    if never and claimed != FLOAT and not (module.linear and plain):
        problems.append(Text("{name} is described as {claimed}, but it is {what}; export the model again with this "
                             "layer excluded, so that it stays FLOAT", name=name, claimed=claimed, what=never))
        group.clear()
        return None
    if not module.linear:
        plans.take_bias(module, name, rows, group, problems)
        return plans.plain(module, name, rows, weight, {}, problems)
    leaves = {"weight": weight, **group}
    group.clear()
    if claimed not in SCHEMES:
        problems.append(Text("{name} is described as {claimed}, which this version does not load ({why})", name=name,
                             claimed=claimed, why=REFUSED[claimed]) if claimed in REFUSED else
                        Text("{name} is described as {claimed}, which this version does not load", name=name,
                             claimed=claimed))
        return None
    if claimed != FLOAT and weight.dtype in PLAIN_DTYPES and not leaves.keys() - {"weight", "bias"}:
        notes.append(Text("{name} is described as {claimed} but stored as {dtype} without scales; the tensors are "
                          "right", name=name, claimed=claimed, dtype=weight.dtype))
        claimed = FLOAT
    scheme = SCHEMES[claimed]
    problem = _contradiction(name, claimed, leaves, types) or _unexpected(claimed, scheme, leaves) \
        or scheme.problem(leaves, rows, module.inner[0])
    if problem:
        how = Text("described as {claimed}", claimed=claimed) if stored in types else Text("not in the description")
        problems.append(Text("{name} ({how}): {problem}", name=name, how=how, problem=problem))
    if module.bias and "bias" not in leaves and "quant_bias" not in leaves:
        problems.append(Text("missing tensor {name}", name=f"{name}.bias"))
    named = plans.leaves(module.stored_leaf, *sorted(leaves.keys() - {"weight"}))
    if claimed == FLOAT and "mul_scale" not in leaves and module.bias == ("bias" in leaves):
        return Layer(name, weight.dtype, named)
    activation = KINDS[scheme.kind].activation if scheme.kind else ""
    return Layer(name, weight.dtype if claimed == FLOAT else claimed, named, _reader(claimed, module.bias),
                 activation == "static" if activation else None, (scheme.kind,) if scheme.kind else ())


@cache
def _reader(claimed: str, bias: bool) -> ReadTensors:
    """How layers of a type are read; `bias` is whether the native module has one."""
    def read(layer: Layer, part: dict[str, Tensor]) -> list[Coded]:
        notes = check_quant_bias(layer.name, part) if "quant_bias" in part and "bias" in part else ()
        made = SCHEMES[claimed].coded(layer.name, part, bias=bias)
        return [made._replace(notes=(*notes, *made.notes))]

    return read


def check_quant_bias(name: str, part: dict[str, Tensor]) -> tuple[str, ...]:
    """Hold the two biases of a static W8A8 layer against each other, and drop `quant_bias` where it overflowed.

    quant_bias = round(bias / deq_scale) - input_offset * (sum of a row's codes). msmodelslim computes the quotient in
    the source's dtype, good to 2^-8 in BF16; in F16 it is infinite above 65504, and the integer made of that is noise.
    Raises ValueError for any other difference, which would be another layer's bias.
    """
    from ....quant.ascend.integers import deq_scale

    deq, bias = deq_scale(part["deq_scale"]).double().flatten(), part["bias"].double()
    sums = part["weight"].sum(1).double() * float(part["input_offset"])  # int64
    wrong = ((part["quant_bias"].double() + sums) * deq - bias).abs() > 2 ** -6 * bias.abs() + 4 * deq
    overflow = bias.abs() > 65000 * deq
    if bool((wrong & ~overflow).any()):
        raise ValueError(Text("{name}: bias and quant_bias are of two different layers", name=name))
    if not bool(wrong.any()):
        return ()
    del part["quant_bias"]
    return (Text("{name}: quant_bias overflowed when it was exported (F16), made again from bias", name=name),)


def _unexpected(claimed: str, scheme: Scheme, leaves: Mapping[str, Any]) -> str:
    unknown = sorted(leaves.keys() - {"weight", "bias"} - scheme.leaves)
    return Text("tensors that {claimed} does not have: {names}", claimed=claimed,
                names=", ".join(unknown)) if unknown else ""


def _contradiction(stored: str, claimed: str, leaves: Mapping[str, Any], types: Mapping[str, str]) -> str:
    """Where the description gives one layer two types; its floats (bias, smoothing) may be FLOAT."""
    other = {leaf: types[f"{stored}.{leaf}"] for leaf in sorted(leaves) if f"{stored}.{leaf}" in types}
    wrong = [f"{leaf} {kind}" for leaf, kind in other.items() if kind not in (claimed, FLOAT)
             and SCHEMES.get(kind) is not SCHEMES[claimed] and claimed != FLOAT]
    return Text("the description contradicts itself: {wrong}", wrong=", ".join(wrong)) if wrong else ""


def _notes(claims: Claims, ignored: list[str]) -> list[str]:
    notes: list[str] = []
    if ignored:
        notes.append(Text("{count} tensors that only quantized attention reads are left out: {names}",
                          count=len(ignored), names=first_ten(ignored)))
    if claims.quantized_attention:
        notes.append(Text("attention is quantized in {count} layers on an NPU that can; here it is not",
                          count=claims.quantized_attention))
    return notes
