"""What becomes of each loader node of other packs: pure functions of a node's type and its widgets' values.

Widget orders and meanings are those of nunchaku-ai/ComfyUI-nunchaku a412b1f (nodes/models/*.py, nodes/lora/flux.py),
city96/ComfyUI-GGUF 014560d (nodes.py), and sgl-project/sglang 8d92fb5
(python/sglang/multimodal_gen/apps/ComfyUI_SGLDiffusion/nodes.py). Targets' orders are checked against the real nodes by
tests/routes/test_routes_post.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...host.texts import Text
from .text_encoders import base_of

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Node:
    """A node type as graphs store it: sockets, widgets in their order (with defaults for targets), output types."""

    widgets: tuple[str, ...]
    sockets: tuple[tuple[str, str], ...] = ()
    outputs: tuple[tuple[str, str], ...] = (("MODEL", "MODEL"),)
    defaults: tuple[Any, ...] = ()
    pack: str = "comfy-core"


@dataclass(frozen=True)
class Conversion:
    """Becomes `target` with these widget values; `renamed` are old names -> new, for links into widgets and sockets.

    `notes` say what has no equivalent. `more` are the values of further targets, chained behind the first.
    """

    target: str
    values: dict[str, Any]
    renamed: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    more: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Left:
    """Stays as it is, because of `why`."""

    why: str


_OURS = "quantized-transformers"
_REPORT = (("MODEL", "MODEL"), ("report", "STRING"))
_MODEL_IN = (("model", "MODEL"),)
_CLIP = (("CLIP", "CLIP"),)

SVDQ, BASE, LORA, UNET = "QT_NunchakuSVDQLoader", "QT_LoadBaseModel", "LoraLoaderModelOnly", "UNETLoader"
TEXT = "QT_LoadBaseTextEncoder"
TARGETS = {
    SVDQ: Node(("weights", "precision", "rank", "reference", "weights_name", "backend", "revision",
                "download_missing"), outputs=_REPORT, defaults=("", "auto", 0, "", "", "auto", "", False), pack=_OURS),
    BASE: Node(("base_model", "component", "weights", "reference", "dtype", "revision", "download_missing",
                "byte_order"),
               outputs=_REPORT, defaults=("", "transformer", "load", "", "default", "", False, "auto"), pack=_OURS),
    TEXT: Node(("base_model", "reference", "dtype", "revision", "download_missing", "override", "override_reference",
                "override_2", "override_2_reference"), outputs=(*_CLIP, ("report", "STRING")),
               defaults=("", "", "default", "", False, "none", "", "none", ""), pack=_OURS),
    LORA: Node(("lora_name", "strength_model"), _MODEL_IN, defaults=("", 1.0)),
    UNET: Node(("unet_name", "weight_dtype"), defaults=("", "default")),
    "CLIPLoader": Node(("clip_name", "type", "device"), outputs=_CLIP, defaults=("", "stable_diffusion", "default")),
    "DualCLIPLoader": Node(("clip_name1", "clip_name2", "type", "device"), outputs=_CLIP,
                           defaults=("", "", "flux", "default")),
    "TripleCLIPLoader": Node(("clip_name1", "clip_name2", "clip_name3"), outputs=_CLIP, defaults=("", "", "")),
    "QuadrupleCLIPLoader": Node(("clip_name1", "clip_name2", "clip_name3", "clip_name4"), outputs=_CLIP,
                                defaults=("", "", "", "")),
}
_STACK = tuple(f"lora_{what}_{i}" for i in range(1, 16) for what in ("name", "strength"))
SOURCES = {
    "NunchakuFluxDiTLoader": Node(("model_path", "cache_threshold", "attention", "cpu_offload", "device_id",
                                   "data_type", "i2f_mode")),
    "NunchakuQwenImageDiTLoader": Node(("model_name", "cpu_offload", "num_blocks_on_gpu", "use_pin_memory")),
    "NunchakuZImageDiTLoader": Node(("model_name",)),
    "NunchakuFluxLoraLoader": Node(("lora_name", "lora_strength"), _MODEL_IN),
    "NunchakuFluxLoraStack": Node(_STACK, _MODEL_IN),
    "NunchakuTextEncoderLoader": Node(("model_type", "text_encoder1", "text_encoder2", "t5_min_length", "use_4bit_t5",
                                       "int4_model")),
    "NunchakuTextEncoderLoaderV2": Node(("model_type", "text_encoder1", "text_encoder2", "t5_min_length")),
    "UnetLoaderGGUF": Node(("unet_name",)),
    "UnetLoaderGGUFAdvanced": Node(("unet_name", "dequant_dtype", "patch_dtype", "patch_on_device")),
    "CLIPLoaderGGUF": Node(("clip_name", "type")),
    "DualCLIPLoaderGGUF": Node(("clip_name1", "clip_name2", "type")),
    "TripleCLIPLoaderGGUF": Node(("clip_name1", "clip_name2", "clip_name3")),
    "QuadrupleCLIPLoaderGGUF": Node(("clip_name1", "clip_name2", "clip_name3", "clip_name4")),
    "SGLDUNETLoader": Node(("unet_name", "weight_dtype"), (("sgld_options", "SGLD_OPTIONS"),)),
    "SGLDLoraLoader": Node(("lora_name", "strength_model", "nickname", "target"), _MODEL_IN),
}
OPTIONS = "SGLDOptions"  # goes when nothing takes it any more
# Loaders and LoRA nodes whose MODEL only nunchaku's own nodes understand
NUNCHAKU_MODELS = ("NunchakuFluxDiTLoader", "NunchakuQwenImageDiTLoader", "NunchakuZImageDiTLoader",
                   "NunchakuFluxLoraLoader", "NunchakuFluxLoraStack")
# What Load Base Model loads of native single files, by words in their names
_KNOWN = re.compile(r"flux|qwen.?image|z.?image|wan.?2|hunyuan.?video", re.IGNORECASE)
_FOURBIT_T5 = re.compile(r"awq-int4", re.IGNORECASE)


def _posix(name: Any) -> Any:
    return name.replace("\\", "/") if isinstance(name, str) else name


def _dropped(values: Values, reasons: Mapping[str, tuple[Any, str]]) -> tuple[str, ...]:
    """A note for each value that is not the default and gets lost."""
    return tuple(Text("{name} {value!r} is dropped: {why}", name=name, value=values[name], why=why)
                 for name, (default, why) in reasons.items() if values.get(name, default) != default)


_MANAGED = Text("ComfyUI manages memory and devices")
_ATTENTION = Text("ComfyUI's own attention is used")


def _svdq(values: Values, name: str, notes: tuple[str, ...]) -> Conversion:
    chosen = _posix(values.get(name, ""))
    if isinstance(chosen, str) and chosen and not chosen.endswith((".safetensors", ".sft")):
        # a legacy folder: the list holds files, so it goes into the free reference, which wins over the list
        return Conversion(SVDQ, {"weights": "nunchaku-tech/nunchaku-flux.1-dev", "reference": chosen},
                          {name: "reference"}, notes)
    return Conversion(SVDQ, {"weights": chosen}, {name: "weights"}, notes)


def _flux(values: Values) -> Conversion:
    return _svdq(values, "model_path", _dropped(values, {
        "cache_threshold": (0, Text("there is no first-block cache here, every step is computed")),
        "attention": ("nunchaku-fp16", _ATTENTION), "cpu_offload": ("auto", _MANAGED), "device_id": (0, _MANAGED),
        "data_type": ("bfloat16", Text("ComfyUI picks the dtype for the device")),
        "i2f_mode": ("enabled", Text("it steers nunchaku's kernels for RTX 20 only"))}))


def _qwen(values: Values) -> Conversion:
    return _svdq(values, "model_name", _dropped(values, {
        "cpu_offload": ("auto", _MANAGED), "num_blocks_on_gpu": (1, _MANAGED),
        "use_pin_memory": ("disable", _MANAGED)}))


def _nunchaku_lora(values: Values) -> Conversion:
    return Conversion(LORA, {"lora_name": values.get("lora_name", ""),
                             "strength_model": values.get("lora_strength", 1.0)},
                      {"lora_name": "lora_name", "lora_strength": "strength_model", "model": "model"})


def _stack(values: Values) -> Conversion | Left:
    used = [{"lora_name": name, "strength_model": values.get(f"lora_strength_{i}", 1.0)} for i in range(1, 16)
            if (name := values.get(f"lora_name_{i}", "None")) not in ("None", "", None)]
    if any(isinstance(value, list) for one in used for value in one.values()):
        return Left(Text("its LoRAs come from other nodes; put a LoraLoaderModelOnly for each by hand"))
    if not used:
        return Left(Text("it holds no LoRA; delete it"))
    return Conversion(LORA, used[0], {"model": "model"}, more=tuple(used[1:]))


def _nunchaku_text(values: Values) -> Conversion | Left:
    names = [values.get("text_encoder1", ""), values.get("text_encoder2", "")]
    if values.get("use_4bit_t5") == "enable" or any(_FOURBIT_T5.search(str(name)) for name in names):
        return Left(Text("its 4-bit T5 is read by nunchaku only; choose t5xxl_fp16 or t5xxl_fp8_e4m3fn, then migrate "
                         "again"))
    length = values.get("t5_min_length", 256)
    notes = () if length == 256 else (
        Text("t5_min_length {length} is dropped (ComfyUI pads to 256 tokens): for the same, put T5TokenizerOptions "
             "with min_length {length} behind it", length=length),)
    return Conversion("DualCLIPLoader", {"clip_name1": names[0], "clip_name2": names[1], "type": "flux"},
                      {"text_encoder1": "clip_name1", "text_encoder2": "clip_name2"}, notes)


def _gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _unet_gguf(values: Values) -> Conversion:
    name = _posix(values.get("unet_name", ""))
    decoded = Text("weights are decoded in F32")
    notes = _dropped(values, {
        "dequant_dtype": ("default", decoded), "patch_dtype": ("default", decoded),
        "patch_on_device": (False, Text("patches stay beside the weights, on its device"))})
    return Conversion(BASE, {"base_model": name}, {"unet_name": "base_model"}, notes)


_TYPES = {"TripleCLIPLoader": "sd3", "QuadrupleCLIPLoader": "hidream"}  # which have no widget for it


def _clip_gguf(target: str) -> Callable[[Values, Collection[str]], Conversion | Left]:
    names = [name for name in TARGETS[target].widgets if name.startswith("clip_name")]

    def rule(values: Values, kinds: Collection[str]) -> Conversion | Left:
        files = [_posix(values.get(name, "")) for name in names]
        if any(not isinstance(file, str) or not file for file in files):
            return Left(Text("which files it loads comes from other nodes; put Load Base Text Encoder there by hand"))
        if any(map(_gguf, files)):
            base = base_of(files, values.get("type", _TYPES.get(target)), kinds)
            inputs = dict(zip(names, ("override", "override_2"), strict=False))
            if isinstance(base, str):
                return Left(base)
            return Conversion(TEXT, {"base_model": base.reference, **dict(zip(inputs.values(), files, strict=True))},
                              inputs, base.notes)
        kept = {name: values[name] for name in (*names, "type") if name in values}
        return Conversion(target, kept, {name: name for name in kept})

    return rule


def _sgld_unet(values: Values) -> Conversion:
    name, dtype = _posix(values.get("unet_name", "")), values.get("weight_dtype", "default")
    if dtype == "default" and isinstance(name, str) and _KNOWN.search(name):
        return Conversion(BASE, {"base_model": name}, {"unet_name": "base_model"})
    why = (Text("weight_dtype {dtype} is a choice of UNETLoader, too", dtype=dtype) if dtype != "default"
           else Text("its name is of no architecture that Load Base Model loads"))
    return Conversion(UNET, {"unet_name": values.get("unet_name", ""), "weight_dtype": dtype},
                      {"unet_name": "unet_name", "weight_dtype": "weight_dtype"}, (why,))


def _sgld_lora(values: Values) -> Conversion:
    notes = _dropped(values, {"nickname": ("", Text("ComfyUI's LoRAs have none")),
                              "target": ("all", Text("the LoRA goes to the MODEL that is connected"))})
    return Conversion(LORA, {"lora_name": values.get("lora_name", ""),
                             "strength_model": values.get("strength_model", 1.0)},
                      {"lora_name": "lora_name", "strength_model": "strength_model", "model": "model"}, notes)


RULES: dict[str, Callable[[Values], Conversion | Left]] = {
    "NunchakuFluxDiTLoader": _flux, "NunchakuQwenImageDiTLoader": _qwen,
    "NunchakuZImageDiTLoader": lambda values: _svdq(values, "model_name", ()),
    "NunchakuFluxLoraLoader": _nunchaku_lora, "NunchakuFluxLoraStack": _stack,
    "NunchakuTextEncoderLoader": _nunchaku_text, "NunchakuTextEncoderLoaderV2": _nunchaku_text,
    "UnetLoaderGGUF": _unet_gguf, "UnetLoaderGGUFAdvanced": _unet_gguf,
    "SGLDUNETLoader": _sgld_unet, "SGLDLoraLoader": _sgld_lora,
}

# These are also told which nodes the workflow has.
TEXT_RULES: dict[str, Callable[[Values, Collection[str]], Conversion | Left]] = {
    f"{target}GGUF": _clip_gguf(target)
    for target in ("CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader", "QuadrupleCLIPLoader")}


def has_rule(kind: str) -> bool:
    """Whether nodes of a type are converted."""
    return kind in RULES or kind in TEXT_RULES


def convert(kind: str, values: Values, kinds: Collection[str]) -> Conversion | Left:
    """What becomes of a node of a type that has a rule, in a workflow with nodes of these `kinds`."""
    return TEXT_RULES[kind](values, kinds) if kind in TEXT_RULES else RULES[kind](values)


def foreign(kind: str) -> str:
    """Why a node of these packs that has no rule is left; empty for nodes of other packs."""
    if kind.startswith("SGLDiffusion"):
        return Text("it talks to an SGLang server, which has no MODEL to load")
    if kind == OPTIONS:
        return Text("it is still taken by a node that was left")
    if kind.startswith("Nunchaku"):
        return Text("this version has no equivalent for it")
    return Text("it is unknown to this version") if "GGUF" in kind else ""
