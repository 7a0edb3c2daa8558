"""Which classes load, by their names alone: what a list of checkpoints needs, without what loads them.

names.json is recorded from the registries (architectures, components/text_encoders, components/vaes); a test holds it
against them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_suffix(".json")


def is_known(kind: str, class_name: object) -> bool:
    """Whether a class is one of "transformers" (diffusers' `_class_name`), "vaes" (the same) or "encoders"
    (`architectures` of transformers)."""
    return class_name in _record()[kind]


def text_folders(index: Mapping[str, Any]) -> list[str] | None:
    """The folders of all text encoders and tokenizers of the base that a model_index.json is of; None for a base whose
    text encoders do not load."""
    named = text_classes(index)
    for pipelines, encoders in _record()["bases"]:
        if is_of(index, named, tuple(pipelines), {folder: classes for folder, _, classes in encoders}):
            return [name for folder, tokenizer, _ in encoders for name in (folder, tokenizer)]
    return None


def text_classes(index: Mapping[str, Any]) -> dict[str, str]:
    """The text encoders that model_index.json names: component -> transformers class."""
    return {name: entry[1] for name, entry in index.items()
            if re.fullmatch(r"text_encoder(_\d+)?", name) and isinstance(entry, list) and len(entry) == 2 and entry[1]}


def is_of(index: Mapping[str, Any], named: Mapping[str, str], pipelines: tuple[str, ...],
          encoders: Mapping[str, Collection[str]]) -> bool:
    """Whether a model_index.json, with `named` as its text encoders, is of a base: by the beginning of its pipeline's
    class, and the classes that each of the base's encoder folders may hold."""
    own = {folder: classes for folder, classes in encoders.items() if folder.startswith("text_encoder")}
    return (str(index.get("_class_name", "")).startswith(pipelines) and named.keys() == own.keys()
            and all(named[folder] in classes for folder, classes in own.items()))


@cache
def _record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))
