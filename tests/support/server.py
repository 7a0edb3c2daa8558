"""A real ComfyUI server in its own process, with this pack (and the test-only nodes) in custom_nodes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from .pack import COMFYUI, PACK

TEST_NODES = Path(__file__).resolve().parent / "test_nodes"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """`with Server(base) as server:` starts ComfyUI on a free loopback port and waits until it answers."""

    def __init__(self, base: Path, *options: str, pack: bool = True, env: dict[str, str] | None = None) -> None:
        self.base, self.options, self.pack, self.env = base, options, pack, env or {}
        self.port = free_port()
        self.log = base / "server.log"

    def __enter__(self) -> Server:
        sys.path.append(str(PACK))
        from dev import link_pack

        (self.base / "custom_nodes").mkdir(parents=True, exist_ok=True)
        if self.pack:
            link_pack(self.base / "custom_nodes")
            target = self.base / "custom_nodes" / "test_nodes"
            target.mkdir(exist_ok=True)
            (target / "__init__.py").write_text((TEST_NODES / "__init__.py").read_text(encoding="utf-8"),
                                                encoding="utf-8")
        command = [sys.executable, str(COMFYUI / "main.py"), "--cpu", "--base-directory", str(self.base), "--listen",
                   "127.0.0.1", "--port", str(self.port), "--disable-api-nodes", "--database-url",
                   f"sqlite:///{(self.base / 'comfyui.db').as_posix()}", "--dont-print-server", *self.options]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=COMFYUI, stdout=log, stderr=subprocess.STDOUT,
                                            env={**os.environ, "PYTHONUTF8": "1", **self.env})
        deadline = time.time() + 120
        while time.time() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI stopped with {self.process.returncode}:\n{self.text()[-4000:]}")
            try:
                self.get("/system_stats")
                return self
            except OSError:
                time.sleep(0.1)
        self.__exit__()
        raise RuntimeError(f"ComfyUI did not answer within 120 s:\n{self.text()[-4000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return json.loads(response.read())

    def post(self, path: str, body: dict) -> tuple[int, dict]:
        """(status, JSON) of a POST; an HTTP error is an answer too."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def run(self, workflow: dict, timeout: float = 120) -> dict:
        """Queue an API workflow and wait for its history entry. A prompt that is refused raises AssertionError."""
        status, answer = self.post("/prompt", {"prompt": workflow})
        assert status == 200 and not answer.get("node_errors"), answer
        return self.wait_for(answer["prompt_id"], timeout)

    def wait_for(self, prompt: str, timeout: float = 120) -> dict:
        """The history entry of a prompt that was queued."""
        deadline = time.time() + timeout
        while time.time() < deadline:
            history = self.get(f"/history/{prompt}")
            if prompt in history:
                return history[prompt]
            time.sleep(0.05)
        raise TimeoutError(f"the workflow did not finish in {timeout} s:\n{self.text()[-3000:]}")


def error_of(history: dict) -> str:
    """The message of the execution error in a history entry, or an empty string."""
    return next((data["exception_message"] for kind, data in history["status"]["messages"]
                 if kind == "execution_error"), "")


def outputs(server: Server, history: dict, kind: str) -> list[Path]:
    """Files of an output kind ("images", "latents") that a finished workflow wrote; previews in temp included."""
    return [server.base / item["type"] / item["subfolder"] / item["filename"]
            for output in history["outputs"].values() for item in output.get(kind, [])]
