"""Folders of language models as text encoders, for the files of tests that compare them with transformers."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from support import text_encoders_llm as llm


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    """family -> its folder, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            entries = llm.save(family, made[family])
            index = {"_class_name": llm.PIPELINES[family], **entries}
            (made[family] / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        return made[family]
    return make


@pytest.fixture
def let_go():
    """No model is loaded when a test ends."""
    yield
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
