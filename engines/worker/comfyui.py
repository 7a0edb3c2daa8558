"""A ComfyUI of a worker's own: a process that ends with the worker, in a base directory of its own, whose models,
custom nodes and inputs are those of all workers."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...host.texts import Text

SHARED = ("models", "custom_nodes", "input")
# What a worker says itself, and nobody behind --.
OWN = ("--base-directory", "--port", "--listen", "--output-directory", "--temp-directory", "--user-directory",
       "--database-url", "--auto-launch", "--quick-test-for-ci")
_STARTS = 600  # seconds that no start takes longer than
# Asks the kernel, before ComfyUI is there, to end it with its parent (PR_SET_PDEATHSIG, Linux); not in a function
# between fork and exec, because Ray's processes have threads.
_BOUND = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class ComfyUI:
    """`main`: ComfyUI's folder; `shared`: the base directory that is everybody's; `base`: this one's, which is made."""

    def __init__(self, main: Path, shared: Path, base: Path, options: Sequence[str]) -> None:
        self.base = base
        base.mkdir(parents=True)
        for name in SHARED:
            if (shared / name).is_dir():
                (self.base / name).symlink_to((shared / name).absolute(), target_is_directory=True)
            else:
                (self.base / name).mkdir()  # ComfyUI wants one of custom_nodes
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = [str(main / "main.py"), *options, "--base-directory", str(self.base), "--listen", "127.0.0.1",
                        "--port", str(self.port),
                        "--database-url", f"sqlite:///{(self.base / 'comfyui.db').as_posix()}"]
        self.main, self.ending = main, False
        self.process: subprocess.Popen | None = None

    def start(self, ended: Callable[[], Any]) -> None:
        """Return when it answers. `ended` is called, in a thread, when it ends later on and nobody has stopped it."""
        begun, answers = threading.Event(), threading.Event()

        def keep() -> None:  # the signal comes when the *thread* ends that started a process: this one ends after it
            bound = ["-c", _BOUND, str(os.getpid())] if sys.platform == "linux" else []
            self.process = subprocess.Popen([sys.executable, *bound, *self.command], cwd=self.main)
            begun.set()
            self.process.wait()
            if answers.is_set() and not self.ending:
                ended()

        threading.Thread(target=keep, daemon=True).start()
        begun.wait()
        end = time.monotonic() + _STARTS
        while self.alive() and time.monotonic() < end:
            try:
                self.ask("/system_stats")
                answers.set()
                return
            except OSError:
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(Text("ComfyUI does not start; what it said is above"))

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """End it, and take its folder away."""
        self.ending = True
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        shutil.rmtree(self.base, ignore_errors=True)

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, JSON or else text) of a GET, or of a POST of `body`. Raises OSError without a whole answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body),
                               {"Content-Type": "application/json"})
            answer = connection.getresponse()
            status, said = answer.status, answer.read().decode(errors="replace")
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()
        try:
            return status, json.loads(said or "null")
        except ValueError:
            return status, said
