"""A local HTTP server that answers as ModelScope's API does (docs/sources/modelscope.md): the list of files, the list of
commits, and files, large ones from another address. Nothing else, as what is not asked for need not be there."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from .hub import Hub

HEAD, OLDER = "89abcdef01" * 4, "0123456789" * 4
NO_REPO, NO_ACCESS, NO_REVISION = 10010205001, 10010200001, 10990101004
LARGE = 100_000  # bytes from which a file is in another store, that the API sends on to


@dataclass
class ScopeRepo:
    """Files of one repo by name. `changed` are those that the newest commit changed: the others are of an older one, and
    with none the newest took files away. `listed` overrides what the API says of a file."""

    files: dict[str, bytes]
    head: str = HEAD
    token: str = ""
    changed: tuple[str, ...] | None = None
    listed: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, **options) -> ScopeRepo:
        return cls({path.relative_to(folder).as_posix(): path.read_bytes()
                    for path in sorted(folder.rglob("*")) if path.is_file()}, **options)

    def digest(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()

    def entries(self) -> list[dict]:
        """Folders are listed, too, and digests may be in capitals."""
        folders = {str(parent) for name in self.files for parent in Path(name).parents if str(parent) != "."}
        found = [{"Name": Path(name).name, "Path": name, "Type": "tree", "Size": 0, "Sha256": "", "IsLFS": False,
                  "Revision": self.head} for name in sorted(folders)]
        for name, data in self.files.items():
            found.append({"Name": Path(name).name, "Path": name, "Type": "blob", "Size": len(data), "Mode": "33188",
                          "Sha256": self.digest(name).upper() if name.endswith(".txt") else self.digest(name),
                          "IsLFS": len(data) >= LARGE, "CommittedDate": 1775179795,
                          "Revision": self.head if self.changed is None or name in self.changed else OLDER,
                          **self.listed.get(name, {})})
        return found + [{"Path": name, "Type": "blob", "Size": 3, **item} for name, item in self.listed.items()
                        if name not in self.files]


class ScopeHub(Hub):
    """As support.hub.Hub, for ScopeRepos. `tokens` are what came with each request, in the order of `log`."""

    def __init__(self, repos: dict[str, ScopeRepo]) -> None:
        super().__init__(repos)
        self.tokens: list[str] = []

    def asked_for(self, name: str) -> list[str]:
        """The ranges with which a file was asked of the API."""
        return [rng for path, rng in self.log if path.endswith(f"&FilePath={name}")]

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        url = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.log.append((unquote(request.path), request.headers.get("Range", "")))
        self.tokens.append(request.headers.get("Authorization", ""))
        if large := re.fullmatch(r"/store/([^/]+/[^/]+)/(.+)", unquote(url.path)):
            return self.bytes(request, large[2], self.repos[large[1]].files[large[2]], 206, body)
        found = re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/(repo|repo/files|commits)", unquote(url.path))
        repo = self.repos.get(found[1]) if found else None
        if repo is None:
            return self.refuse(request, 404, NO_REPO)
        if repo.token and request.headers.get("Authorization") != f"Bearer {repo.token}":
            return self.refuse(request, 404, NO_ACCESS)
        revision = query.get("Revision", query.get("Ref", "master"))
        if found[2] == "commits":
            return self.json(request, {"Commit": [{"Id": repo.head}] if revision == "master" else None}, body)
        if revision not in ("master", repo.head):
            return self.refuse(request, 404, NO_REVISION)
        if found[2] == "repo/files":
            deep = query.get("Recursive") == "True"  # of lower case it is passed over
            files = [item for item in repo.entries() if deep or "/" not in item["Path"]]
            return self.json(request, {"Files": files, "LatestCommitter": {"Id": "", "ShortId": repo.head[:8]}}, body)
        data = repo.files.get(query["FilePath"])
        if data is None:
            return self.refuse(request, 404, NO_REPO)
        if len(data) >= LARGE:
            store = self.url.replace("127.0.0.1", "localhost")  # another host
            return self.send(request, 302, b"", {"Location": f"{store}/store/{found[1]}/{quote(query['FilePath'])}"},
                             body=body)
        return self.bytes(request, query["FilePath"], data, 200, body)

    def bytes(self, request: BaseHTTPRequestHandler, name: str, data: bytes, of_part: int, body: bool) -> None:
        if name in self.damage:
            data = bytes([data[0] ^ 255]) + data[1:]
        start = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        first = int(start[1]) if start and not self.ignore_range else 0
        headers = {"Content-Disposition": f"attachment; filename={quote(name)}"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.send(request, of_part if first else 200, data[first:], headers, self.cut.get(name), body)

    def json(self, request: BaseHTTPRequestHandler, data: dict, body: bool) -> None:
        text = json.dumps({"Code": 200, "Data": data, "Message": "success", "RequestId": "1", "Success": True})
        self.send(request, 200, text.encode(), {"Content-Type": "application/json"}, body=body)

    def refuse(self, request: BaseHTTPRequestHandler, status: int, code: int) -> None:
        text = json.dumps({"Code": code, "Message": "获取模型信息失败，信息：record not found", "RequestId": "1",
                           "Success": False})
        self.send(request, status, text.encode(), {"Content-Type": "application/json"})
