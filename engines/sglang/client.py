"""What a server says of itself. Nothing here follows a redirect, or says a token."""

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
    """Status, and the body as JSON or text."""

    status: int
    body: Any


class State(NamedTuple):
    """What a healthy server says. `name` is its served model name, `identity` what it means, where `serve` gave it."""

    name: str
    identity: Identity | None
    version: str
    gpus: int
    tasks: tuple[str, ...]
    loras: dict[str, Any]


def headers() -> dict[str, str]:
    """The token of QT_SERVER_TOKEN, where there is one."""
    token = os.environ.get(TOKEN, "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


async def get(address: Address, path: str, seconds: float = SECONDS) -> Answer:
    """One GET. Raises CheckpointError where nobody answers, or too much comes."""
    import aiohttp

    try:
        timeout = aiohttp.ClientTimeout(total=seconds)
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers(), trust_env=False) as session,
            session.get(f"{address.url}{path}", allow_redirects=False) as response,
        ):
            body = await response.content.read(LARGEST + 1)
            while len(body) <= LARGEST and (more := await response.content.read(LARGEST + 1 - len(body))):
                body += more
            status = response.status
    except asyncio.TimeoutError:
        raise CheckpointError(
            Text("the server did not answer within {seconds:g} s", seconds=seconds),
            address.url,
            Text("while it warms up only /health answers; else look at its log"),
        ) from None
    except (aiohttp.ClientError, OSError) as error:
        raise CheckpointError(
            Text("there is no server: {error}", error=type(error).__name__),
            address.url,
            Text("start one with `serve BASE --override REF --run`, or set {variable}", variable=URL),
        ) from error
    if len(body) > LARGEST or 300 <= status < 400:
        raise CheckpointError(Text("this does not answer as SGLang does"), address.url, Text("correct the address"))
    text = body.decode("utf-8", "replace")
    try:
        return Answer(status, json.loads(text))
    except (ValueError, RecursionError):
        return Answer(status, text)


async def health(address: Address) -> str:
    """Empty where a server is healthy, "warming" while it is not yet, else why it is not."""
    status, body = await get(address, "/health")
    if status == 200:
        return ""
    if status == 503 and isinstance(body, dict) and body.get("error"):
        return Text("its workers died; restart it: its log has the cause ({error})", error=str(body["error"])[:200])
    if status == 503:
        return Text("it is still warming up")
    if status in (401, 403):
        return Text("it, or a proxy before it, wants a token: set {variable}", variable=TOKEN)
    return Text("it answers {status} to /health", status=status)


async def state(address: Address) -> State:
    """What a healthy server serves. Raises CheckpointError where it is not healthy, or no such server."""
    if problem := await health(address):
        raise CheckpointError(problem, address.url, Text("wait, or look at its log"))
    models, info, loras = [await get(address, path) for path in ("/v1/models", "/server_info", "/v1/list_loras")]
    try:
        model = models.body["data"][0]
        name, tasks = (
            str(model["id"]),
            tuple(map(str, model.get("supported_task_types") or [model.get("task_type")])),
        )
        gpus, version = int(model.get("num_gpus") or 1), str(info.body.get("version", ""))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise CheckpointError(
            Text("this does not answer as SGLang does"),
            address.url,
            Text("this pack was tried with SGLang {version}", version=known.VERSION),
        ) from None
    active = loras.body.get("active") if loras.status == 200 and isinstance(loras.body, dict) else None
    return State(name, parse(name), version, gpus, tasks, active if isinstance(active, dict) else {})
