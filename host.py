"""The one seam to ComfyUI: everything this pack uses of the host comes through here, public entry points only.

Imports happen inside the functions, so that headers can be read and described without torch or ComfyUI.
Where hosts differ, ask for the capability, not the version.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OWN_FOLDER_KEY = "diffusers_components"
MODEL_FOLDER_KEYS = (OWN_FOLDER_KEY, "diffusers", "diffusion_models")
ATTACHMENT = "quantized_transformers"


def version() -> str:
    """ComfyUI's version, or "not found" outside of it."""
    try:
        import comfyui_version
        return comfyui_version.__version__
    except ImportError:
        return "not found"


def ready() -> None:
    """Import the host's loader ahead of use, so that what follows can be timed."""
    import comfy.sd  # noqa: F401


def register_model_folder() -> None:
    """Add models/diffusers_components to ComfyUI's folders, beside what extra_model_paths.yaml says of that key."""
    import folder_paths

    folder_paths.add_model_folder_path(OWN_FOLDER_KEY, os.path.join(folder_paths.models_dir, OWN_FOLDER_KEY))


def model_folders() -> list[str]:
    """The folders ComfyUI keeps models in (extra_model_paths.yaml included); empty outside ComfyUI."""
    try:
        import folder_paths
    except ImportError:
        return []
    folders: list[str] = []
    for key in MODEL_FOLDER_KEYS:
        paths = folder_paths.folder_names_and_paths.get(key, ([], set()))[0]
        folders += [path for path in paths if path not in folders]
    return folders


def cached_snapshot(repo: str, revision: str = "") -> str | None:
    """The folder of a repo that is in the Hugging Face cache, complete or not, or None. Never opens a connection."""
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(repo, revision=revision or None, local_files_only=True)
    except (ImportError, OSError, ValueError) as error:  # no huggingface_hub, not cached, an invalid id: "not here",
        return getattr(error, "snapshot_path", None)  # or some files of the repo are (IncompleteSnapshotError)


def load_file(path: str) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, memory-mapped the way this host streams them."""
    import comfy.utils

    return comfy.utils.load_torch_file(path)


def load_state_dict(tensors: dict[str, torch.Tensor], *, options: dict[str, Any] | None = None,
                    disable_dynamic: bool = False) -> Any:
    """Native tensors → the host's ModelPatcher, or None when the host does not know the architecture."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options or {},
                                                    disable_dynamic=disable_dynamic)


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


def native_names(model: Any, names: list[str]) -> set[str]:
    """The names that the host's architecture gives these native tensor names (it renames a few while loading)."""
    return set(model.model_config.process_unet_state_dict(dict.fromkeys(names)))


def device_name() -> str:
    """The device the host runs models on, in words."""
    import comfy.model_management

    return comfy.model_management.get_torch_device_name(comfy.model_management.get_torch_device())


def has_matmul(kind: str) -> bool:
    """Whether the host multiplies "FP8" (NVIDIA SM 8.9+) or "NVFP4" (SM 10.0+) natively on its device."""
    import comfy.model_management as management

    supports = {"FP8": management.supports_fp8_compute, "NVFP4": management.supports_nvfp4_compute}[kind]
    return bool(supports(management.get_torch_device()))


def capability() -> tuple[int, int] | None:
    """The CUDA compute capability of the host's device, or None."""
    import comfy.model_management
    import torch

    device = comfy.model_management.get_torch_device()
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else None


def is_cpu() -> bool:
    """Whether the host runs models on the CPU."""
    import comfy.model_management

    return bool(comfy.model_management.is_device_cpu(comfy.model_management.get_torch_device()))


def progress(total: int) -> Callable[..., None]:
    """A function to call with how far it went (1 by default): moves the node's progress bar and honours Cancel.

    It does nothing outside of ComfyUI.
    """
    if "comfy" not in sys.modules:
        return lambda amount=1: None
    import comfy.model_management
    import comfy.utils

    bar = comfy.utils.ProgressBar(total)

    def step(amount: int = 1) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if total:
            bar.update(amount)

    return step


def load_without_memory(tensors: dict[str, torch.Tensor], *, options: dict[str, Any],
                        disable_dynamic: bool = False) -> Any:
    """As load_state_dict, for meta tensors: a model whose weights have shapes and dtypes but no memory."""
    import comfy.model_base
    import torch

    options = {**options, "offload_device": torch.device("cpu")}  # meta tensors cannot move to another
    with torch.device("meta"):
        patcher = load_state_dict(tensors, options=options, disable_dynamic=disable_dynamic)
    if patcher is not None:  # the noise schedule is real: nodes read sigmas from a MODEL before it runs
        model = patcher.model
        model.model_sampling = comfy.model_base.model_sampling(model.model_config, model.model_type)
    return patcher


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


def refuse_to_run(patcher: Any, error: Callable[[], Exception]) -> None:
    """Make every use of the model's weights (sampling, saving) raise what `error` returns, before anything is moved."""
    patcher.set_model_patch(_Refusal(error), ATTACHMENT)


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
    clone.attachments[ATTACHMENT] = fresh.attachments[ATTACHMENT]
    clone.object_patches = {**fresh.object_patches, **clone.object_patches}  # what a user set on the base wins
    return clone


def bound_to_weights(patcher: Any) -> str:
    """What on a patcher holds on to its present weights and could not follow to others; empty when nothing does."""
    if "torch_compile_kwargs" in patcher.model_options:
        return "a compiled model (torch.compile)"
    modules = [key for key in patcher.object_patches if key.startswith("diffusion_model.")]
    if modules:
        return f"patched modules ({', '.join(modules[:3])})"
    if patcher.injections:
        return f"injected modules ({', '.join(list(patcher.injections)[:3])})"
    return ""


def environment() -> dict[str, str]:
    """The environment variables that steer this pack, for the doctor."""
    names = ("COMFYUI_PATH", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE")
    return {name: os.environ[name] for name in names if name in os.environ}


def load_text_encoders(state_dicts: list[dict[str, torch.Tensor]], clip_type: str, configs: dict[str, dict[str, Any]],
                       dtype: torch.dtype | None = None, disable_dynamic: bool = False) -> Any:
    """Text encoders in the host's names → its CLIP.

    `clip_type` is a member of its CLIPType; `configs` are entries of its model configs, by its name of the encoder.
    Raises RuntimeError (torch) for tensors of other shapes than the configs say.
    """
    import comfy.sd
    import folder_paths

    options: dict[str, Any] = {f"{name}_model_config": dict(config) for name, config in configs.items()}
    if "clip_l" in configs:  # where it measures CLIP's positions it puts this one in the place of clip_l's
        options["model_config"] = dict(configs["clip_l"])
    if dtype is not None:
        options["dtype"] = dtype
    return comfy.sd.load_text_encoder_state_dicts(
        state_dicts, embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=comfy.sd.CLIPType[clip_type], model_options=options, disable_dynamic=disable_dynamic)


def text_encoder_shapes(clip: Any, name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the encoder `name` of a CLIP is made of.

    Shapes are those of the modules' sizes: a host with lazy weights takes a tensor of any shape.
    """
    model = getattr(clip.cond_stage_model, name).transformer
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for module_name, module in model.named_modules():
        if f"{module_name}.weight" in shapes and hasattr(module, "out_features"):
            shapes[f"{module_name}.weight"] = (module.out_features, module.in_features)
        if f"{module_name}.weight" in shapes and hasattr(module, "num_embeddings"):
            shapes[f"{module_name}.weight"] = (module.num_embeddings, module.embedding_dim)
    return shapes


def text_encoder_dtype(clip: Any, name: str) -> str:
    """The dtype in which the encoder `name` of a CLIP is kept (it computes in F32), as "bfloat16"."""
    return str(getattr(clip.cond_stage_model, name).transformer.dtype).removeprefix("torch.")


def is_instance_of(value: Any, class_name: str) -> bool:
    """Whether the class of a host's object, or one of its base classes, has this name."""
    return any(cls.__name__ == class_name for cls in type(value).__mro__)


def tokenizer_of(clip: Any, name: str) -> Any:
    """The host's tokenizer (an SDTokenizer) of the encoder `name` of a CLIP."""
    tokenizer = clip.tokenizer
    return getattr(tokenizer, name) if hasattr(tokenizer, name) else getattr(tokenizer, f"clip_{name}")


def follow_tokenizer_json(tokenizer: Any, path: str, probe: str) -> bool:
    """Let one of the host's tokenizers split text as tokenizer.json at `path` says; whether it did not, on `probe`.

    transformers 5 builds what is called LlamaTokenizerFast in its own way, whatever tokenizer.json says; this host asks
    for that class. Only this tokenizer is changed, and only when the two disagree.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    stated = Tokenizer.from_file(path)
    if tokenizer.tokenizer(probe)["input_ids"] == stated.encode(probe).ids:
        return False
    tokenizer.tokenizer = PreTrainedTokenizerFast(tokenizer_object=stated)
    return True

def bundled_tokenizer(*path: str) -> str:
    """A file of a tokenizer that the host brings along, below its `comfy` folder."""
    import comfy.sd1_clip

    return os.path.join(os.path.dirname(comfy.sd1_clip.__file__), *path)


def free_memory(device: torch.device) -> int:
    """Bytes that the host can give to a computation on a device now."""
    import comfy.model_management

    return int(comfy.model_management.get_free_memory(device))


def diffusers_vae_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of an AutoencoderKL under diffusers' names → the host's names, in the same order, as its loader does it.

    Its four Linear layers of attention become convolutions of size 1 (views).
    """
    import comfy.diffusers_convert

    return comfy.diffusers_convert.convert_vae_state_dict(tensors)


def latent_map(name: str, channels: int) -> tuple[list[float], list[float]]:
    """Slope and offset of each channel from a sampler's latent to a VAE's, by the host's latent format `name`."""
    import comfy.latent_formats
    import torch

    latents = getattr(comfy.latent_formats, name)()
    zero, one = (latents.process_out(make(1, channels, 1, 1, 1)).flatten() for make in (torch.zeros, torch.ones))
    return (one - zero).tolist(), zero.tolist()


def vae_module(kind: str, sizes: dict[str, Any]) -> Any:
    """One of the host's VAE networks: "kl" (AutoencoderKL: images, HunyuanVideo), "wan21" or "wan22".

    `sizes` are the arguments of the Wan networks, or {"encoder", "decoder": arguments, "embed": channels of the quant
    convolutions or None}.
    """
    import comfy.ldm.models.autoencoder as kl
    import comfy.ldm.wan.vae
    import comfy.ldm.wan.vae2_2

    if kind != "kl":
        return {"wan21": comfy.ldm.wan.vae, "wan22": comfy.ldm.wan.vae2_2}[kind].WanVAE(**sizes)
    if sizes["embed"]:
        return kl.AutoencoderKL(ddconfig=sizes["encoder"], decoder_ddconfig=sizes["decoder"],
                                embed_dim=sizes["embed"])
    halves = {f"{half}_config": {"target": f"comfy.ldm.modules.diffusionmodules.model.{half.capitalize()}",
                                 "params": sizes[half]} for half in ("encoder", "decoder")}
    return kl.AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"}, **halves)


def vae_tensors(kind: str, sizes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Names and shapes of the tensors of a VAE network, as meta tensors."""
    import torch

    with torch.device("meta"):
        return vae_module(kind, sizes).state_dict()


def load_vae(tensors: dict[str, torch.Tensor], dtype: str | None = None,
             metadata: dict[str, str] | None = None) -> Any:
    """Native tensors → the host's VAE; its `first_stage_model` is None when the host does not know them."""
    import comfy.sd
    import torch

    return comfy.sd.VAE(sd=tensors, dtype=getattr(torch, dtype) if dtype else None, metadata=metadata)


def load_vae_sized(tensors: dict[str, torch.Tensor], kind: str, sizes: dict[str, Any], published: dict[str, Any],
                   dtype: str | None = None) -> Any:
    """As load_vae, for a network of other sizes than the `published` ones that the host's constructor has fixed.

    The constructor makes its own, without memory, which settles ratios, devices, dtypes and memory estimates; then the
    network inside is exchanged for one of these sizes.
    """
    import comfy.model_management
    import comfy.model_patcher
    import torch

    with torch.device("meta"):
        vae = load_vae(vae_tensors(kind, published), dtype)
    module = vae_module(kind, sizes).eval().to(vae.vae_dtype)
    comfy.model_management.archive_model_dtypes(module)
    patcher = comfy.model_patcher.CoreModelPatcher(module, load_device=vae.patcher.load_device,
                                                   offload_device=vae.patcher.offload_device)
    module.load_state_dict(tensors, strict=False, assign=patcher.is_dynamic())
    vae.first_stage_model, vae.patcher, vae.size = module, patcher, None
    vae.model_size()
    return vae


@contextmanager
def tekken_read_by(read: Callable[[dict[str, Any]], str | None]) -> Iterator[None]:
    """While a CLIP is made, let `read` turn its `tekken_model` (parsed tekken.json) into the text of a tokenizer.json.

    The host makes this tokenizer inside its CLIP, by transformers' MistralConverter with the arguments of transformers
    4: newer ones refuse them (TypeError), and those of 4 pass over the pattern in the file. There is no other way in,
    so its function is exchanged for as long as this CLIP is made; where `read` returns None the host's own is asked.
    """
    import json

    import comfy.text_encoders.flux as flux
    import torch
    from tokenizers import Tokenizer

    theirs = flux.load_mistral_tokenizer

    def load_mistral_tokenizer(data: Any) -> dict[str, Any]:
        text = read(json.loads(data.numpy().tobytes() if torch.is_tensor(data) else data)) if data is not None else None
        return theirs(data) if text is None else {"tokenizer_object": Tokenizer.from_str(text), "legacy": False}

    flux.load_mistral_tokenizer = load_mistral_tokenizer
    try:
        yield
    finally:
        flux.load_mistral_tokenizer = theirs


# ------------------------------------------------- what quant/svdquant needs to patch and fetch weights


def calculate_weight(patches: list[tuple], weight: torch.Tensor, key: str) -> torch.Tensor:
    """A weight with the host's patches applied, in place where the host does so."""
    import comfy.lora

    return comfy.lora.calculate_weight(patches, weight, key)


def call_on_load(patcher: Any, key: str, callback: Callable[..., None]) -> None:
    """Call back (patcher, device, ...) whenever this patcher or a clone of it has loaded its model."""
    from comfy.patcher_extension import CallbacksMP

    patcher.remove_callbacks_with_key(CallbacksMP.ON_LOAD, key)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, key, callback)


def is_patching(code: Any) -> bool:
    """Whether a caller (its code object) is the host writing patches into a weight."""
    from comfy.model_patcher import ModelPatcher

    return code is ModelPatcher.patch_weight_to_device.__code__


def fetch_weight(module: Any, x: torch.Tensor) -> tuple[Any, Any, Callable[[Any, Any], None]]:
    """Weight (quantized as it is) and bias (in x's dtype) of a module on x's device, and what to call after use."""
    import comfy.model_management
    import comfy.ops

    if hasattr(module, "_v") and comfy.model_management.is_device_cpu(x.device):
        # Dynamic VRAM has no CPU side: the host would hand out a dequantized copy.
        bias = None if module.bias is None else module.bias.to(x.device, x.dtype)
        return module.weight.to(x.device), bias, lambda weight, bias: None
    weight, bias, stream = comfy.ops.cast_bias_weight(module, dtype=module.weight.dtype, device=x.device,
                                                      bias_dtype=x.dtype, offloadable=True, compute_dtype=x.dtype,
                                                      want_requant=True)
    return weight, bias, lambda weight, bias: comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def amd_architecture() -> str:
    """The architecture of an AMD GPU that the host runs models on ("gfx1100"); empty for any other device."""
    import comfy.model_management
    import torch

    device = comfy.model_management.get_torch_device()
    if device.type != "cuda" or not torch.version.hip:
        return ""
    return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]


def device_type() -> str:
    """The type of the device the host runs models on: "cuda", "npu", "cpu", ..."""
    import comfy.model_management

    return str(comfy.model_management.get_torch_device().type)


def unpatched_tensors(patcher: Any) -> dict[str, torch.Tensor]:
    """The tensors of a MODEL's diffusion model under its own names, without what is patched into it at present.

    Quantized layers come as the host saves them. Nothing is copied or moved.
    """
    from comfy.quant_ops import QuantizedTensor

    before = {key: kept[0] for key, kept in patcher.hook_backup.items()}
    before |= {key: kept.weight for key, kept in patcher.backup.items()}  # older than the hooks'
    before |= patcher.backup_buffers
    with patcher.use_ejected():
        tensors = dict(patcher.model.diffusion_model.state_dict())
    for key, tensor in before.items():
        name = key.removeprefix("diffusion_model.")
        if name in tensors:
            tensors |= tensor.state_dict(name) if isinstance(tensor, QuantizedTensor) else {name: tensor}
    if patcher.model.model_type.name == "V_PREDICTION":  # as the host marks it when it saves
        tensors["v_pred"] = tensors[next(iter(tensors))].new_empty(0)
    return tensors


def model_identity(model: Any) -> dict[str, Any]:
    """What must be equal for two of the host's models to be one but for their weights: class, kind of prediction and
    every size."""
    config = {key: value for key, value in model.model_config.unet_config.items() if key != "dtype"}
    return {"class": type(model).__name__, "prediction": model.model_type.name, **config}


def compute_device() -> torch.device:
    """The device the host runs models on."""
    import comfy.model_management

    return comfy.model_management.get_torch_device()


def mixed_operations_in(dtype: torch.dtype, native: bool = False) -> Any:
    """As mixed_operations, for a model that computes in `dtype`; layers that are not quantized are kept in it."""
    import comfy.ops

    if native:
        return comfy.ops.mixed_precision_ops({"mixed_ops": True}, dtype)
    return comfy.ops.pick_operations(None, dtype, load_device=compute_device(),
                                     model_config=SimpleNamespace(quant_config={"mixed_ops": True}))
