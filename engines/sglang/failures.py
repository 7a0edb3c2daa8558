"""What a server's failure means, and what to do (docs/servers.md, "When a job fails"). Its own words are handed on
where it has any."""

from __future__ import annotations

from typing import Any

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from . import client
from .address import TOKEN, Address
from .client import Answer

MOST = 2000  # letters of a server's words


async def failure(answer: Answer, address: Address, sent: str, do: str = "") -> CheckpointError:
    """The error for an answer that is no success. `sent` says what was asked for; `do` what to do where the server says
    what is wrong. Asks the server whether it still
    lives: the first request after a worker's death fails as any other."""
    words = _words(answer.body)
    if answer.status in (400, 422):
        return CheckpointError(Text("the server refuses this: {words}", words=words or Text("it does not say why")),
                               address.url, do or Text("change what it names"))
    if answer.status in (401, 403):
        return CheckpointError(Text("the server, or a proxy before it, wants a token"), address.url,
                               Text("set {variable}", variable=TOKEN))
    if answer.status == 404:
        return CheckpointError(Text("the server does not know this: {words}", words=words), address.url,
                               Text("it may have been restarted: queue it again"))
    try:
        _, problem = await client.health(address)
    except CheckpointError as error:
        return error
    if problem:
        return CheckpointError(problem, address.url, Text("start it again, then queue this again"))
    if isinstance(answer.body, dict) and words:
        return CheckpointError(Text("the server failed: {words}", words=words), address.url,
                               do or Text("look at its log"))
    return CheckpointError(Text("the server failed on this request ({status})", status=answer.status), address.url,
                           Text("its log says why; it was asked for {sent}", sent=sent))


def _words(body: Any) -> str:
    """A server's words, field by field: {"detail": text or [{"loc", "msg"}]}, {"error": text or {"message"}}, text."""
    if isinstance(body, dict):
        body = body.get("detail") or body.get("error") or body.get("message") or ""
    if isinstance(body, dict):
        body = body.get("message") or ""
    if isinstance(body, list):
        lines = []
        for one in body:
            place = one.get("loc") if isinstance(one, dict) else None
            names = [str(name) for name in place if name != "body"] if isinstance(place, list) else []
            message = one.get("msg") if isinstance(one, dict) else one
            lines.append(f"{'.'.join(names)}: {message}" if names else str(message))
        body = "; ".join(lines)
    return str(body)[:MOST]
