"""A request -> the host's MODEL. The only place that calls the host's loader.

Every MODEL carries how it was made (`cached_patcher_init`), so the host can rebuild it from disk for multi-GPU, compile
and non-dynamic clones.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import host
from ..host.texts import Text, joined
from ..quant.stored import PLAIN_DTYPES
from . import attention, damage
from .architectures import ARCHITECTURES, Architecture, Dims, Naming, by_name, diffusers_classes
from .architectures.base import tensor_name
from .architectures.derived import Translated
from .architectures.passthrough import BY_HEADER, HostModel, sizes
from .containers.checkpoint import Checkpoint
from .describe import describe_config, read
from .description import CheckpointDescription
from .errors import CheckpointError
from .families import named
from .files.selection import WEIGHTS
from .files.source import Source, read_json
from .locate import companions_of, locate
from .prepare import prepare
from .report import load_report
from .words import first_ten

if TYPE_CHECKING:
    import torch

DTYPES = {"default": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What to load and how; plain values, so that the host can keep it and load again.

    `base` is (architecture name, sizes) that the checkpoint must fit, for weights that go into another's configuration.
    `family` is set where only its files will do; `choices` is what only that family knows of, handed on unread.
    `pipeline` is the transformer's folder of the base, beside which components may lie that belong to the checkpoint.
    """

    reference: str
    component: str = "transformer"
    weights_name: str = ""
    revision: str = ""
    dtype: str = "default"
    compute: str = "auto"
    fp4_backend: str = "auto"
    download: bool = False
    base: tuple[str, tuple[tuple[str, int], ...]] | None = None
    family: str = ""
    choices: Any = None
    backend: str = ""
    byte_order: str = "auto"
    pipeline: str = ""

    @property
    def wanted(self) -> Any:
        """What the widgets that are about speed say, as one value."""
        from ..quant.kernels.choose import Wanted

        return Wanted(self.compute, self.fp4_backend, self.backend)


@dataclass(frozen=True)
class Loaded:
    """A MODEL, what it was made from, and the report for the user. `lora_beside`: whether weights
    are quantized, and LoRAs stay beside them. `by_host`: what it is was asked of the host."""

    patcher: Any
    description: CheckpointDescription
    report: str
    lora_beside: bool = False
    by_host: bool = False


def load(request: Request, disable_dynamic: bool = False, quiet: bool = False,
         must_be: tuple[str, Dims] | None = None) -> Loaded:
    """Load a transformer with its weights. Raises CheckpointError for anything that is not certain to be right.

    `must_be` is the architecture and sizes a component must have to replace a base; it is checked before any weight is
    read. `quiet` leaves the progress bar alone.
    """
    checkpoint = Checkpoint(_locate(request))
    base = (by_name(request.base[0]), dict(request.base[1])) if request.base else None
    family, plan = read(checkpoint, base)
    description = plan.description
    if request.family or request.choices is not None:
        (named(request.family) if request.family else family).require(checkpoint, description, request.choices)
    description.require_loadable()
    family.settle(checkpoint, plan, request.byte_order)
    if must_be:
        refuse_other_model(description, *must_be)
    if description.formats.keys() - PLAIN_DTYPES:
        host.require("quantized layers")  # before any code that imports comfy-kitchen
    native, operations = prepare(family, checkpoint, plan, request.wanted,
                                 (lambda: None) if quiet else host.progress(len(plan.modules)), dtype_of(request.dtype))
    preferences = attention.tensors(checkpoint, description.naming)
    native.tensors.update(preferences)
    by_host = plan.architecture if isinstance(plan.architecture, HostModel) else None
    patcher = _to_host(native.tensors, request.dtype, operations, disable_dynamic,
                       metadata=by_host.metadata if by_host else None,
                       beside=by_host.network.beside if by_host else ())
    if by_host:
        description.dims.update(by_host.confirm(patcher))
    if preferences and not host.takes_attention_preferences(patcher, preferences):
        native.notes.append(Text("this ComfyUI takes no attention preferences of model files, or not these: its own "
                                 "choice of attention runs, and they are not saved with the MODEL"))
    if native.layouts:
        attach_lora(patcher)
    if native.unread:
        damage.watch(patcher, native.unread, description.reference, plan.hint)
    patcher.cached_patcher_init = (rebuild, (request,))
    patcher.set_attachments(host.ATTACHMENT, request)
    patcher.set_attachments(host.SOURCES, checkpoint.frozen.behind(WEIGHTS))
    return Loaded(patcher, description, load_report(description, native), bool(native.layouts), bool(by_host))


def rebuild(request: Request, disable_dynamic: bool = False) -> Any:
    """Load `request` again, from disk; the factory behind `cached_patcher_init`."""
    return load(replace(request, download=False), disable_dynamic, quiet=True).patcher


def defer(request: Request, disable_dynamic: bool = False) -> Loaded:
    """A MODEL of the right architecture and sizes without weights, from config.json alone.

    It takes LoRAs and patches as any MODEL does; sampling or saving it raises CheckpointError. Weight files need not
    exist and are not opened.
    """
    checkpoint = Checkpoint(locate(request.reference, component=request.component, revision=request.revision,
                                   need_weights=False, download=request.download))
    architecture, dims = describe_config(checkpoint)
    patcher = _to_host(_empty_tensors(architecture, dims), request.dtype, None, disable_dynamic, deferred=True,
                       metadata=architecture.metadata if isinstance(architecture, HostModel) else None)
    host.refuse_to_run(patcher, lambda: CheckpointError(
        Text("this {architecture} model has no weights yet (weights: defer to override)",
             architecture=architecture.name), checkpoint.source.reference,
        Text("connect it to Apply Transformer Override, or set weights to 'load'")))
    patcher.cached_patcher_init = (rebuild_deferred, (request,))
    description = CheckpointDescription(request.reference, [], 0, architecture.name, Naming("diffusers"), dims, "none",
                                        notes=[Text("no weights: they come from an override")])
    patcher.set_attachments(host.ATTACHMENT, request)
    patcher.set_attachments(host.SOURCES, None)
    return Loaded(patcher, description, load_report(description, None))


def rebuild_deferred(request: Request, disable_dynamic: bool = False) -> Any:
    """Defer `request` again, from disk; the factory behind `cached_patcher_init`."""
    return defer(replace(request, download=False), disable_dynamic).patcher


def override(model: Any, request: Request, kind: str = "auto") -> Loaded:
    """A new MODEL with the weights of `request` and everything else (patches, options, hooks, dtype) of `model`.

    `kind` "component" takes config and weights from the override, "weights" keeps the base's configuration, "auto"
    decides by config.json beside the weights. `model` is not changed. Raises CheckpointError when the override does
    not fit the base.
    """
    bound = host.bound_to_weights(model)
    if bound:
        raise CheckpointError(Text("the MODEL carries {bound}, which would keep using the base's weights", bound=bound),
                              "", Text("connect Apply Transformer Override directly behind the base model"))
    name, dims = base_of(model)
    source = _locate(request)
    config = read_json(source.config) if source.config else None
    if kind == "component" and source.config is None:
        raise CheckpointError(Text("there is no config.json, so this is no component"), source.folder,
                              Text("set kind to 'weights', or give the component's folder"))
    as_weights = kind == "weights" or kind == "auto" and source.config is None
    made_by = model.get_attachment(host.ATTACHMENT)
    request = replace(request, base=(name, tuple(dims.items())) if as_weights else None,
                      dtype=made_by.dtype if made_by else request.dtype,
                      pipeline=_pipeline(made_by) if made_by and diffusers_classes.companions(config) else "")
    loaded = load(request, must_be=None if as_weights else (name, dims))
    if loaded.by_host:
        refuse_other_model(loaded.description, host.config_name(model.model), sizes(host.model_identity(model.model)))
    patcher = host.carry_over(model, loaded.patcher)
    if loaded.lora_beside:
        attach_lora(patcher)
    there = patcher.model_state_dict().keys() if model.patches else ()
    lost = [key for key in model.patches if key not in there]
    if lost:
        from ..quant.patches.saving import is_piece

        lost = [key for key in lost if not is_piece(key)]
    if lost:
        raise CheckpointError(Text("the MODEL's patches do not fit the override: {lost}", lost=first_ten(lost)),
                              request.reference, Text("connect LoRAs behind the override"))
    lines = [Text("override as weights only") if as_weights else
             Text("override as component (config and weights)"), loaded.report]
    if model.patches:
        lines.append(Text("patches carried over from the base MODEL: {count}", count=len(model.patches)))
    return replace(loaded, patcher=patcher, report=joined("\n", lines))


def base_of(model: Any) -> tuple[str, Dims]:
    """Architecture name and sizes of any MODEL, ours or another loader's."""
    unet_config = model.model.model_config.unet_config
    for architecture in ARCHITECTURES:
        dims = architecture.dims_from_model(unet_config)
        if dims is not None and host.config_name(model.model) not in BY_HEADER:
            return architecture.name, dims
    return host.config_name(model.model), sizes(host.model_identity(model.model))


def refuse_other_model(description: CheckpointDescription, name: str, dims: Dims) -> None:
    """Raise CheckpointError unless the description is of this architecture and these sizes."""
    if description.architecture != name:
        raise CheckpointError(Text("the override is {architecture}, but the base model is {name}",
                                   architecture=description.architecture, name=name),
                              description.reference, Text("choose an override made for this base"))
    own = {key: description.dims.get(key, 0) for key in dims}  # told by neither tensors nor config: not switched on
    differences = [Text("{key} {size} (base {base})", key=key, size=own[key], base=dims[key])
                   for key in dims if dims[key] != own[key]]
    if differences:
        raise CheckpointError(Text("the override is another {name} than the base: {differences}", name=name,
                                   differences=joined(", ", differences)),
                              description.reference, Text("choose an override made for this base"))


def dtype_of(word: str) -> Any:
    """A word of DTYPES as torch's dtype, or None."""
    import torch

    return getattr(torch, DTYPES[word] or "", None)


def _pipeline(base: Request) -> str:
    """The folder of a base's transformer, whose weights need not be there."""
    return locate(base.reference, component=base.component, revision=base.revision, need_weights=False).folder


def _locate(request: Request) -> Source:
    source = locate(request.reference, component=request.component, weights_name=request.weights_name,
                    revision=request.revision, download=request.download, choices=request.choices)
    if request.pipeline and not source.companions:
        source = source._replace(companions=companions_of(source, request.pipeline))
    return source


def attach_lora(patcher: Any) -> None:
    """LoRAs and other patches of the host's nodes stay beside quantized weights."""
    from ..quant.patches import loading

    loading.attach(patcher)


def _to_host(tensors: dict[str, torch.Tensor], dtype: str, operations: Any, disable_dynamic: bool,
             deferred: bool = False, metadata: dict[str, str] | None = None, beside: Collection[str] = ()) -> Any:
    """The one call into the host's loader, and the check that it used every tensor it was given. `metadata` are the
    file's, where the host's detection is to see them; `beside` are tensors that are not for its network."""
    import torch

    options: dict[str, Any] = {}
    quantized = any(name.endswith(".comfy_quant") for name in tensors)
    chosen = dtype_of(dtype)
    if chosen is not None:
        options["dtype"] = chosen
    if operations is not None:
        options["custom_operations"] = operations
    given = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items() if name not in beside}
    to_model = host.load_without_memory if deferred else host.load_state_dict
    try:
        patcher = to_model(tensors, options=options, disable_dynamic=disable_dynamic,
                           **({"metadata": metadata} if metadata else {}))
    except ValueError as error:  # our Linears check what they are given
        raise CheckpointError(error, "",
                              Text("download the checkpoint again, or report it")) from error
    if patcher is None:
        raise CheckpointError(Text("ComfyUI did not recognise the converted model"), "",
                              Text("update ComfyUI, or report this"))
    _check_names(patcher, given)
    if quantized and chosen is not None:
        patcher.set_model_compute_dtype(chosen)  # the host ignores `dtype` for quantized weights
    return patcher


def _check_names(patcher: Any, given: dict[str, torch.Tensor]) -> None:
    """The host only logs missing and unexpected tensors; here they are errors. `given` are on the meta device."""
    names = [name for name in given if not name.endswith((host.PREFERENCE, ".comfy_quant"))
             and not name.rpartition(".")[2].startswith("weight_")]  # pieces of a quantized weight
    wanted = host.native_names(patcher.model, {name: given[name] for name in names})
    there = {name for name, _ in patcher.model.diffusion_model.named_parameters()}
    marks = {name for name, _ in patcher.model.diffusion_model.named_buffers()}
    missing, unused = sorted(there - wanted), sorted(wanted - there - marks)
    if missing or unused:
        raise CheckpointError(
            Text("ComfyUI {version} expects other tensors for this architecture: missing {missing}; unused {unused}",
                 version=host.version(), missing=first_ten(missing) or "-", unused=first_ten(unused) or "-"), "",
            Text("update this pack and ComfyUI, or report this"))


def _empty_tensors(architecture: Architecture, dims: Dims) -> dict[str, torch.Tensor]:
    """The native tensors of a model of these sizes, on the meta device: shapes and no bytes."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    if isinstance(architecture, Translated):
        return {name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
                for name, shape in architecture.native.items()}
    for module in architecture.modules(dims, Naming("native")):
        rows = sum(module.rows)
        tensors[tensor_name(module.native, module.leaf)] = torch.empty(rows, *module.inner, dtype=torch.bfloat16,
                                                                       device="meta")
        if module.bias:
            tensors[f"{module.native}.bias"] = torch.empty(rows, dtype=torch.bfloat16, device="meta")
    for mark in architecture.marks(dims):
        tensors[mark] = torch.empty(0, device="meta")
    return tensors
