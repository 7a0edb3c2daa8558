"""The tokenizers of FLUX.2, Qwen-Image and Z-Image: Mistral's token ids against transformers', and what is refused."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from quantized_transformers.loaders.components.text_encoders import mistral3, qwen3, qwen25_vl, qwen_tokenizer
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.files.source import Source
from support import text_encoders_llm as llm
from support.text_encoders_llm import STRINGS, ids

pytestmark = pytest.mark.parity


def host_tokenizer(folder: Path) -> Any:
    import comfy.text_encoders.flux

    tensors = mistral3.tokenizer(Source(str(folder), str(folder), ()))
    theirs = comfy.text_encoders.flux.load_mistral_tokenizer
    with mistral3.MISTRAL3.during():
        made = comfy.text_encoders.flux.Mistral3Tokenizer(tokenizer_data=tensors)
    assert comfy.text_encoders.flux.load_mistral_tokenizer is theirs  # nothing of the host stays changed
    return made


# the second is the pattern that transformers 4 gave every Mistral tokenizer, whatever its file said
@pytest.mark.parametrize("pattern", [
    llm.MISTRAL_PATTERN, r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                         r"\s*[\r\n]+|\s+(?!\S)|\s+"])
def test_mistral_token_ids(tmp_path, pattern):
    """From tokenizer.json and from tekken.json alone: transformers' token ids. Pieces are learned of the strings."""
    from transformers import AutoTokenizer

    content = llm.tekken("".join(STRINGS) * 3, pattern)
    llm.save_mistral_processor(tmp_path / "hf", content)
    (tmp_path / "tekken").mkdir()
    (tmp_path / "tekken" / "tekken.json").write_text(json.dumps(content), encoding="utf-8")
    written = json.loads((tmp_path / "hf" / "tokenizer.json").read_text(encoding="utf-8"))
    assert mistral3.from_tekken(content)["model"]["merges"] == written["model"]["merges"]  # their order, too
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(theirs("".join(STRINGS))["input_ids"]) < 0.7 * len("".join(STRINGS).encode())  # merges do apply
    for ours in (host_tokenizer(tmp_path / "hf"), host_tokenizer(tmp_path / "tekken")):
        for text in STRINGS:
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert ids({"": ours.tokenize_with_weights(text)}) == [1, *expected], text


@pytest.mark.parametrize("change", [
    lambda c: c["model"]["vocab"].pop("Ġt"), lambda c: c["added_tokens"].pop(17),
    lambda c: c["model"].update(type="Unigram"), lambda c: c.pop("model"),
    lambda c: c["added_tokens"][1].update(content="<bos>")])
def test_other_mistral_tokenizers_are_refused(tmp_path, change):
    llm.save_mistral_processor(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError):
        host_tokenizer(tmp_path)


def test_a_tekken_file_without_ours_is_left_to_the_host(tmp_path):
    """The hook must not touch what stock loaders read."""
    assert mistral3.read(llm.tekken()) is None


@pytest.mark.parametrize("change", [
    lambda c: c["model"]["vocab"].update({"Ġthe": 17}), lambda c: c["model"]["merges"].insert(0, ["a", "b"]),
    lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+")])
def test_other_qwen_tokenizers_are_refused(qwen_folder, tmp_path, change):
    content = json.loads((qwen_folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match="tokenizer"):
        qwen3.QWEN3.tokenizer(Source("", str(tmp_path), ()))


@pytest.mark.parametrize("change", [
    lambda c: c.update(normalizer=None), lambda c: c["added_tokens"][3].update(lstrip=True),
    lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
    lambda c: c["pre_tokenizer"]["pretokenizers"].pop(0)])
def test_other_ways_to_split_words_are_refused(qwen_rest, change):
    assert qwen_tokenizer.splits_alike(qwen_rest)
    change(qwen_rest)
    assert not qwen_tokenizer.splits_alike(qwen_rest)


@pytest.fixture
def qwen_rest(qwen_folder):
    """transformers' tokenizer.json without its vocabulary."""
    return {**json.loads((qwen_folder / "tokenizer.json").read_text(encoding="utf-8")), "model": {}}


def test_qwen_tokenizer_as_transformers_4_saved_it(tmp_path):
    """vocab.json, merges.txt and tokenizer_config.json, with the 22 added tokens of Qwen-Image's own."""
    import shutil

    import comfy.sd1_clip

    bundled = Path(inspect.getfile(comfy.sd1_clip)).parent / "text_encoders" / "qwen25_tokenizer"
    shutil.copytree(bundled, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    for number in range(151665, 151669):
        config["added_tokens_decoder"].pop(str(number))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert qwen25_vl.QWEN25_VL.tokenizer(Source("", str(tmp_path), ())) == {}
    (tmp_path / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        qwen25_vl.QWEN25_VL.tokenizer(Source("", str(tmp_path), ()))
