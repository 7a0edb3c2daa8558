"""Hugging Face's Xet storage, where hf_xet is installed: the bytes of a file in order, into the file of ours, so that
hash, progress and Cancel are those of any download.

What it does not bring is left to HTTP, which goes on from there. How much that is the length tells: a stream of hf_xet
1.8 may end early without an error. Files of more than 50 GB begin this way or not at all. It comes in blocks of 64 MB,
and of a block on its way nothing is known: where one takes longer than a moment, HTTP shows what comes.
"""

from __future__ import annotations

import logging
import re
import time
from contextlib import suppress
from functools import cache
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

from ..hub_file import HashedFile, RemoteFile
from . import http

logger = logging.getLogger(__name__)
_PATIENCE = 10  # seconds without a block: a link for HTTP
_REST = 600  # seconds for which such a link is not tried again
# One try and a short wait for a connection, instead of minutes: there is HTTP.
_CONFIG = {"client.retry_max_attempts": 1, "client.connect_timeout": "10s"}
_failed: set[str] = set()  # the token routes, one for each repo and commit, that have once brought less than a file
_rests = 0.0  # until when


def transfer(url: str, headers: dict[str, str], file: RemoteFile, target: HashedFile) -> None:
    """Write as much of a file, from its start, as Xet brings; nothing of one that is not there. Raises what `target`
    raises."""
    global _rests
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_XET or len(file.digest) != 64 or time.monotonic() < _rests:  # small files are in git
        return
    try:
        session = _session()
    except Exception as error:  # not there, of another version, not of this machine
        logger.debug("no Xet: %s", error)
        return
    route, stored = _found(url, headers, target)
    if not route or route in _failed:
        return
    token = {name: value for name, value in headers.items() if name.lower() == "authorization"}
    stream = _Stream(session, route, token, stored, file.size)
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                block = stream.arrived.get(timeout=0.25)
            except Empty:
                target.step(0)  # hears Cancel
                if time.monotonic() > deadline:
                    _rests = time.monotonic() + _REST
                    break
                continue
            if not block:
                break
            target.write(block)
            deadline = time.monotonic() + _PATIENCE
    finally:
        stream.close()
    if target.tell() < file.size:
        _failed.add(route)
        logger.info("Xet brought %d of %d bytes of %s; the rest comes by HTTP", target.tell(), file.size, url)


def _found(url: str, headers: dict[str, str], target: HashedFile) -> tuple[str, str]:
    """(token route, hash) of a file; empty for one that is not in Xet. The route is given the token, and is on the host
    that was asked, or none."""
    from huggingface_hub import constants

    try:
        with http.ask(url, headers, target.step, method="HEAD") as answer:
            found, stored = answer.headers, answer.headers.get("X-Xet-Hash") or ""
    except (http.BrokenError, http.StrangeError) as error:  # HTTP meets it, too, or works
        logger.debug("no Xet for %s: %s", url, error)
        return "", ""
    linked = re.search(r'<([^<>]+)>\s*;\s*rel="?xet-auth"?', found.get("Link") or "")
    route = linked[1] if linked else found.get("X-Xet-Refresh-Route") or ""
    home = constants.HUGGINGFACE_CO_URL_HOME
    if route.startswith(home):
        route = constants.ENDPOINT.rstrip("/") + "/" + route.removeprefix(home)
    with suppress(ValueError):
        if urlsplit(route)[:2] == urlsplit(url)[:2] and re.fullmatch(r"[0-9a-f]{64}", stored):
            return route, stored
    return "", ""


class _Stream:
    """Blocks of a file in `arrived`, an empty one at the end."""

    def __init__(self, session: Any, route: str, token: dict[str, str], stored: str, size: int) -> None:
        self.arrived: Queue[bytes] = Queue(2)
        self._gone, self._groups = Event(), list[Any]()
        Thread(target=self._pump, args=(session, route, token, stored, size), name="qt-xet", daemon=True).start()

    def close(self) -> None:
        self._gone.set()
        for group in self._groups:
            group.abort()

    def _pump(self, session: Any, route: str, token: dict[str, str], stored: str, size: int) -> None:
        try:
            import hf_xet

            group = session.new_download_stream_group(token_refresh_url=route, token_refresh_headers=token)
            self._groups.append(group)
            for block in group.download_stream(hf_xet.XetFileInfo(stored, size)):
                self._put(block)
                if self._gone.is_set():
                    return
        except Exception as error:  # one of a thousand
            logger.info("Xet: %s", error)
        finally:
            self._put(b"")

    def _put(self, block: bytes) -> None:
        while not self._gone.is_set():
            with suppress(Full):
                self.arrived.put(block, timeout=0.25)
                return


@cache
def _session() -> Any:
    """One for the process. Raises ImportError for versions without it."""
    from hf_xet import XetConfig, XetSession

    return XetSession(XetConfig().with_config(_CONFIG))
