"""`fleet` for real: three ComfyUI workers on Ray Serve, one of them a pool of its own; and Comfy Org's proxy before one
worker. The tests of this file follow one another on one fleet; the last ones kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from support.fleet import SLEEP, Fleet, model, program, runs, sleep, until
from support.pack import COMFYUI, PACK
from support.server import Server, error_of, free_port
from support.workflow import load_base

pytestmark = [pytest.mark.fleet, pytest.mark.host]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sys.path.append(str(PACK))
    from dev import link_pack

    folder = tmp_path_factory.mktemp("fleet")
    (folder / "base" / "custom_nodes" / "sleep").mkdir(parents=True)
    (folder / "base" / "custom_nodes" / "sleep" / "__init__.py").write_text(SLEEP, encoding="utf-8")
    link_pack(folder / "base" / "custom_nodes")
    (folder / "base" / "models" / "checkpoints").mkdir(parents=True)
    for name in ("a", "b", "solo"):
        (folder / "base" / "models" / "checkpoints" / f"{name}.safetensors").touch()
    # a pipeline whose files are all there, and that no node can load
    (folder / "broken" / "transformer").mkdir(parents=True)
    (folder / "broken" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (folder / "broken" / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (folder / "broken" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no safetensors")
    (folder / "solo.json").write_text(json.dumps(sleep(0, **model("solo.safetensors"))))
    return folder


@pytest.fixture(scope="module")
def fleet(folder):
    with Fleet(folder, "--workers", "2", "--pool", f"solo={folder / 'solo.json'}:1") as fleet:
        yield fleet


def broken(folder) -> dict:
    """A job that a node of ours refuses when it runs."""
    return {"1": {"class_type": "QT_BuildGGUF", "inputs": {"base": str(folder / "broken"), "output": "x", "type": "Q8_0",
                                                           "model_type": "auto"}}}


def test_nobody_but_this_machine_reaches_it(fleet):
    """Ray opens one port of each deployment's process to all; from 2.58 on it wants a token there, which is only ours."""
    mine = {process: process.environ() for process in psutil.process_iter() if _is_of(process, fleet)}
    open_to_all = {process.cmdline()[0] for process in mine for one in process.net_connections("tcp")
                   if one.status == psutil.CONN_LISTEN and one.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")}
    assert len(mine) > 10 and {name.partition(":fleet:")[0] for name in open_to_all} <= {"ray::ServeReplica"}
    tokens = {environ.get("RAY_AUTH_TOKEN") for environ in mine.values()}
    assert len(tokens) == 1 and len(tokens.pop() or "") == 64
    assert {environ["RAY_AUTH_MODE"] for environ in mine.values()} == {"token"}
    assert {environ["RAY_USAGE_STATS_ENABLED"] for environ in mine.values()} == {"0"}


def _is_of(process: psutil.Process, fleet: Fleet) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("RAY_TMPDIR") == fleet.sessions.name and process.pid != fleet.process.pid
    return False


def test_two_workers_take_little_more_than_half_the_time_of_one_and_a_pool_is_strict(fleet):
    """Both at once, so that whatever else this machine does slows both: 12 jobs for the pool of one worker, 12 for two."""
    def work(first: int, more: dict) -> tuple[float, list[dict]]:
        jobs = [fleet.send(sleep(number, 1.0, **more)) for number in range(first, first + 12)]
        found = fleet.finish(*jobs)
        for number, job in enumerate(jobs, first):
            assert fleet.files(job) == [f"slept/{number}.txt"] and fleet.runs_of(number) == 1
            assert fleet.request(f"/jobs/{job}/files/slept/{number}.txt") == (200, b"1.0")
        return time.monotonic() - begun, found

    begun = time.monotonic()
    with ThreadPoolExecutor(2) as both:
        one, two = both.submit(work, 100, model("solo.safetensors")), both.submit(work, 200, {})
        (alone, of_one), (together, of_two) = one.result(), two.result()
    print(f"12 jobs of 1 s: one worker {alone:.1f} s, two {together:.1f} s")
    assert {found["status"] for found in of_one + of_two} == {"completed"}
    assert [len({found["worker"] for found in some}) for some in (of_one, of_two)] == [1, 2]
    assert not {found["worker"] for found in of_one} & {found["worker"] for found in of_two}
    assert [{found["pool"] for found in some} for some in (of_one, of_two)] == [{"solo"}, {"any"}]
    assert together < 0.65 * alone


def test_on_an_idle_fleet_every_model_keeps_its_worker(fleet):
    """Ray Serve learns a moment later whose models a worker has."""
    workers: dict[str, set[str]] = {"a": set(), "b": set()}
    for number, name in enumerate("abbaabab"):
        found, = fleet.finish(fleet.send(sleep(300 + number, 0.05, **model(f"{name}.safetensors"))))
        assert found["status"] == "completed"
        workers[name].add(found["worker"])
        fleet.finish(fleet.send(sleep(320 + number, 0.05)))  # one without a model takes nobody's away
        time.sleep(1)
    assert [len(some) for some in workers.values()] == [1, 1] and workers["a"] != workers["b"]


def test_the_same_id_runs_once(fleet):
    job = str(uuid.uuid4())
    with ThreadPoolExecutor(5) as at_once:
        assert set(at_once.map(lambda _: fleet.send(sleep(400, 1.0), job), range(5))) == {job}
    found, = fleet.finish(job)
    assert found["status"] == "completed" and fleet.send(sleep(400, 1.0), job) == job
    assert fleet.known(job) == found and fleet.runs_of(400) == 1 and fleet.files(job) == ["slept/400.txt"]


def test_what_is_missing_is_refused_at_once(fleet, folder):
    for inputs, name in (({"ckpt_name": "gone.safetensors"}, "gone.safetensors"), ({"ckpt_name": ""}, "ckpt_name")):
        begun = time.monotonic()
        status, answer = fleet.json("/jobs", {"prompt": sleep(500, **{"2": {"class_type": "CheckpointLoaderSimple", "inputs": inputs}})})
        assert status == 400 and answer["error"]["message"] == f"not here: {name}" and time.monotonic() - begun < 10
    status, answer = fleet.json("/jobs", {"prompt": sleep(500, **{"2": load_base("owner/gone")})})
    assert status == 400 and answer["error"]["missing"][0]["reference"] == "owner/gone"
    time.sleep(1)
    assert fleet.runs_of(500) == 0


def test_paths_out_of_the_results_and_pages_get_nothing(fleet, folder):
    job = fleet.send(sleep(510))
    fleet.finish(job)
    for path in (f"{job}/files/../{job}/slept/510.txt", f"{job}/files/..%2f..%2fsolo.json", f"{job}/files/%2e%2e/%2e%2e/solo.json",
                 f"{job}/files//{folder / 'solo.json'}", "../solo.json", "..%2fsolo.json/files/x", f"{job.upper()}"):
        assert fleet.request(f"/jobs/{path}")[0] == 404, path
    page = urllib.request.Request(f"http://127.0.0.1:{fleet.port}/jobs", json.dumps({"prompt": sleep(511)}).encode(),
                                  {"Origin": f"http://127.0.0.1:{fleet.port}"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(page, timeout=30)
    assert refused.value.code == 403


def test_what_fails_fails_once_and_says_why(fleet, folder):
    jobs = {"validation": sleep(600, "soon"), "unknown": {"1": {"class_type": "NoSuchNode", "inputs": {}}}, "node": sleep(601, -1),
            "ours": {"1": load_base(str(folder / "broken")), "2": {"class_type": "ModelSave", "inputs": {
                "model": ["1", 0], "filename_prefix": "x"}}},
            "ours, running": broken(folder)}
    ids = {name: fleet.send(prompt) for name, prompt in jobs.items()}
    found = dict(zip(ids, fleet.finish(*ids.values()), strict=True))
    assert {(one["status"], one["retries"]) for one in found.values()} == {("failed", 0)}
    says = {name: one["error"]["message"] for name, one in found.items()}
    assert "could not convert string to float" in says["validation"] and "NoSuchNode" in says["unknown"]
    assert found["validation"]["error"]["node_errors"]["1"]["class_type"] == "QTTest_Sleep"
    assert says["node"] == "no time goes back" and found["node"]["error"]["node_id"] == "1" and fleet.runs_of(601) == 1
    assert "where:" in says["ours"] and "where:" in says["ours, running"], says
    assert found["ours, running"]["error"]["node_type"] == "QT_BuildGGUF"
    assert not [job for job in ids.values() if (fleet.results / job).exists()]


def test_cancel_ends_what_waits_and_what_runs(fleet):
    running = [fleet.send(sleep(700 + number, 60)) for number in range(2)]
    until(lambda: all(fleet.known(job)["status"] == "in_progress" for job in running) and fleet.runs_of(701), 90)
    waiting = fleet.send(sleep(702, 60))
    time.sleep(1)
    assert fleet.known(waiting)["status"] == "pending"
    begun = time.monotonic()
    for job in (waiting, running[0]):
        assert fleet.json(f"/jobs/{job}/cancel", {}) == (200, {"cancelled": True})
        assert fleet.known(job)["status"] == "cancelled"
        assert fleet.json(f"/jobs/{job}/cancel", {}) == (200, {"cancelled": False})
    freed, = fleet.finish(fleet.send(sleep(703)))
    assert freed["status"] == "completed" and time.monotonic() - begun < 50 and freed["worker"] == fleet.known(running[0])["worker"]
    assert fleet.json(f"/jobs/{running[1]}/cancel", {}) == (200, {"cancelled": True})
    both = fleet.finish(*(fleet.send(sleep(704 + number, 2)) for number in range(2)), seconds=90)
    assert len({found["worker"] for found in both}) == 2, "both are free again"
    assert fleet.runs_of(702) == 0 and not [job for job in (waiting, *running) if (fleet.results / job).exists()]


def test_a_killed_comfyui_and_a_killed_worker_lose_nothing(fleet):
    jobs = [fleet.send(sleep(800 + number, 4)) for number in range(2)]
    until(lambda: all(fleet.runs_of(800 + number) for number in range(2)), 90)
    jobs += [fleet.send(sleep(802 + number, 4)) for number in range(2)]
    workers, processes = [fleet.known(job)["worker"] for job in jobs[:2]], fleet.comfyuis()
    assert len(set(workers)) == 2
    os.kill(processes[workers[0]][0], signal.SIGKILL)  # a ComfyUI
    os.kill(processes[workers[1]][1], signal.SIGKILL)  # a worker: its ComfyUI goes with it
    until(lambda: not any(runs(pid) for worker in workers for pid in processes[worker]), 10)
    begun = time.monotonic()
    found = fleet.finish(*jobs, seconds=180)
    print(f"4 jobs after {time.monotonic() - begun:.0f} s")
    assert [one["status"] for one in found] == ["completed"] * 4
    assert [one["retries"] for one in found] == [1, 1, 0, 0] and not {one["worker"] for one in found} & set(workers)
    for number, job in enumerate(jobs, 800):
        assert fleet.files(job) == [f"slept/{number}.txt"]
    assert not [path.name for path in fleet.results.iterdir() if path.name.startswith(".")]
    until(lambda: fleet.json("/health")[1]["workers"]["any"]["running"] == 2, 120)
    alone, = fleet.finish(fleet.send(sleep(810, **model("solo.safetensors"))))
    assert alone["status"] == "completed" and alone["worker"] in processes, "the pool was not touched"


def test_more_gpus_than_there_are(tmp_path):
    with tempfile.TemporaryDirectory(prefix="qt-") as sessions:
        done = subprocess.run([program("python"), str(PACK), "fleet", "--workers", "1", "--gpus-per-worker", "99", "--port",
                               str(free_port())], env={**os.environ, "COMFYUI_PATH": str(COMFYUI), "RAY_TMPDIR": sessions},
                              capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)
    assert done.returncode == 1 and "GPUs, and 99 are asked for" in done.stderr and "Traceback" not in done.stderr


WORKER = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("commands_of_the_pack", sys.argv[1] + "/__main__.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.import_pack()
from quantized_transformers.engines.worker.comfyui import ComfyUI
ComfyUI(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), ["--cpu"]).start(print)
"""


def test_a_comfyui_ends_with_whoever_started_it(tmp_path):
    """Without Ray, which takes the children of a dead worker away as long as it lives itself."""
    worker = subprocess.Popen([program("python"), "-c", WORKER, str(PACK), str(COMFYUI), str(tmp_path), str(tmp_path / "base")])

    def comfyui() -> list[int]:
        return [int(one) for one in Path(f"/proc/{worker.pid}/task").glob("*/children") for one in one.read_text().split()
                if b"main.py" in Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0")[1]]

    ours, = until(comfyui, 90)
    assert runs(ours)
    worker.kill()
    worker.wait()
    try:
        until(lambda: not runs(ours), 5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ours, signal.SIGKILL)


def test_after_the_end_of_the_door_the_same_id_is_the_same_job(fleet):
    """It is what knows of jobs; results are what is left of it, of the job that went on without it, too."""
    done, = fleet.finish(fleet.send(sleep(900)))
    job = fleet.send(sleep(901, 4))
    until(lambda: fleet.runs_of(901), 90)
    door = fleet.door()
    os.kill(door, signal.SIGKILL)
    until(lambda: not runs(door), 10)
    until(fleet.answers, 90)  # meanwhile requests wait
    assert fleet.known(done["prompt_id"]) == {"prompt_id": done["prompt_id"], "status": "completed", "files": ["slept/900.txt"]}
    assert fleet.send(sleep(900), done["prompt_id"]) and fleet.send(sleep(901, 4), job)
    found, = fleet.finish(job)
    assert found["status"] == "completed" and fleet.files(job) == ["slept/901.txt"] and fleet.runs_of(900) == 1


def test_comfy_api_proxy_before_a_worker(folder, tmp_path):
    """Comfy Org's API v2 before one ComfyUI with this pack: what becomes of jobs, and of one whose ComfyUI was lost."""
    (tmp_path / "custom_nodes" / "sleep").mkdir(parents=True)
    (tmp_path / "custom_nodes" / "sleep" / "__init__.py").write_text(SLEEP, encoding="utf-8")
    (tmp_path / "models").mkdir()
    port = free_port()

    def ask(path: str, body: dict | None = None) -> tuple[int, dict]:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/api/v2{path}", json.dumps(body).encode() if body is not None else None,
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def send(prompt: dict) -> str:
        status, answer = ask("/jobs", {"workflow": prompt})
        assert status < 300, answer
        return answer["id"]

    def known(job: str, *wanted: str) -> dict:
        return until(lambda: (found := ask(f"/jobs/{job}")[1]).get("status") in wanted and found, 90, lambda: str(ask(f"/jobs/{job}")))

    with Server(tmp_path) as server, open(tmp_path / "proxy.log", "wb") as log:
        proxy = subprocess.Popen([program("comfy-api-proxy"), "--comfyui", f"http://127.0.0.1:{server.port}", "--port", str(port)],
                                 stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
        try:
            until(lambda: proxy.poll() is not None or _answers(port), 90, lambda: (tmp_path / "proxy.log").read_text())
            made = known(send(sleep(1)), "succeeded", "failed")
            assert made["status"] == "succeeded", made
            failed = known(send(broken(folder)), "succeeded", "failed")
            plain = server.run(broken(folder))
            assert failed["status"] == "failed" and failed["error"]["message"].strip() == error_of(plain).strip()
            assert "where:" in failed["error"]["message"] and str(failed["error"]["node_id"]) == "1"
            long = send(sleep(2, 60))
            known(long, "running", "in_progress")
            assert ask(f"/jobs/{long}/cancel", {})[0] < 300 and known(long, "canceled")
            lost = send(sleep(3, 60))
            known(lost, "running", "in_progress")
            server.process.kill()
            server.process.wait()
            assert (ask(f"/jobs/{lost}")[0], ask(f"/jobs/{lost}")[1]["error"]["code"]) == (503, "upstream_unreachable")
            server.__enter__()  # at the same port
            assert known(lost, "expired")
        finally:
            proxy.terminate()
            proxy.wait(20)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v2/health", timeout=5).status == 200
    return False
