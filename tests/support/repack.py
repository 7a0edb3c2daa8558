"""What the tests of the Wan repack tool have in common: a base repo, an export, and edits of either."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.makers.repack_wan import repack
from support.modelslim import EXPORTS, FFN, HIDDEN, HOST_TEXT, TEXT, Export
from support.modelslim import folder as loadable

TO_ORIGINAL = "to original"
LOW, WEIGHTS = "low_noise_model", "quant_model_weight_w8a8_mxfp8.safetensors"
DESCRIPTION = "quant_model_description_w8a8_mxfp8.json"


def diffusers_model(layers=1, channels=16, out=None, text=TEXT, **kwargs):
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        return WanTransformer3DModel(num_attention_heads=1, attention_head_dim=HIDDEN, in_channels=channels,
                                     out_channels=out or channels, text_dim=text, ffn_dim=FFN, num_layers=layers,
                                     **kwargs)


def make_base(folder: Path, export: Export, transformer=None) -> Path:
    """A diffusers repo as published, small: components, files at the top, a nested folder called transformer."""
    transformer = transformer or diffusers_model(export.layers, export.channels)
    parts = ["transformer", "transformer_2"][:len(export.experts)]
    for part in parts:
        transformer.save_config(str(folder / part))
        save_file({"x": torch.zeros(4)}, str(folder / part / "diffusion_pytorch_model.safetensors"))
    save_file({"v": torch.ones(8)}, str(sub(folder / "vae") / "diffusion_pytorch_model.safetensors"))
    (sub(folder / "tokenizer") / "tokenizer.json").write_text("{}", encoding="utf-8")
    (sub(folder / "assets" / "transformer") / "readme.txt").write_text("mine", encoding="utf-8")
    (sub(folder / ".git") / "config").write_text("no", encoding="utf-8")
    index = {"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"],
             "tokenizer": ["transformers", "T5TokenizerFast"], "text_encoder": ["transformers", "UMT5EncoderModel"]}
    index |= {part: ["diffusers", "WanTransformer3DModel"] for part in parts}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def sub(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def names(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(str(file)).items()}


def make_case(folder: Path) -> tuple[Path, Path, Path]:
    """(export, base, target) of the export with two experts, of a size that ComfyUI loads."""
    base = make_base(folder / "base", EXPORTS["mxfp8"], diffusers_model(text=HOST_TEXT))
    return loadable("mxfp8", folder / "mxfp8"), base, folder / "out"


def run(case, **kwargs) -> str:
    export, base, target = case
    return repack(str(export), str(base), str(target), **kwargs)


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def rename_tensor(file: Path, old: str, new: str | None) -> None:
    """In the weights and in the description beside them; None drops it."""
    tensors = load_file(str(file))
    tensor = tensors.pop(old)
    save_file(tensors | ({new: tensor} if new else {}), str(file))
    description = next(file.parent.glob("quant_model_description*.json"))
    edit(description, lambda d: d.update({new: d.pop(old)}) if new else d.pop(old))
