"""Which base has the text encoders that a loader of ComfyUI-GGUF's names: by its type and the names of its files.

What ComfyUI makes of a type and the encoders that it is given is in its comfy/sd.py, load_text_encoder_state_dicts.
Where type and names leave a choice there is no answer but why.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ...host.texts import Text


class Base(NamedTuple):
    """A base, by its repo id, and notes for the report."""

    reference: str
    notes: tuple[str, ...] = ()


class _Row(NamedTuple):
    """A loader of this `type` for these `encoders` (names of _ENCODERS) is `base`. `named`: the file's name must say
    so, because ComfyUI makes other models of other files with the same type."""

    type: str
    encoders: tuple[str, ...]
    base: str
    named: bool = False
    note: str = ""


# How the names of published files say which text encoder they are; the first that matches.
_ENCODERS = {
    Text("an mmproj"): "mmproj", "Qwen3-VL": r"qwen[-_. ]?3[-_. ]?vl",
    "Qwen2.5-VL 7B": r"qwen[-_. ]?2[-_. ]?5[-_. ]?vl[-_. ]?7b", "Qwen3 4B": r"qwen[-_. ]?3[-_. ]?4b",
    Text("another Qwen"): "qwen", "UMT5-XXL": "umt5", "T5-XXL": r"(?<![a-z])t5",
    "Mistral Small 3": r"mistral[-_. ]?(small|3)", "CLIP-L": r"clip[-_. ]?l(?![a-z])|vit[-_. ]?l",
    "Llama 3": "llama|llava", "CLIP-G": r"clip[-_. ]?g(?![a-z])|bigg", "Gemma": "gemma"}
_ROWS = (
    _Row("flux", ("CLIP-L", "T5-XXL"), "black-forest-labs/FLUX.1-dev",
         note=Text("T5 prompts are padded to 512 tokens as diffusers does (ComfyUI's loaders: 256); for the same, put "
                   "T5TokenizerOptions with min_length 256 behind it")),
    _Row("hunyuan_video", ("CLIP-L", "Llama 3"), "hunyuanvideo-community/HunyuanVideo"),
    _Row("wan", ("UMT5-XXL",), "Wan-AI/Wan2.2-T2V-A14B-Diffusers", note=Text("any other base of Wan has the same")),
    _Row("qwen_image", ("Qwen2.5-VL 7B",), "Qwen/Qwen-Image",
         note=Text("for pictures choose the mmproj file, which ComfyUI-GGUF finds beside this one, as override_2, "
                   "unless the base's own text encoder is on this machine")),
    _Row("flux2", ("Mistral Small 3",), "black-forest-labs/FLUX.2-dev", named=True),
    _Row("lumina2", ("Qwen3 4B",), "Tongyi-MAI/Z-Image-Turbo", named=True))
# All of Qwen-Image's bases have one text encoder; in one that edits pictures it is refused without its eyes.
_EDIT_NODES, _EDIT_BASE = "TextEncodeQwenImageEdit", "Qwen/Qwen-Image-Edit-2509"


def base_of(files: Sequence[str], kind: Any, kinds: Collection[str]) -> Base | str:
    """The base of text encoder `files`, loaded as type `kind` in a workflow with nodes of these `kinds`; or why nothing
    certain is known of it."""
    if not isinstance(kind, str):
        return Text("its type comes from another node; put Load Base Text Encoder there by hand")
    row = next((row for row in _ROWS if row.type == kind and len(row.encoders) == len(files)), None)
    if row is None:
        return Text("no base that this pack lists has the text encoders of type {kind}; to change, take safetensors "
                    "files with ComfyUI's own loader", kind=kind)
    first, *second = row.encoders
    has = Text("{base}, the base for type {kind}, has {encoders}", base=row.base, kind=kind,
               encoders=Text("{first} and {second}", first=first, second=second[0]) if second else first)
    said = [encoder_named(file) for file in files]
    other = next((Text("{file} is {name}", file=file, name=name) for file, name in zip(files, said, strict=True)
                  if name and name not in row.encoders), "")
    if other:
        return Text("by its name {other}, and {has}", other=other, has=has)
    known = [name for name in said if name]
    if len(set(files)) < len(files) or len(set(known)) < len(known):
        return Text("by their names its files are the same text encoder, and {has}", has=has)
    if row.named and not known:
        return Text("the name {file} does not say which text encoder it is, and ComfyUI makes several models of type "
                    "{kind}; {has}", file=files[0], kind=kind, has=has)
    edits = row.type == "qwen_image" and any(name.startswith(_EDIT_NODES) for name in kinds)
    reference = _EDIT_BASE if edits else row.base
    return Base(reference, (Text("tokenizers and config.json come from {reference}: have them on this machine, or "
                                 "switch download_missing on", reference=reference),
                            *((row.note,) if row.note else ())))


def encoder_named(file: str) -> str:
    """Which text encoder the name of a file says it is; empty where it says nothing."""
    name = PurePosixPath(file).name
    return next((encoder for encoder, words in _ENCODERS.items() if re.search(words, name, re.IGNORECASE)), "")
