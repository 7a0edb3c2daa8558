"""Downloads from Hugging Face's Xet storage: hf_xet's own client against a store that it wrote into a folder."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch

from support.downloads import WEIGHTS, environment, repos, run
from support.hub import COMMIT, FakeRepo, Hub
from support.pack import PACK

pytestmark = pytest.mark.host

hf_xet = pytest.importorskip("hf_xet")
if not hasattr(hf_xet, "XetSession"):
    pytest.skip("this hf_xet has no sessions: its files come by HTTP", allow_module_level=True)

REPO = "owner/tiny-fp8"


@pytest.fixture()
def hub(tiny, tmp_path):
    _, repo, _ = repos(FakeRepo, tiny)
    with Hub({REPO: repo}) as server:
        server.store = f"local://{tmp_path / 'store'}"
        yield server


def stored(hub: Hub, data: bytes) -> str:
    """Put bytes into the store; their hash there."""
    with hf_xet.XetSession().new_upload_commit(endpoint=hub.store) as commit:
        return commit.start_upload_bytes(data).result().xet_info.hash


def weights(home) -> bytes:
    return (home / "hub" / "models--owner--tiny-fp8" / "snapshots" / COMMIT / WEIGHTS).read_bytes()


def test_whole_files(hub, tmp_path):
    data = hub.repos[REPO].files[WEIGHTS]
    hub.xet[WEIGHTS] = stored(hub, data)
    code, text = run(hub, tmp_path, REPO, "--download")
    assert code == 0 and weights(tmp_path) == data, text
    assert not hub.asked_for(WEIGHTS) and len(hub.asked_for("/xet-read-token")) == 1
    assert hub.asked_for("config.json") == [""]  # in git, not in Xet
    # with the switch of huggingface_hub nothing of it is asked
    hub.log.clear()
    assert run(hub, tmp_path / "b", REPO, "--download", HF_HUB_DISABLE_XET="1")[0] == 0
    assert hub.asked_for(WEIGHTS) == [""] and not [path for path, _ in hub.log if "xet" in path]


def test_a_stream_that_ends_early_is_continued_by_http(hub, tmp_path):
    data = hub.repos[REPO].files[WEIGHTS]
    part = len(data) // 3
    hub.xet[WEIGHTS] = stored(hub, data[:part])
    code, text = run(hub, tmp_path, REPO, "--download")
    assert code == 0 and hub.asked_for(WEIGHTS) == [f"bytes={part}-"] and weights(tmp_path) == data, text


@pytest.mark.parametrize("store", ["", "http://127.0.0.1:9", "nonsense"])
def test_what_xet_does_not_bring_comes_by_http(hub, tmp_path, store):
    data = hub.repos[REPO].files[WEIGHTS]
    hub.xet[WEIGHTS] = "0" * 64
    hub.store = store or hub.store  # one that has no such file, is not there, or is none
    code, text = run(hub, tmp_path, REPO, "--download")
    assert code == 0 and hub.asked_for(WEIGHTS) == [""] and weights(tmp_path) == data, text


def test_the_token_is_shown_to_the_hub_alone(hub, tmp_path):
    """An answer that names another host for Xet's own tokens, which are asked for with that of the user."""
    data = hub.repos[REPO].files[WEIGHTS]
    hub.xet[WEIGHTS] = stored(hub, data)
    hub.route = hub.url.replace("127.0.0.1", "localhost")
    code, text = run(hub, tmp_path, REPO, "--download", HF_TOKEN="hf_secret")
    assert code == 0 and weights(tmp_path) == data, text
    assert not hub.asked_for("/xet-read-token") and hub.asked_for(WEIGHTS) == [""]


def test_damaged_bytes_are_never_used(hub, tmp_path):
    data = hub.repos[REPO].files[WEIGHTS]
    hub.xet[WEIGHTS] = stored(hub, bytes([data[0] ^ 255]) + data[1:])
    code, text = run(hub, tmp_path, REPO, "--download")
    assert code == 1 and "arrived damaged" in text, text
    assert not list((tmp_path / "hub").rglob("*.incomplete")) and not list((tmp_path / "hub").rglob(WEIGHTS))


def test_what_has_begun_goes_on_by_http(hub, tmp_path):
    data, digest = hub.repos[REPO].files[WEIGHTS], hub.repos[REPO].digest(WEIGHTS)
    hub.xet[WEIGHTS] = stored(hub, data)
    partial = tmp_path / "hub" / "models--owner--tiny-fp8" / "blobs" / f"{digest}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(data[:200_000])
    assert run(hub, tmp_path, REPO, "--download")[0] == 0
    assert hub.asked_for(WEIGHTS) == ["bytes=200000-"] and not hub.asked_for("/xet-read-token")
    assert weights(tmp_path) == data


CANCELLED = """
import importlib.util, os, sys, threading
spec = importlib.util.spec_from_file_location("cli", os.environ["PACK"] + "/__main__.py")
cli = importlib.util.module_from_spec(spec); spec.loader.exec_module(cli); cli.import_pack()
from pathlib import Path
from quantized_transformers.loaders.files.hub_file import HashedFile, RemoteFile
from quantized_transformers.loaders.files.hubs import huggingface

_, commit, size, digest, target, after = sys.argv
file, path, calls = RemoteFile(int(size), digest), Path(target), []

def step(amount):
    if bool(amount) == (after == "between blocks"):
        calls.append(amount)
    if len(calls) == 2:
        raise InterruptedError("cancelled")

with open(path, "ab") as raw:
    try:
        huggingface.transfer("owner/tiny-fp8", "big.safetensors", commit, file, HashedFile(raw, path, file, step))
    except InterruptedError as error:
        print(error)
for thread in threading.enumerate():
    if thread.name == "qt-xet":
        thread.join(15)
        print("ended" if not thread.is_alive() else "still there")
"""


@pytest.mark.parametrize("when", ["between blocks", "while it waits"])
def test_cancel_is_heard(hub, tmp_path, when):
    """Of a store that has several blocks, and of one that never answers. The stream's thread ends."""
    data = torch.randint(256, (70 << 20,), dtype=torch.uint8).numpy().tobytes()  # two blocks of the store
    hub.repos[REPO].files["big.safetensors"] = data
    hub.xet["big.safetensors"] = stored(hub, data)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if when == "while it waits":
            hub.store = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = subprocess.run([sys.executable, "-c", CANCELLED, COMMIT, str(len(data)),
                               hub.repos[REPO].digest("big.safetensors"), str(tmp_path / "part"), when],
                              text=True, capture_output=True, check=False,
                              env={**environment(hub, tmp_path), "PACK": str(PACK)})
    assert done.returncode == 0 and done.stdout.split() in (["cancelled"], ["cancelled", "ended"]), done.stdout + done.stderr
    arrived = (tmp_path / "part").stat().st_size
    assert not hub.asked_for("big.safetensors") and hub.asked_for("/xet-read-token")
    assert 0 < arrived < len(data) if when == "between blocks" else arrived == 0
