"""Quantized text encoders: hidden states, token ids and tensors against transformers' models with the weights that the
tools' own dequantization gives.

Files are GGUF by llama.cpp's names, transformers' folders and single files; tests/support/text_gguf.py and text_packed.py
write them and say what is in them, without this pack.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantized_transformers.loaders.components import text_encoder
from quantized_transformers.loaders.components.text_encoders import gemma2, qwen25_vl
from quantized_transformers.loaders.components.text_encoders import llm as llm_tables
from support import text_encoders as tiny
from support import text_gguf, text_gguf_models, text_host, text_packed
from support.common import rel_l2
from support.text_checks import CHECKS

pytestmark = pytest.mark.parity

WITHIN = 1e-4
IDS = torch.tensor([[7, 31, 2, 19, 44, 5, 5, 23, 38, 11, 29]])
EXPORTS = {"t5encoder": "t5", "umt5": "umt5", "llama": "llama", "llava": "llama", "mistral3": "mistral3",
           "qwen3": "qwen3", "qwen25vl": "qwen25_vl", "gemma2": "gemma2"}
GGUF = {"t5": "t5encoder", "umt5": "t5encoder", "llama": "llama", "mistral3": "mistral3", "qwen25_vl": "qwen2vl",
        "qwen3": "qwen3", "qwen3_8b": "qwen3", "gemma2": "gemma2"}


@pytest.mark.parametrize("kind", EXPORTS)
def test_files_of_llama_cpps_converter(kind, monkeypatch):
    """Every tensor of the converter's own files is transformers', bit for bit: names, rows of q and k, moments."""
    monkeypatch.setattr(llm_tables, "HEAD", 8)
    monkeypatch.setattr(gemma2, "HEAD", 8)
    model, name = text_gguf_models.make(kind), EXPORTS[kind]
    config, files = text_host.config_of(model), [text_gguf_models.EXPORTS / f"{kind}.gguf"]
    eyes = kind == "qwen25vl"
    if eyes:
        files.append(text_gguf_models.EXPORTS / "qwen25vl-mmproj.gguf")
        small_eyes(monkeypatch, model)
    encoder = text_host.ENCODERS[name]
    given = text_host.part(name, config, *files, sized=False).given
    expected = {new: tensor for key, tensor in model.state_dict().items()
                if (new := encoder.called(key, config)) and (eyes or not new.startswith("visual."))}
    for kept, twins in encoder.twins.items():
        for twin in twins:
            expected.setdefault(kept, expected.pop(twin))
    assert given.keys() == expected.keys()
    assert [key for key in given if not torch.equal(given[key].float(), expected[key])] == []


@pytest.mark.parametrize("family, kind", [("flux1", "Q4_K"), ("wan", "Q8_0"), *(
    pytest.param(*case, marks=pytest.mark.full) for case in (("flux1", "Q8_0"), ("wan", "Q4_K")))])
def test_gguf_in_the_place_of_the_bases(family, kind, tmp_path):
    """Through the node's loader, tokenizers included; the base has no weights of what is replaced."""
    folder = "text_encoder_2" if family == "flux1" else "text_encoder"
    model = tiny.t5(d_model=256, d_ff=512, d_kv=64) if family == "flux1" else tiny.umt5(128, d_ff=256)
    base = tiny.base(family, tmp_path / "base", **{folder: model})
    dense = shutil.copytree(base, tmp_path / "dense")
    for weights in (base / folder).glob("*.safetensors"):
        weights.unlink()
    file = text_gguf.write(model, tmp_path / "encoder.gguf", "t5encoder", kind)
    text_gguf.dequantized(model, file).save_pretrained(dense / folder)
    loaded = text_encoder.load(text_encoder.Request(str(base), overrides=(str(file),)))
    assert f"GGUF {kind}" in loaded.report and "encoder.gguf" in loaded.report
    CHECKS[family](loaded.clip, dense, within=WITHIN)


def small_eyes(monkeypatch, model) -> None:
    """A vision tower of a tiny model's sizes, where the host's are fixed."""
    config = model.config.vision_config
    vision = {key: getattr(config, key) for key in ("depth", "hidden_size", "intermediate_size", "patch_size")}
    monkeypatch.setattr(qwen25_vl, "VISION", {**qwen25_vl.VISION, **vision})


def mixed(name: str) -> str:
    """As llama.cpp mixes types: embeddings and some of the layers in finer ones."""
    return "Q8_0" if "token_embd" in name or "down" in name else "Q5_1" if "attn_k" in name else "Q4_0"


def mixed_k(name: str) -> str:
    return {"Q8_0": "Q6_K", "Q5_1": "Q5_K", "Q4_0": "Q4_K"}[mixed(name)]


@pytest.mark.parametrize("name", GGUF)
def test_gguf(name, tmp_path):
    """States of types that gguf-py quantizes; all weights of those that it only reads, and so are random here."""
    model = text_host.tiny(name)
    config = text_host.config_of(model)
    file = text_gguf.write(model, tmp_path / "encoder.gguf", GGUF[name], mixed)
    assert_same(text_host.network(name, text_host.part(name, config, file)), text_gguf.dequantized(model, file))
    file = text_gguf.write(model, tmp_path / "other.gguf", GGUF[name], mixed_k)
    weights = text_host.dense(text_host.network(name, text_host.part(name, config, file)))
    compared = 0
    for key, expected in text_gguf.dequantized(model, file).state_dict().items():
        new = text_host.ENCODERS[name].called(key, config)
        if new in weights and not new.startswith("visual."):
            compared += 1
            assert torch.equal(weights[new], expected), new
    assert compared > 15


def assert_same(host, model) -> None:
    clip = hasattr(host, "text_model")
    ids = torch.nn.functional.pad(IDS, (0, 77 - IDS.shape[1]), value=49407) if clip else IDS
    given, expected = text_host.host_states(host, ids), text_host.states(model, ids)
    expected = expected[1:] if clip else expected[-len(given):]
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        assert one.shape == other.shape and rel_l2(one, other) < WITHIN


# A format for each encoder beside GGUF, and all of them for one.
PACKED = [("clip_l", "bnb_nf4"), ("clip_g", "fp8_block"), ("t5", "bnb_nf4"), ("umt5", "bnb_int8"), ("llama", "gptq"),
          ("t5_old", "fp8_block"), ("pile_t5", "bnb_nf4"), ("mt5", "bnb_nf4"), ("bert", "bnb_nf4"),
          ("mistral3", "ct_fp8_dynamic"), ("qwen25_vl", "awq"), ("qwen3_8b", "ct_w8a8"), ("gemma2", "ct_w4a16"),
          *(("qwen3", kind) for kind in text_packed.FORMATS)]
FILES = [("t5", "scaled_fp8"), ("t5", "nunchaku_t5"), ("umt5", "scaled_fp8"), ("clip_l", "scaled_fp8"),
         ("clip_g", "int8_tensorwise"), ("mistral3", "scaled_fp8"), ("qwen3", "int8_tensorwise")]


@pytest.mark.part(2)
@pytest.mark.parametrize(("name", "kind"), PACKED)
def test_folder(name, kind, tmp_path, monkeypatch):
    model = text_host.tiny(name)
    if name == "qwen25_vl":
        small_eyes(monkeypatch, model)
    config = text_host.config_of(model)
    dense = text_packed.write(model, tmp_path / "packed", kind, ("visual",) if name == "qwen25_vl" else ())
    assert_same(text_host.network(name, text_host.part(name, config, tmp_path / "packed")), dense)


def test_layers_are_declared_by_the_names_in_the_file(tmp_path):
    """Which are others than ComfyUI's: each layer of a group by its whole name."""
    model = text_host.tiny("mistral3")
    dense = text_packed.write(model, tmp_path / "packed", "ct_fp8_dynamic")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    names = load_file(str(tmp_path / "packed" / "model.safetensors"))
    layers = sorted(name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale"))
    assert not any(name.startswith("model.layers.") for name in layers)
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = layers
    path.write_text(json.dumps(config), encoding="utf-8")
    made = text_host.part("mistral3", text_host.config_of(model), tmp_path / "packed")
    assert_same(text_host.network("mistral3", made), dense)


@pytest.mark.parametrize(("name", "kind"), FILES)
def test_single_file(name, kind, tmp_path):
    model = text_host.tiny(name)
    config = text_host.config_of(model)
    dense = text_packed.write_file(model, tmp_path / "packed.safetensors", kind)
    assert_same(text_host.network(name, text_host.part(name, config, tmp_path / "packed.safetensors")), dense)


# The tools' own: transformers' class -> encoder
OWN = {"Qwen3ForCausalLM": "qwen3", "Qwen2_5_VLForConditionalGeneration": "qwen25_vl", "T5EncoderModel": "t5"}


@pytest.mark.parametrize("case", sorted(path.parent.name for path in text_packed.RECORDS.glob("*/expected.safetensors")))
def test_folders_of_the_tools(case, monkeypatch, tmp_path):
    """Whole tiny encoders as the tools saved them: every quantized weight is the tool's own dequantization of it."""
    folder, _, expected = text_packed.record(case)
    file = Path(shutil.copytree(folder, tmp_path / case, ignore=shutil.ignore_patterns("expected.safetensors")))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name, text = OWN[config["architectures"][0]], config.get("text_config") or config
    if "hidden_size" in text:
        monkeypatch.setattr(llm_tables, "HEAD", text.get("head_dim") or text["hidden_size"] // 2)
    if name == "qwen25_vl":
        vision = {key: config["vision_config"][key] for key in ("depth", "hidden_size", "intermediate_size", "patch_size")}
        monkeypatch.setattr(qwen25_vl, "VISION", {**qwen25_vl.VISION, **vision})
    made = text_host.part(name, config, file, sized=False)
    operations = text_encoder.operations_for([made], None)
    assert expected
    for key, values in expected.items():
        module = made.encoder.called(f"{key}.weight" if not key.endswith(".weight") else key, config).removesuffix(".weight")
        layer = operations.Linear(values.shape[1], values.shape[0], bias=f"{module}.bias" in made.given)
        layer.load_state_dict({leaf.removeprefix(f"{module}."): tensor for leaf, tensor in made.given.items()
                               if leaf.startswith(f"{module}.")})
        assert torch.equal(layer.weight.dequantize().to(values.dtype), values), key
