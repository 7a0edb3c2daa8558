"""What lists know of classes (loaders/names.json) is what the registries load.

`QT_RECORD_NAMES=1 python3 dev.py test tests/loaders/test_names.py` records it again: what a new architecture, VAE or text
encoder asks for.
"""

from __future__ import annotations

import json
import os

import pytest

from quantized_transformers.loaders import names
from quantized_transformers.loaders.architectures import ARCHITECTURES, diffusers_classes, is_known
from quantized_transformers.loaders.components.text_encoders import families, family_of
from quantized_transformers.loaders.components.vaes import VAES
from quantized_transformers.loaders.errors import CheckpointError

pytestmark = pytest.mark.unit


def registered() -> dict[str, list]:
    """What names.json is to say: of each kind the classes, sorted, and the text encoders of bases in the registry's order."""
    derived = {name for one in diffusers_classes.DERIVED for name in one.classes}
    bases = [[list(family.pipelines), [[folder, tokenizer, list(encoder.classes)] for folder, tokenizer, encoder in family.encoders]]
             for family in families()]
    return {"transformers": sorted(derived.union(*(one.class_names for one in ARCHITECTURES))),
            "vaes": sorted(vae.class_name for vae in VAES),
            "encoders": sorted({name for _, parts in bases for _, _, classes in parts for name in classes}),
            "bases": bases}


def test_names_are_those_that_are_registered():
    found = registered()
    if os.environ.get("QT_RECORD_NAMES"):
        kinds = [f' "{kind}": {json.dumps(found[kind])}' for kind in ("transformers", "vaes", "encoders")]
        bases = ",\n".join(f"  {json.dumps(base)}" for base in found["bases"])
        names.RECORD.write_text("{\n" + ",\n".join([*kinds, f' "bases": [\n{bases}\n ]']) + "\n}\n", encoding="utf-8")
    assert json.loads(names.RECORD.read_text(encoding="utf-8")) == found, "record them (see this file's first lines)"


def test_a_base_is_told_by_names_as_by_the_registry():
    """Every base's own index; with a class exchanged, one left out, and of another pipeline, neither finds it or both the
    same."""
    for family in families():
        own = {folder: ["transformers", encoder.classes[0]] for folder, _, encoder in family.encoders
               if folder.startswith("text_encoder")}
        for pipeline in (*family.pipelines, "SomethingPipeline"):
            index = {"_class_name": pipeline, **own}
            for changed in (index, index | {"text_encoder": ["transformers", "NoModel"]}, dict(list(index.items())[:-1])):
                try:
                    expected = [name for parts in family_of(changed).encoders for name in parts[:2]]
                except CheckpointError:
                    expected = None
                assert names.text_folders(changed) == expected, changed
    assert is_known("FluxTransformer2DModel") and names.is_known("transformers", "FluxTransformer2DModel")
    assert not is_known("FluxPipeline") and not names.is_known("transformers", "FluxPipeline")
