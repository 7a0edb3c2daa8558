"""docs/architectures.md against diffusers, ComfyUI and the tables of this pack."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest

from quantized_transformers import host
from quantized_transformers.loaders.architectures import ARCHITECTURES
from quantized_transformers.loaders.architectures.diffusers_classes import DERIVED
from support.pack import PACK

pytestmark = pytest.mark.unit

TEXT = (PACK / "docs" / "architectures.md").read_text(encoding="utf-8")
BOTH, REST = TEXT.split("\n## In diffusers, not as one model")
CLASSES = set(re.findall(r"`([A-Za-z]\w+)`", BOTH.partition("## In both")[2])) - {
    "config", "scheduler", "connectors", "text_conditioner", "norm_eps", "transformer", "unet"}
LOADED = {name for one in ARCHITECTURES for name in one.class_names} | {name for one in DERIVED for name in one.classes}


def test_every_class_that_loads_is_in_the_table_and_no_other():
    assert CLASSES == LOADED


@pytest.mark.skipif(not version("diffusers").startswith("0.42."), reason="the tables are of diffusers 0.42")
def test_every_class_of_diffusers_is_somewhere():
    import diffusers.models

    names = {name for module, found in diffusers.models._import_structure.items() for name in found
             if module.startswith(("transformers.", "unets."))}
    elsewhere = set(re.findall(r"`([A-Za-z]\w+)`", REST))
    assert not CLASSES & elsewhere and names <= CLASSES | elsewhere, names - CLASSES - elsewhere


def test_every_model_of_comfyui_is_somewhere():
    missing = [name for name in host.TRIED if not re.search(rf"\b{name}\b", TEXT)]
    assert not missing
    for one in DERIVED:
        row = next(line for line in BOTH.splitlines() if one.classes[0] in line)
        hosts = [name for name in one.hosts if name != "OvisImage"]  # which is FluxSchnell's
        assert all(re.search(rf"\b{name}\b", row) for name in hosts), (one.title, hosts)
