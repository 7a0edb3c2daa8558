"""Any MODEL -> the same MODEL with its Linear weights in MXFP8, at load.

Weights get the rule of Ascend's npu_dynamic_mx_quant (floor of the shared exponent, docs/formats/mxfp8.md) and
the host's own MXFP8 layout and marker, so that its LoRA, offload and save code work on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import host
from ..host.texts import Text, joined
from ..loaders.architectures import ARCHITECTURES, Naming
from ..loaders.containers.safetensors import TensorInfo
from ..loaders.errors import CheckpointError
from ..loaders.model import attach_lora, base_of
from ..loaders.patterns import Expressions
from ..loaders.words import first_ten, size
from .builders.presets import NONE, PRESETS, Preset, variants
from .sources import sources_of

if TYPE_CHECKING:
    import torch

    from ..quant.kernels.choose import Choice

FLOATS = ("torch.bfloat16", "torch.float16", "torch.float32")
MULTIPLE = 32  # of rows and columns: what the host's layout holds without padding, and the block of MX
BACKENDS = ("auto", "torch_npu", "comfy_kitchen", "reference")
KIND = "w8a8_mxfp8"
SLICE = 1 << 22  # elements of a weight that are quantized at once


@dataclass
class _Choice:
    """Native names of the Linears: which are quantized, and why the others are not."""

    quantize: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)  # patterns that match nothing


def quantize(model: Any, keep: str = "", backend: str = "auto", step: Callable[[], None] | None = None) -> \
        tuple[Any, str]:
    """(a new MODEL with MXFP8 weights and everything else of `model`, the report). `model` is not changed.

    `keep`: regexes, one a line, looked for in native and diffusers' module names; what they find stays as it is. Empty:
    the architecture's preset. `backend` is who multiplies (a kernel of quant/kernels). Layers that are quantized
    already, and those whose rows or columns are no multiple of 32, stay. Weights that stay are shared with `model`
    where the host keeps them in the same dtype. `step` is called after each layer (default: the node's progress bar and
    Cancel).

    Raises CheckpointError for a model without weights or without float Linears, one whose file is written to, or whose
    weights something else holds, a pattern that is no regex, infinite weights, and a backend that cannot run here.
    """
    host.require("quantized layers", "Ascend")
    modules = _linears(model)
    choice, source = _choose(model, modules, keep)
    if not choice.quantize:
        raise CheckpointError(Text("the MODEL has no Linear weights to quantize: {already} are quantized already, "
                                   "{kept} are kept by patterns, {odd} have sizes that are no multiple of {multiple}",
                                   already=len(choice.already), kept=len(choice.kept), odd=len(choice.odd),
                                   multiple=MULTIPLE), "",
                              Text("connect a model in BF16, FP16 or FP32, or keep less"))
    chosen = _kernels(backend, modules)
    step = step or host.progress(len(choice.quantize))
    tensors = host.unpatched_tensors(model)
    before = sum(_bytes(tensors[f"{name}.weight"]) for name in choice.quantize)
    after = 0
    sources, mapped = sources_of(model, tensors.values())
    for name in choice.quantize:
        with sources.held(name):
            layer = _layer(name, mapped.own(tensors[f"{name}.weight"]))
        tensors |= layer
        after += sum(map(_bytes, layer.values()))
        step()
    sources.check()
    tensors = {name: tensor.to(model.offload_device) for name, tensor in tensors.items()}
    fresh = _to_host(tensors, model, modules, chosen.kernels)
    patcher = _dress(model, fresh, keep, backend)
    lines: list[str] = [
        Text("MXFP8: {count} Linear layers, {before} -> {after}; weights by Ascend's rule (floor of the shared "
             "exponent, round half to even, saturating)", count=len(choice.quantize), before=size(before),
             after=size(after)),
        Text("kept in high precision ({source}): {layers}", source=source, layers=_list(choice.kept))]
    if choice.already:
        lines.append(Text("quantized already, left as they are: {layers}", layers=_list(choice.already)))
    if choice.odd:
        lines.append(Text("kept, rows or columns are no multiple of {multiple}: {layers}", multiple=MULTIPLE,
                          layers=_list(choice.odd)))
    if choice.unmatched:
        lines.append(Text("note: these patterns match no layer: {patterns}", patterns=first_ten(choice.unmatched)))
    lines += chosen.lines
    if model.patches:
        lines.append(Text("patches carried over: {count}", count=len(model.patches)))
    return patcher, joined("\n", lines)


def rebuild(init: tuple, keep: str, backend: str, disable_dynamic: bool = False) -> Any:
    """Make the base again by its own `cached_patcher_init` and quantize that; the factory of the new MODEL's."""
    made = init[0](*init[1], disable_dynamic=disable_dynamic)
    return quantize(made[init[2]] if len(init) > 2 else made, keep, backend, step=lambda: None)[0]


def _linears(model: Any) -> dict[str, Any]:
    """Native name -> module of every Linear with a weight. Raises CheckpointError for models that cannot be changed."""
    bound = host.bound_to_weights(model)
    if bound:
        raise CheckpointError(Text("the MODEL carries {bound}, which would keep using the weights as they are",
                                   bound=bound), "",
                              Text("connect Ascend MXFP8 Quantize directly behind the loader"))
    network = model.model.diffusion_model
    if any(parameter.is_meta for parameter in network.parameters()):
        raise CheckpointError(Text("this MODEL has no weights yet (weights: defer to override)"), "",
                              Text("set weights to 'load', or connect Apply Transformer Override before"))
    return {name: module for name, module in network.named_modules()
            if hasattr(module, "in_features") and hasattr(module, "out_features")
            and getattr(module, "weight", None) is not None}


def _choose(model: Any, modules: dict[str, Any], keep: str) -> tuple[_Choice, str]:
    """Which layers to quantize, and where the patterns came from."""
    also, preset = _other_names(model)
    lines = [line.strip() for line in keep.splitlines() if line.strip()]
    patterns, written = [], Expressions(do=Text("give a simpler one"))
    source = Text("{count} patterns", count=len(lines)) if lines else \
        Text("no patterns, and no preset for this architecture")
    if not lines and preset.keep:
        lines, source = list(preset.keep), Text("preset {preset}", preset=preset.name)
    for line in lines:
        try:
            patterns.append(written.compile(line))
        except re.error as error:
            raise CheckpointError(Text("keep_high_precision: {error}", error=error), line,
                                  Text("each line is a Python regular expression, looked for in module names")
                                  ) from error
    choice, used = _Choice(), set()
    for name, module in modules.items():
        found = [p.pattern for p in patterns if any(p.search(other) for other in (name, *also.get(name, ())))]
        used.update(found)
        if hasattr(module.weight, "_layout_cls") or str(module.weight.dtype).startswith("torch.float8"):
            choice.already.append(name)
        elif str(module.weight.dtype) not in FLOATS or module.weight.ndim != 2:
            raise CheckpointError(Text("the weight is {dtype} in a form ComfyUI itself does not have",
                                       dtype=module.weight.dtype), name,
                                  Text("connect a model in BF16, FP16 or FP32"))
        elif found:
            choice.kept.append(name)
        elif module.out_features % MULTIPLE or module.in_features % MULTIPLE:
            choice.odd.append(name)
        else:
            choice.quantize.append(name)
    choice.unmatched = [p.pattern for p in patterns if p.pattern not in used] if keep.strip() else []
    return choice, source


def _other_names(model: Any) -> tuple[dict[str, tuple[str, ...]], Preset]:
    """Native -> diffusers' module names (several for a fused one), and what the published quantized checkpoints of this
    architecture keep in high precision."""
    name, dims = base_of(model)
    architecture = next((a for a in ARCHITECTURES if a.name == name), None)
    if architecture is None:  # one that only the host knows: native names only
        return {}, NONE
    network = model.model.diffusion_model
    shapes = {key: TensorInfo("BF16", tuple(parameter.shape), 0, 0) for key, parameter in network.named_parameters()}
    naming = architecture.naming(shapes.keys()) or Naming("native")
    dims = architecture.dims_from_tensors(shapes, naming) | dims  # the host's settings do not tell every size
    preset = next((p for p in PRESETS.values() if p.class_name in architecture.class_names), NONE)
    return {m.native: tuple(other for stored in m.stored for other in variants(stored, ""))
            for m in architecture.modules(dims, Naming("diffusers"))}, preset


def _kernels(wanted: str, modules: dict[str, Any]) -> Choice:
    """Who multiplies the new layers, and those that are in the host's INT8 already."""
    from ..quant.kernels.choose import Wanted, choose, here
    from ..quant.layout_names import is_int8

    int8 = any(hasattr(module.weight, "_layout_cls") and is_int8(module.weight) for module in modules.values())
    codecs = [KIND, *(("w8a8_dynamic",) if int8 else ())]
    return choose(Wanted(backend=wanted), codecs, here(codecs))


def _layer(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of one layer in the host's MXFP8, made on the host's device."""
    import torch

    from ..quant.ascend.mx import quantize_weight
    from ..quant.layouts.join import join
    from ..quant.tile import Place, Tile

    rows = max(1, SLICE // weight.shape[1])  # quantizing takes several F32 copies; rows do not know of each other
    try:
        parts = [quantize_weight(part.to(host.compute_device())) for part in weight.detach().split(rows)]
        codes, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        shape = (weight.shape[0], weight.shape[1])
        layer = join([Tile(Place(KIND, *shape), {"codes": codes, "scale": scale})], [name], shape)
    except ValueError as error:
        raise CheckpointError(error, name,
                              Text("get the model again; its weights are damaged")) from error
    return {f"{name}.{leaf}": tensor.to("cpu") for leaf, tensor in layer.tensors.items()}


def _to_host(tensors: dict[str, torch.Tensor], model: Any, modules: dict[str, Any], chosen: dict[str, str]) -> Any:
    """The new weights through the host's loader. Raises CheckpointError unless the same model comes out."""
    made_by = model.get_attachment(host.ATTACHMENT)
    operations = host.mixed_operations_in(model.model.get_dtype_inference(),
                                          native=getattr(made_by, "compute", "") == "native")
    options = {"custom_operations": _operations(operations, modules, chosen), "dtype": model.model.get_dtype()}
    fresh = host.load_state_dict(dict(tensors), options=options, disable_dynamic=not model.is_dynamic())
    old, new = host.model_identity(model.model), host.model_identity(fresh.model) if fresh is not None else {}
    differences = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    names, there = ({name for name, _ in m.model.diffusion_model.named_parameters()} if m is not None else set()
                    for m in (model, fresh))
    if differences or names != there:
        raise CheckpointError(Text("ComfyUI {version} does not make the same model of these tensors: {differences}",
                                   version=host.version(),
                                   differences=first_ten(sorted(differences) or sorted(names ^ there))),
                              type(model.model).__name__,
                              Text("this model cannot be quantized here; report it"))
    return fresh


def _operations(operations: Any, modules: dict[str, Any], chosen: dict[str, str]) -> Any:
    """The host's mixed operations, with what multiplies the layers that are in tiles already."""
    from ..quant.layouts.tiled import is_tiled
    from ..quant.linear import with_tiles_of

    kernels = {place.codec: name for module in modules.values() if is_tiled(module.weight)
               for place, name in zip(module.weight._params.tiles, module.weight._params.kernels, strict=True) if name}
    return with_tiles_of(operations, kernels | chosen)


def _dress(model: Any, fresh: Any, keep: str, backend: str) -> Any:
    """Patches, options and hooks of `model` around the new weights, computing in the same dtype."""
    dtype = model.model.get_dtype_inference()
    if fresh.model.get_dtype_inference() != dtype:
        fresh.set_model_compute_dtype(dtype)
    init = model.cached_patcher_init
    fresh.cached_patcher_init = (rebuild, (init, keep, backend)) if init else None
    for key in (host.ATTACHMENT, host.SOURCES):
        fresh.set_attachments(key, model.get_attachment(key))
    patcher = host.carry_over(model, fresh)
    attach_lora(patcher)
    there = patcher.model_state_dict().keys() if model.patches else ()
    lost = [key for key in model.patches if key not in there]
    if lost:
        raise CheckpointError(Text("the MODEL's patches do not fit: {patches}", patches=first_ten(lost)), "",
                              Text("connect LoRAs behind this node"))
    return patcher


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _list(names: list[str]) -> str:
    return Text("{count}: {names}", count=len(names), names=first_ten(names)) if names else Text("none")

