"""The tests' own writer of text encoders in GGUF against llama.cpp's converter: what every test of such files stands on.

The files of tests/data/exports/text_gguf are the converter's, of models whose weights a formula gives
(support/text_gguf_models.py), so that all there is to compare is compared bit by bit.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch

from support import text_gguf
from support.text_gguf_models import EXPORTS, MODELS, make, tokenizer

pytestmark = pytest.mark.unit

PRE = {"mistral": "tekken"}  # an older Mistral, whose architecture is "llama"


def contents(path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(key -> (types, value), tensor name -> (type, shape, bytes))."""
    reader = gguf.GGUFReader(str(path))
    keys = {key: (field.types, field.contents()) for key, field in reader.fields.items()}
    return keys, {t.name: (t.tensor_type, tuple(map(int, t.shape)), t.data.tobytes()) for t in reader.tensors}


@pytest.mark.parametrize("kind", MODELS)
def test_writes_what_llama_cpp_converts_to(kind, tmp_path):
    arch = MODELS[kind][1]
    folder = tokenizer(kind)
    if arch == "gemma2":
        folder = tmp_path
        (tmp_path / "tokenizer.model").write_bytes((EXPORTS / "unigram" / "spiece.model").read_bytes())
    keys, tensors = contents(EXPORTS / f"{kind}.gguf")
    made = contents(text_gguf.write(make(kind), tmp_path / "made.gguf", arch, "F16", folder, PRE.get(kind)))
    assert made[1].keys() == tensors.keys()
    assert [name for name in tensors if made[1][name] != tensors[name]] == []
    loose = {"general.name", "general.size_label", "GGUF.kv_count"}  # the folder's name; counted for leader boards
    assert {key: value for key, value in made[0].items() if key not in loose} == \
        {key: value for key, value in keys.items() if key not in loose}


@pytest.mark.parametrize("kind", MODELS)
def test_reads_the_converters_files_back(kind):
    model, truth = make(kind), dict(make(kind).named_parameters())
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    got = dict(text_gguf.dequantized(model, EXPORTS / f"{kind}.gguf").named_parameters())
    vision = kind.endswith("mmproj")
    for name, values in truth.items():
        if ("visual" in name) != vision or "vision" in name or "projector" in name:
            assert got[name].isnan().all()  # not in this file
        elif kind == "gemma3" and "embed_tokens" in name:  # the converter cuts rows without a token
            assert torch.equal(got[name][:44], values[:44]) and got[name][44:].isnan().all()
        elif name != "lm_head.weight":
            assert torch.equal(got[name], values), name


def quantizable(arch: str) -> Any:
    """A language model whose rows are whole blocks of every type."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(3)
    return LlamaModel(LlamaConfig(vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=1, head_dim=64,
                                  num_attention_heads=4, num_key_value_heads=2)).eval().requires_grad_(False)


def test_quantized_files_mean_the_model_that_is_returned(tmp_path):
    """Every type in turn, one of them of random blocks, and an embedding with holes: what gguf-py reads in the file, with
    rows back in their places by the formula of the spec, are the weights of the model."""
    model = quantizable("llama")
    model.embed_tokens.weight[7:290] = 0
    kinds = {"attn_q": "Q8_0", "attn_k": "Q4_0", "attn_v": "Q6_K", "attn_output": "Q5_1", "ffn_gate": "Q4_K",
             "ffn_up": "IQ4_XS", "ffn_down": "BF16", "token_embd": "Q3_K"}
    text_gguf.LARGE, large = 1, text_gguf.LARGE
    try:
        path = text_gguf.write(model, tmp_path / "q.gguf", "llama", lambda name: kinds[name.split(".")[-2]])
        before = {name: p.clone() for name, p in model.named_parameters()}
        assert text_gguf.dequantized(model, path) is model
    finally:
        text_gguf.LARGE = large
    stored = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    for short, kind in kinds.items():
        tensor = stored["token_embd.weight" if short == "token_embd" else f"blk.0.{short}.weight"]
        assert tensor.tensor_type.name == kind
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        if short in ("attn_q", "attn_k"):
            heads = 4 if short == "attn_q" else 2
            values = values.reshape(heads, 32, 2, 256).swapaxes(1, 2).reshape(values.shape)
        name = "embed_tokens.weight" if short == "token_embd" else f"layers.0.{names[short]}.weight"
        assert torch.equal(dict(model.named_parameters())[name], values), short
        # gguf-py's own quantizers keep the weight; random blocks have its spread
        if kind in text_gguf.QUANTIZED:
            assert (values - before[name]).norm() < 0.12 * before[name].norm(), short
        else:
            assert 0.8 < values[before[name].any(1)].std() / before[name][before[name].any(1)].std() < 1.25, short
    assert not model.embed_tokens.weight[7:290].any()
