"""Tensors in and out of the host's MODEL, and MODELs carried over to other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .check import needs
from .devices import compute_device
from .memory import without_memory
from .texts import Text

if TYPE_CHECKING:
    import torch

ATTACHMENT = "quantized_transformers"
SOURCES = f"{ATTACHMENT}.sources"  # the files of a MODEL's weights
ATTENTION = ".comfy_attention"  # a module beside whose name a file can say which attention kernel it prefers
PREFERENCE = f"{ATTENTION}.config"
READ_AT_LOAD = (".comfy_quant", PREFERENCE)  # JSON, which cannot be read of a meta tensor


@needs("transformers")
def load_file(path: str) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, memory-mapped the way this host streams them."""
    import comfy.utils

    return comfy.utils.load_torch_file(path)


@needs("transformers")
def load_state_dict(tensors: dict[str, torch.Tensor], *, options: dict[str, Any] | None = None,
                    disable_dynamic: bool = False, metadata: dict[str, str] | None = None) -> Any:
    """Native tensors -> the host's ModelPatcher, or None when the host does not know the architecture. `metadata` are
    those of a file, for its detection."""
    import comfy.sd

    more: dict[str, Any] = {"metadata": metadata} if metadata else {}
    return comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options or {},
                                                    disable_dynamic=disable_dynamic, **more)


@needs("quantized layers")
def mixed_operations(tensors: dict[str, torch.Tensor], native: bool = False) -> Any:
    """The mixed-precision operations that the host would pick for these native tensors on its device.

    `native=True` keeps the quantized matmuls even where the host would emulate them.
    """
    import comfy.model_detection
    import comfy.model_management
    import comfy.ops

    config = comfy.model_detection.model_config_from_unet(tensors, "")
    device = comfy.model_management.get_torch_device()
    compute = comfy.model_management.unet_manual_cast(None, device, config.supported_inference_dtypes)
    if native:
        return comfy.ops.mixed_precision_ops({"mixed_ops": True}, compute)
    return comfy.ops.pick_operations(None, compute, load_device=device,
                                     model_config=SimpleNamespace(quant_config={"mixed_ops": True}))


@needs("quantized layers")
def mixed_operations_in(dtype: torch.dtype, native: bool = False) -> Any:
    """As mixed_operations, for a model that computes in `dtype`; layers that are not quantized are kept in it."""
    import comfy.ops

    if native:
        return comfy.ops.mixed_precision_ops({"mixed_ops": True}, dtype)
    return comfy.ops.pick_operations(None, dtype, load_device=compute_device(),
                                     model_config=SimpleNamespace(quant_config={"mixed_ops": True}))


@needs("transformers")
def native_names(model: Any, tensors: dict[str, torch.Tensor]) -> set[str]:
    """The names that the host's architecture gives native tensors (it renames, cuts or drops a few while loading)."""
    return set(model.model_config.process_unet_state_dict(dict(tensors)))


@needs("deferred transformers")
def load_without_memory(tensors: dict[str, torch.Tensor], *, options: dict[str, Any],
                        disable_dynamic: bool = False, metadata: dict[str, str] | None = None) -> Any:
    """As load_state_dict, for meta tensors: a model whose weights have shapes and dtypes but no memory."""
    import comfy.model_base
    import torch

    options = {**options, "offload_device": torch.device("cpu")}  # meta tensors cannot move to another
    tensors = {name: tensor for name, tensor in tensors.items() if not (tensor.is_meta and name.endswith(READ_AT_LOAD))}
    with without_memory():
        patcher = load_state_dict(tensors, options=options, disable_dynamic=disable_dynamic, metadata=metadata)
    if patcher is not None:  # the noise schedule is real: nodes read sigmas from a MODEL before it runs
        model = patcher.model
        model.model_sampling = comfy.model_base.model_sampling(model.model_config, model.model_type)
    return patcher


def takes_attention_preferences(patcher: Any, names: Iterable[str]) -> bool:
    """Whether the model of this host holds all these `<module>.comfy_attention.config`; hosts before 0.38 know none."""
    return set(names) <= patcher.model.diffusion_model.state_dict().keys()


class _Refusal:
    """A model patch that raises when the host casts it to the model's dtype: the first thing it does to load a model.

    Moves between devices are let through: the host makes those when it lets go of a model, too.
    """

    def __init__(self, error: Callable[[], Exception]) -> None:
        self.error = error

    def to(self, target: Any, *_args: Any, **_kwargs: Any) -> _Refusal:
        import torch

        if isinstance(target, torch.dtype):
            raise self.error()
        return self


@needs("deferred transformers")
def refuse_to_run(patcher: Any, error: Callable[[], Exception]) -> None:
    """Make every use of the model's weights (sampling, saving) raise what `error` returns, before anything is moved."""
    patcher.set_model_patch(_Refusal(error), ATTACHMENT)


@needs("overrides")
def carry_over(patcher: Any, fresh: Any) -> Any:
    """A clone of `patcher` (patches, options, hooks, wrappers) around the model of `fresh`; neither is changed.

    This is how the host itself re-homes a patcher (`deepclone_multigpu`), less what belongs to the old weights.
    """
    clone = patcher.clone(model_override=fresh.get_clone_model_override())
    clone.model_options["transformer_options"].get("patches", {}).pop(ATTACHMENT, None)
    clone.load_device, clone.offload_device = fresh.load_device, fresh.offload_device
    clone.size = 0  # measured again on the new weights
    clone.parent = None  # the parent's weights are others; the host must never fall back to them
    clone.clone_base_uuid = fresh.clone_base_uuid
    clone.hook_backup, clone.cached_hook_patches = {}, {}
    clone.cached_patcher_init = fresh.cached_patcher_init
    for key in (ATTACHMENT, SOURCES):
        clone.attachments[key] = fresh.get_attachment(key)
    if hasattr(fresh, "fast_disk"):  # of newer hosts: how the file of these weights lies
        clone.fast_disk = fresh.fast_disk
    clone.object_patches = {**fresh.object_patches, **clone.object_patches}  # what a user set on the base wins
    return clone


@needs("overrides")
def bound_to_weights(patcher: Any) -> str:
    """What on a patcher holds on to its present weights and could not follow to others; empty when nothing does."""
    if "torch_compile_kwargs" in patcher.model_options:
        return Text("a compiled model (torch.compile)")
    modules = [key for key in patcher.object_patches  # an attention preference of a LoRA file holds no weights
               if key.startswith("diffusion_model.") and not key.endswith(ATTENTION)]
    if modules:
        return Text("patched modules ({modules})", modules=", ".join(modules[:3]))
    if patcher.injections:
        return Text("injected modules ({injections})", injections=", ".join(list(patcher.injections)[:3]))
    return ""


@needs("overrides")
def unpatched_tensors(patcher: Any) -> dict[str, torch.Tensor]:
    """The tensors of a MODEL's diffusion model under its own names, and those beside it, without what is patched into
    it at present.

    Quantized layers come as the host saves them. Nothing is copied or moved.
    """
    from comfy.quant_ops import QuantizedTensor

    before = {key: kept[0] for key, kept in patcher.hook_backup.items()}
    before |= {key: kept.weight for key, kept in patcher.backup.items()}  # older than the hooks'
    before |= patcher.backup_buffers
    network, prefix = patcher.model.diffusion_model, "diffusion_model."
    with patcher.use_ejected():
        tensors = dict(network.state_dict())
    for name, module in network.named_modules():
        if hasattr(module, "bare_state"):  # of this pack: its state has the patches in it
            weight, bias = (before.pop(f"{prefix}{name}.{leaf}", None) for leaf in ("weight", "bias"))
            state = {f"{name}.{leaf}": tensor for leaf, tensor in module.bare_state(weight, bias).items()}
            tensors = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] != name} | state
    for key, tensor in before.items():
        name = key.removeprefix(prefix)
        if name in tensors:
            # a patched weight may have pieces that the one before has not
            tensors = {key: piece for key, piece in tensors.items() if key != name and not key.startswith(f"{name}_")}
            tensors |= tensor.state_dict(name) if isinstance(tensor, QuantizedTensor) else {name: tensor}
    tensors |= _beside(patcher.model)
    if patcher.model.model_type.name == "V_PREDICTION":  # as the host marks it when it saves
        tensors["v_pred"] = tensors[next(iter(tensors))].new_empty(0)
    return tensors


def _beside(model: Any) -> dict[str, torch.Tensor]:
    """What a model's files hold for what is around its network, as Stable Audio's, which cannot be made without; and
    what the host reads there and does not save: Stable Zero123's projection, the marks of SDXL that predicts otherwise.
    """
    import torch

    tensors = {name: tensor for name, tensor in model.state_dict_for_saving({}).items() if name != "v_pred"}
    tensors |= {name: tensor for name, tensor in model.named_parameters() if name.startswith("cc_projection.")}
    if type(model.model_config).__name__ == "SDXL" and model.model_type.name == "EDM":
        tensors |= {name: torch.zeros(0) for name in ("edm_mean", "edm_std")}
    elif type(model.model_config).__name__ == "SDXL" and model.model_type.name == "V_PREDICTION_EDM":
        settings = model.model_config.sampling_settings
        tensors |= {f"edm_vpred.{name}": torch.tensor(settings[name]) for name in ("sigma_max", "sigma_min")
                    if name in settings}
    return tensors


@needs("saving")
def tensors_for_saving(patcher: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(the tensors of a MODEL's diffusion model under its own names with what is patched into it, and those beside it,
    as the host's save nodes write them; those of them that have no values yet -> the weight whose `patched_tensors` has
    them).

    ComfyUI 0.30's own `state_dict_for_saving` is not asked: of each tensor that is not in VRAM it makes a torch
    Parameter, which integers (NVFP4, INT8) cannot be, and what its dynamic VRAM keeps loaded it patches twice.
    """
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    network, prefix = patcher.model.diffusion_model, "diffusion_model."
    tensors, modules = dict(network.state_dict()), dict(network.named_modules())

    def pieces(name: str, weight: Any) -> dict[str, torch.Tensor]:
        return weight.state_dict(name) if hasattr(weight, "_qdata") else {name: weight}

    # What is kept aside is what the host has patched, or has cast to another dtype for this device.
    for key, kept in {**{key: kept.weight for key, kept in patcher.backup.items()}, **patcher.backup_buffers}.items():
        name = key.removeprefix(prefix)
        if name in tensors and key not in patcher.patches:
            tensors |= pieces(name, kept)
    pending: dict[str, str] = {}
    for key in patcher.patches.keys() - patcher.backup.keys():
        name = key.removeprefix(prefix)
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and hasattr(modules.get(module), "bare_state") and \
                hasattr(modules[module].weight, "_qdata") or leaf not in ("weight", "bias"):
            continue  # its state has the patches in it; other tensors of a layer are not what is patched
        if name in tensors and hasattr(modules.get(module), "comfy_cast_weights"):
            pending |= {piece: name for piece in pieces(name, getattr(modules[module], leaf)) if piece in tensors}
    tensors |= _beside(patcher.model)
    if patcher.model.model_type.name == "V_PREDICTION":
        marks = ["v_pred", *(["ztsnr"] if getattr(patcher.get_model_object("model_sampling"), "zsnr", False) else [])]
        tensors |= dict.fromkeys(marks, next(iter(tensors.values())).new_empty(0, device="cpu"))
    return tensors, pending


@needs("saving")
def patched_tensors(patcher: Any, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one weight of a MODEL's diffusion model with its patches in it, on the CPU; the patched weight is
    made for this and let go. Raises NotImplementedError where a weight cannot take the patches."""
    weight = patcher.patch_weight_to_device(f"diffusion_model.{name}", device_to=patcher.load_device,
                                            return_weight=True).to("cpu")
    return weight.state_dict(name) if hasattr(weight, "_qdata") else {name: weight}


@needs("saving")
def quantized_weight(patcher: Any, name: str) -> Any:
    """The quantized weight of a layer of a MODEL's diffusion model that has patches, without them; else None."""
    key = f"diffusion_model.{name}.weight"
    if key not in patcher.patches:
        return None
    weight = patcher.backup[key].weight if key in patcher.backup else patcher.get_model_object(key)
    return weight if hasattr(weight, "_qdata") else None


@needs("quantized layers")
def quantized_formats() -> set[str]:
    """The formats of `comfy_quant` markers that this host loads by itself."""
    from comfy.quant_ops import QUANT_ALGOS

    return set(QUANT_ALGOS)


def model_identity(model: Any) -> dict[str, Any]:
    """What must be equal for two of the host's models to be one but for their weights: class, kind of prediction and
    every size; not what is chosen for the device (dtype) or read from values (allow_fp16)."""
    config = {key: value for key, value in model.model_config.unet_config.items() if key not in ("dtype", "allow_fp16")}
    return {"class": type(model).__name__, "prediction": model.model_type.name, **config}
