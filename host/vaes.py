"""The host's VAE networks and latent formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .check import needs, version
from .errors import CheckpointError
from .memory import without_memory
from .texts import Text

if TYPE_CHECKING:
    import torch

NETWORKS = {"cogvideox": ("cogvideo.vae", "AutoencoderKLCogVideoX"),
            "cosmos": ("cosmos.vae", "CausalContinuousVideoTokenizer"),
            "ltx2_audio": ("lightricks.vae.audio_vae", "AudioVAE"),
            "ltxv": ("lightricks.vae.causal_video_autoencoder", "VideoVAE"), "wan21": ("wan.vae", "WanVAE"),
            "wan22": ("wan.vae2_2", "WanVAE")}
# A network that has its sizes in its code, and the classes of both halves beside it
HALVES = {"mochi": ("genmo.vae.model", "VideoVAE")}
# An encoder and a decoder of one module, and what makes a latent of the encoder's output
ENGINES = {"hunyuan_image": ("hunyuan_video.vae", "DiagonalGaussianRegularizer"),
           "hunyuan_15": ("hunyuan_video.vae_refiner", "EmptyRegularizer")}


@needs("VAEs")
def diffusers_vae_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of an AutoencoderKL under diffusers' names -> the host's names, in the same order, as its loader does it.

    Its four Linear layers of attention become convolutions of size 1 (views).
    """
    import comfy.diffusers_convert

    return comfy.diffusers_convert.convert_vae_state_dict(tensors)


@needs("VAEs")
def latent_map(name: str, channels: int) -> tuple[list[float], list[float]]:
    """Slope and offset of each channel from a sampler's latent to a VAE's, by the host's latent format `name`."""
    import comfy.latent_formats
    import torch

    latents = getattr(comfy.latent_formats, name)()
    zero, one = (latents.process_out(make(1, channels, 1, 1, 1)).flatten() for make in (torch.zeros, torch.ones))
    return (one - zero).tolist(), zero.tolist()


@needs("VAEs")
def vae_module(kind: str, sizes: dict[str, Any]) -> Any:
    """One of the host's VAE networks: "kl" (AutoencoderKL: images, HunyuanVideo), one of NETWORKS, HALVES or ENGINES.

    `sizes` are the arguments of the network's class, of HALVES {"encoder", "decoder": arguments}, or of "kl" the same
    with "embed": channels of the quant convolutions or None.
    """
    from importlib import import_module

    import comfy.ldm.models.autoencoder as kl

    module, name = {**NETWORKS, **HALVES, **ENGINES}.get(kind, ("models.autoencoder", "AutoencoderKL"))
    try:
        network = import_module(f"comfy.ldm.{module}")
    except ImportError as error:
        raise CheckpointError(Text("ComfyUI {version} has no VAE of this kind ({kind})", version=version(), kind=kind),
                              "", Text("update ComfyUI")) from error
    if kind in NETWORKS:
        return getattr(network, name)(**sizes)
    if kind in HALVES:
        with without_memory():
            made = getattr(network, name)()
        made.encoder, made.decoder = network.Encoder(**sizes["encoder"]), network.Decoder(**sizes["decoder"])
        return made
    if kind in ENGINES:
        halves = {f"{half}_config": {"target": f"comfy.ldm.{module}.{half.capitalize()}", "params": sizes}
                  for half in ("encoder", "decoder")}
        return kl.AutoencodingEngine(
            regularizer_config={"target": f"comfy.ldm.models.autoencoder.{name}"}, **halves)
    if sizes["embed"]:
        return kl.AutoencoderKL(ddconfig=sizes["encoder"], decoder_ddconfig=sizes["decoder"],
                                embed_dim=sizes["embed"])
    halves = {f"{half}_config": {"target": f"comfy.ldm.modules.diffusionmodules.model.{half.capitalize()}",
                                 "params": sizes[half]} for half in ("encoder", "decoder")}
    return kl.AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"}, **halves)


def vae_tensors(kind: str, sizes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Names and shapes of the tensors of a VAE network, as meta tensors."""
    with without_memory():
        return vae_module(kind, sizes).state_dict()


@needs("VAEs")
def load_vae(tensors: dict[str, torch.Tensor], dtype: str | None = None,
             metadata: dict[str, str] | None = None, marks: Sequence[str] = ()) -> Any:
    """Native tensors -> the host's VAE; its `first_stage_model` is None when the host does not know them. `marks` are
    names that it looks for besides."""
    import comfy.sd
    import torch

    if marks:
        tensors = tensors | {name: torch.empty(0) for name in marks}
    return comfy.sd.VAE(sd=tensors, dtype=getattr(torch, dtype) if dtype else None, metadata=metadata)


@needs("VAEs")
def load_vae_sized(tensors: dict[str, torch.Tensor], kind: str, sizes: dict[str, Any], published: dict[str, Any],
                   dtype: str | None = None, marks: Sequence[str] = ()) -> Any:
    """As load_vae, for a network of other sizes than the `published` ones that the host's constructor has fixed.

    The constructor makes its own, without memory, which settles ratios, devices, dtypes and memory estimates; then the
    network inside is exchanged for one of these sizes.
    """
    import comfy.model_management
    import comfy.model_patcher

    with without_memory():
        vae = load_vae(vae_tensors(kind, published), dtype, None, marks)
    module = vae_module(kind, sizes).eval().to(vae.vae_dtype)
    comfy.model_management.archive_model_dtypes(module)
    patcher = comfy.model_patcher.CoreModelPatcher(module, load_device=vae.patcher.load_device,
                                                   offload_device=vae.patcher.offload_device)
    module.load_state_dict(tensors, strict=False, assign=patcher.is_dynamic())
    if not patcher.is_dynamic():
        module.to(vae.vae_dtype)  # layers that newer hosts make while they load have the file's dtype
    vae.first_stage_model, vae.patcher, vae.size = module, patcher, None
    vae.model_size()
    return vae
