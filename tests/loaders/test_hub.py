"""Downloads, in processes of their own against a local server of the Hub's API; what its answers may hold is in
test_hub_answers.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from support.downloads import WEIGHTS, environment, refused, repos, run, start
from support.hub import COMMIT, FakeRepo, Hub
from support.pack import PACK

pytestmark = pytest.mark.host

BASE, OVERRIDE = "owner/tiny", "owner/tiny-fp8"


@pytest.fixture()
def hub(tiny):
    with Hub(dict(zip((BASE, OVERRIDE, "owner/sharded"), repos(FakeRepo, tiny), strict=True))) as server:
        yield server


def cache(home: Path, repo: str = OVERRIDE) -> Path:
    return home / "hub" / ("models--" + repo.replace("/", "--"))


def held(home: Path, repo: str = OVERRIDE) -> list[str]:
    """The files that a repo's snapshot shows."""
    snapshot = cache(home, repo) / "snapshots" / COMMIT
    return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())


def test_an_override_is_fetched_once_and_then_needs_no_network(hub, tmp_path):
    code, text = run(hub, tmp_path, OVERRIDE, "--download")
    assert code == 0 and "FP8" in text, text
    assert held(tmp_path) == ["config.json", WEIGHTS]
    assert (cache(tmp_path) / "refs" / "main").read_text() == COMMIT
    blob = (cache(tmp_path) / "snapshots" / COMMIT / WEIGHTS).resolve()
    assert blob.parent.name == "blobs" and blob.read_bytes() == hub.repos[OVERRIDE].files[WEIGHTS]
    asked = len(hub.log)
    for flags in ((), ("--download",)):  # with consent too, what is here is not asked for again
        code, again = run(None, tmp_path, OVERRIDE, *flags)  # the endpoint refuses connections
        assert code == 0 and again.splitlines()[1:] == text.splitlines()[1:]
    assert len(hub.log) == asked
    # what was written is an ordinary cache: huggingface_hub finds the files by itself
    probe = f"from huggingface_hub import snapshot_download as s; print(s({OVERRIDE!r}, local_files_only=True))"
    found = subprocess.run([sys.executable, "-c", probe], env=environment(None, tmp_path, HF_HUB_OFFLINE="1"), text=True,
                           capture_output=True, check=True).stdout.strip()
    assert found == str(cache(tmp_path) / "snapshots" / COMMIT)


def test_only_what_the_load_needs(hub, tmp_path):
    """A base: its pipeline index and one component; deferred: no weights at all. Nothing else of the repo."""
    assert run(hub, tmp_path, BASE, "--download")[0] == 0
    assert held(tmp_path, BASE) == ["model_index.json", "transformer/config.json", f"transformer/{WEIGHTS}"]
    probe = ("import sys; sys.argv = ['x']; sys.path.insert(0, {tests!r})\n"
             "from support.pack import start_comfy; start_comfy()\n"
             "from quantized_transformers.loaders.components.pipeline import locate_parts\n"
             "from quantized_transformers.loaders.locate import locate\n"
             "print(locate('owner/tiny', need_weights=False, download=True).files)\n"
             "print(sorted(locate_parts('owner/tiny', lambda index: ['tokenizer'], download=True).parts))\n")
    other = tmp_path / "other"
    done = subprocess.run([sys.executable, "-c", probe.format(tests=str(PACK / "tests"))], text=True, capture_output=True,
                          env=environment(hub, other), check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-2:] == ["()", "['tokenizer']"], done.stderr
    assert held(other, BASE) == ["model_index.json", "tokenizer/vocab.json", "transformer/config.json"]


def test_without_consent_the_command_is_named(hub, tmp_path):
    text = refused("owner/tiny-fp8 is not on this machine", hub, tmp_path, OVERRIDE, "--revision", "v1")
    assert "hf download owner/tiny-fp8 --revision v1" in text and not hub.log
    text = refused("not on this machine", hub, tmp_path, "black-forest-labs/FLUX.1-dev")
    assert 'hf download black-forest-labs/FLUX.1-dev --include "model_index.json" --include "transformer/*"' in text
    run(hub, tmp_path, "owner/sharded", "--download")
    next((cache(tmp_path, "owner/sharded") / "snapshots" / COMMIT).glob("*1-of-*")).unlink()
    assert "hf download owner/sharded" in refused("shards are missing", None, tmp_path, "owner/sharded")


def test_an_interrupted_download_goes_on_where_it_stopped(hub, tmp_path):
    import torch
    from safetensors.torch import save

    big = save({"x": torch.randn(3_000_000)})
    hub.repos["owner/big"] = FakeRepo({"config.json": b"{}", WEIGHTS: big})
    hub.cut[WEIGHTS] = 5_000_000
    hub.seconds_per_mb = 0.05
    process = start(hub, tmp_path, "owner/big", "--download")
    blobs = cache(tmp_path, "owner/big") / "blobs"
    deadline = time.time() + 60
    while not any(path.stat().st_size >= 4 << 20 for path in blobs.glob("*.incomplete")):  # most is here, then it dies
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert held(tmp_path, "owner/big") == ["config.json"]  # nothing of the weights shows
    refused("no .safetensors file", None, tmp_path, "owner/big")
    arrived = next(blobs.glob("*.incomplete")).stat().st_size
    hub.cut.clear()
    hub.log.clear()
    hub.seconds_per_mb = 0.0
    run(hub, tmp_path, "owner/big", "--download")
    assert hub.asked_for(WEIGHTS) == [f"bytes={arrived}-"] and hub.asked_for("config.json") == []
    assert (cache(tmp_path, "owner/big") / "snapshots" / COMMIT / WEIGHTS).read_bytes() == big
    assert not list(blobs.glob("*.incomplete"))


def test_a_server_that_cannot_resume(hub, tmp_path):
    weights = hub.repos[OVERRIDE].files[WEIGHTS]
    blobs = cache(tmp_path) / "blobs"
    blobs.mkdir(parents=True)
    digest = hub.repos[OVERRIDE].digest(WEIGHTS)
    (blobs / f"{digest}.incomplete").write_bytes(weights[:200_000])
    hub.ignore_range = True
    assert run(hub, tmp_path, OVERRIDE, "--download")[0] == 0
    assert (blobs / digest).read_bytes() == weights


def test_damaged_bytes_are_never_used(hub, tmp_path):
    for name in (WEIGHTS, "config.json"):  # sha256, and git's sha1 for small files
        home = tmp_path / name
        hub.damage = {name}
        refused("arrived damaged", hub, home, OVERRIDE, "--download")
        assert name not in held(home) and not list((cache(home) / "blobs").glob("*.incomplete"))
        assert run(None, home, OVERRIDE)[0] == 1
        hub.damage = set()
        assert run(hub, home, OVERRIDE, "--download")[0] == 0  # the next try is a clean one
    # so is a partial file that belongs to something else
    home = tmp_path / "partial"
    (cache(home) / "blobs").mkdir(parents=True)
    digest = hub.repos[OVERRIDE].digest(WEIGHTS)
    (cache(home) / "blobs" / f"{digest}.incomplete").write_bytes(b"junk" * 1000)
    refused("arrived damaged", hub, home, OVERRIDE, "--download")
    assert run(hub, home, OVERRIDE, "--download")[0] == 0


def test_concurrent_loads_download_once(hub, tmp_path):
    hub.seconds_per_mb = 0.3
    processes = [start(hub, tmp_path, OVERRIDE, "--download") for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    assert len(hub.asked_for(WEIGHTS)) == 1 and len(hub.asked_for("config.json")) == 1


def test_one_commit_for_all_files(hub, tmp_path):
    """main moves between two loads: what is fetched later belongs to what is here."""
    run(hub, tmp_path, OVERRIDE, "--download")
    (cache(tmp_path) / "snapshots" / COMMIT / WEIGHTS).unlink()
    old = hub.repos[OVERRIDE]
    hub.repos[OVERRIDE] = FakeRepo({**old.files, WEIGHTS: b"new" * 100_000}, commit="f" * 40)
    refused("no revision main (any more)", hub, tmp_path, OVERRIDE, "--download")
    hub.repos[OVERRIDE] = old
    assert run(hub, tmp_path, OVERRIDE, "--download")[0] == 0
    # every file is asked for by commit, never by branch
    assert all(f"/resolve/{COMMIT}/" in path for path, _ in hub.log if "/resolve/" in path)
    # a named revision is kept apart
    assert run(hub, tmp_path / "b", OVERRIDE, "--download", "--revision", COMMIT)[0] == 0
    assert not (cache(tmp_path / "b") / "refs").exists()
    assert run(None, tmp_path / "b", OVERRIDE, "--revision", COMMIT)[0] == 0


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.json", "transformer/../../evil.json", "C:\\evil.json",
                                  "..\\evil.safetensors"])
def test_unsafe_names_are_refused_before_anything_is_written(hub, tmp_path, name):
    hub.repos[OVERRIDE].listed[name] = {"size": 3, "blobId": "0" * 40}
    text = refused("unsafe names", hub, tmp_path, OVERRIDE, "--download")
    assert "nothing of it was written" in text and not cache(tmp_path).exists()


def test_unsafe_digests_indexes_and_kinds(hub, tmp_path):
    hub.repos[OVERRIDE].listed["config.json"] = {"blobId": "../../../evil"}
    refused("unsafe names or hashes", hub, tmp_path, OVERRIDE, "--download")
    hub.repos[OVERRIDE].listed = {}
    hub.repos[OVERRIDE].commit = "../../evil"
    refused("names no commit", hub, tmp_path, OVERRIDE, "--download")
    hub.repos[OVERRIDE].commit = COMMIT
    sharded = hub.repos["owner/sharded"]
    index, = (name for name in sharded.files if name.endswith("index.json"))
    for victim, message in (("../../x.safetensors", "outside its folder"), ("x.bin", "no .safetensors file"),
                            ("not-in-the-repo.safetensors", "shards are missing")):
        sharded.files[index] = json.dumps({"weight_map": {"a": victim}}).encode()
        refused(message, hub, tmp_path / victim.replace("/", ""), "owner/sharded", "--download")
    refused("only .safetensors", hub, tmp_path, OVERRIDE, "--download", "--weights-name", "config.json")
    refused("no revision", hub, tmp_path, OVERRIDE, "--download", "--revision", "../../x")
    refused("must not contain '..'", hub, tmp_path, "owner/../x", "--download")


def test_every_failure_has_its_message(hub, tmp_path):
    text = refused("there is no repo owner/nothing", hub, tmp_path, "owner/nothing", "--download")
    assert "run: hf download owner/nothing" in text
    refused("no revision v9", hub, tmp_path, OVERRIDE, "--download", "--revision", "v9")
    text = refused("broke off", None, tmp_path, OVERRIDE, "--download")
    assert "run: hf download owner/tiny-fp8" in text
    text = refused("HF_HUB_OFFLINE forbids", hub, tmp_path, OVERRIDE, "--download", HF_HUB_OFFLINE="1")
    assert "run: hf download owner/tiny-fp8" in text
    hub.repos[OVERRIDE].listed[WEIGHTS] = {"lfs": {"sha256": "0" * 64, "size": 10**17, "pointerSize": 1}, "size": 10**17}
    text = refused("100000.00 TB are needed", hub, tmp_path, OVERRIDE, "--download")
    assert "HF_HOME" in text and not hub.asked_for(WEIGHTS)
    hub.repos[OVERRIDE].listed = {}
    hub.repos[OVERRIDE].gated = True
    text = refused("is gated", hub, tmp_path, OVERRIDE, "--download")
    assert "huggingface.co/owner/tiny-fp8" in text and "run: hf download owner/tiny-fp8" in text


def test_token_and_cache_variables(hub, tmp_path):
    hub.repos[OVERRIDE].token = "hf_secret"
    refused("or it is private", hub, tmp_path / "a", OVERRIDE, "--download")
    elsewhere = tmp_path / "my cache 缓存"
    assert run(hub, tmp_path / "a", OVERRIDE, "--download", HF_TOKEN="hf_secret", HF_HUB_CACHE=str(elsewhere))[0] == 0
    assert (elsewhere / "models--owner--tiny-fp8" / "snapshots" / COMMIT / WEIGHTS).is_file()
    assert run(None, tmp_path / "a", OVERRIDE, HF_HUB_CACHE=str(elsewhere))[0] == 0


READ_ONLY = """
import os, sys
sys.argv = ["x"]
import importlib.util
spec = importlib.util.spec_from_file_location("cli", os.environ["PACK"] + "/__main__.py")
cli = importlib.util.module_from_spec(spec); spec.loader.exec_module(cli); cli.import_pack()
import filelock, huggingface_hub, huggingface_hub.file_download, huggingface_hub.utils
from quantized_transformers.loaders import locate
from quantized_transformers.loaders.families import families
from quantized_transformers.loaders.files import hub
families()
huggingface_hub.snapshot_download, huggingface_hub.HfApi, huggingface_hub.hf_hub_url
if os.getuid() == 0:  # rights do not bind root; everything is imported, so another user needs nothing of root's
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(locate.locate("owner/tiny-fp8").files)
try:
    locate.locate("owner/tiny", download=True)
except locate.CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="rights work otherwise on Windows")
def test_a_read_only_cache_loads_and_does_not_download(hub):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        home = Path(folder)
        run(hub, home, OVERRIDE, "--download")
        folders = [home, *(path for path in home.rglob("*") if path.is_dir() and not path.is_symlink())]
        for path in folders:
            path.chmod(0o555)
        try:
            done = subprocess.run([sys.executable, "-c", READ_ONLY], text=True, capture_output=True, check=False,
                                  env={**environment(hub, home), "PACK": str(PACK)})
        finally:
            for path in folders:
                path.chmod(0o755)
    assert done.returncode == 0 and WEIGHTS in done.stdout.splitlines()[0], done.stderr
    assert "cannot write into the Hugging Face cache" in done.stdout and "hf download owner/tiny" in done.stdout


def test_nothing_else_is_lost_when_a_cache_is_incomplete(hub, tmp_path):
    """A cache that another tool filled in part (hf download --include): completed, its files are not fetched again."""
    script = (f"from huggingface_hub import snapshot_download as s; s({BASE!r}, allow_patterns=['transformer/config.json'])")
    subprocess.run([sys.executable, "-c", script], env=environment(hub, tmp_path), check=True, capture_output=True)
    assert held(tmp_path, BASE) == ["transformer/config.json"]
    hub.log.clear()
    refused("no .safetensors file", None, tmp_path, BASE)
    code, text = run(hub, tmp_path, BASE, "--download")
    assert code == 0 and not hub.asked_for("transformer/config.json"), text


def test_one_svdquant_file_of_several(hub, tmp_path):
    """A Nunchaku repo has a file for each precision and rank: without a GPU's wish, int4 of rank 32 alone."""
    from support import svdquant_models

    data = svdquant_models.make_flux().write(tmp_path).read_bytes()
    names = [f"svdq-{precision}_r{rank}-flux.1-dev.safetensors" for precision in ("int4", "fp4") for rank in (32, 128)]
    hub.repos["owner/nunchaku-flux.1-dev"] = FakeRepo({name: data for name in names} | {"README.md": b"x"})
    code, text = run(hub, tmp_path, "owner/nunchaku-flux.1-dev", "--download")
    assert code == 0 and "svdquant-int4" in text, text
    assert held(tmp_path, "owner/nunchaku-flux.1-dev") == [names[0]]


def test_one_gguf_file_of_several(hub, tmp_path):
    """A repo of GGUF files is asked for one by name; of a model in parts, all parts come."""
    from support import gguf_files

    files = {}
    for name in ("flux-Q4_0.gguf", "flux-Q8_0.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf"):
        files[name] = gguf_files.write(tmp_path / name, {f"{name}.weight": torch.ones(4, 4)}).read_bytes()
    hub.repos["owner/flux-gguf"] = FakeRepo(files)
    refused("there are 3 GGUF files", hub, tmp_path, "owner/flux-gguf", "--download")
    for asked, there in (("flux-Q8_0.gguf", ["flux-Q8_0.gguf"]), ("big-00002-of-00002.gguf", ["big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "flux-Q8_0.gguf"])):
        refused("this is an unknown kind of model", hub, tmp_path, f"owner/flux-gguf/{asked}", "--download")
        assert held(tmp_path, "owner/flux-gguf") == there
