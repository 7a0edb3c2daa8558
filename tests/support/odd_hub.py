"""A server on this machine that answers as a hub does, byte by byte as a test says: for answers that no HTTP library
would send."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789" * 4
FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 400}  # 102,400 bytes
Bytes = bytes | Iterable[bytes]


def head(status: str = "200 OK", **headers: Any) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def whole(data: bytes, status: str = "200 OK", **headers: Any) -> bytes:
    return head(status, Content_Length=len(data), **headers) + data


def chunked(pieces: Iterable[bytes], **headers: Any) -> Iterator[bytes]:
    yield head(Transfer_Encoding="chunked", **headers)
    for piece in pieces:
        yield b"%x\r\n%s\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def endless(piece: bytes) -> Iterator[bytes]:
    while True:
        yield piece


def slowly(data: bytes, step: int, seconds: float) -> Iterator[bytes]:
    for start in range(0, len(data), step):
        yield data[start:start + step]
        time.sleep(seconds)


@cache
def bomb() -> bytes:
    """A small gzip stream of 200 MB of spaces."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join([*(packer.compress(b" " * (1 << 20)) for _ in range(200)), packer.flush()])


class OddHub:
    """`with OddHub("huggingface") as hub:` a hub with the repo owner/odd, of FILES. `list` and `file` are functions that
    may answer otherwise: of the list of files, as (document) -> bytes; of a file, as (name, start) -> bytes."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.list: Callable[[Any], Bytes] = lambda document: whole(json.dumps(document).encode())
        self.file: Callable[[str, int], Bytes] = self.plain
        self.sent, self.asked, self.tokens = 0, [], []

    def __enter__(self) -> OddHub:
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def document(self) -> Any:
        """The list of files, as this hub has it."""
        sha = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
        if self.key == "modelscope":
            return {"Code": 200, "Success": True, "Message": "success", "Data": {
                "Files": [{"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": sha[name],
                           "IsLFS": False, "Revision": COMMIT} for name, data in FILES.items()],
                "LatestCommitter": {"Id": "", "ShortId": COMMIT[:8]}}}
        small, large = FILES
        git = hashlib.sha1(b"blob %d\0" % len(FILES[small]) + FILES[small]).hexdigest()
        return {"id": "owner/odd", "sha": COMMIT, "private": False, "gated": False, "siblings": [
            {"rfilename": small, "size": len(FILES[small]), "blobId": git},
            {"rfilename": large, "size": len(FILES[large]), "blobId": "0" * 40,
             "lfs": {"sha256": sha[large], "size": len(FILES[large]), "pointerSize": 130}}]}

    @staticmethod
    def plain(name: str, start: int) -> bytes:
        data = FILES[name]
        if not start:
            return whole(data, ETag='"x"')
        return whole(data[start:], "206 Partial Content", Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            asked = b""
            while b"\r\n\r\n" not in asked:
                piece = connection.recv(65536)
                if not piece:
                    return
                asked += piece
            first, *lines = asked.decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            self.asked.append(first)
            self.tokens.append(headers.get("authorization", "") + headers.get("cookie", ""))
            target = unquote(first.split(" ")[1])
            answer = self._answer(target, int(headers.get("range", "bytes=0-")[6:-1]))
            try:
                for piece in (answer,) if isinstance(answer, bytes) else answer:
                    connection.sendall(piece)
                    self.sent += len(piece)
            except OSError:  # the other side has gone
                return

    def _answer(self, target: str, start: int) -> Bytes:
        name = next((name for name in FILES if name in target), "")
        if name:
            return self.file(name, start)
        if "/commits" in urlsplit(target).path:
            return whole(json.dumps({"Code": 200, "Data": {"Commit": [{"Id": COMMIT}]}}).encode())
        return self.list(self.document())
