"""Questions to a server, and what it says of itself. Nothing here follows a redirect, or says a token."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any, NamedTuple

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from . import known
from .address import TOKEN, URL, Address
from .identity import Identity, parse

SECONDS = 10.0  # for an answer that needs no picture
LARGEST = 1 << 20  # bytes of such an answer


class Answer(NamedTuple):
    """Status, and the body: JSON, text, or bytes where they were asked for."""

    status: int
    body: Any


class State(NamedTuple):
    """What a healthy server says. `name` is its served model name, `identity` what it means, where `serve` gave it.
    `path` is where its base lies, on its own machine; `pipeline` the class that draws."""

    name: str
    identity: Identity | None
    version: str
    gpus: int
    tasks: tuple[str, ...]
    path: str = ""
    pipeline: str = ""


class Silent(CheckpointError):  # noqa: N818  # as MissingFiles: what a server does
    """No answer came in time."""


def headers() -> dict[str, str]:
    """The token of QT_SERVER_TOKEN, where there is one."""
    token = os.environ.get(TOKEN, "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


async def ask(address: Address, path: str, *, method: str = "GET", json_body: Any = None, form: Any = None,
              seconds: float = SECONDS, largest: int = LARGEST, raw: bool = False) -> Answer:
    """One question, with a JSON body or a form (aiohttp.FormData). With `raw` the body of a success stays bytes.

    Raises CheckpointError where nobody answers, or more than `largest` bytes come; Silent where nothing comes in time.
    """
    import aiohttp

    try:
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=min(seconds, SECONDS))
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers(), trust_env=False) as session,
            session.request(method, f"{address.url}{path}", json=json_body, data=form,
                            allow_redirects=False) as response,
        ):
            status, body = response.status, bytearray()
            async for piece in response.content.iter_chunked(1 << 16):
                body += piece
                if len(body) > largest:
                    break
    except asyncio.TimeoutError:
        raise Silent(Text("the server did not answer within {seconds:g} s", seconds=seconds), address.url,
                     Text("while it warms up only /health answers; else look at its log")) from None
    except (aiohttp.ClientError, OSError) as error:
        raise CheckpointError(
            Text("there is no server: {error}", error=type(error).__name__), address.url,
            Text("start one with `serve BASE --override REF --run`, or set {variable}", variable=URL)) from None
    if len(body) > largest or 300 <= status < 400:
        raise not_sglang(address)
    if raw and status == 200:
        return Answer(status, bytes(body))
    text = body.decode("utf-8", "replace")
    try:
        return Answer(status, json.loads(text))
    except (ValueError, RecursionError):
        return Answer(status, text)


def not_sglang(address: Address) -> CheckpointError:
    """For an answer that SGLang would not give."""
    return CheckpointError(Text("this does not answer as SGLang does"), address.url,
                           Text("correct the address; this pack was tried with SGLang {version}",
                                version=known.VERSION))


async def health(address: Address) -> tuple[bool, str]:
    """(whether to wait: it is warming up, why it cannot draw now; empty where it can)."""
    status, body = await ask(address, "/health")
    if status == 200:
        return False, ""
    if status == 503 and isinstance(body, dict) and body.get("error"):
        return False, Text("its workers died; restart it: its log has the cause ({error})",
                           error=str(body["error"])[:200])
    if status == 503:
        return True, Text("it is still warming up")
    if status in (401, 403):
        return False, Text("it, or a proxy before it, wants a token: set {variable}", variable=TOKEN)
    return False, Text("it answers {status} to /health", status=status)


async def state(address: Address) -> State:
    """What a healthy server serves. Raises CheckpointError where it is not healthy, or no such server."""
    _, problem = await health(address)
    if problem:
        raise CheckpointError(problem, address.url, Text("wait, or look at its log"))
    models, info = await ask(address, "/v1/models"), await ask(address, "/server_info")
    try:
        model = models.body["data"][0]
        tasks = tuple(map(str, model.get("supported_task_types") or [model.get("task_type")]))
        return State(str(model["id"]), parse(str(model["id"])), str(info.body.get("version", "")),
                     int(model.get("num_gpus") or 1), tasks, str(info.body.get("model_path", "")),
                     str(model.get("pipeline_name") or ""))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise not_sglang(address) from None


async def loras(address: Address, seconds: float = SECONDS) -> dict[str, Any]:
    """The LoRAs that are on, by transformer; a server tells it between two pictures, and a pipeline that takes none
    answers with an error. Raises Silent where that takes longer than `seconds`, CheckpointError for a dead server."""
    status, body = await ask(address, "/v1/list_loras", seconds=seconds)
    active = body.get("active") if status == 200 and isinstance(body, dict) else None
    if isinstance(active, dict):
        return active
    _, problem = await health(address)
    if problem:
        raise CheckpointError(problem, address.url, Text("look at its log"))
    if status == 500 and isinstance(body, dict) and "detail" in body:
        return {}
    raise not_sglang(address)
