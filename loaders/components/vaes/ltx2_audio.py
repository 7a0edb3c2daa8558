"""diffusers AutoencoderKLLTX2Audio with LTX2Vocoder or LTX2VocoderWithBWE, two components of a pipeline: the VAE of
sound of LTX-2, which ComfyUI has as one, with a vocoder that makes a wave of the spectrogram. It takes all sizes from a
file's metadata. Here they are made of both config.json files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ...architectures.base import check_fixed
from .base import Plan, VAEClass, whole

if TYPE_CHECKING:
    import torch

VOCODER = "vocoder"
WIDTH = 128  # channels of a latent times its mel bins, of which ComfyUI has statistics; and stereo mel bins
STATISTICS = {"latents_mean": "mean-of-means", "latents_std": "std-of-means"}
NAMES = {"conv_in.": "conv_pre.", "conv_out.": "conv_post.", "upsamplers.": "ups.", "resnets.": "resblocks.",
         "act_out.": "act_post."}
INNER = ".downsample.filter", ".downsample.lowpass.filter"
_FIXED = {"leaky_relu_negative_slope": 0.1, "antialias_ratio": 2, "antialias_kernel_size": 12, "in_channels": WIDTH,
          "out_channels": 2}
# What both classes have, and its defaults in diffusers, of each
_VOCODER: dict[str, Any] = {
    **_FIXED, "hidden_channels": 1024, "upsample_kernel_sizes": [16, 15, 8, 4, 4], "upsample_factors": [6, 5, 2, 2, 2],
    "resnet_kernel_sizes": [3, 7, 11], "resnet_dilations": [[1, 3, 5]] * 3, "act_fn": "leaky_relu", "antialias": False,
    "final_act_fn": "tanh", "final_bias": True}
_FIRST = {**_VOCODER, "hidden_channels": 1536, "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
          "upsample_factors": [5, 2, 2, 2, 2, 2], "act_fn": "snakebeta", "antialias": True, "final_act_fn": None,
          "final_bias": False}
_SECOND = {**_FIRST, "hidden_channels": 512, "upsample_kernel_sizes": [12, 11, 4, 4, 4],
           "upsample_factors": [6, 5, 2, 2, 2]}
_STFT = {"filter_length": 512, "hop_length": 80, "window_length": 512, "num_mel_channels": 64,
         "input_sampling_rate": 16000, "output_sampling_rate": 48000}


def _vocoder(config: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One vocoder in ComfyUI's words. Raises ValueError for what its network cannot have."""
    value = {key: config.get(prefix + key, default) for key, default in defaults.items()}
    check_fixed({f"{prefix}{key}": value[key] for key in _FIXED}, {prefix + key: v for key, v in _FIXED.items()},
                VOCODER)
    snake = value["act_fn"] == "snakebeta"
    if value["act_fn"] not in ("snakebeta", "leaky_relu") or bool(value["antialias"]) is not snake:
        raise ValueError(Text("vocoder/config.json: {key} {value!r} with antialias {antialias}; ComfyUI has leaky_relu "
                              "without it, and snakebeta with it", key=f"{prefix}act_fn", value=value["act_fn"],
                              antialias=value["antialias"]))
    if value["final_act_fn"] not in ("tanh", "clamp", None) \
            or any(size % 2 == 0 for size in value["resnet_kernel_sizes"]) \
            or any(len(dilations) != 3 for dilations in value["resnet_dilations"]):
        raise ValueError(Text("vocoder/config.json: ComfyUI's network has three dilations a block, kernels of odd "
                              "sizes, and tanh, clamp or nothing at its end"))
    return {"upsample_initial_channel": value["hidden_channels"],
            "upsample_kernel_sizes": value["upsample_kernel_sizes"], "upsample_rates": value["upsample_factors"],
            "resblock_kernel_sizes": value["resnet_kernel_sizes"], "resblock_dilation_sizes": value["resnet_dilations"],
            "resblock": "AMP1" if snake else "1",
            "activation": "snakebeta", "stereo": True, "use_bias_at_final": value["final_bias"],
            "apply_final_activation": value["final_act_fn"] is not None,
            "use_tanh_at_final": value["final_act_fn"] == "tanh"}


def _checked(config: Mapping[str, Any], known: set[str]) -> None:
    other = [f"{key} {value}" for key, value in config.items() if key not in known and not key.startswith("_")]
    if other:
        raise ValueError(Text("vocoder/config.json has settings that this version does not know: {settings}",
                              settings=", ".join(other)))


def vocoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """vocoder/config.json in the words of ComfyUI's metadata. Raises ValueError for what it would not honour."""
    if config.get("_class_name") == "LTX2VocoderWithBWE":
        _checked(config, {*_FIRST, *(f"bwe_{key}" for key in _SECOND), *_STFT})
        stft = {key: config.get(key, default) for key, default in _STFT.items()}
        second = _vocoder(config, _SECOND, "bwe_")
        if second.pop("apply_final_activation") or stft["window_length"] != stft["filter_length"]:
            raise ValueError(Text("vocoder/config.json: ComfyUI's second vocoder has windows of filter_length and "
                                  "nothing at its end"))
        more = stft["output_sampling_rate"] // stft["input_sampling_rate"]
        if math.prod(second["upsample_rates"]) != stft["hop_length"] * more:
            raise ValueError(Text("vocoder/config.json: bwe_upsample_factors {factors} make no wave that is {times} "
                                  "times as long, from one value every {hop}", factors=second["upsample_rates"],
                                  times=more, hop=stft["hop_length"]))
        second |= {"input_sampling_rate": stft["input_sampling_rate"], "hop_length": stft["hop_length"],
                   "output_sampling_rate": stft["output_sampling_rate"], "n_fft": stft["filter_length"],
                   "num_mels": stft["num_mel_channels"]}
        return {"vocoder": _vocoder(config, _FIRST), "bwe": second}
    if config.get("_class_name") != "LTX2Vocoder":
        raise ValueError(Text("vocoder/config.json is of {name}, expected LTX2Vocoder or LTX2VocoderWithBWE",
                              name=config.get("_class_name")))
    _checked(config, {*_VOCODER, "output_sampling_rate"})
    return {**_vocoder(config, _VOCODER), "output_sample_rate": config.get("output_sampling_rate", 24000)}


def native(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stored names of both components, which have none in common, -> ComfyUI's."""
    def name(old: str) -> str:
        if old in STATISTICS:
            return f"autoencoder.per_channel_statistics.{STATISTICS[old]}"
        if old.startswith(("encoder.", "decoder.")):
            return f"autoencoder.{old}"
        half = next((half for half in ("vocoder.", "bwe_generator.") if old.startswith(half)), "")
        part = old.removeprefix(half)
        for beginning, new in NAMES.items():
            if part.startswith(beginning):
                part = new + part.removeprefix(beginning)
        return f"{VOCODER}.{half}{part}".replace(*INNER)

    return {name(old): tensor for old, tensor in stored.items()}


def _plan(config: Mapping[str, Any]) -> Plan:
    channels, bins = whole(config, "latent_channels", 8), whole(config, "mel_bins", 64)
    levels = config.get("ch_mult") or [1, 2, 4]
    if channels * bins // 4 != WIDTH or bins * 2 != WIDTH:
        raise ValueError(Text("config.json: {channels} latent channels and {bins} mel bins; ComfyUI has 8 and 64",
                              channels=channels, bins=bins))
    half = {"double_z": True, "mel_bins": bins, "z_channels": channels, "resolution": 256, "downsample_time": False,
            "in_channels": 2, "out_ch": 2, "ch": WIDTH, "ch_mult": levels, "dropout": 0.0, "attn_resolutions": [],
            "num_res_blocks": whole(config, "num_res_blocks", 2), "mid_block_add_attention": False,
            "norm_type": "pixel", "causality_axis": "height"}
    rate, hop = whole(config, "sample_rate", 16000), whole(config, "mel_hop_length", 160)
    autoencoder = {"model": {"params": {"ddconfig": half, "sampling_rate": rate}},
                   "preprocessing": {"stft": {"hop_length": hop, "filter_length": 1024}}}
    voice = vocoder_config(config.get(f"_{VOCODER}") or {})
    metadata = {"config": json.dumps({"audio_vae": autoencoder, "vocoder": voice})}
    return Plan("LTX-2 (sound)", "ltx2_audio", {"metadata": metadata}, {}, True, "LTXAV", channels, None, native,
                Text("widths {widths}, {bins} mel bins, {rate} latents a second", bins=bins,
                     widths=[WIDTH * level for level in levels], rate=f"{math.ceil(rate / hop / 4)}"),
                metadata=metadata)


LTX2_AUDIO = VAEClass(
    "AutoencoderKLLTX2Audio",
    {"base_channels": WIDTH, "output_channels": 2, "in_channels": 2, "norm_type": "pixel", "causality_axis": "height",
     "mid_block_add_attention": False, "is_causal": True, "double_z": True},
    frozenset({"ch_mult", "num_res_blocks", "latent_channels", "mel_bins", "sample_rate", "mel_hop_length"}),
    frozenset({"resolution", "dropout"}), _plan, beside=(VOCODER,))
