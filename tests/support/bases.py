"""The models of the example workflows in small: bases, overrides and a LoRA of the same architecture, layout and format.

Everything is made by the real tools (diffusers, transformers, nvidia-modelopt, msmodelslim; Nunchaku's by svdquant_models.py) and
named as on the Hub, so that the repo ids in the workflows' lists are found in a models folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from browser.notes import EXPORT, HYPER, LIGHTNING
from safetensors.torch import save_file

from support import (
    bases_native,
    common,
    flux,
    flux2,
    hunyuan_video,
    lora,
    modelslim,
    qwen_image,
    svdquant_models,
    text_encoders,
    text_encoders_llm,
    vaes,
    wan,
    z_image,
)

SUPPORT = Path(__file__).resolve().parent
# Left in BF16 by the published recipes (docs/sources/sglang.md, "FP8 presets"), besides ModelOpt's own proj_out.
FLUX2_FP8 = [r"time_guidance_embed.*|.*stream_modulation.*|x_embedder|context_embedder|norm_out.*"]
QWEN_FP8 = [r"img_in|txt_in|time_text_embed.*|norm_out.*|proj_out",
            r"transformer_blocks\.\d+\.((img|txt)_mod|img_mlp\.net\.2).*"]
FLUX1_NVFP4 = [*flux.FALLBACK, r"single_transformer_blocks\.\d+\.proj_mlp"]
QWEN_TEXT = text_encoders_llm.WIDTHS["qwen_image"]
FLUX2_TEXT = text_encoders_llm.WIDTHS["flux2"]
# The host has sizes of Qwen-Image and Z-Image in its code; see their small_widths. Of the 32 real layers of Qwen's vision
# tower, which takes most of an edit's time, 8 are run: the eighth sees all of a picture. (All of them against transformers:
# tests/loaders/components/test_text_encoders_qwen_mistral.py.)
SHIM = f"""import sys
sys.path.insert(0, {str(SUPPORT.parent)!r})
from comfy.text_encoders import qwen_vl
from support import narrow_hosts, qwen_image, z_image
forward = qwen_vl.Qwen2VLVisionTransformer.forward
def shorter(self, *args, **kwargs):
    self.blocks = self.blocks[:8]
    return forward(self, *args, **kwargs)
qwen_vl.Qwen2VLVisionTransformer.forward = shorter
held = [qwen_image.small_widths(), z_image.small_widths(), narrow_hosts.small_widths()]
for context in held:
    context.__enter__()
NODE_CLASS_MAPPINGS = {{}}
"""


class Bases:
    """The models of an installation that start with the test-only shim which lets them be narrow; each comes when a
    workflow asks for it."""

    def __init__(self, base: Path) -> None:
        self.models, self.made = base / "models" / "diffusers", set[Callable[[Path], None]]()
        shim = base / "custom_nodes" / "narrow_models"
        shim.mkdir(parents=True)
        (shim / "__init__.py").write_text(SHIM, encoding="utf-8")

    def place(self, workflow: str) -> None:
        """Make what a workflow of this name loads."""
        for make in next(makers for beginning, makers in MAKERS.items() if workflow.startswith(beginning)):
            if make not in self.made:
                make(self.models)
                self.made.add(make)


def _pipeline(folder: Path, class_name: str, entries: dict[str, list[str]], **transformers: Any) -> None:
    """A diffusers pipeline folder: its transformers, what was saved beside them, and model_index.json."""
    for name, model in transformers.items():
        model.save_pretrained(folder / name)
        entries = entries | {name: ["diffusers", type(model).__name__]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name, **entries}), encoding="utf-8")


def _flux1(models: Path) -> None:
    folder, model = models / "black-forest-labs/FLUX.1-dev", flux.make()
    assert (flux.TEXT, flux.POOLED) == (text_encoders.FLUX_TEXT, text_encoders.FLUX_POOLED)
    _pipeline(folder, "FluxPipeline", text_encoders.save("flux1", folder) | vaes.save("flux1", folder), transformer=model)
    flux.export_fp8(model, models / "lmsys/flux1-dev-modelopt-fp8-sglang-transformer", keep=flux.FALLBACK)
    flux.export_nvfp4(model, models / "lmsys/flux1-dev-modelopt-nvfp4-sglang-transformer", keep=FLUX1_NVFP4)


def _flux2(models: Path) -> None:
    folder = models / "black-forest-labs/FLUX.2-dev"
    with patch.object(flux2, "TEXT", FLUX2_TEXT):  # the host reads three layers of a Mistral that is 5120 wide
        model = flux2.make()
        _pipeline(folder, "Flux2Pipeline", text_encoders_llm.save("flux2", folder) | vaes.save("flux2", folder),
                  transformer=model)
        flux2.export(model, models / "lmsys/flux2-dev-modelopt-fp8-sglang-transformer", keep=FLUX2_FP8)
        export = flux2.export(model, models / "export", "NVFP4", keep=flux2.FALLBACK)
    packed = packed_flux2(common.stored(export))
    shutil.rmtree(export)
    folder = models / "black-forest-labs/FLUX.2-dev-NVFP4"
    common.save(folder, packed, None, name="flux2-dev-nvfp4.safetensors")
    # the published -mixed file lacks the activation scales of the text stream's MLP (docs/sources/modelopt.md,
    # "FLUX.2-dev-NVFP4")
    mixed = {name: value for name, value in packed.items() if not ("txt_mlp" in name and name.endswith("input_scale"))}
    common.save(folder, mixed, None, name="flux2-dev-nvfp4-mixed.safetensors")


def packed_flux2(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A diffusers-named NVFP4 export -> as Black Forest Labs publishes: native names, packed q, k, v, ComfyUI's order."""
    rows = flux2.Rows(native_flux2_shapes(), flux2.convert)
    parts: dict[str, dict[int, str]] = {}
    for name, (target, places) in rows.places.items():
        parts.setdefault(target, {})[int(places[0])] = name.removesuffix(".weight")
    file = {}
    for name, value in rows.to_native(common.dequantize(tensors)).items():
        layers = [layer for _, layer in sorted(parts[name].items())]
        layer_name = name.removesuffix(".weight")
        if f"{layers[0]}.weight_scale_2" not in tensors:
            file[name.replace("_norm.weight", "_norm.scale")] = value.to(torch.bfloat16)
            continue
        for leaf in ("weight", "weight_scale"):
            file[f"{layer_name}.{leaf}"] = torch.cat([tensors[f"{layer}.{leaf}"] for layer in layers])
        for leaf in ("weight_scale_2", "input_scale"):
            (one,) = {float(tensors[f"{layer}.{leaf}"]) for layer in layers}  # modelopt unified q, k and v
            file[f"{layer_name}.{leaf}"] = torch.tensor(one)
    return common.comfy_order(file)


def native_flux2_shapes(hidden: int = 256, double: int = 2, single: int = 2, channels: int = flux2.CHANNELS,
                        text: int = FLUX2_TEXT) -> dict[str, torch.Size]:
    """Names and shapes of FLUX.2's native weights, from the published ones at width 6144
    (docs/sources/modelopt.md, "FLUX.2-dev-NVFP4")."""
    shapes = {"img_in": (hidden, channels), "txt_in": (hidden, text), "time_in.in_layer": (hidden, 256),
              "time_in.out_layer": (hidden, hidden), "guidance_in.in_layer": (hidden, 256),
              "guidance_in.out_layer": (hidden, hidden), "double_stream_modulation_img.lin": (6 * hidden, hidden),
              "double_stream_modulation_txt.lin": (6 * hidden, hidden), "single_stream_modulation.lin": (3 * hidden, hidden),
              "final_layer.linear": (channels, hidden), "final_layer.adaLN_modulation.1": (2 * hidden, hidden)}
    for i in range(double):
        for stream in ("img", "txt"):
            at = f"double_blocks.{i}.{stream}"
            shapes |= {f"{at}_attn.qkv": (3 * hidden, hidden), f"{at}_attn.proj": (hidden, hidden),
                       f"{at}_mlp.0": (6 * hidden, hidden), f"{at}_mlp.2": (hidden, 3 * hidden),
                       f"{at}_attn.norm.query_norm": (128,), f"{at}_attn.norm.key_norm": (128,)}
    for i in range(single):
        at = f"single_blocks.{i}"
        shapes |= {f"{at}.linear1": (9 * hidden, hidden), f"{at}.linear2": (hidden, 4 * hidden),
                   f"{at}.norm.query_norm": (128,), f"{at}.norm.key_norm": (128,)}
    return {f"{name}.weight": torch.Size(shape) for name, shape in shapes.items()}


def _wan(models: Path) -> None:
    folder, model = models / "Wan-AI/Wan2.2-T2V-A14B-Diffusers", wan.make()
    assert wan.TEXT == text_encoders.WAN_TEXT
    _pipeline(folder, "WanPipeline", text_encoders.save("wan", folder) | vaes.save("wan", folder), transformer=model,
              transformer_2=wan.make(seed=1))
    for algorithm in ("FP8", "NVFP4"):
        wan.export(model, models / f"lmsys/wan22-t2v-a14b-modelopt-{algorithm.lower()}-sglang-transformer", algorithm)


def _modelslim(models: Path) -> None:
    """msmodelslim's real exports: INT8 repacked for diffusers (two of them, to tell the experts apart), MXFP8 as it is."""
    repo = models / "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8"
    for component, name in (("transformer", "w8a8"), ("transformer_2", "w8a8_fp16")):
        export = modelslim.folder(name, models / "export")
        modelslim.repack(modelslim.stored(export), modelslim.described(export), repo / component)
        shutil.rmtree(export)
    modelslim.folder("mxfp8", models / EXPORT)


def _hunyuan_video(models: Path) -> None:
    folder, model = models / "hunyuanvideo-community/HunyuanVideo", hunyuan_video.make()
    assert (hunyuan_video.TEXT, hunyuan_video.POOLED) == (text_encoders.HUNYUAN_TEXT, text_encoders.HUNYUAN_POOLED)
    _pipeline(folder, "HunyuanVideoPipeline", text_encoders.save("hunyuan_video", folder)
              | vaes.save("hunyuan_video", folder), transformer=model)
    hunyuan_video.export(model, models / "lmsys/hunyuanvideo-modelopt-fp8-sglang-transformer",
                         keep=hunyuan_video.FALLBACK)


def _qwen_image(models: Path) -> None:
    edit, plain = models / "Qwen/Qwen-Image-Edit-2511", models / "Qwen/Qwen-Image"
    entries = text_encoders_llm.save("qwen_image_edit", edit)
    plain.mkdir(parents=True)
    for name in ("text_encoder", "tokenizer"):  # the same in both
        os.symlink(edit / name, plain / name, target_is_directory=True)
    rows: tuple[tuple[Path, str, str, bool, dict[str, list[str]]], ...] = (
        (plain, "QwenImagePipeline", "qwen-image", False, {k: v for k, v in entries.items() if k != "processor"}),
        (edit, "QwenImageEditPlusPipeline", "qwen-image-edit", True, entries))
    with patch.object(qwen_image, "TEXT", QWEN_TEXT):
        for folder, pipeline, name, zero_cond_t, encoders in rows:
            model = qwen_image.make(zero_cond_t=zero_cond_t)
            _pipeline(folder, pipeline, encoders | vaes.save("qwen_image", folder), transformer=model)
            qwen_image.export(model, models / f"lmsys/{name}-modelopt-fp8-sglang-transformer", keep=QWEN_FP8)
    # the same sizes, text encoder and VAE
    os.symlink(edit, models / "Qwen/Qwen-Image-Edit-2509", target_is_directory=True)


def _z_image(models: Path) -> None:
    """What a Nunchaku transformer leaves to its base."""
    folder = models / "Tongyi-MAI/Z-Image-Turbo"
    _pipeline(folder, "ZImagePipeline", text_encoders_llm.save("z_image", folder) | vaes.save("z_image", folder))


def _nunchaku_flux1(models: Path) -> None:
    """An INT4 file of rank 32 as published, and a LoRA of the name that its workflow has."""
    made = svdquant_models.make_flux(rank=32)
    made.write(models / "nunchaku-tech/nunchaku-flux.1-dev")
    layers = {name: tuple(module.weight.shape) for name, module in made.model.named_modules()
              if "transformer_blocks" in name and isinstance(module, torch.nn.Linear)}
    loras = models.parent / HYPER["directory"]
    loras.mkdir(exist_ok=True)
    save_file(lora.random_lora(layers), str(loras / HYPER["name"]))


def _nunchaku_qwen_image(models: Path) -> None:
    with patch.object(qwen_image, "TEXT", QWEN_TEXT):
        made = svdquant_models.make_qwen_image(rank=32)
    folder = models / "nunchaku-tech/nunchaku-qwen-image"
    made.write(folder)
    made.write(folder, name=LIGHTNING)
    made.write(models / "nunchaku-tech/nunchaku-qwen-image-edit-2509", name="svdq-int4_r32-qwen-image-edit-2509.safetensors")


def _nunchaku_z_image(models: Path) -> None:
    with patch.object(z_image, "TEXT", text_encoders_llm.WIDTHS["z_image"]):
        svdquant_models.make_z_image(rank=32, refiners=True).write(models / "nunchaku-tech/nunchaku-z-image-turbo")


# By the beginnings of the workflows' names.
MAKERS = {
    "flux1_dev_svdq": (_flux1, _nunchaku_flux1), "flux1": (_flux1,),
    "flux2_dev": (_flux2,), "flux2_klein": (bases_native.klein,),
    "wan22_t2v_a14b_modelslim": (_wan, _modelslim), "wan22": (_wan,), "wan21_vace": (bases_native.vace,),
    "hunyuanvideo15": (bases_native.hunyuan_video_15,), "hunyuanvideo": (_hunyuan_video,),
    "qwen_image_edit_svdq": (_qwen_image, _nunchaku_qwen_image), "qwen_image_svdq": (_qwen_image, _nunchaku_qwen_image),
    "qwen_image": (_qwen_image,), "z_image": (_z_image, _nunchaku_z_image),
    "sd35": (bases_native.sd35,), "chroma": (bases_native.chroma,), "hidream": (bases_native.hidream,),
    "ltx2": (bases_native.ltx2,)}
