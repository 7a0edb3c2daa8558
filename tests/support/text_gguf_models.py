"""The tiny models that llama.cpp's converter was run on (tests/data/exports/text_gguf, make_text_gguf.py), made anew.

Their weights are no random numbers but a formula of name and place, exact in F16 and, plus one, in F32: what the
converter made of each can be compared bit by bit, on every version of torch. Sizes differ from each other wherever they
can, heads of q and k and a layer's widths too, so that a wrong permutation, slice or transposition shows.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

from support.pack import PACK
from support.transformers_versions import parameters, qwen25_vl_config, rope

EXPORTS = PACK / "tests" / "data" / "exports" / "text_gguf"
VOCAB = 48
# file of EXPORTS -> (transformers' class, architecture, tokenizer); "-vision": the same model's mmproj
MODELS = {
    "t5encoder": ("T5EncoderModel", "t5encoder", "unigram"),
    "umt5": ("UMT5ForConditionalGeneration", "t5", "unigram"),
    "llama": ("LlamaForCausalLM", "llama", "bpe"),
    "llava": ("LlavaForConditionalGeneration", "llama", "bpe"),
    "mistral": ("MistralForCausalLM", "llama", "bpe"),
    "mistral3": ("Mistral3ForConditionalGeneration", "mistral3", "bpe"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", "bpe"),
    "qwen25vl": ("Qwen2_5_VLForConditionalGeneration", "qwen2vl", "bpe"),
    "qwen25vl-mmproj": ("Qwen2_5_VLForConditionalGeneration", "clip", ""),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", "unigram"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3", "bpe"),
}
LLM = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
       "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": False,
       "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rms_norm_eps": 1e-5}
T5 = {"vocab_size": VOCAB, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "n_positions": 512,
      "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


def _config(kind: str) -> Any:
    import transformers as tr

    if kind in ("t5encoder", "umt5"):
        return tr.T5Config(**T5) if kind == "t5encoder" else tr.UMT5Config(**T5, num_decoder_layers=1)
    if kind == "llama":
        return tr.LlamaConfig(**LLM, **rope(**LLAMA3))
    if kind == "llava":
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}
        return tr.LlavaConfig(text_config=tr.LlamaConfig(**LLM, **rope(1e6)).to_dict(),
                              vision_config=tr.CLIPVisionConfig(**vision).to_dict(), image_token_index=3)
    if kind == "mistral":
        return tr.MistralConfig(**LLM, **rope(1e6))
    if kind == "mistral3":
        vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "head_dim": 8, "patch_size": 14, "image_size": 28}
        text = tr.MistralConfig(**{**LLM, "tie_word_embeddings": True}, **rope(1e6))
        return tr.Mistral3Config(text_config=text.to_dict(), vision_config=vision, tie_word_embeddings=True)
    if kind == "qwen3":
        return tr.Qwen3Config(**{**LLM, "tie_word_embeddings": True}, **rope(1e6))
    if kind.startswith("qwen25vl"):
        text = {**LLM, "hidden_size": 32}
        del text["head_dim"]
        text |= rope(1e6, mrope_section=[1, 1, 2])
        vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
                  "fullatt_block_indexes": [0, 1, 2], "window_size": 112, "patch_size": 4}
        return qwen25_vl_config(text, vision_config=vision)
    gemma = {**LLM, "tie_word_embeddings": True, "sliding_window": 128}
    if kind == "gemma2":
        return tr.Gemma2Config(**gemma)
    return tr.Gemma3TextConfig(**gemma)


def make(kind: str) -> Any:
    """The model of a file of EXPORTS, F32. Every element of a tensor below 1,024 elements is another one."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, MODELS[kind][0])(_config(kind)).float().eval().requires_grad_(False)
    for name, parameter in parameters(model).items():
        # models are renamed between versions of transformers: the last parts of a name stay
        start = zlib.crc32(".".join(name.rpartition("layers.")[2].split(".")[-4:]).encode())
        values = (torch.arange(parameter.numel()) * 5 + start) % 1024 - 512
        parameter.copy_((values / 512).view(parameter.shape))
    return model


def tokenizer(kind: str) -> Path | None:
    """The folder of the tokenizer that the converter read with it."""
    name = MODELS[kind][2]
    return EXPORTS / name if name else None
