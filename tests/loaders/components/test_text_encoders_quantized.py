"""Quantized text encoders: hidden states, token ids and tensors against transformers' models with the weights that the
tools' own dequantization gives.

Files are GGUF by llama.cpp's names, transformers' folders and single files; tests/support/text_gguf.py and text_packed.py
write them and say what is in them, without this pack.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from quantized_transformers.loaders.components import text_encoder
from quantized_transformers.loaders.components.text_encoders import gemma2, qwen25_vl
from quantized_transformers.loaders.components.text_encoders import llm as llm_tables
from support import text_encoders as tiny
from support import text_gguf, text_gguf_models, text_host
from support.common import rel_l2

from .test_text_encoders import CHECKS

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
        vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 24, "patch_size": 4}
        monkeypatch.setattr(qwen25_vl, "VISION", {**qwen25_vl.VISION, **vision})
    encoder = text_host.ENCODERS[name]
    given = text_host.part(name, config, *files, sized=False).given
    expected = {new: tensor for key, tensor in model.state_dict().items()
                if (new := encoder.called(key, config)) and (eyes or not new.startswith("visual."))}
    for kept, twins in encoder.twins.items():
        for twin in twins:
            expected.setdefault(kept, expected.pop(twin))
    assert given.keys() == expected.keys()
    assert [key for key in given if not torch.equal(given[key].float(), expected[key])] == []


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
@pytest.mark.parametrize("family", ["flux1", "wan"])
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
    given, expected = text_host.host_states(host, IDS), text_host.states(model, IDS)
    if len(given) == 1:
        expected = expected[-1:]
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        assert one.shape == other.shape and rel_l2(one, other) < WITHIN
