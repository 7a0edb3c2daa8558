"""Which files a reference means, and which references are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.files.places import cleaned, is_repo
from quantized_transformers.loaders.files.selection import INDEX
from quantized_transformers.loaders.local import references
from quantized_transformers.loaders.locate import locate

pytestmark = pytest.mark.unit


def names(source) -> list[str]:
    return [os.path.basename(f) for f in source.files]


def refused(message: str, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(locate(*map(str, args), **kwargs))
    text = str(caught.value)
    assert message in text and "what to do:" in text, text
    return text


def test_every_way_to_name_the_same_weights(tiny):
    file = next(tiny.fp8.glob("*.safetensors"))
    assert locate(str(file)).files == (str(file),) and locate(str(file)).config is None
    assert locate(str(tiny.fp8)).files == (str(file),)
    assert locate(str(tiny.fp8)).config == str(tiny.fp8 / "config.json")
    assert locate(str(tiny.fp8), weights_name=file.name).files == (str(file),)
    assert locate(str(tiny.pipeline)).folder == str(tiny.bf16)
    index = next(tiny.sharded.glob(f"*{INDEX}"))
    by_folder, by_index = locate(str(tiny.sharded)), locate(str(index))
    assert by_folder == locate(str(tiny.sharded), weights_name=index.name)
    assert names(by_folder) == names(by_index) == sorted(set(json.loads(index.read_text())["weight_map"].values()))


def test_spaces_and_other_alphabets_in_paths(tiny, tmp_path):
    folder = tmp_path / "mein Modell 模型"
    shutil.copytree(tiny.fp8, folder)
    assert Checkpoint(locate(str(folder))).tensors == Checkpoint(locate(str(tiny.fp8))).tensors


def test_model_folders_and_repo_ids(tiny, tmp_path, monkeypatch):
    import folder_paths

    root = tmp_path / "diffusers"
    shutil.copytree(tiny.pipeline, root / "owner" / "tiny")
    shutil.copytree(tiny.fp8, root / "tiny-fp8")
    (root / "loose").mkdir()
    shutil.copy(next(tiny.fp8.glob("*.safetensors")), root / "loose" / "one.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(root)], {"folder"}))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path / "none")], set()))
    (root / "loose" / "two.gguf").write_bytes(b"GGUF")
    (root / "loose" / "notes.txt").write_bytes(b"x")
    there = [one.reference for one in references()]
    assert there == ["loose/one.safetensors", "loose/two.gguf", "owner/tiny", "tiny-fp8"]
    assert locate("owner/tiny").folder == str(root / "owner" / "tiny" / "transformer")
    assert locate("somebody/tiny-fp8").folder == str(root / "tiny-fp8")
    assert locate("loose/one.safetensors").files == (str(root / "loose" / "one.safetensors"),)


def test_pasted_and_of_windows(tiny, tmp_path, monkeypatch):
    """What a terminal or the Explorer puts around a path, and the separators of a workflow made on Windows."""
    import folder_paths

    root = tmp_path / "diffusers"
    for name in ("sub", "two/deep"):
        shutil.copytree(tiny.fp8, root / name / "tiny")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(root)], {"folder"}))
    file = next((root / "sub" / "tiny").glob("*.safetensors"))
    for text in (f'"{file}"', f" '{file}'\n", f'" {file} "', f"sub\\tiny\\{file.name}", f'"sub\\tiny\\{file.name}"'):
        assert locate(text).files == (str(file),), text
    assert locate("sub\\tiny").folder == str(root / "sub" / "tiny")
    assert locate("two\\deep\\tiny").folder == str(root / "two" / "deep" / "tiny")
    assert locate(" 'sub/tiny'", weights_name=f'"{file.name}"').files == (str(file),)
    refused("no checkpoint is chosen", '" "')
    refused("must not contain '..'", "sub\\..\\..\\etc")
    for text in ('"', "'sub/tiny", '"sub/tiny\''):  # no pair of quotes
        refused("was found neither", text)


@pytest.mark.skipif(os.name == "nt", reason="no file of Windows has such a name")
def test_a_name_with_a_backslash_is_first_what_it_says(tiny, tmp_path, monkeypatch):
    import folder_paths

    for name in ("a\\b", "a/b", "c/d"):
        shutil.copytree(tiny.fp8, tmp_path / name)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(tmp_path)], {"folder"}))
    assert locate("a\\b").folder == str(tmp_path / "a\\b") == locate(str(tmp_path / "a\\b")).folder
    assert locate(f"{tmp_path}\\c\\d").folder == str(tmp_path / "c" / "d")


def test_missing_references_name_the_command(tmp_path):
    text = refused("not on this machine", "owner/never-heard-of", revision="v1")
    assert "hf download owner/never-heard-of --revision v1" in text
    refused("no such file or folder", tmp_path / "nothing")
    refused("no checkpoint is chosen", "  ")
    refused("must not contain '..'", "owner/../../etc")


@pytest.mark.parametrize(("address", "repo"), [
    ("https://huggingface.co/owner/name", "owner/name"), ("http://hf.co/owner/name/", "owner/name"),
    ("https://huggingface.co/owner/name/tree/main", "owner/name"),
    ("https://huggingface.co/owner/name/tree/main/transformer", "owner/name/transformer"),
    (" 'https://huggingface.co/owner/name/blob/main/a%20b/x.gguf?download=true' ", "owner/name/a b/x.gguf"),
    ("https://huggingface.co/owner/name/resolve/main/x.safetensors", "owner/name/x.safetensors"),
    ("https://huggingface.co/owner/name/discussions/3", "owner/name"),
    ("https://mirror.example/owner/name/tree/main", "owner/name"),
    ("https://huggingface.co/datasets/owner/name", "https://huggingface.co/datasets/owner/name"),
    ("https://other.example/owner/name", "https://other.example/owner/name")])
def test_addresses_of_the_hub(address, repo, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert cleaned(address) == repo and cleaned(repo) == repo
    assert is_repo(address) is (repo.startswith("owner/") and " " not in repo)
    if is_repo(address):
        assert f"hf download {'/'.join(repo.split('/')[:2])}" in refused("not on this machine", address)


def test_an_address_of_another_revision():
    text = refused("this address is of the revision 'v2'", "https://huggingface.co/owner/name/tree/v2/transformer")
    assert "give owner/name/transformer, and v2 as revision" in text


def test_ambiguous_and_empty_folders(tiny, tmp_path):
    file = next(tiny.fp8.glob("*.safetensors"))
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(file, two / name)
    assert "a.safetensors, b.safetensors" in refused("2 weight files without an index", two)
    assert names(locate(str(two), weights_name="b.safetensors")) == ["b.safetensors"]
    refused("holds no c.safetensors", two, weights_name="c.safetensors")
    for outside in ("../fp8/x.safetensors", "..\\fp8\\x.safetensors", "/etc/x.safetensors", "C:/x.safetensors"):
        refused("must stay inside the folder", two, weights_name=outside)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("no .safetensors file", empty)
    (empty / "model.pt").write_bytes(b"PK\x03\x04")
    refused("only .safetensors", empty / "model.pt")
    refused("no transformer_2", tiny.pipeline, component="transformer_2")
    refused("single component", tiny.fp8, component="transformer_2")


@pytest.fixture()
def shards(tiny, tmp_path) -> Path:
    folder = tmp_path / "shards"
    shutil.copytree(tiny.sharded, folder)
    return folder


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


A, B = "diffusion_pytorch_model", "flux2-dev-nvfp4"


@pytest.mark.parametrize(("files", "chosen"), [
    # SGLang 0.5.23's test_transformer_quant.py, lines 1311, 1325, 1342
    ([f"{B}.safetensors", f"{B}-mixed.safetensors"], [f"{B}-mixed.safetensors"]),
    ([f"{A}.safetensors", f"{A}.fp16.safetensors"], [f"{A}.safetensors"]),
    ([f"{A}.fp16.safetensors"], [f"{A}.fp16.safetensors"]),
    ([f"{A}.safetensors", f"{A}.bf16.safetensors", f"{A}.fp32.safetensors"], [f"{A}.safetensors"]),
    (["weights/only.safetensors"], ["only.safetensors"]),
    ([f"{A}.safetensors", "ema/other.safetensors"], [f"{A}.safetensors"]),
])
def test_choice_among_files(files, chosen, tmp_path):
    folder = touch(tmp_path / "folder", *files)
    source = locate(str(folder))
    assert names(source) == chosen
    assert bool(source.choice) == (len(files) > 1 and "ema" not in files[1])
    for name in files:  # an explicit name beats every rule
        assert names(locate(str(folder), weights_name=name)) == [os.path.basename(name)]


@pytest.mark.parametrize("files", [
    ["a.safetensors", "b.safetensors"], ["a-mixed.safetensors", "b-mixed.safetensors", "c.safetensors"],
    [f"{A}.fp16.safetensors", f"{A}.bf16.safetensors"], ["x/a.safetensors", "y/b.safetensors"]])
def test_ambiguous_among_files(files, tmp_path):
    refused("without an index", touch(tmp_path / "folder", *files))


def test_shards_without_an_index(shards, tiny):
    """All of them, by their names: from the folder, and from any one of them; or those that are missing are named."""
    from quantized_transformers.loaders.describe import describe

    next(shards.glob(f"*{INDEX}")).unlink()
    files = sorted(shards.glob("*.safetensors"))
    for reference in (shards, files[0], files[-1]):
        source = locate(str(reference))
        assert source.files == tuple(map(str, files)), reference
        assert not describe(Checkpoint(source)).problems
    assert "shards without an index" in locate(str(shards)).choice
    whole = {name: describe(Checkpoint(locate(str(folder)))).layers for name, folder in (("one", tiny.fp8), ("all", shards))}
    assert whole["one"] == whole["all"]
    files[-1].unlink()
    for reference in (shards, files[0]):
        text = refused(f"1 of {len(files)} shards are missing", reference)
        assert files[-1].name in text


@pytest.mark.parametrize("files", [
    [f"{A}-00001-of-00002.safetensors", f"{B}-00001-of-00002.safetensors"],
    [f"{A}-00001-of-00002.safetensors", f"{A}-00001-of-00003.safetensors"],
    [f"{A}-00001-of-00002.safetensors", f"{A}-00002-of-00002.safetensors", "other.safetensors"]])
def test_shards_of_two_models_are_ambiguous(files, tmp_path):
    refused("without an index", touch(tmp_path / "folder", *files))


def test_shards_that_are_mixed(tmp_path):
    mixed = [f"{B}-mixed-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert names(locate(str(touch(tmp_path / "folder", *mixed)))) == mixed


def test_a_list_shows_shards_once(tmp_path, monkeypatch):
    import folder_paths

    touch(tmp_path / "models", *(f"{A}-0000{i}-of-00002.safetensors" for i in (1, 2)), "b-00001-of-00002.gguf", "b-00002-of-00002.gguf")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path / "models")], {".safetensors"}))
    found = [one.reference for one in references() if "-of-" in one.reference]
    assert sorted(found) == ["b-00001-of-00002.gguf", f"{A}-00001-of-00002.safetensors"]


def test_index_wins_over_mixed_and_twins(shards):
    (shards / "transformer-mixed.safetensors").write_bytes(b"")
    index = next(shards.glob(f"*{INDEX}"))
    shutil.copy(index, shards / "diffusion_pytorch_model.fp16.safetensors.index.json")
    shutil.copy(index, shards / "diffusion_pytorch_model.safetensors.index.bf16.json")
    source = locate(str(shards))
    assert source.index_file == str(index) and len(source.files) == len(set(json.loads(index.read_text())["weight_map"].values()))


def test_a_quantized_repo_given_as_the_base(tmp_path, monkeypatch):
    """FLUX.2-dev-NVFP4: its mixed file are the weights, FLUX.2-dev gives the configuration."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(tmp_path)], {"folder"}))
    touch(tmp_path / "black-forest-labs" / "FLUX.2-dev-NVFP4", f"{B}.safetensors", f"{B}-mixed.safetensors")
    base = touch(tmp_path / "black-forest-labs" / "FLUX.2-dev", "transformer/config.json")
    for name in ("model_index.json", "transformer/config.json"):
        (base / name).write_text("{}")
    assert names(locate("black-forest-labs/FLUX.2-dev-NVFP4")) == [f"{B}-mixed.safetensors"]
    explicit = locate("black-forest-labs/FLUX.2-dev-NVFP4", weights_name=f"{B}.safetensors")
    assert names(explicit) == [f"{B}.safetensors"]
    deferred = locate("black-forest-labs/FLUX.2-dev-NVFP4", need_weights=False)
    assert deferred.config == str(base / "transformer" / "config.json")


def test_two_transformers_are_never_mixed_up(tmp_path):
    pipeline = touch(tmp_path / "wan", "model_index.json", "transformer/a.safetensors", "transformer_2/b.safetensors",
                     "vae/c.safetensors")
    assert names(locate(str(pipeline))) == ["a.safetensors"]
    assert names(locate(str(pipeline), component="transformer_2")) == ["b.safetensors"]


def test_deferred_needs_a_config_and_nothing_else(tiny, tmp_path):
    shutil.copy(tiny.bf16 / "config.json", tmp_path / "config.json")
    assert locate(str(tmp_path), need_weights=False).files == ()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        locate(str(next(tiny.fp8.glob("*.safetensors"))), need_weights=False)


def edit_index(folder: Path, change) -> None:
    index = next(folder.glob(f"*{INDEX}"))
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def test_missing_shard(shards):
    victim = sorted(shards.glob("*.safetensors"))[1]
    victim.unlink()
    assert victim.name in refused("shards are missing", shards)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd.safetensors", "a/../../b.safetensors",
                                  "..\\elsewhere.safetensors", "C:evil.safetensors"])
def test_index_naming_a_file_outside(shards, name):
    edit_index(shards, lambda c: c["weight_map"].update(x=name))
    refused("outside its folder", shards)


def test_index_naming_a_pickle_or_nothing(shards):
    edit_index(shards, lambda c: c["weight_map"].update(x="model.bin"))
    refused("no .safetensors file", shards)
    edit_index(shards, lambda c: c.update(weight_map={}))
    refused("names no tensors", shards)
    next(shards.glob(f"*{INDEX}")).write_text("{broken")
    refused("invalid JSON", shards)


def test_two_indexes(shards):
    index = next(shards.glob(f"*{INDEX}"))
    shutil.copy(index, shards / f"other{INDEX}")
    refused("2 index files", shards)


def test_index_and_shards_disagree(shards):
    edit_index(shards, lambda c: c["weight_map"].update(ghost=next(iter(c["weight_map"].values()))))
    refused("tensors that no shard holds: ghost", shards)


def test_shards_holding_the_same_tensor(shards):
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    shutil.copy(first, second)
    refused("two shards hold the same tensors", shards)


def test_truncated_shard(shards):
    victim = sorted(shards.glob("*.safetensors"))[-1]
    with open(victim, "r+b") as file:
        file.truncate(victim.stat().st_size - 1)
    assert victim.name in refused("truncated", shards)
