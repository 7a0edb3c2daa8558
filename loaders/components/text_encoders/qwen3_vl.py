"""Qwen3-VL with its vision tower: 4B, the text encoder of Krea-2, and 8B, that of Ideogram 4 and JoyImage-Edit.

Krea-2 reads twelve hidden states, Ideogram 4 thirteen, the last of them before the final norm, which it so is loaded
without (comfy/text_encoders/ideogram4.py has none either, but for the whole of Qwen3-VL), JoyImage the last before it.
Prompts are the same token ids as in diffusers. diffusers pads Krea-2's between the prompt and the end of its template,
and hides the padding; the host does not pad.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ...architectures.base import Module
from ...errors import CheckpointError
from .base import Encoder, Family, embedding, exchanging, host_sizes, linear, plain
from .llm import KNOWN, ORIGIN, UNNEEDED, sizes, text_part
from .llm import modules as llm_modules
from .qwen3 import HOST_4B, HOST_8B, WIDTH_4B, WIDTH_8B
from .qwen25_vl import EYES, IMAGE_TOKEN, PREFIXES
from .qwen_tokenizer import same_as_bundled

if TYPE_CHECKING:
    from torch import Tensor

SMALL, LARGE = "qwen3vl_4b", "qwen3vl_8b"
# comfy/text_encoders/llama.py, Qwen3VL_4BConfig and Qwen3VL_8BConfig
HOST = {SMALL: {**HOST_4B, "rope_theta": 5000000.0},
        LARGE: {**HOST_8B, "hidden_size": WIDTH_8B, "rope_theta": 5000000.0}}
FIXED = {"attention_bias": False, "mrope_section": [24, 20, 20]}
# comfy/text_encoders/qwen3vl.py; nothing of the tower can be set but the width that it gives
COMMON: dict[str, Any] = {"num_heads": 16, "patch_size": 16, "temporal_patch_size": 2, "in_channels": 3,
                          "spatial_merge_size": 2, "num_position_embeddings": 2304, "hidden_act": "gelu_pytorch_tanh"}
VISION: dict[str, dict[str, Any]] = {
    SMALL: {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "deepstack_visual_indexes": [5, 11, 17]},
    LARGE: {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "deepstack_visual_indexes": [8, 16, 24]}}
EYELESS = ("Qwen3VLTextModel",)
CLASSES = ("Qwen3VLModel", "Qwen3VLForConditionalGeneration", *EYELESS)
CALLED = exchanging(PREFIXES, UNNEEDED)
# What the host knows the model by (comfy/sd.py): a norm, and the width that the eyes give
MARKS = (f"{EYES}deepstack_merger_list.0.norm.weight", f"{EYES}merger.linear_fc2.weight")
TAPS = [2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35]  # Krea-2's (comfy/text_encoders/krea2.py)


def has_head(config: dict[str, Any]) -> bool:
    """Whether there is a lm_head, which is of 8B alone: 4B's is its embedding."""
    text = config.get("text_config") or config
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return (config.get("architectures") or [""])[0] == "Qwen3VLForConditionalGeneration" and not tied


def called(name: str, config: dict[str, Any], kind: str, last: bool) -> str | None:
    """8B's lm_head comes along, the final norm where it is run."""
    if name.startswith("lm_head."):
        return f"model.{name}" if kind == LARGE and has_head(config) else None
    new = CALLED(name, config)
    return new if last or new != "model.norm.weight" else None


def modules(config: dict[str, Any], names: Collection[str], kind: str, last: bool) -> Iterator[Module]:
    """The language model and the vision tower that feeds it."""
    text = text_part(config)
    for module in llm_modules(text, norms=True):
        if last or module.native != "model.norm":
            yield module
    if kind == LARGE and has_head(config):
        yield linear("model.lm_head", text["vocab_size"], text["hidden_size"])
    if (config.get("architectures") or [""])[0] not in EYELESS:
        yield from vision_modules(text["hidden_size"], kind)


def vision_modules(width: int, kind: str) -> Iterator[Module]:
    """The vision tower that feeds a language model of this width."""
    sizes_of = {**COMMON, **VISION[kind]}
    inner, wide, side = sizes_of["hidden_size"], sizes_of["intermediate_size"], sizes_of["patch_size"]
    merged = inner * sizes_of["spatial_merge_size"] ** 2
    yield plain(f"{EYES}patch_embed.proj", inner, 3, sizes_of["temporal_patch_size"], side, side, bias=True)
    yield embedding(f"{EYES}pos_embed", sizes_of["num_position_embeddings"], inner)
    for number in range(sizes_of["depth"]):
        here = f"{EYES}blocks.{number}"
        yield plain(f"{here}.norm1", inner, bias=True)
        yield plain(f"{here}.norm2", inner, bias=True)
        yield linear(f"{here}.attn.qkv", 3 * inner, inner, bias=True)
        yield linear(f"{here}.attn.proj", inner, inner, bias=True)
        yield linear(f"{here}.mlp.linear_fc1", wide, inner, bias=True)
        yield linear(f"{here}.mlp.linear_fc2", inner, wide, bias=True)
    mergers = {f"{EYES}merger": inner} | {f"{EYES}deepstack_merger_list.{number}": merged
                                          for number in range(len(sizes_of["deepstack_visual_indexes"]))}
    for here, normed in mergers.items():
        yield plain(f"{here}.norm", normed, bias=True)
        yield linear(f"{here}.linear_fc1", merged, merged, bias=True)
        yield linear(f"{here}.linear_fc2", width, merged, bias=True)


def handed(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors by the names that the host knows Qwen3-VL by and then exchanges; without eyes, two of zeros."""
    import torch

    found = {f"model.{name}" if name.startswith(EYES) else name: tensor for name, tensor in tensors.items()}
    if f"model.{MARKS[0]}" not in found:
        norm = tensors["model.layers.0.input_layernorm.weight"]
        merged = VISION[kind]["hidden_size"] * COMMON["spatial_merge_size"] ** 2
        found[f"model.{MARKS[0]}"] = torch.zeros(merged, dtype=norm.dtype)
        found[f"model.{MARKS[1]}"] = torch.zeros(norm.shape[0], merged, dtype=norm.dtype)
    return found


def host_config(config: dict[str, Any], kind: str, layers: int, last: bool, whose: str) -> dict[str, Any]:
    """Sizes that differ from the host's. Raises CheckpointError for what its code fixes: the tower, 4B's width, and a
    depth of `layers` at least."""
    text, vision = text_part(config), dict(config.get("vision_config") or {})
    text["head_dim"] = text.get("head_dim") or 128
    if (config.get("architectures") or [""])[0] not in EYELESS:
        vision["architectures"] = [Text("{name} (its vision_config)", name=(config.get("architectures") or [""])[0])]
        vision["deepstack_visual_indexes"] = list(vision.get("deepstack_visual_indexes") or ())
        host_sizes(vision, {}, {**COMMON, **VISION[kind], "out_hidden_size": text["hidden_size"]})
        if config.get("image_token_id", IMAGE_TOKEN) != IMAGE_TOKEN:
            raise CheckpointError(Text("image_token_id is {value}, ComfyUI's is {fixed}",
                                       value=config["image_token_id"], fixed=IMAGE_TOKEN), ORIGIN,
                                  Text("use the base's own text encoder"))
    if text["num_hidden_layers"] < layers:
        raise CheckpointError(Text("ComfyUI's {model} text encoder needs {layers} layers or more", model=whose,
                                   layers=layers), ORIGIN, Text("use the base's own text encoder"))
    if (text["hidden_size"] == WIDTH_4B) != (kind == SMALL):
        raise CheckpointError(Text("{model} has Qwen3-VL {size}, this one is {width} wide", model=whose,
                                   size="4B" if kind == SMALL else "8B", width=text["hidden_size"]), ORIGIN,
                              Text("use the base's own text encoder"))
    different = sizes(text, HOST[kind], FIXED)
    if kind == LARGE and not has_head(config):
        different["lm_head"] = False
    return different if last else {**different, "final_norm": False}


def encoder(kind: str, layers: int, whose: str, last: bool = True) -> Encoder:
    """Qwen3-VL of a size, for a model that reads the states of so many layers; `last`: the final norm is run."""
    return Encoder("Qwen3-VL", CLASSES, kind, KNOWN, partial(called, kind=kind, last=last),
                   partial(modules, kind=kind, last=last),
                   partial(host_config, kind=kind, layers=layers, last=last, whose=whose), same_as_bundled, apart=EYES,
                   eyeless=EYELESS, handed=partial(handed, kind=kind))


KREA2, IDEOGRAM4 = encoder(SMALL, 36, "Krea-2"), encoder(LARGE, 36, "Ideogram 4", last=False)
JOYIMAGE = encoder(LARGE, 2, "JoyImage")
FAMILIES = (
    Family("Krea-2", "KREA2", (("text_encoder", "tokenizer", KREA2),), "Krea2TEModel", ("Krea2",),
           fixed={"text_encoder_select_layers": TAPS}),
    Family("Ideogram 4", "IDEOGRAM4", (("text_encoder", "tokenizer", IDEOGRAM4),), "Ideogram4Qwen3VLTEModel",
           ("Ideogram4",)),
    Family("JoyImage", "JOYIMAGE", (("text_encoder", "tokenizer", JOYIMAGE),), "JoyImageTEModel", ("JoyImage",)))
