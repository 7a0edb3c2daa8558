"""A fleet of real ComfyUI workers on a real Ray, on this CPU (`python3 dev.py test fleet`)."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import needs
from .pack import COMFYUI, PACK
from .server import free_port

# Waits as a node on a GPU does, and says of every run that it begins, in a folder that all workers share.
SLEEP = '''
import os
import time

import folder_paths
from comfy.model_management import throw_exception_if_processing_interrupted


class Sleep:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "wait", "tests", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seconds": ("FLOAT", {"default": 1.0, "min": -1.0}), "number": ("INT", {"default": 0})}}

    def wait(self, seconds, number):
        with open(os.path.join(folder_paths.models_dir, "runs.txt"), "a") as runs:
            runs.write(f"{number}\\n")
        if seconds < 0:
            raise ValueError("no time goes back")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)
            throw_exception_if_processing_interrupted()
        folder = os.path.join(folder_paths.get_output_directory(), "slept")
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f"{number}.txt"), "w") as file:
            file.write(f"{seconds}")
        return {"ui": {"files": [{"filename": f"{number}.txt", "subfolder": "slept", "type": "output"}]}}


NODE_CLASS_MAPPINGS = {"QTTest_Sleep": Sleep}
'''
Prompt = dict[str, Any]


def program(name: str) -> str:
    """Of the environment that dev.py made."""
    if not os.environ.get("QT_FLEET"):
        needs.missing("python3 dev.py test fleet makes what this needs")
    return str(Path(os.environ["QT_FLEET"]) / "bin" / name)


def sleep(number: int, seconds: float | str = 0.1, **more: Any) -> Prompt:
    return {"1": {"class_type": "QTTest_Sleep", "inputs": {"seconds": seconds, "number": number}}, **more}


def model(name: str) -> Prompt:
    """A node that says which model a job needs. Nothing hangs on it, so nothing is loaded."""
    return {"2": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}}}


def until(what: Callable[[], Any], seconds: float, tell: Callable[[], str] = lambda: "") -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, tell()
        time.sleep(0.1)
    return found


def runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Fleet:
    """`with Fleet(folder, "--workers", "2") as fleet:` starts `python <pack> fleet` and waits for its workers."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.base, self.results, self.log, self.port = folder / "base", folder / "results", folder / "fleet.log", free_port()
        self.options, self.temp = options, folder / "temp"

    def __enter__(self) -> Fleet:
        self.temp.mkdir()
        self.sessions = tempfile.TemporaryDirectory(prefix="qt-")  # Ray's; paths of sockets must be short
        command = [program("python"), str(PACK), "fleet", "--gpus-per-worker", "0", "--base-directory", str(self.base),
                   "--results", str(self.results), "--port", str(self.port), *self.options, "--", "--disable-api-nodes"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=self.base, env={
                **os.environ, "COMFYUI_PATH": str(COMFYUI), "TMPDIR": str(self.temp), "RAY_TMPDIR": self.sessions.name,
                "RAY_DEDUP_LOGS": "0"})
        until(lambda: "jobs at http" in self.text() or self.process.poll() is not None, 240, lambda: self.text()[-6000:])
        assert self.process.poll() is None, self.text()[-6000:]
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it, and sees that nothing is left."""
        comfyuis = [pid for pid, _ in self.comfyuis().values()]
        self.process.terminate()
        try:
            assert self.process.wait(60) == 0
        finally:
            self.process.kill()
        until(lambda: not any(map(runs, comfyuis)), 10, lambda: "a ComfyUI is left")
        assert not list(self.temp.glob("qt-fleet-*"))
        self.sessions.cleanup()

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def request(self, path: str, body: Any = None) -> tuple[int, bytes]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", None if body is None else json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def json(self, path: str, body: Any = None) -> tuple[int, Any]:
        status, answer = self.request(path, body)
        return status, json.loads(answer)

    def send(self, prompt: Prompt, job: str = "") -> str:
        job = job or str(uuid.uuid4())
        assert self.json("/jobs", {"prompt": prompt, "prompt_id": job}) == (202, {"prompt_id": job})
        return job

    def known(self, job: str) -> dict[str, Any]:
        status, found = self.json(f"/jobs/{job}")
        assert status == 200, found
        return found

    def finish(self, *jobs: str, seconds: float = 120) -> list[dict[str, Any]]:
        """What is known of jobs when all are over."""
        return until(lambda: (found := [self.known(job) for job in jobs])
                     and all(one["status"] not in ("pending", "in_progress") for one in found) and found,
                     seconds, lambda: self.text()[-6000:])

    def files(self, job: str) -> list[str]:
        return sorted(path.relative_to(self.results / job).as_posix() for path in (self.results / job).rglob("*.*"))

    def comfyuis(self) -> dict[str, tuple[int, int]]:
        """Worker -> (process of its ComfyUI, process of the worker)."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_text().split("\0")
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except OSError:
                    continue
                base = words[words.index("--base-directory") + 1] if "--base-directory" in words else ""
                if base.startswith(f"{self.temp}/qt-fleet-"):
                    found[Path(base).name] = (int(entry.name), parent)
        return found

    def door(self) -> int:
        """The process that takes jobs."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if (entry / "cmdline").read_bytes().startswith(b"ray::ServeReplica:fleet:door") and \
                            self.sessions.name.encode() in (entry / "environ").read_bytes():
                        return int(entry.name)
                except OSError:
                    continue
        raise AssertionError("there is no door")

    def answers(self) -> bool:
        try:
            return self.request("/health")[0] == 200
        except OSError:
            return False

    def runs_of(self, number: int) -> int:
        """How often a job was begun."""
        file = self.base / "models" / "runs.txt"
        return file.read_text().split().count(str(number)) if file.is_file() else 0
