"""Downloads from ModelScope, in processes of their own against a local server that answers as its API does. What is the
same for every hub is in test_hub.py."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.files import hubs
from quantized_transformers.loaders.files.places import candidates, cleaned, is_repo
from support.downloads import WEIGHTS, refused, repos, run, start
from support.hub import FakeRepo, Hub
from support.modelscope_hub import HEAD, OLDER, ScopeHub, ScopeRepo

pytestmark = pytest.mark.host

BASE, OVERRIDE = "modelscope:owner/tiny", "modelscope:owner/tiny.v1-fp8"


@pytest.fixture()
def hub(tiny):
    names = ("owner/tiny", "owner/tiny.v1-fp8", "owner/sharded")
    with ScopeHub(dict(zip(names, repos(ScopeRepo, tiny), strict=True))) as server:
        yield server


def repo(home: Path, reference: str = OVERRIDE) -> Path:
    return home / "modelscope" / "models" / reference.partition(":")[2].replace("/", "--")


def snapshot(home: Path, reference: str = OVERRIDE, revision: str = "master") -> Path:
    return repo(home, reference) / "snapshots" / revision


def held(home: Path, reference: str = OVERRIDE, revision: str = "master") -> list[str]:
    """The files that a repo's snapshot shows."""
    folder = snapshot(home, reference, revision)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def partials(home: Path, reference: str = OVERRIDE) -> list[Path]:
    return list(repo(home, reference).rglob("*.incomplete"))


def test_an_override_is_fetched_once_and_then_needs_no_network(hub, tmp_path):
    code, text = run(hub, tmp_path, OVERRIDE, "--download")
    assert code == 0 and "FP8" in text, text
    assert held(tmp_path) == ["config.json", WEIGHTS]  # plain files, as its client has them
    assert (snapshot(tmp_path) / WEIGHTS).read_bytes() == hub.repos["owner/tiny.v1-fp8"].files[WEIGHTS]
    asked = [path for path, _ in hub.log if "FilePath" in path]
    assert asked and all(f"Revision={HEAD}" in path for path in asked)  # by commit, never by branch
    # without a hub, too, and with consent: what is here is not asked for again
    for reference, flags in ((OVERRIDE, ()), (OVERRIDE, ("--download",)), ("owner/tiny.v1-fp8", ("--download",))):
        code, again = run(None, tmp_path, reference, *flags)
        assert code == 0 and again.splitlines()[2:] == text.splitlines()[2:]
    refused("not on this machine", None, tmp_path, "huggingface:owner/tiny.v1-fp8")
    assert not (tmp_path / "hub" / "models--owner--tiny.v1-fp8").exists()


def test_only_what_the_load_needs(hub, tmp_path):
    """A base: its pipeline index and one component, nothing else; a subfolder and a file of one as they are named."""
    assert run(hub, tmp_path, BASE, "--download")[0] == 0
    assert held(tmp_path, BASE) == ["model_index.json", "transformer/config.json", f"transformer/{WEIGHTS}"]
    other = tmp_path / "other"
    for address in ("https://modelscope.cn/models/owner/tiny/tree/master/transformer",
                    f"https://www.modelscope.cn/models/owner/tiny/file/view/master/transformer/{WEIGHTS}?status=2"):
        code, text = run(hub, other, address, "--download")
        assert code == 0, text
    assert held(other, BASE) == ["transformer/config.json", f"transformer/{WEIGHTS}"]


def test_the_preferred_hub(hub, tiny, tmp_path):
    """A reference without a hub goes to Hugging Face, or to the one in QT_HUB, or to the only one that has it."""
    with Hub({"owner/tiny": FakeRepo.of(tiny.pipeline)}) as other:
        both = {"HF_ENDPOINT": other.url, "MODELSCOPE_ENDPOINT": hub.url}
        assert run(None, tmp_path / "a", "owner/tiny", "--download", **both)[0] == 0 and not hub.log and other.log
        before = len(other.log)
        assert run(None, tmp_path / "b", "owner/tiny", "--download", **both, QT_HUB="modelscope")[0] == 0
        assert run(None, tmp_path / "c", "huggingface:owner/tiny", "--download", QT_HUB="modelscope",
                   **both)[0] == 0
        assert held(tmp_path / "b", BASE) and not held(tmp_path / "c", BASE) and len(other.log) > before
        before = len(other.log)
        refused("no repo Eco-Tech/Wan2.2", None, tmp_path, "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8", "--download", **both)
        assert len(other.log) == before  # it is known to be on ModelScope alone
    refused("QT_HUB is none of huggingface, modelscope", hub, tmp_path, "owner/tiny", "--download", QT_HUB="other")
    code, text = run(None, tmp_path, command="doctor", QT_HUB="ModelScope")
    assert code == 0 and "QT_HUB: ModelScope" in text and "hub: modelscope" in text, text


def test_without_consent_the_command_is_named(hub, tmp_path):
    text = refused("modelscope:owner/tiny is not on this machine", hub, tmp_path, BASE, "--revision", "v1")
    assert "modelscope download --model owner/tiny --revision v1" in text and not hub.log
    text = refused("not on this machine", hub, tmp_path, "modelscope:black-forest-labs/FLUX.1-dev")
    assert 'modelscope download --model black-forest-labs/FLUX.1-dev --include "model_index.json" "transformer/*"' in text
    assert "hf download owner/tiny" in refused("not on this machine", hub, tmp_path, "owner/tiny")
    assert "modelscope download --model" in refused("not on this machine", hub, tmp_path, "owner/tiny", QT_HUB="modelscope")


@pytest.mark.parametrize("whole_parts", [True, pytest.param(False, marks=pytest.mark.full)])
def test_an_interrupted_download_goes_on_where_it_stopped(hub, tmp_path, whole_parts):
    """It dies in the middle of a large file: 206 from the store; or of one that the API has itself, where a part is 200."""
    import torch
    from safetensors.torch import save

    from support import modelscope_hub

    big = save({"x": torch.randn(3_000_000)})
    hub.repos["owner/big"] = ScopeRepo({"config.json": b"{}", WEIGHTS: big})
    reference, before = "modelscope:owner/big", modelscope_hub.LARGE
    modelscope_hub.LARGE = 100_000 if whole_parts else 10**9
    try:
        hub.cut[WEIGHTS] = 5_000_000
        hub.seconds_per_mb = 0.05
        process = start(hub, tmp_path, reference, "--download")
        deadline = time.time() + 60
        while not any(path.stat().st_size >= 4 << 20 for path in partials(tmp_path, reference)):
            assert time.time() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert held(tmp_path, reference) == ["config.json"]  # nothing of the weights shows
        refused("no .safetensors file", None, tmp_path, reference)
        partial, = partials(tmp_path, reference)
        arrived = partial.stat().st_size
        hub.cut.clear()
        hub.log.clear()
        hub.seconds_per_mb = 0.0
        run(hub, tmp_path, reference, "--download")
        assert hub.asked_for(WEIGHTS) == [f"bytes={arrived}-"] and hub.asked_for("config.json") == []
        assert (snapshot(tmp_path, reference) / WEIGHTS).read_bytes() == big and not partials(tmp_path, reference)
    finally:
        modelscope_hub.LARGE = before


def test_a_connection_that_breaks_is_taken_up_again(hub, tmp_path):
    weights = hub.repos["owner/tiny.v1-fp8"].files[WEIGHTS]
    hub.cut[WEIGHTS] = len(weights) // 2  # of each answer: three of them make the whole
    assert run(hub, tmp_path, OVERRIDE, "--download")[0] == 0
    ranges = hub.asked_for(WEIGHTS)
    assert ranges[0] == "" and f"bytes={len(weights) // 2}-" in ranges
    assert (snapshot(tmp_path) / WEIGHTS).read_bytes() == weights


def test_a_server_that_cannot_resume(hub, tmp_path):
    weights = hub.repos["owner/tiny.v1-fp8"].files[WEIGHTS]
    hub.ignore_range = True
    partial = repo(tmp_path) / "quantized_transformers" / f"{hub.repos['owner/tiny.v1-fp8'].digest(WEIGHTS)}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(weights[:200_000])
    assert run(hub, tmp_path, OVERRIDE, "--download")[0] == 0
    assert (snapshot(tmp_path) / WEIGHTS).read_bytes() == weights


def test_damaged_bytes_are_never_used(hub, tmp_path):
    for name in (WEIGHTS, "config.json"):
        home = tmp_path / name
        hub.damage = {name}
        refused("arrived damaged", hub, home, OVERRIDE, "--download")
        assert name not in held(home) and not partials(home)
        assert run(None, home, OVERRIDE)[0] == 1
        hub.damage = set()
        assert run(hub, home, OVERRIDE, "--download")[0] == 0  # the next try is a clean one


def test_one_commit_for_all_files(hub, tmp_path):
    """master moves between two loads: what is fetched later belongs to what is here."""
    run(hub, tmp_path, OVERRIDE, "--download")
    (snapshot(tmp_path) / WEIGHTS).unlink()
    old = hub.repos["owner/tiny.v1-fp8"]
    hub.repos["owner/tiny.v1-fp8"] = ScopeRepo({**old.files, WEIGHTS: b"new" * 100_000}, head="f" * 40)
    refused("no revision master (any more)", hub, tmp_path, OVERRIDE, "--download")
    hub.repos["owner/tiny.v1-fp8"] = old
    assert run(hub, tmp_path, OVERRIDE, "--download")[0] == 0
    # a named revision is kept apart
    assert run(hub, tmp_path / "b", OVERRIDE, "--download", "--revision", HEAD)[0] == 0
    assert held(tmp_path / "b") == [] and held(tmp_path / "b", revision=HEAD) == ["config.json", WEIGHTS]
    assert run(None, tmp_path / "b", OVERRIDE, "--revision", HEAD)[0] == 0
    assert run(None, tmp_path / "b", OVERRIDE)[0] == 1


def test_what_another_tool_left_is_proven_or_refused(hub, tmp_path):
    """Its folder says nothing of the commit. Right bytes are taken, and not fetched again; others are not added to."""
    files = hub.repos["owner/tiny.v1-fp8"].files
    for wrong in (False, True):
        home = tmp_path / str(wrong)
        snapshot(home).mkdir(parents=True)
        (snapshot(home) / "config.json").write_bytes(files["config.json"].swapcase() if wrong else files["config.json"])
        hub.log.clear()
        if wrong:  # of the same size: only the hash tells
            refused("another version of config.json", hub, home, OVERRIDE, "--download")
            assert held(home) == ["config.json"] and not hub.asked_for(WEIGHTS)
        else:
            assert run(hub, home, OVERRIDE, "--download")[0] == 0
            assert not hub.asked_for("config.json") and hub.asked_for(WEIGHTS)
    # and what it changes afterwards
    home = tmp_path / "False"
    (snapshot(home) / WEIGHTS).unlink()
    time.sleep(0.01)
    (snapshot(home) / "config.json").write_bytes(files["config.json"].swapcase())
    refused("another version of config.json", hub, home, OVERRIDE, "--download")


@pytest.mark.parametrize("folder", ["models/owner/tiny___v1-fp8", "hub/models/owner/tiny___v1-fp8",
                                    "owner/tiny.v1-fp8", "hub/owner/tiny___v1-fp8"])
def test_folders_of_older_clients(tiny, tmp_path, folder):
    (tmp_path / "modelscope" / folder).parent.mkdir(parents=True)
    os.symlink(tiny.fp8, tmp_path / "modelscope" / folder)
    for reference in (OVERRIDE, "owner/tiny.v1-fp8"):
        code, text = run(None, tmp_path, reference)
        assert code == 0 and "FP8" in text, text
    refused("not on this machine", None, tmp_path, OVERRIDE, "--revision", "v1")  # which one it is, nothing says


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.json", "transformer/../../evil.json", "C:\\evil.json"])
def test_unsafe_names_are_refused_before_anything_is_written(hub, tmp_path, name):
    hub.repos["owner/tiny.v1-fp8"].listed[name] = {"Sha256": "0" * 64}
    text = refused("unsafe names", hub, tmp_path, OVERRIDE, "--download")
    assert "nothing of it was written" in text and not repo(tmp_path).exists()


def test_unsafe_digests_commits_and_lists(hub, tmp_path):
    override = hub.repos["owner/tiny.v1-fp8"]
    for digest in ("../../../evil", ""):
        override.listed["config.json"] = {"Sha256": digest}
        refused("unsafe names or hashes", hub, tmp_path, OVERRIDE, "--download")
    override.listed = {}
    override.head = "../../evil"
    refused("names no commit", hub, tmp_path, OVERRIDE, "--download")
    override.head = HEAD
    override.listed = {f"{i}.json": {"Sha256": "0" * 64} for i in range(3000)}
    refused("no more than 3000 files", hub, tmp_path, OVERRIDE, "--download")
    override.listed = {}
    sharded = hub.repos["owner/sharded"]
    index, = (name for name in sharded.files if name.endswith("index.json"))
    sharded.files[index] = json.dumps({"weight_map": {"a": "../../x.safetensors"}}).encode()
    refused("outside its folder", hub, tmp_path, "modelscope:owner/sharded", "--download")
    refused("no revision", hub, tmp_path, OVERRIDE, "--download", "--revision", "../../x")
    refused("must not contain '..'", hub, tmp_path, "modelscope:owner/../x", "--download")


@pytest.mark.parametrize("changed", [(WEIGHTS,), ()])
def test_the_commit_of_a_branch(hub, tmp_path, changed):
    """The list says its first digits, and in full the last commit of each file, which need not be the newest."""
    hub.repos["owner/tiny.v1-fp8"].changed = changed
    assert run(hub, tmp_path, OVERRIDE, "--download")[0] == 0
    asked = [path for path, _ in hub.log if "FilePath" in path]
    assert all(f"Revision={HEAD}" in path and OLDER not in path for path in asked)
    assert any("/commits?" in path for path, _ in hub.log) is not bool(changed)


def test_every_failure_has_its_message(hub, tmp_path):
    text = refused("there is no repo owner/nothing", hub, tmp_path, "modelscope:owner/nothing", "--download")
    assert "run: modelscope download --model owner/nothing" in text
    refused("no revision v9", hub, tmp_path, OVERRIDE, "--download", "--revision", "v9")
    text = refused("broke off", None, tmp_path, OVERRIDE, "--download")
    assert "run: modelscope download --model owner/tiny.v1-fp8" in text
    refused("HF_HUB_OFFLINE forbids", hub, tmp_path, OVERRIDE, "--download", HF_HUB_OFFLINE="1")
    override = hub.repos["owner/tiny.v1-fp8"]
    override.listed[WEIGHTS] = {"Size": 10**17}
    text = refused("100000.00 TB are needed", hub, tmp_path, OVERRIDE, "--download")
    assert "MODELSCOPE_CACHE" in text and not hub.asked_for(WEIGHTS)
    override.listed = {}
    with Hub({}) as other:  # a server that is none of ModelScope's
        refused("there is no repo", None, tmp_path, OVERRIDE, "--download", MODELSCOPE_ENDPOINT=other.url)


def test_token_and_access(hub, tmp_path):
    """A private repo and one that must be applied for are refused alike. The token is not sent on to the store."""
    hub.repos["owner/tiny.v1-fp8"].token = "secret"
    text = refused("gives no access to owner/tiny.v1-fp8", hub, tmp_path / "a", OVERRIDE, "--download")
    assert f"{hub.url}/models/owner/tiny.v1-fp8" in text and "MODELSCOPE_API_TOKEN" in text
    hub.log.clear()
    hub.tokens.clear()
    assert run(hub, tmp_path / "a", OVERRIDE, "--download", MODELSCOPE_API_TOKEN="secret",
               MODELSCOPE_DOMAIN="ignored.example")[0] == 0
    assert {path.startswith("/store/"): token for (path, _), token in zip(hub.log, hub.tokens, strict=True)} == {
        False: "Bearer secret", True: ""}


PAGE = "https://modelscope.cn/models/owner/name"


@pytest.mark.parametrize(("address", "reference"), [
    (PAGE, "modelscope:owner/name"), (f"{PAGE}/files", "modelscope:owner/name"),
    ("http://www.modelscope.cn/models/owner/name/summary", "modelscope:owner/name"),
    ("https://www.modelscope.ai/models/owner/name/", "modelscope:owner/name"),
    (f" '{PAGE}/file/view/master/transformer/config.json?status=1' ", "modelscope:owner/name/transformer/config.json"),
    (f"{PAGE}/file/view/master?fileName=vae%2Fa.safetensors&status=2", "modelscope:owner/name/vae/a.safetensors"),
    (f"{PAGE}/tree/master/transformer", "modelscope:owner/name/transformer"),
    (f"{PAGE}/resolve/master/x%20y.gguf", "modelscope:owner/name/x y.gguf"),
    (f"{PAGE}/resolve/v2/x.gguf", f"{PAGE}/resolve/v2/x.gguf"),
    ("https://modelscope.cn/datasets/owner/name", "https://modelscope.cn/datasets/owner/name"),
    ("https://modelscope.cn.evil.example/models/owner/name", "https://modelscope.cn.evil.example/models/owner/name")])
def test_addresses(address, reference):
    assert cleaned(address) == reference and cleaned(reference) == reference
    assert is_repo(address) is (reference.startswith("modelscope:") and " " not in reference)


def test_other_revisions_and_names_that_are_no_repo(tmp_path):
    text = refused("this address is of the revision 'v2'", None, tmp_path, f"{PAGE}/file/view/v2/x.gguf")
    assert "give modelscope:owner/name/x.gguf, and v2 as revision" in text
    for text in ("modelscope:", "modelscope:owner", f"modelscope:{tmp_path}", "modelscope:~/x", "modelscope:C:\\models\\x",
                 "modelscope:modelscope:owner/name", "modelscope:huggingface:owner/name", "modelscope:./a/b"):
        assert not is_repo(text)
        with pytest.raises(CheckpointError, match="no repo on it"):
            list(candidates(text))
    for text in ("other:owner/name", "C:/models/name", "C:\\models\\name"):  # as before
        assert not is_repo(text) and hubs.split(text) == ("", text)


def test_both_sites_are_asked(hub, tmp_path, monkeypatch):
    """What modelscope.cn does not have may be on modelscope.ai; a repo that it refuses is not looked for there."""
    from quantized_transformers.loaders.files.hubs import modelscope

    monkeypatch.delenv("MODELSCOPE_ENDPOINT", raising=False)
    monkeypatch.delenv("MODELSCOPE_DOMAIN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with ScopeHub({"owner/big": ScopeRepo({"a.json": b"{}"}), "owner/no": ScopeRepo({}, token="x")}) as first:
        monkeypatch.setattr(modelscope.api, "SITES", (first.url, hub.url))
        assert modelscope.listing("owner/tiny", None, lambda amount: None).commit == HEAD and first.log and hub.log
        hub.log.clear()
        assert list(modelscope.listing("owner/big", None, lambda amount: None).files) == ["a.json"] and not hub.log
        with pytest.raises(OSError, match="record not found") as error:
            modelscope.listing("owner/no", None, lambda amount: None)
        assert error.value.kind == "access" and not hub.log
        monkeypatch.setenv("MODELSCOPE_PREFER_AI_SITE", "true")
        assert modelscope.api.sites() == (hub.url, first.url)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "www.modelscope.example/")
    assert modelscope.api.sites() == ("https://www.modelscope.example",)
