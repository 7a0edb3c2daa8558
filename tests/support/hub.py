"""A local HTTP server that serves the part of the Hugging Face Hub's API that huggingface_hub's client asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890" * 4


@dataclass
class FakeRepo:
    """Files of one repo by name; those of 100 kB and more are "LFS". `listed` overrides what the API says of them. The
    files of a `gated` one are refused, unless its licence was accepted (`granted`)."""

    files: dict[str, bytes]
    commit: str = COMMIT
    gated: bool = False
    granted: bool = False
    token: str = ""
    listed: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, **options) -> FakeRepo:
        return cls({path.relative_to(folder).as_posix(): path.read_bytes()
                    for path in sorted(folder.rglob("*")) if path.is_file()}, **options)

    def digest(self, name: str) -> str:
        """As the Hub's ETag has it, which is also the blob's name in the cache."""
        item, = (item for item in self.siblings() if item["rfilename"] == name)
        return item["lfs"]["sha256"] if "lfs" in item else item["blobId"]

    def siblings(self) -> list[dict]:
        found = []
        for name, data in self.files.items():
            item = {"rfilename": name, "size": len(data),
                    "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
            if len(data) >= 100_000:
                item["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            found.append({**item, **self.listed.get(name, {})})
        return found + [{"rfilename": name, **item} for name, item in self.listed.items() if name not in self.files]


class Hub:
    """`with Hub({"owner/name": FakeRepo(...)}) as hub:`; `hub.url` is the endpoint, `hub.log` what was asked.

    `log` has the path and the range of each request, "HEAD" for those without a body. `xet`: {file name: its hash in the
    Xet storage at `store`}, an address that hf_xet takes ("local:///folder"); `route` is another address for its tokens;
    `cut`: {file name: bytes after which the connection is dropped}; `seconds_per_mb` slows files down; `damage` names
    files whose bytes are changed on the way; `ignore_range` sends whole files whatever is asked.
    """

    def __init__(self, repos: dict[str, FakeRepo]) -> None:
        self.repos, self.log = repos, []
        self.xet: dict[str, str] = {}
        self.store = self.route = ""
        self.cut: dict[str, int] = {}
        self.damage: set[str] = set()
        self.seconds_per_mb = 0.0
        self.ignore_range = False

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def asked_for(self, name: str) -> list[str]:
        """The ranges with which a file was asked for ("" without one)."""
        return [rng for path, rng in self.log if path.endswith(name) and rng != "HEAD"]

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.log.append((path, request.headers.get("Range", "") if body else "HEAD"))
        if path == "/xet-read-token":
            text = json.dumps({"accessToken": "t", "exp": int(time.time()) + 3600, "casUrl": self.store}).encode()
            return self.send(request, 200, text, {"Content-Type": "application/json"}, body=body)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or tree or resolve
        repo = self.repos.get(found[1]) if found else None
        if repo is None or repo.token and request.headers.get("Authorization") != f"Bearer {repo.token}":
            return self.refuse(request, 404 if repo is None else 401, "RepoNotFound")
        if found[2] not in (None, "main", repo.commit):
            return self.refuse(request, 404, "RevisionNotFound")
        if api:
            text = json.dumps({"id": found[1], "sha": repo.commit, "private": False, "gated": repo.gated,
                               "siblings": repo.siblings()}).encode()
            return self.send(request, 200, text, {"Content-Type": "application/json"}, body=body)
        if tree:
            text = json.dumps([{"type": "file", "path": item["rfilename"], "size": item["size"], "oid": item["blobId"]}
                               for item in repo.siblings()]).encode()
            return self.send(request, 200, text, {"Content-Type": "application/json"}, body=body)
        if repo.gated and not repo.granted:
            return self.refuse(request, 403, "GatedRepo")
        data = repo.files.get(found[3])
        if data is None:
            return self.refuse(request, 404, "EntryNotFound")
        if found[3] in self.damage:
            data = bytes([data[0] ^ 255]) + data[1:]
        start = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        first = int(start[1]) if start and not self.ignore_range else 0
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{repo.digest(found[3])}"', "Accept-Ranges": "bytes"}
        if found[3] in self.xet:
            headers |= {"X-Xet-Hash": self.xet[found[3]], "X-Xet-Refresh-Route": f"{self.route or self.url}/xet-read-token"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        return self.send(request, 206 if first else 200, data[first:], headers, self.cut.get(found[3]), body)

    def refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        self.send(request, status, b'{"error": "%s"}' % code.encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str],
             cut: int | None = None, body: bool = True) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(name, value)
        request.end_headers()
        step = 1 << 18
        for start in range(0, len(data) if body else 0, step):
            piece = data[start:start + step]
            if cut is not None and start + len(piece) > cut:
                request.wfile.write(piece[:cut - start])
                request.wfile.flush()
                request.close_connection = True
                request.connection.shutdown(2)
                return
            try:
                request.wfile.write(piece)
            except OSError:  # the client has gone
                request.close_connection = True
                return
            if self.seconds_per_mb:
                time.sleep(self.seconds_per_mb * len(piece) / 1e6)
