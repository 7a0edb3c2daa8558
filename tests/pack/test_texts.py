"""Every sentence that a user reads is in every language's catalogue, and is said in the language of who reads it."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections import defaultdict

import pytest

from quantized_transformers.host import texts
from quantized_transformers.host.errors import CheckpointError
from quantized_transformers.host.texts import Text, joined, one_line, packed, said, unpacked
from support.texts import BENT, LANGUAGES, PACK, catalogue, fields, templates, untold

# What looks like sentences and is none: names, values of widgets, kinds of answers, what is written into files.
ALONE = {
    "naïve", "modelslim (saved)", "optimum-quanto, torchao", "quanto, torchao", "hf download",
    "modelscope download --model", "Node name for S&R", "This folder is unfinished", "to diffusers", "to original",
    "A path (folder, .safetensors", "4-bit codebook", "dequantized when loaded", "dequantized weights",
    "; {} have other patches", "too large", "other kind", "import runpy", "import ctypes", "defer to override", "this pack",
    "device type", "model folders", "download folder", "not quantized", "base only"}


@pytest.fixture(scope="module")
def spoken_of():
    return templates()


@pytest.fixture
def chinese():
    token = texts.asked.set("zh")
    yield
    texts.asked.reset(token)


def test_there_is_chinese():
    assert LANGUAGES == ("zh",)


@pytest.mark.parametrize("language", LANGUAGES)
def test_catalogues_say_what_the_code_says(spoken_of, language):
    """Each catalogue has the templates of its folder, no other; with the same placeholders; and says the same thing in
    the same way wherever it is said."""
    names = {path.stem for path in (PACK / "locales" / language / "messages").iterdir()}
    assert names == set(spoken_of) and len(names) > 15
    every = defaultdict(set)
    for name in names:
        there = catalogue(language, name)
        assert set(there) == set(spoken_of[name]), (name, set(there) ^ set(spoken_of[name]))
        for template, translated in there.items():
            ours, theirs = set(fields(template)), set(fields(translated))
            assert theirs <= ours and all(BENT.fullmatch(field) for field in ours - theirs), (template, translated)
            every[template].add(translated)
    assert {template: many for template, many in every.items() if len(many) > 1} == {}


def test_the_chinese_is_chinese(spoken_of):
    """Nothing but names was left as it was."""
    for name in spoken_of:
        for template, translated in catalogue("zh", name).items():
            words = re.findall(r"(?<![\w{])[a-z]{2,}(?![\w}])", template)
            assert re.search(r"[\u4e00-\u9fff]", translated) or len(words) < 3, (template, translated)
            assert (translated.strip() == translated) == (template.strip() == template), translated


def test_every_sentence_is_a_text():
    """A sentence that is no Text would be English for everybody."""
    found = list(untold())
    loose = [(where, text) for where, text in found if not any(known in text for known in ALONE)]
    assert loose == []
    assert {known for known in ALONE if not any(known in text for _, text in found)} == set()


def test_a_text_is_an_ordinary_str_with_its_template():
    text = Text("{name!r} has {count:,} rows{s}", name="a{b}", count=12000, s="")
    assert text == "'a{b}' has 12,000 rows" and hash(text) == hash("'a{b}' has 12,000 rows") and isinstance(text, str)
    assert (text.template, text.values) == ("{name!r} has {count:,} rows{s}", {"name": "'a{b}'", "count": "12,000", "s": ""})
    assert said(text, "en") == said(text, "xx") == text and type(said(text, "en")) is str
    for again in (pickle.loads(pickle.dumps(text)), copy.deepcopy(text), json.loads(json.dumps(packed(text)), object_hook=unpacked)):
        assert (again, again.template, again.values) == (text, text.template, text.values)
    assert json.loads(json.dumps({"a": [text]})) == {"a": [str(text)]}


def test_texts_within_texts_are_said_too(chinese):
    none = Text("none")
    assert said(none) == "无" and none == "none"
    both = joined("; ", [Text("not installed"), "plain {x}", Text("{a}: {b}", a="A", b=none)])
    assert both == "not installed; plain {x}; A: none" and said(both) == "未安装; plain {x}; A: 无"
    assert one_line(Text("{text}\n  where: {where}", text=Text("not installed"), where="a\n b")) == "未安装 位置：a b"
    found = json.loads(json.dumps(packed({"rows": [both, 1, None]})), object_hook=unpacked)
    assert texts.each(found, said) == {"rows": [said(both), 1, None]}


def test_errors_speak_the_language_of_who_reads_them(chinese, monkeypatch):
    error = CheckpointError(Text("no checkpoint is chosen"), "x.safetensors", Text("correct it"))
    assert str(error) == "未选择检查点\n  位置：x.safetensors\n  解决方法：请更正"
    assert str(CheckpointError(Text("the download failed: {kind}: {error}", kind="ValueError", error=ValueError(
        Text("none"))))) == "下载失败：ValueError：无"
    texts.asked.set("")
    assert str(error) == "no checkpoint is chosen\n  where: x.safetensors\n  what to do: correct it" == error.args[0]
    monkeypatch.setenv("QT_LANG", "zh")
    assert str(error).startswith("未选择检查点")
    for unknown in ("xx", "../zh", "", "EN"):
        monkeypatch.setenv("QT_LANG", unknown)
        assert str(error).startswith("no checkpoint")
