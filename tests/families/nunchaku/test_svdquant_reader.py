"""SVDQuant files by their headers: what they are, which file is taken, what is refused and by which name."""

from __future__ import annotations

import json
import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError, MissingFiles
from quantized_transformers.loaders.families.nunchaku.files import Choice, choose_file
from quantized_transformers.loaders.locate import locate
from quantized_transformers.loaders.report import describe_report
from quantized_transformers.views.layer_map import layer_map
from support import svdquant_tables as tables

pytestmark = pytest.mark.unit

Shapes = dict[str, tuple[int, ...]]


def read(path: Path) -> Any:
    return describe(Checkpoint(locate(str(path))))


def shapes_of(class_name: str, **config: Any) -> Shapes:
    """The tensors of a diffusers model of published size (its defaults)."""
    import diffusers
    import torch

    with torch.device("meta"):
        model = getattr(diffusers, class_name)(**config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def z_image(path: Path, refiners: bool, precision: str) -> None:
    shapes = shapes_of("ZImageTransformer2DModel")
    tables.header_only(path, shapes, tables.z_image_table(30, refiners), precision, 128)


PUBLISHED = {
    "FLUX.1": (partial(tables.header_only, shapes=None, table=tables.flux_table(19, 38, 3072), rank=32,
                       rename=tables.flux_plain, legacy=True), 304, 76, 32),
    "Qwen-Image": (partial(tables.header_only, shapes=None, table=tables.qwen_table(60), rank=32), 480, 120, 32),
    "FLUX.2": (partial(tables.header_only, shapes=None, table=tables.flux2_table(8, 24, 4096, 0), rank=32,
                       rename=tables.flux_plain, legacy=True), 160, 0, 32),
    "Z-Image": (partial(tables.header_only, shapes=None, table=tables.z_image_table(30, False), rank=128), 120, 0, 128),
    "Z-Image with refiners": (partial(tables.header_only, shapes=None, table=tables.z_image_table(30, True), rank=128),
                              136, 0, 128),
}
CLASSES = {"FLUX.1": ("FluxTransformer2DModel", {"guidance_embeds": True}), "Qwen-Image": ("QwenImageTransformer2DModel", {}),
           "FLUX.2": ("Flux2Transformer2DModel", {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32,
                                                  "joint_attention_dim": 12288, "guidance_embeds": False}),
           "Z-Image": ("ZImageTransformer2DModel", {})}


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_and_counts(name, precision, tmp_path):
    """Headers of the published models' sizes: everything has its place, and the counts are those published."""
    write, w4a4, awq, rank = PUBLISHED[name]
    family = name.partition(" with")[0]
    class_name, config = CLASSES[family]
    path = tmp_path / "renamed.safetensors"
    write(path, shapes=shapes_of(class_name, **config), precision=precision)
    description = read(path)
    assert not description.problems and description.architecture == family
    assert description.family == f"svdquant-{precision}" and description.ranks == [rank]
    kind = {"int4": "SVDQ INT4", "nvfp4": "SVDQ NVFP4"}[precision]
    assert description.formats[kind] == w4a4 and description.formats.get("AWQ INT4", 0) == awq
    text = describe_report(description)
    assert f"svdquant-{precision}" in text and f"low rank: {rank}" in text and "no metadata in the file" in text
    assert "this checkpoint loads" in text and layer_map(description).size[0] > 400


INT4 = [f"svdq-int4_r{rank}-qwen-image{more}.safetensors" for rank in (32, 128)
        for more in ("", "-lightningv1.0-4steps", "-lightningv1.1-8steps")]
ALL = [*INT4, *(name.replace("int4", "fp4") for name in INT4), "README.md"]


@pytest.mark.parametrize(("precision", "rank", "capability", "expected"), [
    ("auto", 0, None, "svdq-int4_r32-qwen-image.safetensors"), ("auto", 0, (8, 9), "svdq-int4_r32-qwen-image.safetensors"),
    ("auto", 0, (9, 0), "svdq-int4_r32-qwen-image.safetensors"), ("auto", 0, (10, 0), "svdq-fp4_r32-qwen-image.safetensors"),
    ("auto", 0, (12, 0), "svdq-fp4_r32-qwen-image.safetensors"), ("int4", 0, (12, 0), "svdq-int4_r32-qwen-image.safetensors"),
    ("nvfp4", 128, None, "svdq-fp4_r128-qwen-image.safetensors"), ("auto", 128, None, "svdq-int4_r128-qwen-image.safetensors")])
def test_choice_among_several(precision, rank, capability, expected, monkeypatch):
    from quantized_transformers import host

    monkeypatch.setattr(host, "capability", lambda: capability)
    files, why = choose_file(ALL, "here", precision, rank) or ((), "")
    assert files == (expected,) and "of 12 svdq files" in why


def test_what_is_there_is_taken_when_auto(tmp_path):
    only = ["svdq-fp4_r128-z.safetensors"]
    assert choose_file([*only, "other.safetensors"], "here") == ((only[0],), "")
    assert choose_file(["diffusion_pytorch_model.safetensors"], "here") is None
    for wanted in ({"precision": "int4"}, {"rank": 32}):
        with pytest.raises(MissingFiles, match="no svdq file of"):  # so that a download can follow
            choose_file(only, "here", **wanted)
    with pytest.raises(CheckpointError, match=r"2 svdq files.*4steps.*8steps"):
        choose_file([name for name in INT4 if "steps" in name and "r32" in name], "here")
    for name in INT4[:2]:
        (tmp_path / name).touch()
    assert [Path(file).name for file in locate(str(tmp_path)).files] == [INT4[0]]
    assert [Path(file).name for file in locate(str(tmp_path), weights_name=INT4[1]).files] == [INT4[1]]


def test_the_download_command_fetches_one_precision_and_rank():
    for request, pattern in (({}, "svdq-int4_r32-*"), ({"choices": Choice("nvfp4", 128)}, "svdq-fp4_r128-*"),
                             ({"weights_name": "svdq-int4_r128-x"}, "svdq-int4_r128-x")):
        with pytest.raises(CheckpointError) as caught:
            locate("nunchaku-tech/nunchaku-qwen-image", **request)
        assert f'hf download nunchaku-tech/nunchaku-qwen-image --include "{pattern}' in str(caught.value)


def test_half_of_a_legacy_folder(tmp_path):
    (tmp_path / "transformer_blocks.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"lacks unquantized_layers\.safetensors"):
        locate(str(tmp_path))


def write_header(path: Path, entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> Path:
    sizes = {"I8": 1, "U8": 1, "F8_E4M3": 1, "I16": 2, "BF16": 2, "I32": 4, "F32": 4}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape) in entries.items():
        end = at + sizes[dtype] * int(__import__("math").prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


def layer(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{name}.qweight": ("I8", (128, 64)), f"{name}.wscales": ("BF16", (2, 128)), f"{name}.proj_down": ("BF16", (128, 16))}


KITCHEN = {"transformer_blocks.0.attn.to_q.weight": ("I8", (128, 64)), "transformer_blocks.0.attn.to_q.comfy_quant": ("U8", (4,))}
OTHERS: dict[str, tuple[dict, dict | None]] = {
    "this is a text encoder": ({"encoder.block.0.layer.0.SelfAttention.q.qweight": ("I16", (32, 128)),
                                "encoder.block.0.layer.0.SelfAttention.q.scaled_zeros": ("BF16", (1, 128))}, None),
    "Sana": ({**layer("transformer_blocks.0.attn.qkv_proj"), "caption_norm.weight": ("BF16", (8,))}, None),
    "Chroma": ({**layer("transformer_blocks.0.qkv_proj"), "distilled_guidance_layer.in_proj.weight": ("BF16", (8, 8))}, None),
    "comfy-quants": ({**KITCHEN, "transformer_blocks.0.attn.to_q.proj_down": ("BF16", (128, 16))}, None),
    "kitchen's own": ({**KITCHEN, "transformer_blocks.0.attn.to_q.weight_proj_down": ("BF16", (128, 16))}, None),
    "nunchaku_lite": (layer("transformer_blocks.0.attn.to_q"),
                      {"quantization_config": json.dumps({"quant_method": "nunchaku_lite"})}),
    "metadata says NunchakuWanTransformer3DModel": (layer("blocks.0.attn1.to_q"), {"model_class": "NunchakuWanTransformer3DModel"}),
    "GPTQ": ({"model.layers.0.mlp.qweight": ("I32", (8, 8)), "model.layers.0.mlp.scales": ("BF16", (8,))}, None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_refused_by_name(name, tmp_path):
    entries, metadata = OTHERS[name]
    with pytest.raises(CheckpointError) as caught:
        read(write_header(tmp_path / "svdq-int4_r32-other.safetensors", entries, metadata))
    assert name in str(caught.value) and "what to do:" in str(caught.value), str(caught.value)
