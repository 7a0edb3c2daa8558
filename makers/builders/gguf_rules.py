"""Which type each tensor of a GGUF file has: the rules of ComfyUI-GGUF's converter and of its patch for llama-quantize
(https://github.com/city96/ComfyUI-GGUF, tools/convert.py and tools/lcpp.patch, as of 795e451).

The converter: vectors, what has 1024 values or fewer, and a few parameters that a model needs exactly are F32; the rest
is BF16 where it was BF16, else F16. llama-quantize: weights of two dimensions are quantized, but for the layers at
both ends of a model and what conditions it. Names are searched for these words, as there.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import NamedTuple

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from ...quant.ggml import TYPES

# What gguf-py (package gguf, quants.py) quantizes to.
QUANTIZED = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "TQ2_0", "TQ1_0")
KINDS = (*QUANTIZED, "BF16", "F16")
# general.file_type: gguf-py's LlamaFileType.
FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37,
              "MXFP4": 38}
LONGEST_NAME = 127  # ggml's, as ComfyUI-GGUF's patch has it
# Layers that llama-quantize gives one more number a block than the others: the last of each MLP.
_WIDER = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}
_LAST_OF_MLP = ("ffn_down", ".ffn.2.weight", ".ff.net.2.weight", ".mlp.layer2.weight", ".adaln_modulation_mlp.2.weight",
                ".feed_forward.w2.weight")
_SMALL = 1024
_CUT_FROM = 512  # values of a tensor of a UNet that is stored in rows of 256


class Rules(NamedTuple):
    """Of one `general.architecture`. `high` stays in 16 bits, `exact` in F32; `cut`: whether what does not divide by
    256 is stored in rows of 256, with its shape in the file's keys, as the convolutions of UNets are."""

    name: str
    high: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    cut: bool = False


_ENDS = ("txt_in.", "img_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.")
_UNET = ("class_embedding.", "time_embedding.", "add_embedding.", "time_embed.", "label_emb.", "conv_in.", "conv_out.",
         "input_blocks.0.0.weight", "out.2.weight")
RULES = {rules.name: rules for rules in (
    # FLUX.2's modulations of all blocks, and Chroma's of all layers: each is one for the whole model
    Rules("flux", (*_ENDS, "_stream_modulation", "distilled_guidance_layer.")),
    Rules("hyvid", _ENDS),
    Rules("sd1", _UNET, cut=True),
    Rules("sdxl", _UNET, cut=True),
    Rules("sd3", ("final_layer.", "time_text_embed.", "context_embedder.", "t_embedder.", "y_embedder.", "x_embedder.",
                  "pos_embed")),
    Rules("aura", ("t_embedder.", "init_x_linear.", "modF.1.weight", "cond_seq_linear.weight", "final_linear.weight",
                   "positional_encoding", "register_tokens")),
    Rules("ltxv", ("adaln_single.", "caption_projection.", "patchify_proj.", "proj_out."), ("scale_shift_table",)),
    Rules("wan", ("patch_embedding.", "text_embedding.", "time_projection.", "time_embedding.", "img_emb.", "head."),
          (".modulation",)),
    Rules("hidream", ("p_embedder.", "t_embedder.", "x_embedder.", "final_layer.", "caption_projection."),
          (".ff_i.gate.weight", "img_emb.emb_pos")),
    Rules("cosmos", ("p_embedder.", "t_embedder.", "t_embedding_norm.", "x_embedder.", "final_layer."),
          ("pos_embedder",)),
    Rules("lumina2", ("t_embedder.", "x_embedder.", "final_layer.", "cap_embedder.", "context_refiner.",
                      "noise_refiner.")),
    # the patch has none for it: what nvidia-modelopt's examples leave alone (presets.py)
    Rules("qwen_image", ("img_in.", "txt_in.", "time_text_embed.", "norm_out.", "proj_out.")))}

# This pack's architectures and the host's classes -> general.architecture, by how their names begin.
_CALLED = {"FLUX.1": "flux", "FLUX.2": "flux", "Flux": "flux", "OvisImage": "flux", "Chroma": "flux",
           "HunyuanVideo": "hyvid",
           "Qwen-Image": "qwen_image", "QwenImage": "qwen_image", "Wan": "wan", "WAN2": "wan", "Z-Image": "lumina2",
           "ZImage": "lumina2", "Lumina2": "lumina2", "SDXL": "sdxl", "SSD1B": "sdxl", "Segmind_Vega": "sdxl",
           "KOALA_": "sdxl", "SD15": "sd1", "SD3": "sd3", "AuraFlow": "aura", "LTX": "ltxv", "HiDream": "hidream",
           "CosmosT2IPredict2": "cosmos", "CosmosI2VPredict2": "cosmos"}
# Models that have a name of these at the beginning, and that ComfyUI-GGUF does not know.
_OTHERS = frozenset({"SDXLRefiner", "HiDreamO1", "ChromaRadiance", "ZImagePixelSpace"})


def rules_of(architecture: str, where: object) -> Rules:
    """The rules of an architecture, by its name. Raises CheckpointError for one that ComfyUI-GGUF has no name for."""
    name = "" if architecture in _OTHERS else next((name for begin, name in _CALLED.items()
                                                    if architecture.startswith(begin)), "")
    if not name:
        raise CheckpointError(Text("ComfyUI-GGUF reads no {architecture}, so there is no name for it in a GGUF file",
                                   architecture=architecture), where,
                              Text("build one of: {names}", names=", ".join(RULES)))
    return RULES[name]


class Choice(NamedTuple):
    """What becomes of a tensor: its type, the shape it is stored in, and why: "quantized", "kept" (a rule or a pattern
    says so), "columns" (they do not divide into blocks) or "" (nothing of that kind is quantized)."""

    kind: str
    shape: tuple[int, ...]
    why: str = ""


def choose(name: str, shape: tuple[int, ...], dtypes: Collection[str], linear: bool, wanted: str, rules: Rules,
           kept: bool) -> Choice:
    """The type of one tensor [shape] stored as `dtypes` (those of its parts).

    `linear`: whether it is the weight of a Linear; `wanted` one of KINDS; `kept`: whether a preset or the user keeps it
    in 16 bits.
    """
    values = prod(shape)
    high = wanted if wanted in ("BF16", "F16") else "BF16" if set(dtypes) == {"BF16"} else "F16"
    if len(shape) > 4:
        return Choice("F32", shape)  # llama.cpp's tools have four; ComfyUI-GGUF adds these by themselves, in F32
    if "F16" not in dtypes and (len(shape) == 1 or values <= _SMALL or any(word in name for word in rules.exact)):
        return Choice("F32", shape)
    cut = rules.cut and len(shape) > 1 and values >= _CUT_FROM and values % 256 == 0 and shape[-1] % 256 != 0
    stored = (values // 256, 256) if cut else shape
    if wanted in ("BF16", "F16") or not name.endswith(".weight") or len(stored) != 2 or not (linear or cut):
        return Choice(high, stored)
    if kept or any(word in name for word in rules.high):
        return Choice(high, stored, "kept")
    kind = _WIDER.get(wanted, wanted) if any(word in name for word in _LAST_OF_MLP) else wanted
    if stored[1] % TYPES[kind].block:
        return Choice(high, stored, "columns")
    return Choice(kind, stored, "quantized")
