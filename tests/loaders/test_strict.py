"""JSON and patterns that others wrote: what is refused, and in what time."""

from __future__ import annotations

import inspect
import json
import os
import re
import time

import pytest
import regex

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.files import kinds, strict
from quantized_transformers.loaders.files.source import read_json
from quantized_transformers.loaders.patterns import LONGEST, MANY, MOST, SECONDS, Expressions, Globs

pytestmark = pytest.mark.unit

REFUSED = {
    "a byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"), "UTF-16": ("{}".encode("utf-16"), "no UTF-8"),
    "UTF-32": ("{}".encode("utf-32"), "no UTF-8"), "Latin-1": (b'{"a": "\xe9"}', "byte 7 of it is no UTF-8"),
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate keys: c"), "NaN": (b'[NaN]', "NaN is no number"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is no number"), "1e400": (b"[1e400]", "1e400 is too large"),
    "a long integer": (b"[" + b"1" * 41 + b"]", "too large"), "a very long one": (b"[" + b"1" * 5000 + b"]", "too large"),
    "half a character": (b'{"a": "\\ud800"}', "half of a character"), "half of one in a key": (b'{"\\uDFFF": 1}', "half of a character"),
    "deep lists": (b"[" * 65 + b"]" * 65, "more than 64 deep"), "very deep lists": (b"[" * 10 ** 5, "more than 64 deep"),
    "deep objects": (b'{"a":' * 65 + b"1" + b"}" * 65, "more than 64 deep"), "nothing": (b"", "Expecting value"),
    "two values": (b"1 2", "Extra data"), "a comma too many": (b"[1,]", "JSON"),
    "many values": (b"[" + b"0," * strict.MOST + b"0]", "more than 500,000 values"),
    "many empty lists": (b"[" + b"[]," * strict.MOST + b"[]]", "more than 500,000 values"),
    "many bytes": (b'"' + b"a" * strict.LARGEST + b'"', "it takes 16.00 MB, and no more than 16.00 MB")}


@pytest.mark.parametrize("data, words", REFUSED.values(), ids=list(REFUSED))
def test_refused(data, words):
    with pytest.raises(CheckpointError) as refused:
        strict.parse(data, "somewhere")
    assert words in refused.value.what and len(str(refused.value)) < 400


def test_taken():
    """What writers do write: non-ASCII text, transformers' "no limit", 64 levels."""
    value = {"é": "猫", "\N{CAT FACE}": "\N{CAT}", "model_max_length": 1000000000000000019884624838656, "x": [None, True, -1.5e300, {"": []}]}
    assert strict.parse(json.dumps(value, ensure_ascii=False).encode(), "") == value
    assert strict.parse(json.dumps(value), "") == value
    assert strict.parse(b"[" * 64 + b"]" * 64, "")


WRONG = [
    ("config.json", {"_class_name": 7}, "_class_name is 7, expected a text"),
    ("config.json", {"num_layers": "12"}, "num_layers is '12', expected a number of layers"),
    ("config.json", {"num_layers": True}, "num_layers is True, expected a number of layers"),
    ("config.json", {"num_layers": 10 ** 9}, "num_layers is 1000000000, expected a number of layers, 256 at most"),
    ("config.json", {"text_config": {"num_hidden_layers": -1}}, "text_config.num_hidden_layers is -1, expected"),
    ("config.json", {"axes_dims_rope": {"a": 1}}, "axes_dims_rope is an object, expected a list"),
    ("config.json", {"axes_dims_rope": [16, None]}, "axes_dims_rope.1 is None, expected a whole number"),
    ("config.json", {"quantization_config": []}, "quantization_config is a list of 0, expected an object"),
    ("config.json", {"scaling_factor": "1"}, "scaling_factor is '1', expected a number"),
    ("model_index.json", {"transformer": [1, 2]}, "transformer is a list of 2, expected"),
    ("x.safetensors.index.json", {"weight_map": []}, "weight_map is a list of 0, expected an object"),
    ("x.safetensors.index.json", {"metadata": {}}, "weight_map is None, expected an object"),
    ("x.safetensors.index.fp16.json", {"weight_map": {"a": 1}}, "weight_map.a is 1, expected a name"),
    ("x.safetensors.index.json", {"weight_map": {"a": None}}, "weight_map.a is None, expected a name"),
    ("x.safetensors.index.json", {"weight_map": {"a\nb": "c"}}, "expected a name")]


@pytest.mark.parametrize("name, value, words", WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_another_type_is_told_with_key_and_what_was_expected(name, value, words, tmp_path):
    (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(CheckpointError) as refused:
        read_json(str(tmp_path / name))
    assert words in refused.value.what and refused.value.where == str(tmp_path / name)


def test_null_is_what_is_left_out(tmp_path):
    value = dict.fromkeys(("_class_name", "num_layers", "axes_dims_rope", "quantization_config", "scaling_factor"))
    (tmp_path / "config.json").write_text(json.dumps(value), encoding="utf-8")
    assert read_json(str(tmp_path / "config.json")) == value


# None of them is loaded here: their heads, widths, layers or lengths are no numbers, or no lists.
OTHERS = {"cvt", "dinat", "donut-swin", "florence2", "florence_vision", "gemma3n", "gemma3n_text", "hiera", "lxmert", "maskformer-swin",
          "musicflamingo", "swin", "swin2sr", "swinv2", "UVit2DModel"}


def test_every_class_of_diffusers_and_transformers_says_such_configurations():
    """By their defaults."""
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    classes = [kind for name in dir(diffusers) if inspect.isclass(kind := getattr(diffusers, name, None)) and issubclass(kind, ModelMixin)]
    assert len(classes) > 100
    refused = set()
    for kind in classes:
        said = {name: one.default for name, one in inspect.signature(kind.__init__).parameters.items() if one.default is not one.empty}
        if kinds.CONFIG.wrong(json.loads(json.dumps({"_class_name": kind.__name__, **said}, default=str))):
            refused.add(kind.__name__)
    for name in list(CONFIG_MAPPING.keys()):
        try:
            said = json.loads(CONFIG_MAPPING[name]().to_json_string())
        except Exception:  # one that has no defaults, or needs another package
            continue
        if kinds.CONFIG.wrong(said):
            refused.add(name)
    assert refused <= OTHERS


def test_a_pipe_is_no_file(tmp_path):
    """Reading one would wait for ever."""
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="no ordinary file"):
        read_json(str(tmp_path / "config.json"))


def test_a_value_of_a_kind_shows_little_of_itself():
    with pytest.raises(CheckpointError) as refused:
        kinds.require({"_class_name": ["x" * 10 ** 6] * 100, "quantization_config": "y" * 10 ** 6}, kinds.CONFIG, "")
    assert len(str(refused.value)) < 400


def expression(pattern):
    """A glob as it was: `*` is any text."""
    return re.compile(re.escape(pattern).replace(re.escape("*"), ".*"))


@pytest.mark.parametrize("pattern", ["*", "a*", "*a", "a*b*c", "transformer_blocks.*", "*.proj_out", "a[b]*", "a?*", "x.y", "**", "*.*.*"])
def test_globs_are_what_they_were(pattern):
    names = ["", "a", "ab", "abc", "aXbYc", "transformer_blocks.0.attn", "x.proj_out", "proj_out", "a[b]c", "a?", "axx", "x.y", "xzy", "b.c.d"]
    assert Globs([pattern]).among(names) == [name for name in names if expression(pattern).fullmatch(name)]


@pytest.mark.parametrize("pattern", ["*" * 300 + "x", "*a" * 150 + "x", "*.*" * 100])
def test_stars_take_no_time(pattern):
    begun = time.process_time()
    Globs([pattern]).among(["a" * 400] * 1000)
    assert time.process_time() - begun < SECONDS


def test_lists_that_nobody_writes():
    for patterns, names in ((["*" * (LONGEST + 1)], ["a"]), (["*" * (LONGEST - n) for n in range(60)], ["a"]), (["*a"] * 2 + [f"*{n}" for n in range(MANY)], ["a"]),
                            ([f"*{n}" for n in range(100)], ["a"] * (MOST // 100 + 1))):
        with pytest.raises(CheckpointError):
            Globs(patterns).among(names)


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(.*)*x", r"(a|aa)+$", r"(?:.*){1,50}x", r"(x+x+)+y"])
def test_expressions_of_others_end(pattern):
    """Those that `regex` sees through are none of its; the others are stopped."""
    written = Expressions("config.json")
    begun = time.process_time()
    try:
        for _ in range(3):
            written.compile(pattern).match("a" * 300 + "b" + "x" * 300)
    except CheckpointError as error:
        assert "takes too long" in error.what
    assert time.process_time() - begun < 2 * SECONDS


def test_expressions_are_pythons():
    written = Expressions()
    for pattern in (r"(?i)A.*b", r"^x\.(\d+)\.y$", r"(?<!a)b"):
        for name in ("aXb", "x.12.y", "ab", "b"):
            assert written.compile(pattern).match(name) == bool(re.match(pattern, name))
            assert written.compile(pattern).search(name) == bool(re.search(pattern, name))
    for pattern in (r"(?R)", r"(", "a{99999999999999999999}", "(" * 300, r"\p{L}"):
        with pytest.raises(re.error):
            written.compile(pattern)
    assert regex.compile(r"(?R)?a")  # which regex alone takes
