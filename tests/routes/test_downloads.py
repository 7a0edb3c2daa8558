"""Downloads as a user of the real server sees them: progress on the node, Cancel, consent, and folders of all kinds."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from support.hub import COMMIT, FakeRepo, Hub
from support.pack import PACK
from support.server import Server, error_of
from support.workflow import apply_override, load_base, text_to_image

pytestmark = pytest.mark.host

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def hub(tiny):
    import torch
    from safetensors.torch import save

    override = FakeRepo.of(tiny.fp8)
    name, = (name for name in override.files if name.endswith(".safetensors"))
    override.files[WEIGHTS] = override.files.pop(name)
    big = FakeRepo({"config.json": b"{}", WEIGHTS: save({"x": torch.randn(12_000_000)})})
    with Hub({"owner/tiny": FakeRepo.of(tiny.pipeline), "owner/tiny-fp8": override, "owner/big": big}) as server:
        yield server


@pytest.fixture(scope="module")
def server(hub, tmp_path_factory):
    """A server whose extra_model_paths.yaml names a folder with a space and other letters, and a link to another."""
    base = tmp_path_factory.mktemp("server")
    real = base / "real folder 模型"
    real.mkdir()
    (base / "linked").symlink_to(real, target_is_directory=True)
    (base / "extra.yaml").write_text(f"qt:\n  base_path: {base.as_posix()}\n  diffusers_components: linked\n",
                                     encoding="utf-8")
    env = {"HF_HOME": str(base / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with Server(base, "--extra-model-paths-config", str(base / "extra.yaml"), env=env) as running:
        yield running


def watch(server: Server, client: str, until: threading.Event, seen: list[dict]) -> threading.Thread:
    """Collect the websocket's progress messages of one client."""
    import aiohttp

    async def listen() -> None:
        async with aiohttp.ClientSession() as session, \
                session.ws_connect(f"http://127.0.0.1:{server.port}/ws?clientId={client}") as socket:
            ready.set()
            while not until.is_set():
                try:
                    message = await socket.receive(timeout=0.2)
                except asyncio.TimeoutError:
                    continue
                if message.type == aiohttp.WSMsgType.TEXT:
                    seen.append(json.loads(message.data))

    ready = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(listen()), daemon=True)
    thread.start()
    assert ready.wait(20)
    return thread


def test_consent_then_a_picture(server, hub):
    workflow = {"base": load_base("owner/tiny", "defer to override"), "q": apply_override(["base", 0], "owner/tiny-fp8"),
                **text_to_image(["q", 0], "", steps=1, size=64)}
    status, answer = server.post("/prompt", {"prompt": workflow})
    errors = [error for node in answer["node_errors"].values() for error in node["errors"]]
    assert status == 400 and any("hf download owner/tiny" in error["details"] for error in errors), answer
    assert not hub.log
    for node in ("base", "q"):
        workflow[node]["inputs"]["download_missing"] = True
    history = server.run(workflow)
    assert history["status"]["status_str"] == "success", error_of(history)
    fetched = {path for path, _ in hub.log if "/resolve/" in path}
    assert {path.split(COMMIT + "/")[1] for path in fetched if "/tiny/" in path} == {"model_index.json",
                                                                                     "transformer/config.json"}
    asked = len(hub.log)
    workflow["sample"]["inputs"]["seed"] += 1
    history = server.run(workflow)
    assert history["status"]["status_str"] == "success" and len(hub.log) == asked


def test_progress_and_cancel(server, hub):
    """Bytes move the node's bar; Cancel stops within the file; nothing half shows; the next try goes on."""
    hub.seconds_per_mb = 0.15
    stop, seen = threading.Event(), []
    thread = watch(server, "tester", stop, seen)
    workflow = {"big": load_base("owner/big", download_missing=True),
                "show": {"class_type": "PreviewAny", "inputs": {"source": ["big", 1]}}}
    status, answer = server.post("/prompt", {"prompt": workflow, "client_id": "tester"})
    assert status == 200, answer

    def moved() -> list[dict]:
        return [m["data"] for m in seen if m["type"] == "progress" and m["data"]["value"] >= 10 << 20]

    deadline = time.time() + 60
    while not moved():
        assert time.time() < deadline, seen
        time.sleep(0.05)
    assert moved()[0]["node"] == "big" and moved()[0]["max"] == 2 + len(hub.repos["owner/big"].files[WEIGHTS])
    server.post("/interrupt", {})
    while answer["prompt_id"] not in (history := server.get(f"/history/{answer['prompt_id']}")):
        assert time.time() < deadline
        time.sleep(0.05)
    stop.set()
    thread.join()
    kinds = [kind for kind, _ in history[answer["prompt_id"]]["status"]["messages"]]
    assert "execution_interrupted" in kinds and "execution_error" not in kinds
    snapshot = server.base / "hf" / "hub" / "models--owner--big" / "snapshots" / COMMIT
    assert [path.name for path in snapshot.iterdir()] == ["config.json"]
    hub.seconds_per_mb = 0.0
    hub.log.clear()
    server.run(workflow)  # arrives whole; that it holds no transformer is its own error
    assert hub.asked_for(WEIGHTS)[0].startswith("bytes=") and (snapshot / WEIGHTS).is_file()


def test_extra_paths_links_and_letters(server, hub, tiny):
    """The own folder key from extra_model_paths.yaml, through a link to a folder with a space and other letters."""
    folder = server.base / "real folder 模型" / "somebody" / "mein modell"
    shutil.copytree(tiny.pipeline, folder)
    shutil.copytree(tiny.fp8, server.base / "models" / "diffusers_components" / "fp8")
    choices = server.get("/object_info/QT_LoadBaseModel")["QT_LoadBaseModel"]["input"]["optional"]["base_model"]
    options = choices[1]["options"] if choices[0] == "COMBO" else choices[0]
    assert {"somebody/mein modell", "fp8"} <= set(options)
    hub.log.clear()
    workflow = {"base": {"class_type": "QT_LoadBaseModel", "inputs": {"base_model": "somebody/mein modell",
                                                                      "component": "transformer", "weights": "load"}},
                "q": apply_override(["base", 0], "fp8", download_missing=True),
                **text_to_image(["q", 0], "", steps=1, size=64)}
    history = server.run(workflow)
    assert history["status"]["status_str"] == "success" and not hub.log, error_of(history)


# Python's audit hooks see every socket, whatever library opens it, and cannot be removed.
HOOK = """
import os, sys
def probes():  # urllib3, which older versions of huggingface_hub ask with, tries for IPv6 when it is imported
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "_has_ipv6":
        frame = frame.f_back
    return frame is not None

def hook(event, arguments):
    if event.startswith("socket.") and not probes():
        os.write(2, f"a socket: {event} {arguments}\\n".encode())
        os._exit(9)

sys.addaudithook(hook)
"""
NO_SOCKETS = """
import os, sys
sys.argv = ["x"]; sys.path.insert(0, os.environ["TESTS"])
from support.pack import start_comfy; start_comfy()
import asyncio
import huggingface_hub.file_download  # with its HTTP library, which may try for IPv6 when it is imported
from quantized_transformers.nodes import node_classes
from support.workflow import queued
nodes = {node.__name__: node for node in node_classes()}
os.environ["PYTHONPATH"] = os.environ["HOOKED"]  # of the process that reads files for the checks, too
exec(open(os.environ["HOOKED"] + "/sitecustomize.py").read())
if os.environ.get("PROVE"):
    __import__("urllib.request").request.urlopen("http://127.0.0.1:9")
pipeline, fp8 = (os.environ["PIPELINE"], os.environ["FP8"])
base = nodes["QT_LoadBaseModel"].execute(base_model=pipeline).args[0]
nodes["QT_LoadBaseModel"].execute(base_model=pipeline, weights="defer to override")
nodes["QT_ApplyTransformerOverride"].execute(model=base, override=fp8)
nodes["QT_InspectCheckpoint"].execute(checkpoint=fp8)
FIRST = {"QT_ApplyTransformerOverride": "override", "QT_InspectCheckpoint": "checkpoint", "QT_ModelSlimLoader": "folder",
         "QT_NunchakuSVDQLoader": "weights", "QT_LoadBaseModel": "base_model", "QT_LoadBaseTextEncoder": "base_model",
         "QT_LoadBaseVAE": "base_model"}
for node in nodes.values():
    node.define_schema()
nodes["QT_AscendMXFP8Quantize"].execute(model=base)
for name, first in FIRST.items():
    node = nodes[name]
    for reference in ("owner/never-heard-of", "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.2-dev-NVFP4"):
        inputs = {"model": base} if "Override" in name else {}
        node.fingerprint_inputs(**{first: reference})
        assert queued(node, reference=reference).endswith("code: missing")
        try:
            node.execute(**inputs, **{first: reference})
        except ValueError as error:
            assert "hf download" in str(error), error
        else:
            raise AssertionError(name)
repack = nodes["QT_RepackModelSlimWan"]
try:
    repack.execute(source="owner/never-heard-of", base="Wan-AI/Wan2.2-T2V-A14B-Diffusers", output=os.environ["OUTPUT"])
except ValueError as error:
    assert "hf download" in str(error), error
BUILDERS = {"QT_BuildFP8Transformer": {"backbone": "", "model_type": "auto"}, "QT_BuildNVFP4Transformer": {"pattern_preset": "none"}}
for name, inputs in BUILDERS.items():
    try:
        nodes[name].execute(modelopt_export="", base="black-forest-labs/FLUX.1-dev", output=os.environ["OUTPUT"], **inputs)
    except ValueError as error:
        assert "black-forest-labs/FLUX.1-dev" in str(error), error
    else:
        raise AssertionError(name)
try:
    nodes["QT_BuildGGUF"].execute(base="black-forest-labs/FLUX.1-dev", output=os.environ["OUTPUT"])
except ValueError as error:
    assert "black-forest-labs/FLUX.1-dev" in str(error), error
else:
    raise AssertionError("QT_BuildGGUF")
# a server is asked when something is drawn
served = nodes["QT_ServerModel"].execute(base_model="black-forest-labs/FLUX.1-dev", override="owner/never-heard-of").args[0]
nodes["QT_ServerLoRA"].execute(server_model=served, lora="owner/never-heard-of")
# these take MODELs, and one of them a file of a LoRA, only; or are asked for what a server draws
assert {*FIRST, *BUILDERS, "QT_BuildGGUF", "QT_AscendMXFP8Quantize", "QT_RepackModelSlimWan", "QT_SaveQuantizedModel",
        "QT_CompareModels", "QT_LoadLoRA", "QT_KeepDecoded", "QT_ServerModel", "QT_ServerLoRA", "QT_ServerImage",
        "QT_ServerVideo"} == set(nodes)
print("no socket")
"""


@pytest.mark.parametrize("prove", [False, True])
def test_without_consent_no_socket_is_opened(tiny, tmp_path, prove):
    """All nodes, on what is here and on what is not. `prove`: the same hook does notice a socket."""
    env = {**os.environ, "TESTS": str(PACK / "tests"), "PIPELINE": str(tiny.pipeline), "FP8": str(tiny.fp8),
           "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "PROVE": "1" if prove else "", "OUTPUT": str(tmp_path / "out"),
           "HOOKED": str(tmp_path)}
    (tmp_path / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", NO_SOCKETS], text=True, capture_output=True, env=env, check=False)
    if prove:
        assert done.returncode == 9 and "a socket" in done.stderr
    else:
        assert done.returncode == 0 and "no socket" in done.stdout, done.stderr[-3000:]
