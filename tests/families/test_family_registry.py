"""CONTRIBUTING's promise: a new family is one file and one line. Here the file is in a temporary folder, and the line a
name put into the registry; nothing else of the pack is touched."""

from __future__ import annotations

import textwrap

import pytest
import torch
from safetensors.torch import save_file

from quantized_transformers.loaders import families, model
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.locate import locate
from quantized_transformers.loaders.queries import Query
from quantized_transformers.views.card import card
from support import flux
from support.common import stored

pytestmark = pytest.mark.parity

FILE = '''
    """Files that hold half of every weight, under names that end with "half"."""

    from .. import plan as plans
    from ..architectures import ARCHITECTURES
    from ..description import CheckpointDescription
    from .base import Family


    def whole(name):
        return name.removesuffix(".half")


    class Halves(Family):
        name = kind = "halves"
        title = "Halves"

        def recognise(self, checkpoint):
            return all(name.endswith(".half") for name in checkpoint.tensors)

        def is_named(self, reference):
            return reference.endswith(".half.safetensors")

        def read(self, checkpoint, base):
            tensors = {whole(name): info for name, info in checkpoint.tensors.items()}
            architecture, naming = next((a, naming) for a in ARCHITECTURES if (naming := a.naming(tensors)))
            dims = architecture.dims_from_tensors(tensors, naming)
            description = CheckpointDescription(checkpoint.source.reference, [], checkpoint.bytes_on_disk,
                                                architecture.name, naming, dims, self.name)
            plan = plans.LoadPlan(description, architecture, stored=lambda name: f"{name}.half")
            return plans.make(plan, tensors, read_layer)

        def tensors(self, checkpoint, plan):
            tensors = super().tensors(checkpoint, plan)
            tensors.mapped = {name: 2 * half for name, half in tensors.mapped.items()}
            return tensors


    def read_layer(module, name, rows, group, problems):
        weight = plans.take_weight(module, name, group, problems)
        plans.take_bias(module, name, rows, group, problems)
        layer = plans.plain(module, name, rows, weight, group, problems)
        return layer._replace(format="halves")


    FAMILY = Halves()
'''


@pytest.mark.parametrize("name", families.FAMILIES)
def test_what_people_see_of_every_family(name):
    """The words on its badge are its own, each published checkpoint has a badge, a verdict and a node that loads it, and
    the colours of formats that it names are all different, known to the page, and judged by the doctor's rules."""
    from quantized_transformers.views import known, verdict
    from quantized_transformers.views.catalog import LOADS_WITH
    from quantized_transformers.views.layer_map import css_colours

    one = dict(zip(families.FAMILIES, families.families(), strict=True))[name]
    words = [*one.words.values()] or [one.title]
    others = {text for other in families.families() if other is not one for text in [*other.words.values()]}
    assert all(words) and not others & set(words) and one.kind in LOADS_WITH
    for reference in one.published:
        there = known.KNOWN_CHECKPOINTS[reference]
        assert there.kind == one.kind and there.family and there.verdict().text and there.formats
        assert set(there.formats) <= css_colours().keys() | set(one.colours())
    colours = one.colours()
    twice = 1 if name == "comfy" else 0  # asym_w4a8_int8 is one format, with codes of 4 and of 6 bits
    assert len(set(colours.values())) == len(colours) - twice and set(colours) <= css_colours().keys()
    assert all(verdict.of_formats([fmt]).text for fmt in colours)


@pytest.fixture
def halves(tmp_path, monkeypatch):
    (tmp_path / "halves.py").write_text(textwrap.dedent(FILE), encoding="utf-8")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.setattr(families, "FAMILIES", ("halves", *families.FAMILIES))  # the line
    families.families.cache_clear()
    yield
    families.families.cache_clear()


def test_a_family_is_one_file_and_one_line(halves, tiny, tmp_path):
    plain = stored(tiny.bf16)
    save_file({f"{name}.half": tensor / 2 for name, tensor in plain.items()}, str(tmp_path / "flux.half.safetensors"))
    path = str(tmp_path / "flux.half.safetensors")
    loaded = model.load(model.Request(path), quiet=True)
    expected = model.load(model.Request(str(tiny.bf16)), quiet=True).patcher
    assert torch.equal(flux.comfy_velocity(loaded.patcher, **flux.inputs()), flux.comfy_velocity(expected, **flux.inputs()))
    assert "halves" in loaded.report
    assert describe(Checkpoint(locate(path))).family == "halves"
    assert card(Query(path))["family"] == "Halves halves"
    other = model.load(model.Request(str(tiny.fp8)), quiet=True)  # and the others are what they were
    assert other.description.family == "modelopt-fp8"
