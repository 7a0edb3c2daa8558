"""Text encoders in GGUF as llama.cpp's converter writes them: its names, and what it does to values on the way.

It permutes the rows of q and k of Llama's kind for its own rotary embedding, and adds 1 to Gemma's norms. What it cuts
off a language model to see (the mmproj file) has q, k and v apart and its first convolution in two moments.
Source: llama.cpp, convert_hf_to_gguf.py (LlamaModel.permute, Gemma2Model.modify_tensors, Qwen2VLVisionModel) and
gguf-py's tensor_mapping.py; proven against exports of theirs (tests/data/exports/text_gguf).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ...errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURE = "general.architecture"
_T5 = {"attn_q": "0.SelfAttention.q", "attn_k": "0.SelfAttention.k", "attn_v": "0.SelfAttention.v",
       "attn_o": "0.SelfAttention.o", "attn_rel_b": "0.SelfAttention.relative_attention_bias",
       "attn_norm": "0.layer_norm", "ffn_gate": "1.DenseReluDense.wi_0", "ffn_up": "1.DenseReluDense.wi_1",
       "ffn_down": "1.DenseReluDense.wo", "ffn_norm": "1.layer_norm"}
_T5_TOP = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
_LLM = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm"}
_GEMMA = {**_LLM, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
          "post_ffw_norm": "post_feedforward_layernorm"}
_LLM_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_EYES = {"attn_q": "attn.q", "attn_k": "attn.k", "attn_v": "attn.v", "attn_out": "attn.proj", "ln1": "norm1",
         "ln2": "norm2", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EYES_TOP = {"v.post_ln": "visual.merger.ln_q", "mm.0": "visual.merger.mlp.0", "mm.2": "visual.merger.mlp.2"}
_MOMENTS = {"v.patch_embd.weight": "visual.patch_embed.proj.0.weight",
            "v.patch_embd.weight.1": "visual.patch_embed.proj.1.weight"}
_PERMUTED = frozenset({"llama", "mistral3"})
_ONE_MORE = frozenset({"gemma", "gemma2", "gemma3"})
# Of no use to an encoder: the half of a whole T5 that writes, angles of the rotary embedding.
_UNNEEDED = re.compile(r"^(dec\.|rope_(freqs|factors_\w+)\.)")
_BLOCK = re.compile(r"^(enc\.blk|v\.blk|blk)\.(\d+)\.(\w+)\.(weight|bias)$")
_TOP = re.compile(r"^([\w.]+)\.(weight|bias)$")


def is_here(names: Collection[str]) -> bool:
    """Whether tensors are named as llama.cpp names them."""
    return any(name.startswith(("blk.", "enc.blk.", "v.blk.")) for name in names)


def called(names: Collection[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """transformers' name -> the file's. A name that is nobody's stays what it is; two of one name are kept apart."""
    kind = metadata.get(ARCHITECTURE, "")
    gemma, encoder = kind in _ONE_MORE, any(name.startswith("enc.blk.") for name in names)
    found = {}
    for name in names:
        if _UNNEEDED.search(name) or encoder and name.startswith("output."):
            continue
        new = _MOMENTS.get(name) or _name(name, _GEMMA if gemma else _LLM, encoder)
        found[name if new in found else new] = name
    return found


def _name(name: str, layers: Mapping[str, str], encoder: bool) -> str:
    block, top = _BLOCK.match(name), _TOP.match(name)
    if block:
        below, number, part, leaf = block.groups()
        table, start = {"blk": (layers, "model.layers."), "enc.blk": (_T5, "encoder.block."),
                        "v.blk": (_EYES, "visual.blocks.")}[below]
        middle = f"{number}.layer" if below == "enc.blk" else number
        return f"{start}{middle}.{table[part]}.{leaf}" if part in table else name
    tops = {**(_T5_TOP if encoder else _LLM_TOP), **_EYES_TOP}
    return f"{tops[top[1]]}.{top[2]}" if top and top[1] in tops else name


def put_right(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str],
              where: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> what makes transformers' tensor of the file's, for those of `shapes` that are others.

    Raises CheckpointError where the file does not say how many heads there are, or the rows are not those of heads.
    """
    kind = metadata.get(ARCHITECTURE, "")
    if kind in _ONE_MORE:
        return {name: _less_one for name in shapes if name.endswith("norm.weight")}
    if kind not in _PERMUTED:
        return {}
    heads = {}
    for part, key in (("q", "head_count"), ("k", "head_count_kv")):
        try:
            heads[part] = int(metadata.get(f"{kind}.attention.{key}") or metadata[f"{kind}.attention.head_count"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(Text("the file does not say {key}, by which rows are in another order",
                                       key=f"{kind}.attention.{key}"), where,
                                  Text("take another file of this model")) from error
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, shape in shapes.items():
        projection = re.search(r"\.self_attn\.([qk])_proj\.(weight|bias)$", name)
        if projection is None:
            continue
        count = heads[projection[1]]
        if count < 1 or shape[0] % (2 * count):
            raise CheckpointError(Text("{name} has {rows} rows, which are no {heads} heads", name=name, rows=shape[0],
                                       heads=count), where, Text("take another file of this model"))
        found[name] = partial(_unpermuted, count, shape[0] // count // 2)
    return found


def _unpermuted(heads: int, half: int, stored: Tensor) -> Tensor:
    """Rows in the order of transformers: of each head its two halves, not in turn. Whatever rows are stored as, they
    are moved whole."""
    return stored.view(heads, half, 2, -1).transpose(1, 2).reshape(stored.shape)


def _less_one(stored: Tensor) -> Tensor:
    return stored.float() - 1


def config_of(config: dict[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """config.json with the rotary base that the file says, which finetunes change."""
    kind = metadata.get(ARCHITECTURE, "")
    try:
        base = float(metadata[f"{kind}.rope.freq_base"])
    except (KeyError, ValueError):
        return config
    found = deepcopy(config)
    for part in (found, found.get("text_config") or {}):
        for one in (part, part.get("rope_parameters"), part.get("rope_scaling")):
            if isinstance(one, dict) and one.get("rope_theta") is not None:
                one["rope_theta"] = base
    return found
