"""What is asked of a hub over HTTP, by Python's own client, and within bounds whatever the other side does.

A thread of its own does the talking, so that who waits hears Cancel: in a connection that is not made, a header without
an end, an answer that stops. huggingface_hub's client is another one in each of the versions that are supported; it
takes an answer of any size, unpacks what is compressed, and writes in pieces of 10 MB, between which nothing is heard.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import string
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from ....host.texts import Text
from .. import strict

Step = Callable[[int], None]  # called with 0 while something is waited for; raises when the user has cancelled
MAX_JSON = 8_000_000  # bytes of an answer in JSON: the list of 30,000 files
PATIENCE = 30.0  # seconds for the head of an answer, and then for every LEAST bytes of it
LEAST = 4096
_EVERY = 0.25  # seconds between two looks for Cancel
_BLOCK = 1 << 16  # bytes that are read at once, where so many are there
_REDIRECTS = 10
_SECRET = ("authorization", "cookie")


class OfflineError(OSError):
    """Nothing was asked: the environment forbids it."""


class BrokenError(OSError):
    """The connection was not made, or ended; what may be over in a second."""


class StrangeError(OSError):
    """An answer that nothing can be done with."""


class RefusedError(OSError):
    """An answer that says no. `kind`: "access", "revision", "repo", or "" for any other reason; `busy`: it may be over
    in a second."""

    def __init__(self, message: str, kind: str = "", busy: bool = False) -> None:
        super().__init__(message)
        self.kind, self.busy = kind, busy


class Answer:
    """The answer to one request: its `status`, its `headers` (any case), and its bytes as they come."""

    def __init__(self, url: str, headers: Mapping[str, str], method: str, step: Step) -> None:
        """Raises BrokenError, StrangeError, and what `step` raises."""
        self._step, self._gone = step, Event()
        self._arrived: Queue[Any] = Queue(16)
        self._sockets: list[socket.socket] = []
        Thread(target=self._talk, args=(url, dict(headers), method), name="qt-hub", daemon=True).start()
        try:
            self.status, self.headers = self._next(time.monotonic() + PATIENCE)
        except BaseException:
            self.close()
            raise

    def blocks(self, most: int) -> Iterator[bytes]:
        """The bytes of the answer, `most` of them and no more; fewer where it ends before. Raises BrokenError."""
        deadline, counted = time.monotonic() + PATIENCE, 0
        while most and (block := self._next(deadline)):
            block = block[:most]
            most, counted = most - len(block), counted + len(block)
            if counted >= LEAST:
                deadline, counted = time.monotonic() + PATIENCE, 0
            elif time.monotonic() > deadline:
                raise _slow()
            yield block

    def json(self) -> Any:
        """Its bytes as JSON. Raises StrangeError for what is none, is compressed, or longer than MAX_JSON."""
        if (self.headers.get("Content-Encoding") or "identity").lower() != "identity":
            raise StrangeError(Text("it is compressed, which was not asked for"))
        pieces = []
        for block in self.blocks(MAX_JSON + 1):
            self._step(0)
            pieces.append(block)
        data = b"".join(pieces)
        if len(data) > MAX_JSON:
            raise StrangeError(Text("it is longer than {most:,} bytes", most=MAX_JSON))
        try:
            return strict.decode(data)
        except strict.Invalid as error:
            raise StrangeError(Text("invalid JSON: {error}", error=error)) from error

    def close(self) -> None:
        """End the connection, wherever it is."""
        self._gone.set()
        for one in self._sockets:
            with suppress(OSError):
                socket.socket.shutdown(one, socket.SHUT_RDWR)  # of an SSL socket the reader is still in it

    def _next(self, deadline: float) -> Any:
        while True:
            try:
                item = self._arrived.get(timeout=_EVERY)
                break
            except Empty:
                self._step(0)
                if time.monotonic() > deadline:
                    raise _slow() from None
        if isinstance(item, OSError):
            raise item
        return item

    def _put(self, item: Any) -> None:
        while not self._gone.is_set():
            with suppress(Full):
                self._arrived.put(item, timeout=_EVERY)
                return

    def _talk(self, url: str, headers: dict[str, str], method: str) -> None:
        """In the thread: (status, headers), blocks and an empty one, or an OSError."""
        try:
            with self._opened(url, headers, method) as response:
                self._put((response.status, response.headers))
                while not self._gone.is_set() and (block := response.read1(_BLOCK)):
                    self._put(block)
            self._put(b"")
        except (BrokenError, StrangeError) as error:
            self._put(error)
        except (OSError, HTTPException) as error:
            said = " ".join(str(getattr(error, "reason", None) or error).split())
            self._put(BrokenError(Text("{kind}: {error}", kind=type(error).__name__, error=said[:200])))
        except Exception as error:  # what it was made of is not said: a token may be among it
            self._put(StrangeError(Text("its address or header cannot be read ({kind})", kind=type(error).__name__)))

    def _opened(self, url: str, headers: dict[str, str], method: str) -> HTTPResponse:
        """The answer, behind redirects. What is secret goes to the first host alone; a HEAD goes to no other host."""
        opener = _opener(self._sockets)
        for _ in range(_REDIRECTS + 1):
            if self._gone.is_set():
                raise BrokenError
            response: HTTPResponse = opener.open(Request(url, headers=headers, method=method), timeout=PATIENCE)
            onward = response.headers.get("Location") if response.status in (301, 302, 303, 307, 308) else None
            if not onward:
                return response
            onward, same = leads(url, onward)
            if method == "HEAD" and not same:
                return response
            response.close()
            if not same:
                headers = {name: value for name, value in headers.items() if name.lower() not in _SECRET}
            url = onward
        raise StrangeError(Text("it leads on and on, {most} times", most=_REDIRECTS))


def _slow() -> BrokenError:
    return BrokenError(Text("less than {least:,} bytes came in {seconds:g} s", least=LEAST, seconds=PATIENCE))


@contextmanager
def ask(url: str, headers: Mapping[str, str], step: Step, start: int = 0, method: str = "GET") -> Iterator[Answer]:
    """The answer to a request, with `start` for the bytes from there. Raises OfflineError, BrokenError, StrangeError,
    and what `step` raises."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OfflineError
    wanted = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    answer = Answer(url, wanted, method, step)
    try:
        yield answer
    finally:
        answer.close()


def leads(url: str, onward: str) -> tuple[str, bool]:
    """(address, whether it is of the same host) that a redirect goes to. Raises StrangeError for one that is of no
    HTTP, or goes on unencrypted."""
    onward = urljoin(url, quote(onward, safe=string.punctuation))
    before, behind = urlsplit(url), urlsplit(onward)
    if behind.scheme not in ("http", "https") or not behind.hostname or behind.scheme == "http" != before.scheme:
        raise StrangeError(Text("it leads on to an address of another kind: {address!r}", address=onward[:200]))
    return onward, before[:2] == behind[:2]


def begins(answer: Answer, start: int) -> int:
    """Where the bytes of an answer begin, of one that was asked for those from `start`: there, or at 0. Its status does
    not tell: ModelScope says 200 of a part, too. Raises StrangeError for any other place."""
    found = re.match(r"bytes (\d{1,18})-", answer.headers.get("Content-Range") or "")
    at = int(found[1]) if found else 0
    if at not in (0, start) or answer.status == 206 and not found:
        raise StrangeError(Text("it has the bytes from {there} on, not those from {asked}", there=at, asked=start))
    return at


def pause(seconds: float, step: Step) -> None:
    """Wait, and hear Cancel."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        step(0)
        time.sleep(min(left, _EVERY))


def _opener(sockets: list[socket.socket]) -> OpenerDirector:
    """HTTP and HTTPS alone, by the proxies of the environment; each connection's socket goes into `sockets`."""
    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class Encrypted(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class PlainHandler(HTTPHandler):
        def http_open(self, request: Request) -> HTTPResponse:
            return self.do_open(Plain, request)

    class EncryptedHandler(HTTPSHandler):
        def https_open(self, request: Request) -> HTTPResponse:
            return self.do_open(partial(Encrypted, context=_certificates()), request)

    opener = OpenerDirector()
    for handler in (ProxyHandler(), PlainHandler(), EncryptedHandler()):
        opener.add_handler(handler)
    return opener


@cache
def _certificates() -> ssl.SSLContext:
    """The system's, certifi's where it is (Python on macOS finds none of the system's), and those that the variables of
    other clients name."""
    context = ssl.create_default_context()
    with suppress(ImportError):
        import certifi

        context.load_verify_locations(certifi.where())
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if os.path.isfile(os.environ.get(name) or ""):
            context.load_verify_locations(os.environ[name])
    return context
