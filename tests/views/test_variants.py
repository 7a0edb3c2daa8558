"""The forms of a model, ordered for machines that are not this one."""

from __future__ import annotations

import gguf
import pytest

from quantized_transformers import host
from quantized_transformers.loaders.files.places import is_repo
from quantized_transformers.quant.kernels import choose
from quantized_transformers.views import variants, verdict
from quantized_transformers.views.known import KNOWN_CHECKPOINTS

GB = 10**9


@pytest.fixture
def on(monkeypatch):
    """on(capability, GB): the forms of a model on an NVIDIA GPU that is not here."""
    def forms(capability: tuple[int, int], gb: int, reference: str = "black-forest-labs/FLUX.1-dev") -> list[str]:
        matmuls = {"INT8"} | ({"FP8"} if capability >= (8, 9) else set()) | (
            {"NVFP4", "MXFP8"} if capability >= (10, 0) else set())
        gpu = host.Machine("cuda", "a GPU", capability, "", frozenset(matmuls), choose.here().found)
        monkeypatch.setattr(choose, "here", lambda *_: gpu)
        monkeypatch.setattr(host, "device_memory", lambda: gb * GB)
        verdict.of_codecs.cache_clear()
        return variants.forms(reference)["items"]

    yield forms
    verdict.of_codecs.cache_clear()


def test_the_best_comes_first(on):
    """What fits and runs natively, and of that the closest to the model; else what fits, the largest; else the smallest."""
    first = on((9, 0), 80)[0]
    assert (first["format"], first["fits"], first["verdict"]) == ("BF16", True, "green")
    ada = on((8, 9), 24)
    assert (ada[0]["format"], ada[0]["fits"], ada[0]["verdict"]) == ("FP8, ModelOpt", True, "green")
    assert not next(row for row in ada if row["format"] == "BF16")["fits"]
    turing = on((7, 5), 4)
    sizes = [row["size"] for row in turing if row["verdict"] == "amber"]
    assert not any(row["fits"] for row in turing) and sizes == sorted(sizes)
    keys = [(row["verdict"] == "red", not row["fits"], row["verdict"] == "amber") for row in ada]
    assert keys == sorted(keys) and len({tuple(key) for key in keys}) > 2


def test_every_form_is_one_that_the_pack_knows():
    for title, forms in variants.MODELS.items():
        assert forms[0].kind == "base" and forms[0].reference in KNOWN_CHECKPOINTS
        for form in forms:
            assert is_repo(form.reference) and variants.model_of(form.reference) == title
            assert form.reference in KNOWN_CHECKPOINTS or form.reference.endswith((".safetensors", ".gguf"))
            assert form.kind == "base" or set(form.formats) <= set(verdict.by_title()), form


def test_sizes_of_gguf_are_those_of_its_blocks():
    for form in (form for forms in variants.MODELS.values() for form in forms if form.format.startswith("GGUF")):
        count, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form.format.removeprefix("GGUF ")]]
        base, = (forms[0] for forms in variants.MODELS.values() if form in forms)
        assert form.gb == pytest.approx(base.gb / 2 * size / count, rel=0.02)


@pytest.mark.parametrize("text,title", [
    ("flux1-dev-Q4_K_S.gguf", "FLUX.1 dev"), ("flux1-dev-Q6_K.gguf", "FLUX.1 dev"), ("FLUX.1-dev", "FLUX.1 dev"),
    ("svdq-int4_r32-flux.1-dev.safetensors", "FLUX.1 dev"), ("nunchaku-tech/nunchaku-qwen-image", "Qwen-Image"),
    ("diffusers\\Qwen-Image-Edit-2511", "Qwen-Image-Edit 2511"), ("my-own.safetensors", ""), ("", ""),
    ("owner/FLUX.1-something", "")])
def test_whose_form_a_reference_is(text, title):
    assert variants.model_of(text) == title
