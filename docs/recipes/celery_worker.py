"""Many jobs on many workers, durable: Celery and Redis around one ComfyUI per GPU. docs/workers.md explains it.

    pip install "celery[redis]"                             in the environment that runs this file
    python celery_worker.py worker [WORKFLOW.json ...]      one per GPU; with workflows: their models' jobs only
    python celery_worker.py send PROMPT.json [UUID]         queue a workflow in the API's format, print its id

Environment: COMFYUI (its folder), PACK (this pack's), COMFYUI_PYTHON (the Python that runs ComfyUI), COMFYUI_OPTIONS
(more of its options, such as --base-directory), WORK (an empty folder of this worker's), RESULTS (one folder for all),
REDIS_URL, LONGEST (seconds that no job takes longer than).
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from celery import Celery, signals
from redis import Redis

COMFYUI, WORK, RESULTS = (Path(os.environ.get(name, default)).absolute() for name, default in (
    ("COMFYUI", "ComfyUI"), ("WORK", "work"), ("RESULTS", "results")))
PACK = Path(os.environ.get("PACK") or COMFYUI / "custom_nodes" / "quantized-transformers")
PYTHON, OPTIONS = os.environ.get("COMFYUI_PYTHON", sys.executable), shlex.split(os.environ.get("COMFYUI_OPTIONS", ""))
REDIS, LONGEST = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"), int(os.environ.get("LONGEST", "3600"))
POOLS, ANY = "comfyui:pools", "any"  # the keys that some worker serves; the queue of all other jobs

app = Celery("comfyui", broker=REDIS, backend=REDIS)
app.conf.update(
    task_acks_late=True,  # a job leaves the queue when its results are there, not when it begins
    worker_prefetch_multiplier=1,  # a busy worker holds no second job
    worker_pool="solo",  # one job at a time, in the process whose end ends ComfyUI
    # What a dead worker held comes back after this; shorter than a job, and a living worker's job runs twice. Living
    # workers look for it every 10 seconds (without the second option every 100).
    broker_transport_options={"visibility_timeout": LONGEST, "unacked_restore_throttle": 1},
    result_backend_transport_options={"visibility_timeout": LONGEST},
    task_default_queue=ANY)


class LostError(Exception):
    """ComfyUI went away: the job may run again. Whatever else fails would fail again, and is not repeated."""


def check(file: Path, *options: str) -> tuple[bool, dict]:
    """(whether everything is here, what `workflow` says) of a workflow."""
    where = OPTIONS[OPTIONS.index("--base-directory"):][:2] if "--base-directory" in OPTIONS else []
    done = subprocess.run([PYTHON, str(PACK), "workflow", str(file), "--json", *where, *options], check=False,
                          stdout=subprocess.PIPE, env={**os.environ, "COMFYUI_PATH": str(COMFYUI)})
    if done.returncode > 1 or not done.stdout:
        raise ValueError(f"{file} cannot be read as a workflow")
    return done.returncode == 0, json.loads(done.stdout)


class ComfyUI:
    """One ComfyUI in a process of its own, which ends with this one however this one ends (Linux)."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.port = 0

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for name in ("output", "temp", "user"):
            (WORK / name).mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [PYTHON, str(COMFYUI / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port),
             "--output-directory", str(WORK / "output"), "--temp-directory", str(WORK / "temp"),
             "--user-directory", str(WORK / "user"), "--database-url", f"sqlite:///{WORK / 'comfyui.db'}", *OPTIONS],
            cwd=COMFYUI, preexec_fn=_die_with_parent)
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                self.ask("/system_stats")
                return
            except LostError:
                time.sleep(0.5)
        raise SystemExit("ComfyUI does not start")

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(30)

    def ask(self, path: str, body: dict | None = None) -> dict | None:
        """A GET, or a POST with a body; None for what it does not know. Raises ValueError with its answer when it
        refuses, LostError when it does not answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}",
                                         json.dumps(body).encode() if body is not None else None,
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise ValueError(error.read().decode(errors="replace")) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise LostError(str(error)) from None

    def run(self, job: str, prompt: dict) -> dict:
        """The outputs of a prompt. ComfyUI runs the same id twice when it is posted twice: so it is asked first."""
        if self.ask(f"/api/jobs/{job}") is None:
            said = self.ask("/prompt", {"prompt": prompt, "prompt_id": job}) or {}
            if said.get("node_errors"):  # it would run what it can of it
                self.ask(f"/api/jobs/{job}/cancel", {})
                raise ValueError(json.dumps(said["node_errors"]))
        while True:
            found = self.ask(f"/api/jobs/{job}")
            if found is None:
                raise LostError("it was started again meanwhile")
            if found["status"] == "completed":
                return found.get("outputs") or {}
            if found["status"] in ("failed", "cancelled"):
                raise ValueError(f"{found['status']}: {json.dumps(found.get('execution_error'))}")
            time.sleep(0.2)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


comfyui = ComfyUI()


@signals.worker_init.connect
def begin(**_: object) -> None:
    comfyui.start()


@signals.worker_shutdown.connect
def end(**_: object) -> None:
    comfyui.stop()


@app.task(bind=True, name="comfyui.run")
def run(self, prompt: dict) -> str:
    """Run a prompt under the task's id; the folder of its results."""
    job = str(self.request.id)
    target = RESULTS / job
    for attempt in range(3):
        if target.is_dir():  # published by a worker that died before it could say so
            return str(target)
        try:
            if self.request.delivery_info["routing_key"] == ANY:  # no worker was prepared for it
                _prepare(job, prompt)
            publish(comfyui.run(job, prompt), target)
        except LostError:
            if attempt == 2:
                raise
            comfyui.stop()
            comfyui.start()
    return str(target)


def _prepare(job: str, prompt: dict) -> None:
    file = WORK / f"{job}.json"
    file.write_text(json.dumps(prompt), encoding="utf-8")
    try:
        ready, said = check(file, "--download")
    finally:
        file.unlink()
    if not ready:
        raise ValueError(f"missing: {[row['missing'] for row in said['references'] if row['missing']]}")


def publish(outputs: dict, target: Path) -> None:
    """Copy what was written under another name, then show it whole; of two that did the same job the first is kept."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for items in (items for kinds in outputs.values() for items in kinds.values() if isinstance(items, list)):
        for item in items:
            if isinstance(item, dict) and item.get("type") == "output" and "filename" in item:
                place = Path(item.get("subfolder", ""), item["filename"])
                (partial / place.parent).mkdir(parents=True, exist_ok=True)
                shutil.copy2(WORK / "output" / place, partial / place)
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(partial)


def work(files: list[Path]) -> None:
    """Serve the jobs of these workflows' models, else all that no worker serves."""
    keys = []
    for file in files:
        ready, said = check(file, "--download")
        if not ready:
            raise SystemExit(f"not ready for {file}: {json.dumps(said['references'], indent=1)}")
        keys.append(said["affinity"])
    if keys:
        Redis.from_url(REDIS).sadd(POOLS, *keys)
    app.worker_main(["worker", "--loglevel", "INFO", "--queues", ",".join(dict.fromkeys(keys)) or ANY,
                     "--hostname", f"{WORK.name}@{socket.gethostname()}"])


def send(file: Path, job: str = "") -> str:
    """Queue a prompt; its id. The same id again is the same job: its results are those that are there."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the key alone is wanted: no hub is asked
    key = check(file)[1]["affinity"]
    queue = key if Redis.from_url(REDIS).sismember(POOLS, key) else ANY
    prompt = json.loads(file.read_text(encoding="utf-8"))
    return run.apply_async((prompt,), task_id=str(uuid.UUID(job) if job else uuid.uuid4()), queue=queue).id


if __name__ == "__main__":
    what, *given = sys.argv[1:] or [""]
    if what == "worker":
        work([Path(one) for one in given])
    elif what == "send":
        print(send(Path(given[0]), *given[1:]))
    else:
        sys.exit(__doc__)
