"""docs/recipes/celery_worker.py: as it is in the page, and for real where QT_CELERY is a Python that has celery and redis,
and redis-server is installed: two workers with a ComfyUI each, one of them killed in the middle of a job, and one ComfyUI."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from support import downloads
from support.hub import FakeRepo, Hub
from support.pack import COMFYUI, PACK
from support.server import TEST_NODES, free_port
from support.workflow import load_base, text_to_image

pytestmark = pytest.mark.host

RECIPE = PACK / "docs" / "recipes" / "celery_worker.py"
PAGE = (PACK / "docs" / "workers.md").read_text(encoding="utf-8")
SLEEP = '''
import time
class Sleep:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "wait", "tests", True
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seconds": ("FLOAT", {"default": 1.0}), "number": ("INT", {"default": 0})}}
    def wait(self, seconds, number):
        time.sleep(seconds)
        return {}
NODE_CLASS_MAPPINGS = {"QTTest_Sleep": Sleep}
'''


def test_the_recipe_is_what_the_page_says():
    """Every setting and environment variable that the page names is in the file, and the reverse."""
    code = RECIPE.read_text(encoding="utf-8")
    compile(code, str(RECIPE), "exec")
    settings = next(node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)
                    and ast.unparse(node.func) == "app.conf.update")
    for setting in settings.keywords:
        assert f"`{setting.arg}`" in PAGE, setting.arg
    for name in ("COMFYUI", "PACK", "COMFYUI_PYTHON", "COMFYUI_OPTIONS", "WORK", "RESULTS", "REDIS_URL", "LONGEST"):
        assert f'"{name}"' in code and f"`{name}`" in PAGE, name
    assert "PR_SET_PDEATHSIG" in code and "docs/workers.md" in code and "recipes/celery_worker.py" in PAGE


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(what, seconds: float, logs) -> None:
    end = time.time() + seconds
    while not what():
        assert time.time() < end, "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
        time.sleep(0.1)


real = pytest.mark.skipif("QT_CELERY" not in os.environ,
                          reason="the recipe with Celery and Redis, where QT_CELERY is their Python")


@pytest.fixture
def env(tmp_path):
    """The environment of workers, with their Redis."""
    sys.path.append(str(PACK))
    from dev import link_pack

    base = tmp_path / "base"
    for name, code in (("test_nodes", (TEST_NODES / "__init__.py").read_text(encoding="utf-8")), ("sleep", SLEEP)):
        (base / "custom_nodes" / name).mkdir(parents=True)
        (base / "custom_nodes" / name / "__init__.py").write_text(code, encoding="utf-8")
    link_pack(base / "custom_nodes")
    port = free_port()
    redis = subprocess.Popen([str(shutil.which("redis-server")), "--port", str(port), "--bind", "127.0.0.1", "--save", "",
                              "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
    yield {**os.environ, "COMFYUI": str(COMFYUI), "PACK": str(PACK), "COMFYUI_PYTHON": sys.executable,
           "COMFYUI_OPTIONS": f"--cpu --disable-api-nodes --base-directory '{base}'", "RESULTS": str(tmp_path / "results"),
           "REDIS_URL": f"redis://127.0.0.1:{port}/0", "LONGEST": "20"}
    redis.kill()
    redis.wait()


@pytest.mark.full
@real
def test_two_workers_lose_no_job(tmp_path, tiny, env):
    results, logs = tmp_path / "results", [tmp_path / "one.log", tmp_path / "two.log"]

    def prompt(number: int) -> Path:
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({"1": load_base(str(tiny.pipeline)), **text_to_image(["1", 0], "j", seed=number, steps=2, size=64),
                                    "9": {"class_type": "QTTest_Sleep", "inputs": {"seconds": 6.0, "number": number}}}))
        return file

    def start(log: Path) -> subprocess.Popen:
        with open(log, "wb") as out:
            return subprocess.Popen([os.environ["QT_CELERY"], str(RECIPE), "worker", str(prompt(0))], stdout=out,
                                    stderr=subprocess.STDOUT, env=env | {"WORK": str(tmp_path / log.stem)}, cwd=tmp_path)

    def send(*numbers: int) -> None:
        """At once."""
        sending = [subprocess.Popen([os.environ["QT_CELERY"], str(RECIPE), "send", str(prompt(number)), jobs[number]],
                                    stdout=subprocess.PIPE, text=True, env=env, cwd=tmp_path) for number in numbers]
        assert [process.communicate(timeout=60)[0].strip() for process in sending] == [jobs[number] for number in numbers]

    def said(log: Path, what: str) -> list[str]:
        """The jobs of which a worker says that they were received, or succeeded."""
        return [job for job in jobs for line in log.read_text(errors="replace").splitlines() if f"[{job}] {what}" in line]

    jobs = [str(uuid.uuid4()) for _ in range(4)]
    workers = []
    try:
        workers += [start(log) for log in logs]
        until(lambda: all(" ready." in log.read_text(errors="replace") for log in logs)
              or any(worker.poll() is not None for worker in workers), 180, logs)
        assert not any(worker.poll() for worker in workers), logs[0].read_text()[-3000:]
        comfyuis = [children(worker.pid)[0] for worker in workers]
        assert all("main.py" in Path(f"/proc/{pid}/cmdline").read_text() for pid in comfyuis)
        begun = time.time()
        send(0, 1)
        until(lambda: all(said(log, "received") for log in logs), 60, logs)
        time.sleep(1)
        # both are in the middle of a job: the first worker is killed, and the ComfyUI of the second
        workers[0].send_signal(signal.SIGKILL)
        os.kill(comfyuis[1], signal.SIGKILL)
        workers[0].wait()
        assert not any(said(log, "succeeded") for log in logs) and not results.exists()
        (lost,), (kept,) = (said(log, "received") for log in logs)
        assert {lost, kept} == set(jobs[:2])
        until(lambda: not runs(comfyuis[0]), 10, logs)  # the dead worker's ComfyUI went with it
        send(2, 3)
        until(lambda: sorted(said(logs[1], "succeeded")) == sorted(jobs), 180, logs)
        print(f"4 jobs after {time.time() - begun:.0f} s;", *(line for line in logs[1].read_text(errors="replace").splitlines()
                                                              if "] received" in line or "] succeeded" in line), sep="\n")
        assert said(logs[1], "received").count(lost) == 1, "it came back"
        assert sorted(path.name for path in results.iterdir()) == sorted(jobs), "one folder for each, and no other"
        for job in jobs:
            assert [path.suffix for path in sorted((results / job).iterdir())] == [".latent", ".png"]
        before = (results / jobs[0]).stat().st_mtime_ns
        send(0)
        until(lambda: said(logs[1], "succeeded").count(jobs[0]) == 2, 60, logs)
        assert (results / jobs[0]).stat().st_mtime_ns == before, "the same id is the same job"
        ours = children(workers[1].pid)[0]
        workers[1].terminate()
        workers[1].wait(60)
        assert not runs(ours)
    finally:
        for process in workers:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.mark.full
@real
def test_a_worker_of_all_models_fetches_and_tells_what_fails(tmp_path, tiny, env):
    """A job whose model is fetched first; one whose model is nowhere, one that ComfyUI refuses, and one that fails."""
    def job(reference: str, **nodes: dict) -> dict:
        return {"1": load_base(reference), **text_to_image(["1", 0], "j", steps=2, size=64), **nodes}

    failing = {"class_type": "QTTest_TinyConditioning", "inputs": {"text": 63, "pooled": 32, "tokens": 7, "seed": 5}}
    jobs = {"fetched": job("owner/tiny"), "gone": job("owner/gone"), "fails": job("owner/tiny", jcond=failing),
            "refused": job("owner/tiny", jcond={"class_type": "NoSuchNode", "inputs": {}})}
    log, ids = tmp_path / "any.log", {}
    with Hub({"owner/tiny": FakeRepo.of(tiny.pipeline)}) as hub:
        env |= downloads.environment(hub, tmp_path / "home") | env | {
            "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "WORK": str(tmp_path / "work")}
        with open(log, "wb") as out:
            worker = subprocess.Popen([os.environ["QT_CELERY"], str(RECIPE), "worker"], stdout=out, stderr=subprocess.STDOUT,
                                      env=env, cwd=tmp_path)
        try:
            for name, prompt in jobs.items():
                (tmp_path / f"{name}.json").write_text(json.dumps(prompt))
                ids[name] = subprocess.run([os.environ["QT_CELERY"], str(RECIPE), "send", str(tmp_path / f"{name}.json")], env=env,
                                           cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
            asked = len(hub.log)
            until(lambda: len(re.findall(r"\] succeeded|raised unexpected", log.read_text(errors="replace"))) == 4, 180, [log])
            assert asked < len(hub.log), "it was fetched by the worker"
        finally:
            worker.terminate()
            worker.wait(60)
    said = {name: next(line for line in log.read_text(errors="replace").splitlines()
                       if f"[{job}] succeeded" in line or f"[{job}] raised" in line) for name, job in ids.items()}
    assert " succeeded " in said["fetched"] and "missing: [['owner/gone']]" in said["gone"]
    assert "NoSuchNode" in said["refused"] and "cannot be multiplied" in said["fails"]
    assert [path.name for path in (tmp_path / "results").iterdir()] == [ids["fetched"]]
