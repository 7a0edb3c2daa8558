"""ModelScope's API over HTTP (docs/sources/modelscope.md, "The API"): which sites, what they refuse, and why."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote, urlencode

from ....host.texts import Text
from .http import Answer, BrokenError, RefusedError, Step, StrangeError, ask

SITES = ("https://modelscope.cn", "https://www.modelscope.ai")  # one API, and other repos
_NO_ACCESS, _NO_REVISION = 10010200001, 10990101004


def sites() -> tuple[str, ...]:
    """The one that its client's variables name, else both, the preferred one first."""
    named = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or ""
    if named:
        return (f"{'' if '://' in named else 'https://'}{named}".rstrip("/"),)
    return SITES[::-1] if os.environ.get("MODELSCOPE_PREFER_AI_SITE", "").lower() in ("1", "true") else SITES


def data(path: str, query: Mapping[str, str], step: Step) -> dict[str, Any]:
    """The "Data" of an answer in JSON. Raises RefusedError, also for a refusal that comes with status 200."""
    with asked(path, query, step) as answer:
        body = answer.json()
    if not isinstance(body, dict) or type(body.get("Code")) is not int:
        raise StrangeError(Text("it is not that of its API"))
    if body["Code"] != 200:
        raise _refusal(body["Code"], body.get("Message"))
    if not isinstance(body.get("Data"), dict):
        raise StrangeError(Text("it is not that of its API"))
    found: dict[str, Any] = body["Data"]
    return found


@contextmanager
def asked(path: str, query: Mapping[str, str], step: Step, start: int = 0) -> Iterator[Answer]:
    """The answer of the first site that has the repo, with `start` for the bytes from there. Raises RefusedError and
    the other failures of http.py."""
    headers = {"User-Agent": "quantized_transformers"}
    if token := os.environ.get("MODELSCOPE_API_TOKEN", "").strip():
        headers |= {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
    refused: RefusedError | None = None
    for site in sites():
        with ask(f"{site}/api/v1/models/{quote(path)}?{urlencode(query)}", headers, step, start) as answer:
            if answer.status in (200, 206):
                yield answer
                return
            found = _said(answer)
        if found.kind != "repo":
            raise found
        refused = refused or found
    raise refused or RefusedError(Text("there is no site to ask"), "repo")


def _said(answer: Answer) -> RefusedError:
    """By the API's own number, where it gives one: its status is 404 for everything that it does not give away."""
    with suppress(StrangeError, BrokenError):
        body = answer.json() if answer.status < 500 else None
        if isinstance(body, dict) and type(body.get("Code")) is int:
            return _refusal(body["Code"], body.get("Message"))
    return _refusal(answer.status, None)


def _refusal(code: int, message: Any) -> RefusedError:
    """`code` is the API's own number, or the status of HTTP."""
    kind = "access" if code in (_NO_ACCESS, 401, 403) else "revision" if code == _NO_REVISION else \
        "repo" if code == 404 or code > 10**9 else ""
    return RefusedError(" ".join(str(message or f"HTTP {code}").split())[:200], kind, code == 429 or 500 <= code < 600)
