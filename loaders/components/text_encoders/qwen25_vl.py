"""Qwen2.5-VL 7B with its vision tower, the text encoder of Qwen-Image and Qwen-Image-Edit, HunyuanImage 2.1,
Kandinsky 5 and LongCat-Image; of HunyuanVideo 1.5 without the tower.

HunyuanImage and HunyuanVideo 1.5 read the third hidden state from the end behind their system prompts (34, 36 and 108
tokens), LongCat-Image the last, of 512 tokens in any case. Kandinsky 5 reads the last behind the final norm; the host
would take it before (comfy/text_encoders/kandinsky5.py, layer_norm_hidden_state), and is told. Some system prompts of
the host are others than diffusers': HunyuanVideo 1.5's by white space, Kandinsky 5's by a letter.

Qwen-Image and Edit read the last hidden state behind the system prompt (34 tokens; 64 for Edit), of the same token ids
as diffusers. The same pixels give the same hidden states. For Edit the host's node, not this loader, prepares pictures
otherwise: it scales them to about 384 x 384 pixels by area where diffusers takes multiples of 32 by Lanczos, and the
rounding to multiples of 28 is bilinear in the host, bicubic in transformers; so a picture of 500 x 300 is 198 tokens,
not 170.
diffusers 0.42 on transformers 5 hands on no mm_token_type_ids, so that pictures get the positions of text; transformers
4, with which the models were published, and the host give them their places in the picture.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ...architectures.base import Module
from ...errors import CheckpointError
from . import byt5, clip_l
from .base import Encoder, Family, exchanging, host_sizes, linear, plain
from .llm import KNOWN, ORIGIN, UNNEEDED, sizes, text_part
from .llm import modules as llm_modules
from .qwen_tokenizer import same_as_bundled

if TYPE_CHECKING:
    from torch import Tensor

# comfy/text_encoders/llama.py, Qwen25_7BVLI_Config; 4 x 128 keys is what the host knows the model by (comfy/sd.py)
HOST = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
FIXED = {"num_key_value_heads": 4, "mrope_section": [16, 24, 24]}
# comfy/text_encoders/qwen_vl.py, Qwen2VLVisionTransformer: nothing of it can be set but the width that it gives
VISION: dict[str, Any] = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_channels": 3, "in_chans": 3,
    "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112, "hidden_act": "silu",
    "fullatt_block_indexes": [7, 15, 23, 31], "rope_theta": 10000.0}
NAMED = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")
IMAGE_TOKEN = 151655
# in transformers 5's memory, in its files and those of 4, and Qwen2_5_VLModel alone
PREFIXES = {"model.language_model.": "model.", "model.visual.": "visual.", "language_model.": "model.",
            "visual.": "visual.", "model.": "model.", "": "model."}
CALLED = exchanging(PREFIXES, r"^(model\.)?lm_head\.|" + UNNEEDED)  # the logits nobody reads
EYES = "visual."
EYELESS = ("Qwen2_5_VLTextModel",)


def modules(config: dict[str, Any], names: Collection[str]) -> Iterator[Module]:
    """The language model and the vision tower that feeds it, where the class has one."""
    text = text_part(config)
    yield from llm_modules(text, bias=True)
    if not _eyeless(config):
        yield from vision_modules(text["hidden_size"], names)


def _eyeless(config: dict[str, Any]) -> bool:
    return (config.get("architectures") or [""])[0] in EYELESS


def vision_modules(width: int, names: Collection[str]) -> Iterator[Module]:
    """The vision tower that feeds a language model of this width, whose parts are stored as `names` say: llama.cpp's
    files have q, k and v apart, and the two moments of the first convolution."""
    inner, wide, side = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    if f"{EYES}patch_embed.proj.1.weight" in names:
        for moment in range(2):
            yield plain(f"{EYES}patch_embed.proj.{moment}", inner, 3, side, side)
    else:
        yield plain(f"{EYES}patch_embed.proj", inner, 3, 2, side, side)
    apart = any(name.startswith(f"{EYES}blocks.0.attn.q.") for name in names)
    for number in range(VISION["depth"]):
        here = f"{EYES}blocks.{number}"
        yield plain(f"{here}.norm1", inner)
        yield plain(f"{here}.norm2", inner)
        yield Module(f"{here}.attn.qkv", tuple(f"{here}.attn.{part}" for part in "qkv"), (inner,) * 3, (inner,)) \
            if apart else linear(f"{here}.attn.qkv", 3 * inner, inner, bias=True)
        yield linear(f"{here}.attn.proj", inner, inner, bias=True)
        yield linear(f"{here}.mlp.gate_proj", wide, inner, bias=True)
        yield linear(f"{here}.mlp.up_proj", wide, inner, bias=True)
        yield linear(f"{here}.mlp.down_proj", inner, wide, bias=True)
    yield plain(f"{EYES}merger.ln_q", inner)
    yield linear(f"{EYES}merger.mlp.0", 4 * inner, 4 * inner, bias=True)
    yield linear(f"{EYES}merger.mlp.2", width, 4 * inner, bias=True)


def complete(tensors: dict[str, Tensor]) -> None:
    """The first convolution of two moments [rows, 3, 14, 14] -> [rows, 3, 2, 14, 14]."""
    import torch

    moments = [tensors.pop(f"{EYES}patch_embed.proj.{moment}.weight", None) for moment in range(2)]
    if moments[0] is not None and moments[1] is not None:
        tensors[f"{EYES}patch_embed.proj.weight"] = torch.stack((moments[0], moments[1]), dim=2)


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from Qwen2.5-VL 7B's. Raises CheckpointError for what the host's code fixes."""
    text, vision = text_part(config), dict(config.get("vision_config") or {})
    text["head_dim"] = None  # Qwen2.5-VL always divides its width by its heads
    if _eyeless(config):
        return sizes(text, HOST, FIXED)
    lacking = [name for name in NAMED if name not in vision]
    if lacking:
        raise CheckpointError(Text("the vision_config does not say {lacking}", lacking=", ".join(lacking)),
                              ORIGIN, Text("download it again"))
    vision |= vision.get("rope_parameters") or {}
    for name in ("patch_size", "temporal_patch_size"):  # transformers allows a list: height, width
        if isinstance(vision.get(name), list) and len(set(vision[name])) == 1:
            vision[name] = vision[name][0]
    if "fullatt_block_indexes" in vision:
        vision["fullatt_block_indexes"] = list(vision["fullatt_block_indexes"])
    vision["architectures"] = [Text("{name} (its vision_config)", name=(config.get("architectures") or [""])[0])]
    host_sizes(vision, {}, {**VISION, "out_hidden_size": text["hidden_size"]})
    if config.get("image_token_id", IMAGE_TOKEN) != IMAGE_TOKEN:
        raise CheckpointError(Text("image_token_id is {value}, ComfyUI's is {fixed}", value=config["image_token_id"],
                                   fixed=IMAGE_TOKEN), ORIGIN,
                              Text("use the base's own text encoder"))
    return sizes(text, HOST, FIXED)


QWEN25_VL = Encoder("Qwen2.5-VL", ("Qwen2_5_VLForConditionalGeneration",), "qwen25_7b", KNOWN, CALLED, modules,
                    host_config, same_as_bundled, apart=EYES, complete=complete)
FAMILY = Family("Qwen-Image", "QWEN_IMAGE", (("text_encoder", "tokenizer", QWEN25_VL),), "QwenImageTEModel",
                ("QwenImage",))
TEXT_ALONE = replace(QWEN25_VL, classes=(*EYELESS, *QWEN25_VL.classes), eyeless=EYELESS)
_BYT5 = ("text_encoder_2", "tokenizer_2", byt5.BYT5)
_KANDINSKY = (("text_encoder", "tokenizer", QWEN25_VL), ("text_encoder_2", "tokenizer_2", clip_l.CLIP_L))
_OTHER_PROMPT = Text("ComfyUI's system prompt is not letter by letter diffusers', so that states behind it differ a "
                     "little")
_KANDINSKY_NOTE = Text("{prompt}. They are taken behind the encoder's final norm as diffusers does it (ComfyUI's own "
                       "loaders: before it)", prompt=_OTHER_PROMPT)
FAMILIES = (
    FAMILY,
    Family("HunyuanImage 2.1", "HUNYUAN_IMAGE", (("text_encoder", "tokenizer", QWEN25_VL), _BYT5),
           "HunyuanImageTEModel", ("HunyuanImagePipeline",)),
    Family("HunyuanImage 2.1 refiner", "HUNYUAN_IMAGE", (("text_encoder", "tokenizer", QWEN25_VL),),
           "HunyuanImageTEModel", ("HunyuanImageRefiner",),
           note=Text("the refiner's pipeline puts a system prompt of its own before a prompt; ComfyUI does not")),
    Family("HunyuanVideo 1.5", "HUNYUAN_VIDEO_15", (("text_encoder", "tokenizer", TEXT_ALONE), _BYT5),
           "HunyuanImageTEModel", ("HunyuanVideo15",), note=_OTHER_PROMPT),
    Family("Kandinsky 5", "KANDINSKY5", _KANDINSKY, "Kandinsky5TEModel", ("Kandinsky5T2V", "Kandinsky5I2V"),
           note=_KANDINSKY_NOTE, normed=("qwen25_7b",)),
    Family("Kandinsky 5 Image", "KANDINSKY5_IMAGE", _KANDINSKY, "Kandinsky5TEModel",
           ("Kandinsky5T2I", "Kandinsky5I2I"), note=_KANDINSKY_NOTE, normed=("qwen25_7b",)),
    Family("LongCat-Image", "LONGCAT_IMAGE", (("text_encoder", "tokenizer", QWEN25_VL),), "LongCatImageTEModel",
           ("LongCatImage",)))
