"""Ovis-Image, of which two of ComfyUI's Linear layers are the rows of one that diffusers stores (Module.ranges)."""

from __future__ import annotations

import pytest
import tables
import torch

from quantized_transformers.loaders.architectures.diffusers_classes import DERIVED
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from quantized_transformers.makers.builders.gguf import build_gguf
from quantized_transformers.makers.compare.weights import compare_weights
from support import common, host_models
from support.passthrough import FORMS, load, same_model, stock

if not tables.is_there("ovis"):
    pytest.skip("this diffusers has no Ovis-Image", allow_module_level=True)

from architectures.test_derived import Tiny

pytestmark = pytest.mark.parity

MODEL = "Ovis-Image"


@pytest.fixture(scope="module")
def tiny():
    return Tiny(next(one for one in DERIVED if one.title == MODEL), MODEL)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_stored_layer_in_every_format(tiny, form, tmp_path):
    truth = tiny.write(tmp_path / "model", form)
    loaded = load(tmp_path / "model")
    same_model(loaded.patcher.model, stock(truth, MODEL))
    assert loaded.description.architecture == "OvisImage"
    quantized = sum(count for kind, count in loaded.description.formats.items() if kind != "BF16")
    assert quantized == tiny.quantized


def test_files_in_comfyuis_names_are_called_the_same(tiny, tmp_path):
    common.save(tmp_path, tiny.native, None, None, "native.safetensors")
    assert load(tmp_path / "native.safetensors").description.architecture == "OvisImage"


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_a_gguf_of_a_folder(tiny, kind, tmp_path):
    truth = tiny.write(tmp_path / "model")
    build_gguf(base=str(tmp_path / "model"), output=str(tmp_path / "made.gguf"), kind=kind)
    loaded = load(tmp_path / "made.gguf")
    if kind == "BF16":
        same_model(loaded.patcher.model, stock(truth, MODEL))
    assert loaded.description.architecture == "OvisImage"


def test_a_folder_against_a_file_in_comfyuis_names(tiny, tmp_path):
    truth = tiny.write(tmp_path / "model")
    common.save(tmp_path, truth, None, None, "native.safetensors")
    found = compare_weights(locate(str(tmp_path / "model")), locate(str(tmp_path / "native.safetensors")))
    names = [layer.name for layer in found.layers]
    assert not found.total.noise and len(names) == len(set(names)) == len(tiny.linears()) + 2
    assert {"transformer_blocks.0.ff.net.0.proj[0:512]", "transformer_blocks.0.ff.net.0.proj[512:1024]"} < set(names)


def test_a_layer_of_other_rows_is_refused(tiny, tmp_path):
    tiny.write(tmp_path / "model")
    stored = common.stored(tmp_path / "model")
    for leaf in ("weight", "bias"):
        stored[f"transformer_blocks.0.ff.net.0.proj.{leaf}"] = torch.ones(1000, 128)[:, 0] if leaf == "bias" else torch.ones(1000, 128)
    common.save(tmp_path / "model", stored, common.config_of(tmp_path / "model"))
    with host_models.detected(MODEL), pytest.raises(CheckpointError, match=r"proj"):
        load(tmp_path / "model")
