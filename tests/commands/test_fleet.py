"""`fleet` without Ray: what is refused before anything starts, ids, results, routing, and the door's answers. What runs is in
test_fleet_runs.py."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from quantized_transformers.engines.worker.dispatcher import RETRIES, Dispatcher, Lost
from quantized_transformers.engines.worker.fleet import Asked, _free, prepare
from quantized_transformers.engines.worker.pools import ANY, Pool, asked, choose, pools
from quantized_transformers.engines.worker.replica import Settings
from quantized_transformers.engines.worker.results import Results, job_id
from quantized_transformers.engines.worker.workflow import Workflow
from quantized_transformers.loaders.errors import CheckpointError
from support.pack import COMFYUI, PACK

pytestmark = pytest.mark.unit

JOB = "01234567-89ab-4cde-8f01-23456789abcd"


# Ids and results


def test_an_id_is_what_comfyui_takes():
    from comfy_execution.jobs import validate_job_id

    assert job_id(JOB) == validate_job_id(JOB) == JOB
    new = job_id(None)
    assert validate_job_id(new) == new != job_id(None)
    for wrong in (JOB.upper(), JOB.replace("-", ""), "{" + JOB + "}", "urn:uuid:" + JOB, JOB + "\n", "..", "../" + JOB[3:],
                  "", 7, True, [JOB], "é" * 36):
        with pytest.raises(CheckpointError, match="no UUID"):
            job_id(wrong)
        with pytest.raises((ValueError, AttributeError)):
            validate_job_id(wrong)


def item(name: str, subfolder: str = "", kind: str = "output") -> dict:
    return {"filename": name, "subfolder": subfolder, "type": kind}


def outputs(*items) -> dict:
    return {"9": {"images": list(items), "animated": (True,), "text": ["said"]}, "10": {"3d": []}, "11": "odd"}


@pytest.fixture
def made(tmp_path):
    """ComfyUI's output folder."""
    (tmp_path / "output" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        (tmp_path / "output" / name).write_bytes(name.encode())
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "output"


def test_results_are_published_whole_and_once(tmp_path, made):
    results = Results(tmp_path / "results")
    assert results.files(JOB) is None
    said = outputs(item("a.png"), item("b.png", "sub"), item("a.png"), item("preview.png", kind="temp"))
    assert results.publish(JOB, said, made) == results.files(JOB) == ["a.png", "sub/b.png"]
    assert results.file(JOB, "sub/b.png").read_bytes() == b"sub/b.png"
    (made / "a.png").write_bytes(b"later")
    assert results.publish(JOB, said, made) == ["a.png", "sub/b.png"], "a second run is the same job"
    assert results.file(JOB, "a.png").read_bytes() == b"a.png"
    assert results.publish(job_id(None), outputs(), made) == [], "a job without files is done, too"
    assert not [path for path in (tmp_path / "results").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("wrong", [item("gone.png"), item("../secret"), item("secret", ".."), item("/etc/hostname"),
                                   item("link.png"), item("sub")], ids=str)
def test_half_of_a_result_is_never_there(tmp_path, made, wrong):
    """A file that cannot be copied, and every way out of the output folder."""
    (made / "link.png").symlink_to(tmp_path / "secret")
    with pytest.raises((CheckpointError, OSError)):
        Results(tmp_path / "results").publish(JOB, outputs(item("a.png"), wrong), made)
    assert list((tmp_path / "results").iterdir()) == []


def test_nothing_is_seen_before_all_of_it_is(tmp_path, made, monkeypatch):
    import shutil

    results, copy, seen = Results(tmp_path / "results"), shutil.copy2, []
    monkeypatch.setattr(shutil, "copy2", lambda *args: (copy(*args), seen.append(results.files(JOB))))
    results.publish(JOB, outputs(item("a.png"), item("b.png", "sub")), made)
    assert seen == [None, None] and results.files(JOB) == ["a.png", "sub/b.png"]


def test_a_name_is_one_of_the_files_or_nothing(tmp_path, made):
    results = Results(tmp_path / "results")
    results.publish(JOB, outputs(item("a.png"), item("b.png", "sub")), made)
    (tmp_path / "results" / "other").write_text("other")
    for name in ("../other", "../../secret", "sub/../a.png", "sub/../../../secret", f"../{JOB}/a.png", "/etc/hostname", "", ".",
                 "..", "sub", "sub/", "a.png/", "./a.png", "..\\other", "a.png\0", str(tmp_path / "secret")):
        assert results.file(JOB, name) is None, name


# Arguments


def test_a_pool_is_a_name_a_file_and_a_number():
    assert [vars(asked(text)) for text in ("flux=a.json:2", "b=/x=y:z/c d.json:12")] == [
        {"name": "flux", "file": "a.json", "count": 2}, {"name": "b", "file": "/x=y:z/c d.json", "count": 12}]
    for wrong in ("", "a.json:2", "flux=a.json", "flux=a.json:0", "flux=a.json:-1", "flux=a.json:x", "=a.json:1", "any=a.json:1",
                  "a b=a.json:1", "a/b=c.json:1", "flux=:1"):
        with pytest.raises(CheckpointError, match="NAME=WORKFLOW.json:K"):
            asked(wrong)


def test_a_key_goes_to_its_pool_and_to_no_other():
    some = pools(2, [Pool("flux", 1, "f" * 12), Pool("wan", 3, "a" * 12)])
    assert [pool.name for pool in some] == [ANY, "flux", "wan"]
    assert [choose(some, key * 12).name for key in "fa0"] == ["flux", "wan", ANY]
    only = pools(0, [Pool("flux", 1, "f" * 12)])
    assert choose(only, "f" * 12).name == "flux"
    with pytest.raises(CheckpointError, match="no worker is for these models"):
        choose(only, "0" * 12)
    for workers, named, says in ((0, [], "no workers"), (-1, [Pool("a", 1, "f" * 12)], "no workers"),
                                 (1, [Pool("a", 1, "f" * 12), Pool("a", 1, "0" * 12)], "have this name"),
                                 (1, [Pool("a", 1, "f" * 12), Pool("b", 1, "f" * 12)], "same models")):
        with pytest.raises(CheckpointError, match=says):
            pools(workers, named)


def test_what_cannot_be_is_refused_before_anything_starts(tmp_path):
    for gpus in (-1, 1.5, float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="whole GPUs"):
            prepare(Asked("/comfyui", 1, gpus=gpus))
    for word in ("--port", "--port=1", "--lis", "--base-directory", "--base", "--out", "--user-dir=x", "--temp", "--database"):
        with pytest.raises(CheckpointError, match="of its own"):
            prepare(Asked("/comfyui", 1, more=("--cpu", word)))
    with pytest.raises(CheckpointError, match="ComfyUI was not found"):
        prepare(Asked("", 1))
    file = tmp_path / "w.json"
    file.write_text(json.dumps({"1": {"class_type": "UNETLoader", "inputs": {"unet_name": "gone.safetensors"}}}))
    with pytest.raises(CheckpointError, match=r"not here: gone.safetensors[\s\S]*--download"):
        prepare(Asked("/comfyui", 1, pool=(f"flux={file}:1",)))
    file.write_text("{}")
    with pytest.raises(CheckpointError, match="no workflow"):
        prepare(Asked("/comfyui", 1, pool=(f"flux={file}:1",)))


def test_what_workers_get(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "w.json"
    file.write_text(json.dumps(prompt(0)))
    found = prepare(Asked("/comfyui", 2, pool=(f"one={file}:1",), gpus=0, results="out", shared="base", config=("more.yaml",),
                          more=("--preview-method", "none", "--lowvram")))
    assert found.pools == (Pool(ANY, 2), Pool("one", 1, Workflow(prompt(7)).affinity())) and found.warnings == ()
    assert found.settings == Settings("/comfyui", str(tmp_path / "base"), str(tmp_path / "out"), "",
                                      (str(tmp_path / "more.yaml"),), ("--cpu", "--preview-method", "none", "--lowvram"))
    with_gpus = prepare(Asked("/comfyui", 1)).settings
    assert with_gpus.options == () and with_gpus.shared == "/comfyui"
    for host, warned in (("127.0.0.1", 0), ("::1", 0), ("localhost", 0), ("0.0.0.0", 1), ("::", 1), ("192.0.2.1", 1),
                         ("gpu1", 1)):
        assert len(prepare(Asked("/comfyui", 1, host=host)).warnings) == warned


def test_an_address_that_is_taken_is_said():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        for host, number in (("127.0.0.1", port), ("203.0.113.1", port), ("127.0.0.1", 0), ("127.0.0.1", 70000)):
            with pytest.raises(CheckpointError, match="nobody can listen"):
                _free(host, number)
    _free("127.0.0.1", port)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="of an environment without Ray")
def test_without_ray_the_line_that_installs_it(tmp_path):
    done = subprocess.run([sys.executable, str(PACK), "fleet", "--workers", "1", "--results", str(tmp_path / "r")],
                          capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path,
                          env={**os.environ, "COMFYUI_PATH": str(COMFYUI)})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f'{sys.executable} -m pip install "ray[serve]>=2.58"' in done.stderr
    assert list(tmp_path.iterdir()) == []


# The door


def prompt(number: int, **more: dict) -> dict:
    return {"1": {"class_type": "QTTest_Sleep", "inputs": {"seconds": 0, "number": number}}, **more}


MISSING = {"2": {"class_type": "UNETLoader", "inputs": {"unet_name": "gone.safetensors", "weight_dtype": "default"}}}


class Door:
    """A dispatcher whose jobs go to `work`, an async generator function of this test: (pool, key, id, prompt)."""

    def __init__(self, folder: Path, work, some=None) -> None:
        self.sent: Counter[str] = Counter()

        async def send(pool, key, job, prompt):
            self.sent[job] += 1
            async for change in work(pool, key, job, prompt):
                yield change

        self.some = some or pools(1, [])
        self.dispatcher = Dispatcher(Settings("", "", str(folder), ""), self.some, send,
                                     lambda: {pool.name: 1 for pool in self.some})

    async def ask(self, path: str, body=None, method: str = "", **headers: str):
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return await self.dispatcher.answer(method or ("GET" if body is None else "POST"), path, headers, data)

    async def finish(self, job: str) -> dict:
        await asyncio.wait_for(asyncio.gather(self.dispatcher.jobs[job].work, return_exceptions=True), 30)
        return (await self.ask(f"/jobs/{job}"))[1]


async def done(pool, key, job, prompt):
    yield {"status": "in_progress", "worker": "w"}
    await asyncio.sleep(0.01)
    yield {"status": "completed", "files": ["a.png"]}


def test_the_same_id_runs_once(tmp_path, made):
    async def main() -> None:
        door = Door(tmp_path / "results", done)
        answers = await asyncio.gather(*(door.ask("/jobs", {"prompt": prompt(1), "prompt_id": JOB}) for _ in range(5)))
        assert answers == [(202, {"prompt_id": JOB})] * 5
        found = await door.finish(JOB)
        assert found == {"prompt_id": JOB, "status": "completed", "retries": 0, "pool": ANY, "worker": "w", "files": ["a.png"],
                         "affinity": Workflow(prompt(1)).affinity()}
        assert await door.ask("/jobs", {"prompt": prompt(1), "prompt_id": JOB}) == (202, {"prompt_id": JOB})
        assert (await door.ask("/jobs", {"prompt": prompt(2), "prompt_id": JOB}))[0] == 409
        assert door.sent == {JOB: 1}
        other = (await door.ask("/jobs", {"prompt": prompt(1)}))[1]["prompt_id"]
        await door.finish(other)
        # after a restart: results are the answer
        Results(tmp_path / "results").publish(JOB, outputs(item("a.png")), made)
        again = Door(tmp_path / "results", done)
        assert await again.ask("/jobs", {"prompt": prompt(1), "prompt_id": JOB}) == (202, {"prompt_id": JOB})
        assert await again.ask(f"/jobs/{JOB}") == (200, {"prompt_id": JOB, "status": "completed", "files": ["a.png"]})
        assert await again.ask(f"/jobs/{JOB}/files/a.png") == (200, tmp_path / "results" / JOB / "a.png")
        assert await again.ask(f"/jobs/{JOB}/cancel", {}) == (200, {"cancelled": False})
        assert (await again.ask(f"/jobs/{other}"))[0] == 404 and not again.sent

    asyncio.run(main())


def test_what_is_refused_is_refused_at_once_and_leaves_nothing(tmp_path):
    async def main() -> None:
        door = Door(tmp_path, done, pools(0, [Pool("one", 1, "f" * 12)]))
        began = time.monotonic()
        answers = await asyncio.gather(*(door.ask("/jobs", {"prompt": prompt(1, **MISSING), "prompt_id": JOB}) for _ in range(3)))
        assert time.monotonic() - began < 10
        for status, answer in answers:
            assert status == 400 and answer["error"]["message"] == "not here: gone.safetensors"
            assert [(one["node"], one["input"], one["missing"]) for one in answer["error"]["missing"]] == [
                ("2", "unet_name", ["gone.safetensors"])]
        for body, says in ((b"{", "no JSON"), (b"[" * 100_000, "no JSON"), ([], "no workflow"), ({}, "no workflow"),
                           ({"prompt": {}}, "no workflow"), ({"prompt": []}, "no workflow"), ({"prompt": {"1": 5}}, "no workflow"),
                           ({"prompt": {"nodes": [], "links": []}}, "no workflow"), ({"prompt": {"prompt": prompt(1)}}, "no workflow"),
                           ({"prompt": prompt(1), "prompt_id": JOB.upper()}, "no UUID"), ({"prompt": prompt(1)}, "no worker is for")):
            status, answer = await door.ask("/jobs", body)
            assert status == 400 and says in answer["error"]["message"], body
        assert (await door.ask("/jobs", {"prompt": prompt(1)}, origin="http://example.com"))[0] == 403
        for method, path in (("GET", "/"), ("GET", "/jobs"), ("DELETE", f"/jobs/{JOB}"), ("GET", f"/jobs/{JOB}"),
                             ("POST", f"/jobs/{JOB}/cancel"), ("GET", f"/jobs/{JOB}/files/a.png"), ("GET", "/jobs/.."),
                             ("GET", "/jobs/../files/secret"), ("GET", f"/jobs/{JOB}/files/../../secret"), ("POST", "/health")):
            assert (await door.ask(path, b"{}", method))[0] == 404, path
        assert not door.sent and not door.dispatcher.jobs

    asyncio.run(main())


def test_lost_workers_are_retried_and_failures_are_not(tmp_path):
    async def main() -> None:
        async def work(pool, key, job, prompt):
            number = prompt["1"]["inputs"]["number"]
            yield {"status": "in_progress", "worker": f"w{door.sent[job]}"}
            if number == 1 and door.sent[job] < 3 or number == 2:
                raise Lost("gone")
            if number == 3:
                raise ValueError("a defect")
            yield {"status": "failed", "error": {"message": "no"}} if number == 4 else {"status": "completed", "files": []}

        door, found = Door(tmp_path, work), {}
        ids = {number: (await door.ask("/jobs", {"prompt": prompt(number)}))[1]["prompt_id"] for number in (1, 2, 3, 4)}
        for number, job in ids.items():
            found[number] = await door.finish(job)
        assert [(found[number]["status"], door.sent[ids[number]], found[number]["retries"]) for number in found] == [
            ("completed", 3, 2), ("failed", 1 + RETRIES, RETRIES), ("failed", 1, 0), ("failed", 1, 0)]
        assert found[1]["worker"] == "w3" and "error" not in found[1]
        assert [found[number]["error"]["message"] for number in (2, 3, 4)] == [
            "4 workers ended with this job", "ValueError: a defect", "no"]

    asyncio.run(main())


def test_cancel_ends_what_waits_and_what_runs(tmp_path):
    async def main() -> None:
        ended = []

        async def work(pool, key, job, prompt):
            try:
                if prompt["1"]["inputs"]["number"]:
                    yield {"status": "in_progress", "worker": "w"}
                await asyncio.sleep(60)
                yield {"status": "completed", "files": []}
            finally:
                ended.append(job)

        door = Door(tmp_path, work)
        ids = [(await door.ask("/jobs", {"prompt": prompt(number)}))[1]["prompt_id"] for number in (0, 1)]
        await asyncio.sleep(0.1)
        assert [(await door.ask(f"/jobs/{job}"))[1]["status"] for job in ids] == ["pending", "in_progress"]
        assert (await door.ask("/health"))[1]["jobs"] == {"pending": 1, "in_progress": 1}
        for job in ids:
            assert await door.ask(f"/jobs/{job}/cancel", {}) == (200, {"cancelled": True})
            assert (await door.ask(f"/jobs/{job}"))[1]["status"] == "cancelled"
            assert (await door.finish(job))["status"] == "cancelled"
            assert await door.ask(f"/jobs/{job}/cancel", {}) == (200, {"cancelled": False})
        assert ended == ids and set(door.sent.values()) == {1}

    asyncio.run(main())


def test_models_decide_the_pool_and_the_key(tmp_path):
    """A job without models has no key to the workers: it takes no worker's models away."""
    async def main() -> None:
        went = {}

        async def work(pool, key, job, prompt):
            went[job] = (pool.name, key)
            yield {"status": "completed", "files": []}

        server = {"3": {"class_type": "QT_ServerModel", "inputs": {"base_model": "owner/base"}}}
        key = Workflow(prompt(0, **server)).affinity()
        for some, expected in ((pools(1, [Pool("one", 1, key)]), [(ANY, ""), ("one", key)]), (pools(1, []), [(ANY, ""), (ANY, key)])):
            door, went = Door(tmp_path, work, some), {}
            for more in ({}, server):
                await door.finish((await door.ask("/jobs", {"prompt": prompt(0, **more)}))[1]["prompt_id"])
            assert list(went.values()) == expected

    asyncio.run(main())


def test_health_is_of_every_pool(tmp_path):
    async def main() -> None:
        door = Door(tmp_path, done, pools(2, [Pool("one", 1, "f" * 12)]))
        assert await door.ask("/health") == (200, {"status": "ok", "jobs": {"pending": 0, "in_progress": 0}, "workers": {
            ANY: {"wanted": 2, "running": 1}, "one": {"wanted": 1, "running": 1}}})
        door.dispatcher.running = lambda: {ANY: 2}
        status, answer = await door.ask("/health")
        assert status == 503 and answer["workers"]["one"] == {"wanted": 1, "running": 0}

    asyncio.run(main())


def test_nothing_of_a_fleet_imports_ray_before_it_starts():
    import ast

    for path in sorted((PACK / "engines" / "worker").glob("*.py")) + [PACK / "commands" / "fleet.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", "") for node in top}
        assert not {name for name in names if name and name.partition(".")[0] in ("ray", "starlette")}, path
