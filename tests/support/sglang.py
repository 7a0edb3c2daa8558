"""SGLang: its server on this CPU, its own reading of arguments, and its own models of requests (`dev.py test server`)."""

from __future__ import annotations

import ast
import base64
import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipimport
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support import needs

MISSING = "python3 dev.py test server makes what this needs"
OPENAI = "sglang/multimodal_gen/runtime/entrypoints/openai"  # in its wheel
# One thread: SGLang, too, runs beside what a test does. Nothing is fetched.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
PARSER = """
import contextlib, dataclasses, io, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # where SGLang logs
from sglang.multimodal_gen.runtime.server_args import prepare_server_args
for line in sys.stdin:
    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            found = prepare_server_args(json.loads(line))
        answer = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        answer["pipeline_config"] = type(found.pipeline_config).__name__
    except (Exception, SystemExit) as error:
        answer = {"error": " ".join([*usage.getvalue().splitlines()[-1:], str(error)])}
    print(json.dumps(answer, default=str), file=answers, flush=True)
"""


def missing() -> None:
    """Skip or fail a test of SGLang's."""
    needs.missing(MISSING)


def folder() -> Path | None:
    """Where dev.py put the wheel, and the environment in which the server runs."""
    return Path(os.environ["QT_SGLANG"]) if os.environ.get("QT_SGLANG") else None


def program(name: str) -> Path | None:
    """"python" or "sglang" of that environment; None where it was not built."""
    path = (folder() or Path()) / "env" / "bin" / name
    return path if folder() and path.is_file() else None


def module(name: str, place: str = OPENAI) -> ModuleType:
    """A file that needs no more than pydantic, read from the wheel."""
    spec = _of_wheel(place).find_spec(name)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, found)  # where dataclasses look their own module up
        spec.loader.exec_module(found)
    return found


def parameters(file: str, function: str) -> set[str]:
    """The names of a form that a route of OPENAI takes: its function's arguments, read from the wheel."""
    tree = ast.parse(_of_wheel(OPENAI).get_source(file) or "")
    found, = (node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef) and node.name == function)
    return {argument.arg for argument in found.args.args}


def _of_wheel(place: str) -> zipimport.zipimporter:
    root = folder()
    assert root, MISSING
    wheel, = root.glob("sglang-*.whl")
    return zipimport.zipimporter(f"{wheel}/{place}")


class Parser:
    """`with Parser() as parse: parse(argv)` is SGLang's own reading of the arguments after `sglang serve`: the fields of
    its ServerArgs, with the name of the pipeline's settings; or {"error": why it would not start}."""

    def __enter__(self) -> Parser:
        self.process = subprocess.Popen([str(program("python")), "-c", PARSER], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
                                        env={**os.environ, **ENVIRONMENT})
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def __call__(self, argv: Sequence[str]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(list(argv)), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def free_ports(count: int) -> int:
    """The first of so many loopback ports in a row that nobody listens at, below those that systems give to connections:
    one of these might have it when a server starts again."""
    while True:
        first = random.randrange(20000, 32000)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for at in range(count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", first + at))
            return first


def command(model: Path, *more: str, replicas: int = 1, port: int = 0) -> tuple[int, list[str]]:
    """(port, the whole command) of a server of `model` on ports of its own, or from `port` on: SGLang takes the one after
    its own for a broker, one for each replica's scheduler, and one where ranks meet."""
    port = port or free_ports(3 + replicas)
    return port, [str(program("sglang")), "serve", "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port),
                  "--scheduler-port", str(port + 2), "--master-port", str(port + 2 + replicas), "--strict-ports",
                  "--warmup-mode", "off", "--sleep-on-idle", *more]


class Server:
    """`with Server(folder, port, command) as server:` starts SGLang in `folder` and waits until it can draw."""

    def __init__(self, folder: Path, port: int, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.folder, self.port, self.command, self.env = folder, port, list(command), dict(env or {})
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "sglang.log"

    def __enter__(self) -> Server:
        with open(self.log, "wb") as log:  # a session of its own: __exit__ ends it with all that it started
            self.process = subprocess.Popen(self.command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT,
                                            env={**os.environ, **ENVIRONMENT, **self.env}, start_new_session=True)
        problem, deadline = "did not answer within 300 s", time.time() + 300
        while time.time() < deadline:
            if self.process.poll() is not None:
                problem = f"stopped with {self.process.returncode}"
                break
            with contextlib.suppress(OSError):
                if self.request("/health")[0] == 200:
                    return self
            time.sleep(0.2)
        self.__exit__()
        raise RuntimeError(f"SGLang {problem}:\n{self.text()[-6000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def request(self, path: str, body: dict | None = None, timeout: float = 120) -> tuple[int, Any]:
        """(status, JSON or text) of a GET, or of a POST of `body`."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                status, kind, answer = response.status, response.headers.get_content_type(), response.read()
        except urllib.error.HTTPError as error:
            status, kind, answer = error.code, error.headers.get_content_type(), error.read()
        return status, json.loads(answer) if kind == "application/json" else answer.decode()

    def picture(self, **fields: Any) -> bytes:
        """The bytes of one picture's file, by a request of just these fields."""
        status, answer = self.request("/v1/images/generations", {"response_format": "b64_json", **fields})
        assert status == 200, f"{answer}\n{self.text()[-3000:]}"
        one, = answer["data"]
        return base64.b64decode(one["b64_json"])
