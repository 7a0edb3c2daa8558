"""Stand-ins of the example workflows whose quantized files are published with the host's own names: a base with nothing
but the configuration of its transformer, and the tiny model of the host's class (support/host_sizes) in the published format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from browser.notes import HIDREAM, LTX2

from support import common, flux2, gguf_files, host_models, narrow_hosts, text_encoders, text_encoders_llm, vaes
from support.derived import CASES, SOURCES
from support.passthrough import WHOLE, stored_as
from support.real_files import BESIDE

SD3_POOLED = 2 * text_encoders.SDXL_POOLED
KLEIN_TEXT = text_encoders_llm.WIDTHS["flux2_klein"]


def _base(folder: Path, pipeline: str, config: dict[str, Any], *entries: dict[str, list[str]]) -> None:
    """A pipeline whose transformer is a config.json, as a deferred base needs it."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    index = {"_class_name": pipeline, "transformer": ["diffusers", config["_class_name"]]}
    for entry in entries:
        index |= entry
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def _config(table: str, **sizes: Any) -> dict[str, Any]:
    """The config.json of a case, without what may not be said of it (narrow_hosts)."""
    from quantized_transformers.loaders.architectures.diffusers_classes import DERIVED

    one, = (one for one in DERIVED if one.table == table)
    config = {**CASES[table][0].config, **sizes}
    if CASES[table][0].model in host_models.OF_ONE_SIZE:
        config = {key: value for key, value in config.items() if key not in one.fixed}
    return {"_class_name": one.classes[0], **config}


@contextmanager
def _sized(model: str, **sizes: Any) -> Iterator[None]:
    place, kwargs, *more = host_models.MODELS[model]
    with patch.dict(host_models.MODELS, {model: (place, {**kwargs, **sizes}, *more)}):
        yield


def _native(table: str, form: str, **sizes: Any) -> dict[str, torch.Tensor]:
    """The host's tiny model in one of passthrough's formats, in the names that are published."""
    model = CASES[table][0].model
    with _sized(model, **narrow_hosts.SIZES.get(table, {}), **sizes):
        stored, _ = stored_as(model, host_models.make(model), form)
    return {re.sub(*SOURCES[table].published, name): tensor for name, tensor in stored.items()}


def _gguf(table: str, path: Path, arch: str, **sizes: Any) -> None:
    """The same as ComfyUI-GGUF's converter and llama.cpp's quantizer write Q4_K_M: some weights are Q6_K."""
    model = CASES[table][0].model
    with _sized(model, **sizes):
        made, _ = gguf_files.packed(host_models.make(model), ("Q4_K", "Q4_K", "Q6_K"))
    path.parent.mkdir(parents=True)
    gguf_files.write(path, made, arch)


def sd35(models: Path) -> None:
    """A whole checkpoint; the large one has no second attention."""
    folder = models / "stabilityai/stable-diffusion-3.5-large"
    text = text_encoders.SD3_TEXT
    _base(folder, "StableDiffusion3Pipeline", _config(
        "sd3", joint_attention_dim=text, pooled_projection_dim=SD3_POOLED, dual_attention_layers=[]),
        text_encoders.save("sd3", folder), vaes.save("sd3", folder))
    tensors = _native("sd3", "FP8, first names", x_block_self_attn_layers=[], adm_in_channels=SD3_POOLED, context_embedder_config={
        "target": "torch.nn.Linear", "params": {"in_features": text, "out_features": 192}})
    tensors |= {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    common.save(models / "Comfy-Org/stable-diffusion-3.5-fp8", {f"{WHOLE}{name}": t for name, t in tensors.items()} | BESIDE, None,
                name="sd3.5_large_fp8_scaled.safetensors")


def chroma(models: Path) -> None:
    folder = models / "lodestones/Chroma1-HD"
    _base(folder, "ChromaPipeline", _config("chroma"), text_encoders.save("chroma", folder), vaes.save("flux1", folder))
    common.save(models / "Comfy-Org/Chroma1-HD_repackaged/split_files/diffusion_models", _native("chroma", "FP8, marked"), None,
                name="Chroma1-HD-fp8mixed.safetensors")


def klein(models: Path) -> None:
    folder = models / "black-forest-labs/FLUX.2-klein-4B"
    with patch.object(flux2, "TEXT", KLEIN_TEXT):
        config = dict(flux2.make(heads=1, double=1, single=2, guidance=False).config)
    _base(folder, "Flux2KleinPipeline", {"_class_name": "Flux2Transformer2DModel", **config},
          text_encoders_llm.save("flux2_klein", folder), vaes.save("flux2", folder))
    with _sized("FLUX.2", context_in_dim=KLEIN_TEXT, guidance_embed=False):
        stored, _ = stored_as("FLUX.2", host_models.make("FLUX.2"), "FP8")
    common.save(models / "black-forest-labs/FLUX.2-klein-4b-fp8", stored, None, name="flux-2-klein-4b-fp8.safetensors")


def vace(models: Path) -> None:
    folder = models / "Wan-AI/Wan2.1-VACE-14B-diffusers"
    _base(folder, "WanVACEPipeline", _config("wan_vace", num_attention_heads=2, ffn_dim=512),
          text_encoders.save("wan", folder), vaes.save("wan", folder))
    _gguf("wan_vace", models / "QuantStack/Wan2.1_14B_VACE-GGUF/Wan2.1_14B_VACE-Q4_K_M.gguf", "wan", dim=256, num_heads=2,
          ffn_dim=512)


def hunyuan_video_15(models: Path) -> None:
    folder, text = models / "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v", text_encoders_llm.WIDTHS["qwen_image"]
    folder.mkdir(parents=True)
    text_encoders_llm.hunyuan_video_15(folder)
    entries = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    _base(folder, entries.pop("_class_name"), _config("hunyuan_video15", text_embed_dim=text, num_attention_heads=2), entries,
          vaes.save("hunyuan_video_15", folder))
    _gguf("hunyuan_video15", models / "jayn7/HunyuanVideo-1.5_T2V_720p-GGUF/720p/hunyuanvideo1.5_720p_t2v-Q4_K_M.gguf",
          "hyvid", context_in_dim=text, hidden_size=256, num_heads=2)


def hidream(models: Path) -> None:
    """A base without text encoders, which its workflow takes from the repo of the override, by ComfyUI's own loader."""
    _base(models / "HiDream-ai/HiDream-I1-Full", "HiDreamImagePipeline", _config("hidream"),
          vaes.save("flux1", models / "HiDream-ai/HiDream-I1-Full"))
    common.save(models / "Comfy-Org/HiDream-I1_ComfyUI/split_files/diffusion_models", _native("hidream", "cast"), None,
                name="hidream_i1_full_fp8.safetensors")
    long = {"max_position_embeddings": 248}
    made = (text_encoders.clip_l_projected(False, **long), text_encoders.clip_g(**long), text_encoders.t5(num_layers=24),
            text_encoders.llama_head(num_hidden_layers=2))
    for net, file in zip(made, HIDREAM, strict=True):
        common.save(models.parent / file["directory"], {name: tensor for name, tensor in net.state_dict().items()
                                                        if name not in ("lm_head.weight", "encoder.embed_tokens.weight")},
                    None, name=file["name"])


# Of the host's own classes (comfy/ldm/lightricks/vae, vocoders), narrow.
SOUND: dict[str, Any] = {
    "audio_vae": {"model": {"params": {"sampling_rate": 16000, "ddconfig": {
        "double_z": True, "mel_bins": 64, "z_channels": 8, "resolution": 256, "in_channels": 2, "out_ch": 2, "ch": 16, "ch_mult":
        [1, 2, 4], "num_res_blocks": 1, "attn_resolutions": [], "mid_block_add_attention": False, "norm_type": "pixel",
        "causality_axis": "height"}}}, "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160}}},
    "vocoder": {"upsample_initial_channel": 32, "output_sample_rate": 24000}}


def ltx2(models: Path) -> None:
    """A whole checkpoint in models/checkpoints, with the VAE for sound, which ComfyUI reads there. Connectors without layers:
    of the text encoder's width one has 177 million numbers."""
    from comfy.ldm.lightricks.vae.audio_vae import AudioVAE

    folder, width = models / "Lightricks/LTX-2", 3840
    folder.mkdir(parents=True)
    projection = torch.from_numpy(np.zeros((width, width * 49), np.uint16)).view(torch.bfloat16)
    for row in range(0, width, 480):
        projection[row] = torch.randn(width * 49, generator=torch.Generator().manual_seed(row)) * (width * 49) ** -0.5
    layers = {"video_connector_num_layers": 0, "audio_connector_num_layers": 0, "rope_type": "split"}
    text_encoders_llm.ltx2(folder, {"text_proj_in.weight": projection}, **layers)
    entries = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    _base(folder, entries.pop("_class_name"), _config("ltx2", caption_channels=width), entries, vaes.save("ltx2", folder))
    sizes = {"caption_channels": width, "connector_attention_head_dim": 128, "connector_num_attention_heads": 30,
             "connector_num_layers": 0}
    tensors = {f"{WHOLE}{name}": tensor for name, tensor in _native("ltx2", "FP8", **sizes).items()}
    with _sized("LTX-2", **sizes):
        header = json.loads(host_models.metadata_of("LTX-2")["config"])
    torch.manual_seed(13)
    sound = common.randomise(AudioVAE({"config": json.dumps(SOUND)}))
    for name, buffer in sound.autoencoder.per_channel_statistics.named_buffers():
        buffer.fill_(float(name.startswith("std")))
    tensors |= {re.sub(r"^autoencoder\.", "audio_vae.", name): tensor for name, tensor in sound.state_dict().items()}
    common.save(models.parent / LTX2["directory"], tensors, None, {"config": json.dumps(header | SOUND)}, LTX2["name"])
