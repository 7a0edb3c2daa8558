"""Hugging Face's Xet storage, where hf_xet is installed: the bytes of a file in order, into the file of ours, so that
hash, progress and Cancel are those of any download.

What it does not bring is left to HTTP, which goes on from there. How much that is the length tells: a stream of hf_xet
1.8 may end early without an error. Files of more than 50 GB begin this way or not at all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from functools import cache
from queue import Empty, Queue
from threading import Thread
from typing import Any

from ..hub_file import HashedFile, RemoteFile

logger = logging.getLogger(__name__)
_PATIENCE = 120  # seconds without a block, which has up to 64 MB
# One try and a short wait for a connection, instead of minutes: there is HTTP.
_CONFIG = {"client.retry_max_attempts": 1, "client.connect_timeout": "10s"}
_failed: set[str] = set()  # the token routes, one for each repo and commit, that have once brought less than a file


def transfer(url: str, headers: dict[str, str], file: RemoteFile, target: HashedFile) -> None:
    """Write as much of a file, from its start, as Xet brings; nothing of one that is not there. Raises what `target`
    raises."""
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_XET or len(file.digest) != 64:  # small files are in git
        return
    try:
        route, group, stream = _opened(url, headers, file)
    except Exception as error:  # one of a thousand: HTTP meets it, too, or works
        logger.debug("no Xet for %s: %s", url, error)
        return
    if stream is None:
        return
    arrived: Queue[bytes | None] = Queue(2)
    Thread(target=_pump, args=(stream, arrived), name="qt-xet", daemon=True).start()
    try:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            try:
                block = arrived.get(timeout=0.5)
            except Empty:
                target.write(b"")  # hears Cancel
                continue
            if block is None:
                break
            target.write(block)
            deadline = time.monotonic() + _PATIENCE
    finally:
        group.abort()
        while not arrived.empty():  # what is left of the stream has room now, and its thread ends
            arrived.get()
    if target.tell() < file.size:
        _failed.add(route)
        logger.info("Xet brought %d of %d bytes of %s; the rest comes by HTTP", target.tell(), file.size, url)


def _opened(url: str, headers: dict[str, str], file: RemoteFile) -> tuple[str, Any, Any]:
    """(token route, group, stream) of a file; no stream for one that is not in Xet, or whose repo has failed."""
    import hf_xet
    from huggingface_hub import get_hf_file_metadata

    session = _session()
    found = get_hf_file_metadata(url, headers=headers).xet_file_data
    if found is None or found.refresh_route in _failed:
        return "", None, None
    token = {name: value for name, value in headers.items() if name.lower() == "authorization"}
    group = session.new_download_stream_group(token_refresh_url=found.refresh_route, token_refresh_headers=token)
    return found.refresh_route, group, group.download_stream(hf_xet.XetFileInfo(found.file_hash, file.size))


@cache
def _session() -> Any:
    """One for the process. Raises ImportError for versions without it."""
    from hf_xet import XetConfig, XetSession

    return XetSession(XetConfig().with_config(_CONFIG))


def _pump(stream: Iterable[bytes], arrived: Queue[bytes | None]) -> None:
    try:
        for block in stream:
            arrived.put(block)
    except Exception as error:
        logger.info("Xet: %s", error)
    finally:
        arrived.put(None)
