"""ModelScope's API over HTTP (docs/sources/modelscope.md, "The API"): which sites, what they refuse, and why."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from ....host.texts import Text

SITES = ("https://modelscope.cn", "https://www.modelscope.ai")  # one API, and other repos
# What may be over in a second. Failures of the disk are none of these.
BROKEN = (URLError, ConnectionError, TimeoutError, ssl.SSLError, HTTPException)
_NO_ACCESS, _NO_REVISION = 10010200001, 10990101004
_PATIENCE = 30  # seconds without a byte
_BLOCK = 1 << 20


class OfflineError(OSError):
    """Nothing was asked: the environment forbids it."""


class RefusedError(OSError):
    """An answer that says no; `code` is the API's own number, or the status of HTTP."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.no_access = code in (_NO_ACCESS, 401, 403)
        self.no_revision = code == _NO_REVISION
        self.no_repo = code == 404 or code > 10**9 and not self.no_access and not self.no_revision
        self.busy = code == 429 or 500 <= code < 600


def sites() -> tuple[str, ...]:
    """The one that its client's variables name, else both, the preferred one first."""
    named = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or ""
    if named:
        return (f"{'' if '://' in named else 'https://'}{named}".rstrip("/"),)
    return SITES[::-1] if os.environ.get("MODELSCOPE_PREFER_AI_SITE", "").lower() in ("1", "true") else SITES


def data(path: str, query: Mapping[str, str]) -> dict[str, Any]:
    """The "Data" of an answer in JSON. Raises RefusedError, also for a refusal that comes with status 200."""
    with ask(path, query) as answer:
        try:
            body = json.load(answer)
            code, found = int(body["Code"]), body.get("Data")
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise RefusedError(0, Text("the answer is not that of its API")) from error
    if code != 200 or not isinstance(found, dict):
        raise RefusedError(code, str(body.get("Message")))
    return found


def ask(path: str, query: Mapping[str, str], start: int = 0) -> HTTPResponse:
    """The answer of the first site that has the repo. The token goes to the site alone, not where it redirects to.

    With `start` only the bytes from there are asked for; `continues` says whether they came. Raises RefusedError, or
    one of BROKEN.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OfflineError
    token, refused = os.environ.get("MODELSCOPE_API_TOKEN"), RefusedError(404, Text("there is no site to ask"))
    for number, site in enumerate(sites()):
        request = Request(f"{site}/api/v1/models/{quote(path)}?{urlencode(query)}",
                          headers={"User-Agent": "quantized_transformers"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
            request.add_unredirected_header("Cookie", f"m_session_id={token}")
        try:
            answer: HTTPResponse = urlopen(request, timeout=_PATIENCE, context=_certificates())
            return answer
        except HTTPError as error:
            found = _refusal(error)
        if not found.no_repo:
            raise found
        refused = refused if number else found
    raise refused


def continues(answer: HTTPResponse, start: int) -> bool:
    """Whether an answer begins at `start`. Its status does not tell: the API says 200 of a part, too."""
    return not start or (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-")


def blocks(answer: HTTPResponse, size: int) -> Iterator[bytes]:
    """The bytes of an answer, `size` at most; fewer where the connection ended."""
    while size and (block := answer.read(min(_BLOCK, size))):
        size -= len(block)
        yield block


def _refusal(error: HTTPError) -> RefusedError:
    """By the API's own number, where it gives one: its status is 404 for everything that it does not give away."""
    with error, suppress(ValueError, TypeError, LookupError, OSError, HTTPException):
        body = json.loads(error.read(1 << 16))
        if error.code < 500:
            return RefusedError(int(body["Code"]), str(body.get("Message")))
    return RefusedError(error.code, f"HTTP {error.code} {error.reason}")


@cache
def _certificates() -> ssl.SSLContext:
    """The system's, and certifi's where it is: Python on macOS finds none of the system's."""
    context = ssl.create_default_context()
    with suppress(ImportError):
        import certifi

        context.load_verify_locations(certifi.where())
    return context
