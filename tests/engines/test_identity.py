"""What a server is named by: said and read again, the same for the same bytes anywhere, another for any other."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from quantized_transformers.engines.sglang import identity
from quantized_transformers.engines.sglang.identity import Identity, Part, parse, part_of
from quantized_transformers.loaders.errors import CheckpointError

pytestmark = pytest.mark.unit

HEX = "0123456789ab"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ALL = [Identity(Part("black-forest-labs/FLUX.1-dev", HEX)), Identity(Part("base")),
       Identity(Part("Wan-AI/Wan2.2", HEX), (("transformer", Part("a/b/c.safetensors", HEX)), ("transformer_2", Part("d")))),
       Identity(Part("x+y @=*%/z ä", HEX), (("transformer", Part("b@c")),), ((Part("l", HEX), 0.8), (Part("m"), -1.0)))]


@pytest.mark.parametrize("one", ALL)
def test_said_and_read_again(one):
    text = str(one)
    assert parse(text) == one and text.isascii() and not set(text) & set(" \"'\\")


@pytest.mark.parametrize("text", ["", "FLUX.1-dev", "qt:", "qt:a@short", "qt:a+vae=b", "qt:a+transformer=", "qt:a+lora=b", "qt:a+lora=b*x",
                                  "qt:a+transformer=b*1", "qt:a@0123456789abc", "QT:a"])
def test_other_names_are_none(text):
    assert parse(text) is None


def test_a_part_without_a_mark_matches_any_of_its_name():
    assert Part("a", HEX).matches(Part("a")) and Part("a").matches(Part("a", HEX)) and Part("a", HEX).matches(Part("a", HEX))
    assert not Part("a", HEX).matches(Part("a", "f" * 12)) and not Part("a").matches(Part("b"))
    base, other = Identity(Part("a", HEX)), Identity(Part("a", HEX), (("transformer", Part("b")),))
    assert base.matches(base) and not base.matches(other) and not other.matches(base)
    lora = Identity(Part("a"), (), ((Part("l", HEX), 0.8),))
    assert lora.matches(Identity(Part("a", HEX), (), ((Part("l"), 0.8),)))
    assert not lora.matches(Identity(Part("a"), (), ((Part("l"), 0.7),))) and not lora.matches(base)


@pytest.fixture
def folder(tmp_path):
    """A component: a small config, and weights beyond the size up to which all bytes count."""
    made = tmp_path / "here" / "one"
    made.mkdir(parents=True)
    (made / "config.json").write_text('{"a": 1}')
    save_file({"weight": torch.arange(700_000.0)}, str(made / "model.safetensors"))
    (made / "README.md").write_text("about")
    return made


def files(folder):
    return [str(folder / "config.json"), str(folder / "model.safetensors")]


def test_content_decides_and_not_the_place(folder, tmp_path):
    first = part_of(folder, files(folder))
    assert first.name == "one" and len(first.mark) == 12
    elsewhere = tmp_path / "there" / "one"
    shutil.copytree(folder, elsewhere)
    assert part_of(elsewhere, reversed(files(elsewhere))) == first
    assert part_of(str(folder) + "/", files(folder)) == first
    alone = part_of(folder / "model.safetensors", files(folder)[1:])
    assert alone.name == "model.safetensors" and alone.mark != first.mark


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change", ["config", "header", "middle", "size", "name", "more"])
def test_another_content_is_another_mark(folder, change):
    before, weights = part_of(folder, files(folder)), folder / "model.safetensors"
    named = files(folder)
    if change == "config":
        (folder / "config.json").write_text('{"a": 2}')
    elif change == "header":
        flip(weights, 20)
    elif change == "middle":
        flip(weights, weights.stat().st_size // 2)
    elif change == "size":
        with open(weights, "ab") as file:
            file.write(b"0")
    elif change == "name":
        named[1] = str(weights.rename(folder / "other.safetensors"))
    else:
        (folder / "second.safetensors").write_bytes(b"")
        named.append(str(folder / "second.safetensors"))
    assert part_of(folder, named).mark != before.mark


def test_two_tunes_of_one_model_differ_though_sizes_and_headers_are_one(folder, tmp_path):
    """Their marks would be one without a look at the values."""
    other = tmp_path / "other" / "one"
    shutil.copytree(folder, other)
    save_file({"weight": torch.arange(700_000.0) * 1.01}, str(other / "model.safetensors"))
    assert part_of(other, files(other)).mark != part_of(folder, files(folder)).mark


def test_a_large_file_is_not_read_whole(folder):
    """64 KiB from its middle, and its header."""
    weights = folder / "model.safetensors"
    before = part_of(weights, [str(weights)])
    flip(weights, weights.stat().st_size - 3)
    assert part_of(weights, [str(weights)]) == before


@pytest.mark.parametrize("root, name", [("models--a--b-c", "a/b-c"), ("models/a--b-c", "a/b-c")])
def test_a_repo_in_a_hubs_cache_goes_by_its_commit(tmp_path, root, name):
    made = tmp_path / root / "snapshots" / COMMIT
    (made / "sub").mkdir(parents=True)
    (made / "sub" / "x.safetensors").write_bytes(b"1")
    assert part_of(made, []) == Part(name, COMMIT[:12])
    assert part_of(made / "sub" / "x.safetensors", []) == Part(f"{name}/sub/x.safetensors", COMMIT[:12])
    branch = made.rename(made.parent / "master")  # ModelScope's snapshots go by branches
    found = part_of(branch, [str(branch / "sub" / "x.safetensors")])
    assert found.name == name and found.mark not in ("", COMMIT[:12])


def test_a_file_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read the file"):
        part_of(tmp_path, [str(tmp_path / "gone.json")])


def test_marks_are_as_long_as_said():
    assert identity.DIGITS == 12
