"""Text encoders of this pack in the host's networks without a tokenizer, which takes seconds to load, and what
transformers makes of the same token ids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantized_transformers.loaders.components import text_encoder, text_part
from quantized_transformers.loaders.components.text_encoders import (
    bert,
    clip_g,
    clip_l,
    gemma2,
    llama,
    llm,
    mistral3,
    mt5,
    pile_t5,
    qwen3,
    qwen25_vl,
    t5,
    t5_old,
    umt5,
)
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.locate import locate
from support import text_encoders
from support.transformers_versions import qwen25_vl_config, rope

ENCODERS = {"clip_l": clip_l.CLIP_L, "clip_g": clip_g.CLIP_G, "t5": t5.T5_XXL, "umt5": umt5.UMT5_XXL,
            "t5_old": t5_old.T5_OLD, "pile_t5": pile_t5.PILE_T5, "mt5": mt5.MT5, "bert": bert.BERT,
            "llama": llama.LLAMA, "mistral3": mistral3.MISTRAL3, "qwen25_vl": qwen25_vl.QWEN25_VL,
            "qwen3": qwen3.QWEN3, "qwen3_8b": qwen3.KLEIN_9B, "gemma2": gemma2.GEMMA2}
WRAPPERS = {"clip_l": "sd1_clip:SDClipModel", "clip_g": "sdxl_clip:SDXLClipG", "t5": "text_encoders.sd3_clip:T5XXLModel",
            "t5_old": "text_encoders.cosmos:T5XXLModel", "pile_t5": "text_encoders.aura_t5:PT5XlModel",
            "mt5": "text_encoders.hydit:MT5XLModel", "bert": "text_encoders.hydit:HyditBertModel",
            "umt5": "text_encoders.wan:UMT5XXlModel", "llama": "text_encoders.hunyuan_video:LLAMAModel",
            "mistral3": "text_encoders.flux:Mistral3_24BModel", "qwen25_vl": "text_encoders.qwen_image:Qwen25_7BVLIModel",
            "qwen3": "text_encoders.z_image:Qwen3_4BModel", "qwen3_8b": "text_encoders.flux:Qwen3_8BModel", "gemma2": "text_encoders.lumina2:Gemma2_2BModel"}
T5 = {"t5": "t5", "t5_old": "t5", "umt5": "umt5", "pile_t5": "umt5", "mt5": "t5"}


def part(name: str, config: dict[str, Any], *files: Path, sized: bool = True) -> text_part.Part:
    """An encoder from its files (a folder, or one file, and one of its eyes), as the loader prepares it, of any size:
    what the host's detection knows a language model by need not be there."""
    encoder = ENCODERS[name]
    if name not in ("clip_l", "clip_g", "bert", *T5):
        encoder = replace(encoder, host_config=_any_size if sized else lambda config: {})
    made = text_part.Part("text_encoder", encoder, config, locate(str(files[0])),
                          [Checkpoint(locate(str(file))) for file in files], True,
                          blind=encoder.apart != "" and len(files) == 1 and files[0].suffix == ".gguf")
    text_part.assemble_part(made)
    return made


def _any_size(config: dict[str, Any]) -> dict[str, Any]:
    text = llm.text_part(config)
    found = {key: text[key] for key in (*llm.SIZES, "rms_norm_eps", "rope_theta")}
    return found | ({"lm_head": qwen3.has_head(config)} if text.get("model_type") == "qwen3" else {})


def network(name: str, made: text_part.Part, dtype: torch.dtype = torch.float32) -> Any:
    """The host's network with the tensors of a part, as its CLIP makes and loads it."""
    import importlib

    module, _, wrapper = WRAPPERS[name].partition(":")
    host_name = made.encoder.host_name
    options = {"model_name": host_name, f"{host_name}_model_config": made.sizes,
               "custom_operations": text_encoder.operations_for([made], None)}
    model = getattr(importlib.import_module(f"comfy.{module}"), wrapper)(dtype=dtype, model_options=options)
    apart = made.encoder.apart or "-"  # eyes of other sizes than the host's
    missing, unexpected = model.load_sd({key: value for key, value in made.given.items() if not key.startswith(apart)})
    assert not unexpected and all(key.startswith(apart) for key in missing), (missing, unexpected)
    return model.transformer


def host_states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """All hidden states, the last as it is given out."""
    every = None if hasattr(model, "shared") or hasattr(model, "bert") else "all"  # T5 and BERT give the last alone
    with torch.inference_mode():
        out = model(ids, attention_mask=None, intermediate_output=every, final_layer_norm_intermediate=False,
                    dtype=torch.float32)
    return list(out[1].unbind(1)) if every else [out[0]]


def dense(network: Any) -> dict[str, torch.Tensor]:
    """All weights of the host's network as numbers, F32."""
    found = {}
    for name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            found[f"{name}.weight"] = (weight.dequantize() if hasattr(weight, "dequantize") else weight).float()
    return found


def tiny(name: str) -> Any:
    """transformers' model of an encoder, BF16: as small as blocks of 256 columns and heads of 128 let it be."""
    import transformers as tr

    if name in T5:
        sizes = {"d_model": 256, "d_ff": 512, "d_kv": 64, "num_layers": 2}
        return text_encoders.umt5(64, **sizes) if T5[name] == "umt5" else getattr(text_encoders, "t5_old" if name == "t5_old" else "t5")(
            vocab_size=64, **sizes)
    if name == "bert":
        return text_encoders.bert(vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    if name == "clip_l":
        return text_encoders.clip(256)
    if name == "clip_g":
        return text_encoders.clip_g(hidden_size=64, intermediate_size=64, projection_dim=64, num_attention_heads=4)
    sizes = {**LLM, **rope(12345.0)}
    if name == "llama":
        return text_encoders.seeded(tr.LlamaModel, tr.LlamaConfig(**sizes))
    if name == "gemma2":
        return text_encoders.seeded(tr.Gemma2Model, tr.Gemma2Config(
            **{**sizes, "head_dim": 256, "num_attention_heads": 1}, query_pre_attn_scalar=256, sliding_window=4096,
            attn_logit_softcapping=1e9))  # the host has none
    if name == "mistral3":
        vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "head_dim": 8, "patch_size": 14, "image_size": 28}
        return text_encoders.seeded(tr.Mistral3ForConditionalGeneration, tr.Mistral3Config(
            text_config=tr.MistralConfig(**sizes, sliding_window=None).to_dict(), vision_config=vision))
    if name == "qwen25_vl":
        sizes |= rope(12345.0, mrope_section=[16, 24, 24])
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 256,
                  "fullatt_block_indexes": [0], "patch_size": 4}
        return text_encoders.seeded(tr.Qwen2_5_VLForConditionalGeneration, qwen25_vl_config(sizes, vision_config=vision))
    return text_encoders.seeded(tr.Qwen3ForCausalLM, tr.Qwen3Config(
        **sizes, tie_word_embeddings=name == "qwen3"))


LLM = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2,
       "num_key_value_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
       "pad_token_id": None}


def states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """transformers' hidden states. A model that was made BF16 has its rotary angles in it, so that it is made anew."""
    fresh = type(model)(model.config).float().eval()
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        return list(fresh(ids, output_hidden_states=True).hidden_states)


def config_of(model: Any) -> dict[str, Any]:
    """config.json as transformers saves it."""
    return json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
