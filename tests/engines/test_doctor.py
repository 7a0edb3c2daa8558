"""`doctor --server`: what it says of answers such as SGLang's (specs: scale_out 2.2, taken down from the real server), and of others.
The real one is asked in test_server.py."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from quantized_transformers.engines.sglang import report
from support.pack import PACK

pytestmark = pytest.mark.host
NAME = "qt:black-forest-labs/FLUX.1-dev@0123456789ab+transformer=lmsys/x@0123456789ab"
MODELS = {"object": "list", "data": [{"id": NAME, "owned_by": "sglang", "root": "/x", "num_gpus": 2, "task_type": "T2I",
                                      "supported_task_types": ["T2I"], "dit_precision": "bf16"}]}
HEALTHY: dict[str, Any] = {"/health": (200, {"status": "ok"}), "/v1/models": (200, MODELS),
                           "/server_info": (200, {"model_path": "/x", "served_model_name": NAME, "version": "0.5.23"}),
                           "/v1/list_loras": (200, {"loaded_adapters": [], "active": {}})}


@contextmanager
def answering(answers: dict[str, Any], seen: Callable[[Any], None] = lambda request: None) -> Iterator[str]:
    """A server on this machine: path -> (status, JSON, text or bytes[, headers])."""
    from aiohttp import web

    async def handle(request: web.Request) -> web.Response:
        seen(request)
        status, body, *more = answers.get(request.path, (404, "no"))
        if isinstance(body, float):
            await asyncio.sleep(body)
        if isinstance(body, bytes):
            return web.Response(status=status, body=body)
        return web.Response(status=status, text=body if isinstance(body, str) else json.dumps(body), headers=more[0] if more else {})

    loop, ready, port = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> None:
        app = web.Application()
        app.router.add_route("*", "/{any:.*}", handle)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port.append(runner.addresses[0][1])
        ready.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def said(found: dict[str, Any]) -> str:
    return "\n".join(f"{check['level']}: {check['what']} {check['do']}" for check in found["checks"])


def test_a_healthy_server_with_a_name_of_serves():
    with answering(HEALTHY) as url:
        found = report.of_server(url)
        assert found == {"url": url, "healthy": True, "identity": NAME, "version": "0.5.23", "num_gpus": 2, "tasks": ["T2I"], "loras": {},
                         "checks": []}
        done = subprocess.run([sys.executable, str(PACK), "doctor", "--server", url, "--json"], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and json.loads(done.stdout) == found
        text = subprocess.run([sys.executable, str(PACK), "doctor", "--server", url], capture_output=True, text=True, check=False)
        assert f"identity: {NAME}" in text.stdout


@pytest.mark.parametrize("changes, healthy, words", [
    ({"/v1/models": (200, {"data": [{**MODELS["data"][0], "id": "FLUX.1-dev"}]})}, True, "does not say what it serves"),
    ({"/server_info": (200, {"version": "0.6.1"})}, True, "this is SGLang 0.6.1"),
    ({"/v1/list_loras": (200, {"active": {"transformer": [{"nicknames": ["a"]}]}})}, True, "LoRAs are on"),
    ({"/v1/list_loras": (500, {"detail": "Lora is not enabled"})}, True, ""),  # as of a pipeline that takes none
    ({"/v1/list_loras": (500, "x")}, False, "does not answer as SGLang does"),
    ({"/health": (503, "")}, False, "still warming up"),
    ({"/health": (503, {"status": "unhealthy", "error": "Scheduler worker exited; restart the server."})}, False, "its workers died"),
    ({"/health": (401, "")}, False, "wants a token"), ({"/health": (404, "")}, False, "answers 404"),
    ({"/health": (302, "", {"Location": "http://127.0.0.1:1/"})}, False, "does not answer as SGLang does"),
    ({"/v1/models": (200, "<html>")}, False, "does not answer as SGLang does"), ({"/v1/models": (200, {"data": []})}, False, "does not answer"),
    ({"/v1/models": (200, "[" * 100_000)}, False, "does not answer"), ({"/v1/models": (200, b"x" * (2 << 20))}, False, "does not answer"),
    ({"/server_info": (200, [1])}, False, "does not answer")])
def test_other_answers(changes, healthy, words):
    with answering({**HEALTHY, **changes}) as url:
        found = report.of_server(url)
        assert found["healthy"] is healthy and words in said(found)
        assert (found["identity"] != "") == healthy


def test_one_that_does_not_answer_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(report.client, "SECONDS", 0.5)
    monkeypatch.setitem(report.client.ask.__kwdefaults__, "seconds", 0.5)
    with answering({**HEALTHY, "/v1/models": (200, 30.0)}) as url:
        start = time.monotonic()
        found = report.of_server(url)
        assert not found["healthy"] and "did not answer within" in said(found) and time.monotonic() - start < 10


def test_nobody_there():
    found = report.of_server("http://127.0.0.1:1")
    assert not found["healthy"] and "there is no server" in said(found) and "serve BASE --override REF --run" in said(found)


def test_the_token_goes_to_the_server_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("QT_SERVER_TOKEN", "secret-of-mine")
    asked: list[str] = []
    with answering(HEALTHY, lambda request: asked.append(request.headers.get("Authorization", ""))) as url:
        found = report.of_server(url)
    assert set(asked) == {"Bearer secret-of-mine"} and "secret" not in json.dumps(found)


def test_a_list_of_names(monkeypatch):
    with answering(HEALTHY) as url:
        monkeypatch.setenv("QT_SERVERS", f"flux={url}")
        assert report.of_server("flux")["url"] == url
        monkeypatch.setenv("QT_SERVER_URL", url)
        assert report.of_server("")["url"] == url
