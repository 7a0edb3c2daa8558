"""The web routes of the real server that change something: who may, downloads, and migrated workflows."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest
import torch
from safetensors.torch import save, save_file

from support import svdquant_models
from support.hub import COMMIT, FakeRepo, Hub
from support.modelscope_hub import HEAD, ScopeHub, ScopeRepo
from support.routes import ask, describe
from support.server import Server, error_of, outputs
from support.workflow import text_to_image

pytestmark = pytest.mark.host

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def svdq():
    return svdquant_models.make_flux()


@pytest.fixture(scope="module")
def hub(tiny, svdq, tmp_path_factory):
    folder = tmp_path_factory.mktemp("svdq")
    svdq.write(folder)
    big = FakeRepo({"config.json": b"{}", WEIGHTS: save({"x": torch.randn(12_000_000)})})
    with Hub({"owner/tiny": FakeRepo.of(tiny.pipeline), "owner/other": FakeRepo.of(tiny.pipeline),
              "owner/fp8": FakeRepo.of(tiny.fp8), "owner/both": FakeRepo.of(tiny.sharded), "owner/svdq": FakeRepo.of(folder),
              "nunchaku-tech/nunchaku-flux.1-dev": FakeRepo.of(folder), "owner/gated": FakeRepo.of(tiny.fp8, gated="manual"),
              "owner/big": big}) as running:
        yield running


@pytest.fixture(scope="module")
def scope(tiny):
    big = ScopeRepo({"config.json": b"{}", WEIGHTS: save({"x": torch.randn(12_000_000)})})
    with ScopeHub({"owner/there": ScopeRepo.of(tiny.pipeline), "owner/both": ScopeRepo.of(tiny.sharded),
                   "owner/big": big, "owner/closed": ScopeRepo.of(tiny.fp8, token="secret")}) as running:
        yield running


@pytest.fixture(scope="module")
def server(tiny, svdq, hub, scope, tmp_path_factory):
    base = tmp_path_factory.mktemp("routes")
    for folder in ("diffusion_models", "loras"):
        (base / "models" / folder).mkdir(parents=True)
    shutil.copytree(tiny.pipeline, base / "models" / "diffusers" / "tiny-flux")
    svdq.write(base / "models" / "diffusion_models")
    env = {"HF_HOME": str(base / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
           "MODELSCOPE_ENDPOINT": scope.url, "MODELSCOPE_CACHE": str(base / "modelscope")}
    with Server(base, env=env) as running:
        yield running
        assert "Traceback" not in running.text()


def test_only_our_own_page_writes(server):
    own = f"http://127.0.0.1:{server.port}"
    body = json.dumps({"items": [{"reference": "owner/none", "node": "QT_LoadBaseModel"}]})
    is_json = {"Content-Type": "application/json"}
    for headers, status in (({"Content-Type": "text/plain"}, 415), ({}, 415),
                            ({**is_json, "Origin": own}, 202), ({**is_json, "Sec-Fetch-Site": "same-site"}, 403)):
        assert ask(server, "POST", "download", data=body, headers=headers)[0] == status, headers
    # a page of another port or host is stopped by the host's middleware already, or by ours
    for origin in ("http://evil.example", "http://127.0.0.1:1", "null"):
        for method, path, data in (("POST", "download", body), ("DELETE", "download?id=1", None),
                                   ("POST", "migrate", "{}"), ("GET", "catalog", None)):
            async def send(method=method, path=path, data=data, origin=origin) -> int:
                async with aiohttp.ClientSession() as session, session.request(
                        method, f"{own}/quantized_transformers/{path}", data=data,
                        headers={**is_json, "Origin": origin}) as response:
                    return response.status

            assert asyncio.run(send()) == 403, (origin, method)
    for data, status in ((b"[1]", 400), (b"{", 400), (b"[" * 60_000, 400), (b"{}" + b" " * 70_000, 413),
                         (b'{}', 400), (b'{"items": []}', 400), (b'{"items": [3]}', 400),
                         (b'{"items": [{"reference": "owner/tiny"}], "target": "/etc"}', 400),
                         (b'{"items": [{"reference": "owner/tiny"}], "licences": [3]}', 400),
                         (b'{"items": [{"reference": "owner/tiny"}], "hub": "github"}', 400),
                         (b'{"items": [{"reference": "modelscope:/etc/passwd"}]}', 403),
                         (b'{"items": [{"reference": 3}]}', 400), (b'{"items": [{"reference": "/etc/passwd"}]}', 403),
                         (b'{"items": [{"reference": "tiny-flux"}]}', 400),
                         (b'{"items": [{"reference": "owner/tiny"}, {"reference": "owner/../x"}]}', 403)):
        assert ask(server, "POST", "download", data=data, headers=is_json)[0] == status, data[:40]
    assert ask(server, "POST", "migrate", data=b" " * 2_100_000, headers=is_json)[0] == 413


def test_only_under_its_own_name(server):
    """DNS rebinding: a page whose name leads here is of the origin that it asks. Reading is the host's to guard."""
    def status(name: str, method: str = "POST", path: str = "migrate") -> int:
        headers = {"Host": f"{name}:{server.port}", "Origin": f"http://{name}:{server.port}"}
        return ask(server, method, path, headers=headers, **({"json": {"1": {"class_type": "a", "inputs": {}}}} if method == "POST" else {}))[0]

    for path in ("migrate", "download", "download/cancel", "language"):
        assert status("evil.example", path=path) == 403 == status("127.0.0.1.evil.example", path=path)
    assert status("evil.example", "DELETE", "download?id=1") == 403
    assert status("127.0.0.1") == status("localhost") == status("[::1]") == 200
    assert status("127.0.0.1", "DELETE", "download?id=1") == 404
    assert status("evil.example", "GET", "page") == 200


WRONG = (b"null", b"true", b"-1", b"1e400", b"-1e400", b"NaN", b"7.5", b"1e308", b"9" * 5000, b'""', b'"\\ud800"', b'"\\u0000text"', b"[]",
         b"{}", b'{"\\u0000text": 1}', b"[[[[]]]]", b'"' + b"x" * 5000 + b'"', b"[" * 500 + b"]" * 500)


def test_every_body_and_query_of_a_wrong_type(server):
    """Every key of every body, and every parameter of every query: an answer in JSON, a 4xx where it is refused."""
    bodies = {"download": {"items": [{"reference": "owner/none", "node": "QT_LoadBaseModel", "rank": 0, "layers": "1", "base": "a/b"}],
                           "target": "cache", "hub": "", "licences": [], "plan": False},
              "download/cancel": {"id": "1"}, "language": {"client": "1"},
              "migrate": {"nodes": [{"id": 1, "type": "NunchakuFluxDiTLoader", "pos": [0, 0], "widgets_values": [], "inputs": [],
                                     "outputs": []}], "links": []}}
    sent = []
    for path, body in bodies.items():
        for holder in (body, *(body.get("items") or body.get("nodes") or ())):
            for key in list(holder):
                kept, holder[key] = holder[key], "@"
                sent += [(path, json.dumps(body).encode().replace(b'"@"', value)) for value in WRONG]
                holder[key] = kept
        sent += [(path, value) for value in WRONG]
    queries = [f"{path}?{name}={value}" for path, names in (
        ("describe", ("reference", "rank", "layers", "node", "component", "weights", "base", "override", "revision")),
        ("serve", ("base", "near", "override", "kind", "weights_name", "revision")), ("variants", ("reference",)),
        ("download", ("id",))) for name in names
        for value in ("1e400", "NaN", "-1", "%00", "%ff", "%ED%A0%80", "%5B%5D", "x" * 300, "%F0%9F%98%80", "", "&", "%0A", "%2e%2e%2f")]

    async def everything() -> list[tuple[object, int, object]]:
        from yarl import URL

        async with aiohttp.ClientSession() as session:
            at, found = f"http://127.0.0.1:{server.port}/quantized_transformers/", []
            for path, body in sent:
                async with session.post(at + path, data=body, headers={"Content-Type": "application/json"}) as response:
                    found.append(((path, body[:200]), response.status, await response.json()))
            for query in queries:
                async with session.get(URL(at + query, encoded=True)) as response:
                    found.append((query, response.status, await response.json()))
            return found

    statuses = set()
    for asked, status, answer in asyncio.run(everything()):
        statuses.add(status)
        assert status in (200, 202, 400, 403, 404, 409, 413), (asked, status, answer)
        if status >= 400:
            assert set(answer) == {"error", "where", "todo"} and answer["error"] and "\n" not in answer["error"], asked
            assert "this version" not in answer["error"], (asked, answer)
        bad = isinstance(asked, tuple) and any(number in asked[1] for number in (b"1e400", b"NaN", b"9" * 50))
        assert not bad or status == 400, (asked, status)
        assert not (isinstance(asked, str) and "rank=" in asked and "rank=&" not in asked and not asked.endswith("rank=")) or status == 400, asked
    assert {200, 400, 404} <= statuses
    assert describe(server, "tiny-flux", node="QT_LoadBaseModel")["architecture"] == "FLUX.1"


def download(server: Server, *items: dict, **more) -> dict:
    """Start a download of items and wait for its end."""
    status, job = ask(server, "POST", "download", json={"items": items, **more})
    assert status == 202, job
    return wait(server, job["id"])


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file that a walk of it sees; what begins with a dot is none of a model's."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)}


def test_everything_that_a_workflow_lacks(server, hub):
    """One plan for several nodes: each file once, what is here left out, nothing written; then one download."""
    base = {"reference": "owner/tiny", "node": "QT_LoadBaseModel"}
    items = [base, {**base, "weights": "defer to override"}, {"reference": "tiny-flux", "node": "QT_LoadBaseModel"},
             {"reference": "owner/nothing", "node": "QT_LoadBaseModel"},
             {"reference": "owner/fp8", "node": "QT_ApplyTransformerOverride"}]
    cache = server.base / "hf" / "hub"
    status, found = ask(server, "POST", "download", json={"items": items, "plan": True})
    tiny, local, nothing, fp8 = sorted(found["rows"], key=lambda row: row["items"])
    files = hub.repos["owner/tiny"].files
    assert status == 200 and (tiny["items"], tiny["commit"], tiny["error"]) == ([0, 1], COMMIT, None)
    assert tiny["files"] == {name: len(data) for name, data in files.items()}
    assert not tiny["gated"] and tiny["licence"] is None and found["free"] > 0
    assert tiny["folder"] == str(cache / "models--owner--tiny")
    assert (local["items"], nothing["items"], fp8["items"]) == ([2], [3], [4])
    assert "only a repo id" in local["error"]["error"] and "no repo owner/nothing" in nothing["error"]["error"]
    assert found["bytes"] == tiny["bytes"] + fp8["bytes"] == sum(map(len, files.values())) + sum(
        map(len, hub.repos["owner/fp8"].files.values()))
    assert not (cache / "models--owner--tiny").exists() and not (cache / "models--owner--fp8").exists()
    state = download(server, items[3], base, items[4])
    assert state["state"] == "failed" and len(state["errors"]) == 1 and state["done"] == state["total"] == found["bytes"]
    assert describe(server, "owner/tiny", node="QT_LoadBaseModel")["architecture"] == "FLUX.1"
    assert ask(server, "POST", "download", json={"items": [base, items[4]], "plan": True})[1]["rows"] == []


def test_into_a_model_folder(server, hub, svdq):
    """owner/name in the folder of the kind, each file whole or not there, found by the same reference and by huggingface_hub;
    another version that lies there is left alone."""
    base = {"reference": "owner/other", "node": "QT_LoadBaseModel"}
    single = {"reference": "owner/svdq", "node": "QT_NunchakuSVDQLoader"}
    _, found = ask(server, "POST", "download", json={"items": [base, single], "target": "models", "plan": True})
    folders = [server.base / "models" / "diffusers_components" / "owner" / "other",
               server.base / "models" / "diffusion_models" / "owner" / "svdq"]
    assert [row["folder"] for row in found["rows"]] == list(map(str, folders)) and not any(map(Path.exists, folders))
    state = download(server, base, single, target="models")
    assert state["state"] == "done" and state["total"] == found["bytes"], state
    assert [files_below(folder) for folder in folders] == [hub.repos[name].files for name in ("owner/other", "owner/svdq")]
    assert not (server.base / "hf" / "hub" / "models--owner--other").exists()
    assert describe(server, "owner/svdq", node="QT_NunchakuSVDQLoader")["family"].startswith("SVDQuant")
    listed = server.get("/object_info/UNETLoader")["UNETLoader"]["input"]["required"]["unet_name"]
    assert f"owner/svdq/{svdq.file}" in str(listed)
    # huggingface_hub takes the files for its own: it asks for none again
    before = len([path for path, _ in hub.log if "/resolve/" in path])
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(server.base / "hf2")}
    probe = "import sys; from huggingface_hub import snapshot_download as s; s('owner/other', local_dir=sys.argv[1])"
    subprocess.run([sys.executable, "-c", probe, str(folders[0])], env=env, check=True, capture_output=True)
    assert len([path for path, _ in hub.log if "/resolve/" in path]) == before
    # a file of another version is neither replaced nor mixed with the rest
    name, = (name for name in hub.repos["owner/other"].files if name.endswith("transformer/config.json"))
    weights = next(path for path in folders[0].rglob("*.safetensors"))
    weights.unlink()
    (folders[0] / name).write_bytes(b"{}")
    state = download(server, base, target="models")
    assert state["state"] == "failed" and "another version of transformer/config.json" in state["errors"][0]["error"]
    assert not weights.exists() and (folders[0] / name).read_bytes() == b"{}"


def wait(server: Server, job: str, until: tuple[str, ...] = ("done", "failed", "cancelled")) -> dict:
    deadline = time.time() + 20
    while time.time() < deadline:
        status, state = ask(server, "GET", f"download?id={job}")
        assert status == 200
        if state["state"] in until and (state["state"] != "running" or state["done"] > 1e6):
            return state
        time.sleep(0.02)
    raise TimeoutError(state)


def test_gated(server, hub):
    item = {"reference": "owner/gated", "node": "QT_ApplyTransformerOverride"}
    status, found = ask(server, "POST", "download", json={"items": [item], "plan": True})
    row, = found["rows"]
    assert status == 200 and row["gated"] and row["licence"] == "https://huggingface.co/owner/gated"
    for accepted in (False, True):  # accepting here does not help without access there
        before = sum("/resolve/" in path for path, _ in hub.log)
        state = download(server, item, licences=["owner/gated"] if accepted else ["owner/other"])
        error, = state["errors"]
        assert state["state"] == "failed" and "gated" in error["error"]
        assert error["where"] == "https://huggingface.co/owner/gated"
        assert accepted == (sum("/resolve/" in path for path, _ in hub.log) > before)  # no file was asked for before


@pytest.mark.parametrize("method", ["DELETE", "POST"])
def test_cancel_and_continue(server, hub, method):
    cache = server.base / "hf" / "hub" / "models--owner--big"
    hub.seconds_per_mb = 0.05
    try:
        big = {"reference": "owner/big", "node": "QT_LoadBaseModel"}
        _, job = ask(server, "POST", "download", json={"items": [big]})
        _, again = ask(server, "POST", "download", json={"items": [big]})
        assert again == job  # one download of one thing
        running = wait(server, job["id"], ("running",))
        for node, base, known in (("QT_LoadBaseModel", "", job["id"]), ("QT_LoadBaseModel", "&base=owner/hub", job["id"]),
                                  ("QT_ApplyTransformerOverride", "", None)):
            assert ask(server, "GET", f"describe?reference=owner/big&node={node}{base}")[1]["downloading"] == known
        assert running["file"] and running["total"] >= running["done"]
        status, _ = ask(server, "DELETE", f"download?id={job['id']}") if method == "DELETE" \
            else ask(server, "POST", "download/cancel", json={"id": job["id"]})
        assert status == 200 and wait(server, job["id"])["state"] == "cancelled"
    finally:
        hub.seconds_per_mb = 0.0
    assert [path for path in cache.glob("blobs/*.incomplete") if path.stat().st_size]
    if method == "POST":
        assert download(server, big)["state"] == "done"
        assert any(hub.asked_for(WEIGHTS))  # with a range: from where it stopped


def test_modelscope(server, hub, scope):
    """The hub of a reference, of the request, or the one that is known to have it; into its cache or a model folder."""
    both = {"reference": "owner/both", "node": "QT_ApplyTransformerOverride"}
    there = {"reference": "modelscope:owner/there", "node": "QT_LoadBaseModel"}
    only = {"reference": "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8", "node": "QT_ModelSlimLoader"}
    _, found = ask(server, "POST", "download", json={"items": [there, only], "plan": True, "hub": "huggingface"})
    row, missing = sorted(found["rows"], key=lambda row: row["items"])
    files = scope.repos["owner/there"].files
    assert (row["hub"], row["repo"], row["commit"], row["gated"]) == ("modelscope", "owner/there", HEAD, False)
    assert row["files"] == {name: len(data) for name, data in files.items()}
    assert row["folder"] == str(server.base / "modelscope" / "models" / "owner--there")
    assert missing["error"]["where"] == f"{only['reference']} at {scope.url}"
    assert not (server.base / "modelscope").exists()
    card = describe(server, "modelscope:owner/there", node="QT_LoadBaseModel")["download"]
    assert (card["repo"], card["hubs"]) == ("owner/there", ["modelscope"]) and "modelscope download" in card["command"]
    assert describe(server, "owner/unknown", node="QT_LoadBaseModel")["download"]["hubs"] == []
    state = download(server, there)
    assert state["state"] == "done" and state["total"] == found["bytes"], state
    assert describe(server, "modelscope:owner/there", node="QT_LoadBaseModel")["on_disk"]
    assert describe(server, "owner/there", node="QT_LoadBaseModel")["architecture"] == "FLUX.1"
    assert ask(server, "GET", "describe?reference=modelscope:../x")[0] == 403
    # owner/both is on both; into a model folder
    asked = len(hub.log)
    state = download(server, both, target="models", hub="modelscope")
    folder = server.base / "models" / "diffusers_components" / "owner" / "both"
    assert state["state"] == "done" and len(hub.log) == asked
    assert files_below(folder) == scope.repos["owner/both"].files
    assert describe(server, "modelscope:owner/both")["family"] == "ModelOpt FP8"
    # the rest of it is taken from another hub only if that has the same bytes
    lost, weights, *_ = sorted(name for name in hub.repos["owner/both"].files if name.endswith(".safetensors"))
    (folder / lost).unlink()
    old = hub.repos["owner/both"].files[weights]
    hub.repos["owner/both"].files[weights] = old[:-1] + bytes([old[-1] ^ 1])
    state = download(server, both, target="models", hub="huggingface")
    assert state["state"] == "failed" and f"another version of {weights}" in state["errors"][0]["error"]
    hub.repos["owner/both"].files[weights] = old
    assert download(server, both, target="models", hub="huggingface")["state"] == "done"


def test_modelscope_without_access_and_cancelled(server, scope):
    closed = {"reference": "modelscope:owner/closed", "node": "QT_ApplyTransformerOverride"}
    _, found = ask(server, "POST", "download", json={"items": [closed], "plan": True})
    error, = (row["error"] for row in found["rows"])
    assert "gives no access" in error["error"] and error["where"] == f"{scope.url}/models/owner/closed"
    big = {"reference": "modelscope:owner/big", "node": "QT_LoadBaseModel"}
    scope.seconds_per_mb = 0.05
    try:
        _, job = ask(server, "POST", "download", json={"items": [big]})
        wait(server, job["id"], ("running",))
        ask(server, "POST", "download/cancel", json={"id": job["id"]})
        assert wait(server, job["id"])["state"] == "cancelled"
    finally:
        scope.seconds_per_mb = 0.0
    folder = server.base / "modelscope" / "models" / "owner--big"
    partial, = folder.rglob("*.incomplete")
    arrived = partial.stat().st_size
    assert 0 < arrived < len(scope.repos["owner/big"].files[WEIGHTS])
    assert download(server, big)["state"] == "done" and scope.asked_for(WEIGHTS)[-1] == f"bytes={arrived}-"
    assert (folder / "snapshots" / "master" / WEIGHTS).read_bytes() == scope.repos["owner/big"].files[WEIGHTS]


def test_migration_knows_the_nodes_it_makes(server):
    """Widgets by position, sockets and outputs of every target are those of the real nodes."""
    from quantized_transformers.makers.migrate.rules import TARGETS

    for kind, target in TARGETS.items():
        info = server.get(f"/object_info/{kind}")[kind]
        inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
        names = [*info["input_order"]["required"], *info["input_order"].get("optional", [])]
        sockets = [(name, inputs[name][0]) for name in names if inputs[name][0] in ("MODEL", "CLIP", "VAE")]
        widgets = [name for name in names if name not in dict(sockets)]
        assert widgets == list(target.widgets), kind
        assert sockets == list(target.sockets), kind
        assert list(zip(info["output_name"], info["output"], strict=True)) == list(target.outputs), kind
        for name, default in zip(target.widgets, target.defaults, strict=True):
            options = inputs[name][1] if len(inputs[name]) > 1 else {}
            choices = inputs[name][0] if isinstance(inputs[name][0], list) else options.get("options")
            assert default == "" or default in (choices or [options.get("default")]), (kind, name)


def test_workers_know_the_nodes_that_name_files(server):
    """Widgets by position, and of which folder a stock loader's lists are."""
    from quantized_transformers.engines.worker.loaders import SERVER, STOCK, WIDGETS

    folders = {folder for stock in STOCK.values() for folder in stock.files.values()}
    for folder in folders:
        (server.base / "models" / folder).mkdir(exist_ok=True)
        (server.base / "models" / folder / f"of_{folder}.safetensors").write_bytes(b"")
    infos = server.get("/object_info")
    for folder in folders:
        (server.base / "models" / folder / f"of_{folder}.safetensors").unlink()
    of_servers = {name for name in infos if name.startswith("QT_Server")}
    assert of_servers - WIDGETS.keys() == {"QT_ServerLoRA", "QT_ServerImage", "QT_ServerVideo"}, "which name nothing of this machine"
    assert SERVER in of_servers
    for kind, widgets in WIDGETS.items():
        info = infos[kind]
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        names = [name for order in ("required", "optional") for name in info["input_order"].get(order, [])]
        shown = [name for name in names if inputs[name][0] not in ("MODEL", "CLIP", "VAE")]
        assert shown[:len(widgets)] == list(widgets), kind
        for name, folder in (STOCK[kind].files if kind in STOCK else {}).items():
            listed = inputs[name][0] if isinstance(inputs[name][0], list) else inputs[name][1]["options"]
            assert [one for one in listed if one.startswith("of_")] == [f"of_{folder}.safetensors"], (kind, name)


def test_migrated_workflow_runs(server, svdq, hub):
    """A workflow of nunchaku's nodes, migrated over HTTP: its file is offered by its published name; then a picture."""
    save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.randn(8, 256),
               "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.randn(256, 8)},
              str(server.base / "models" / "loras" / "tiny.safetensors"))
    old = {"1": {"class_type": "NunchakuFluxDiTLoader", "inputs": {
               "model_path": svdq.file, "cache_threshold": 0, "attention": "nunchaku-fp16", "cpu_offload": "auto",
               "device_id": 0, "data_type": "bfloat16", "i2f_mode": "enabled"}},
           "2": {"class_type": "NunchakuFluxLoraLoader",
                 "inputs": {"model": ["1", 0], "lora_name": "tiny.safetensors", "lora_strength": 0.5}},
           **text_to_image(["2", 0], "m_", steps=1, size=64)}
    status, done = ask(server, "POST", "migrate", json=old)
    assert status == 200 and len(done["changes"]) == 2 and done["left"] == []
    (server.base / "models" / "diffusion_models" / svdq.file).unlink()
    status, answer = server.post("/prompt", {"prompt": done["workflow"]})
    error = answer["node_errors"]["1"]["errors"][0]["details"]
    assert "published as nunchaku-tech/nunchaku-flux.1-dev" in error and error.endswith("code: missing"), answer
    item = {"reference": svdq.file, "node": "QT_NunchakuSVDQLoader"}
    card = describe(server, svdq.file, node="QT_NunchakuSVDQLoader")
    assert (card["on_disk"], card["family"], card["architecture"]) == (False, "SVDQuant", "FLUX.1")
    row, = ask(server, "POST", "download", json={"items": [item], "plan": True})[1]["rows"]
    assert (row["repo"], list(row["files"])) == ("nunchaku-tech/nunchaku-flux.1-dev", [svdq.file])
    assert download(server, item)["state"] == "done"
    history = server.run(done["workflow"])
    assert not error_of(history) and outputs(server, history, "images")
    status, answer = ask(server, "POST", "migrate", json={"nothing": 1})
    assert status == 400 and "no workflow" in answer["error"]
