"""What a request may be: its origin, its size, its parameters."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .. import host
from ..host.texts import Text, chosen, usual
from ..loaders.components import overrides
from ..loaders.download_plans import TARGETS, Asked
from ..loaders.errors import CheckpointError
from ..loaders.files import hubs, strict
from ..loaders.files.places import cleaned
from ..loaders.queries import Query
from .work import Answer, refusal

if TYPE_CHECKING:
    from aiohttp import web

HOSTS = "QT_HOSTS"
MAX_QUERY = 4096  # characters
MAX_BODY = 65_536  # bytes; a workflow may be longer
MAX_WORKFLOW = 2_000_000
MAX_ITEMS = 100  # nodes of one download
_TEXTS = ("reference", "node", "component", "weights_name", "revision", "precision", "weights", "base",
          "base_component", *overrides.INPUTS)


class RefusedError(Exception):
    """A request that is answered without looking at any file."""

    def __init__(self, status: int, what: str, where: str = "", do: str = "") -> None:
        super().__init__(what)
        self.answer: Answer = refusal(status, what, where, do)


def check_origin(request: web.Request, writes: bool) -> None:
    """Raise RefusedError for a page of another origin, as the host's own middleware does for loopback addresses.

    Reading is left to the host where its user allows other origins (--enable-cors-header); writing never is. Programs
    send no Origin, and pass. What writes over a loopback address must name it: a page of any name can have its name
    resolved to this machine (DNS rebinding), and is then the origin that it asks. HOSTS has the names of a proxy.
    """
    if writes and _loopback(request) and not _allowed(request.headers.get("Host")):
        raise RefusedError(403, Text("this server is reached by a name that is not its own"), "",
                           Text("use its address or localhost, or put the name into QT_HOSTS before ComfyUI starts"))
    if not writes and host.other_origins_allowed():
        return
    if request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        raise RefusedError(403, Text("pages of other sites are not answered"), "", Text("use ComfyUI's own page"))
    origin = request.headers.get("Origin")
    if origin is not None and not _same(origin, request.headers.get("Host", "")):
        raise RefusedError(403, Text("pages of other origins are not answered"), "", Text("use ComfyUI's own page"))


def _loopback(request: web.Request) -> bool:
    """Whether a request came in over a loopback address of this machine."""
    here = request.transport.get_extra_info("sockname") if request.transport else None
    return isinstance(here, tuple) and _address(here[0], lambda address: address.is_loopback)


def _allowed(name: str | None) -> bool:
    """Whether a Host header is an IP address, localhost, or one of HOSTS; programs may send none."""
    if name is None:
        return True
    try:
        found = (urlsplit("//" + name.lower()).hostname or "").rstrip(".")
    except ValueError:
        return False
    named = {one.strip().lower() for one in os.environ.get(HOSTS, "").split(",")} - {""}
    return found == "localhost" or found.endswith(".localhost") or found in named \
        or _address(found, lambda address: True)


def _address(text: str, fits: Callable[[IPv4Address | IPv6Address], bool]) -> bool:
    """Whether a text is an IP address that fits; one of IPv4 in IPv6 is the former."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    return fits(getattr(address, "ipv4_mapped", None) or address)


def _same(origin: str, host_header: str) -> bool:
    try:
        ours, theirs = urlsplit("//" + host_header.lower()), urlsplit(origin.lower())
        port = {"http": 80, "https": 443}.get(theirs.scheme)
        return (bool(theirs.hostname) and theirs.hostname == ours.hostname
                and (theirs.port or port) == (ours.port or port))
    except ValueError:  # a port that is no number
        return False


def language(accepted: str) -> str:
    """The language to answer in: the first of an Accept-Language header's that there is, else the usual one."""
    wanted = [one.partition(";")[0].strip().lower() for one in accepted.split(",")]
    return chosen(wanted) if accepted.strip() else usual()


def check_query(request: web.Request) -> None:
    """Raise RefusedError for a query string that no page of ours sends."""
    if len(request.query_string) > MAX_QUERY:
        raise RefusedError(413, Text("the query is longer than {most} characters", most=MAX_QUERY), "",
                           Text("send less"))


async def read_body(request: web.Request, limit: int = MAX_BODY) -> bytes:
    """The body of a POST. Raises RefusedError when it is not declared as JSON, or is longer than `limit` bytes."""
    if request.content_type != "application/json":
        raise RefusedError(415, Text("the body must be JSON"), request.content_type,
                           Text("send Content-Type: application/json"))
    if (request.content_length or 0) > limit:
        raise RefusedError(413, Text("the body is longer than {limit:,} bytes", limit=limit), "", Text("send less"))
    body = b""
    async for piece in request.content.iter_chunked(1 << 16):
        body += piece
        if len(body) > limit:
            raise RefusedError(413, Text("the body is longer than {limit:,} bytes", limit=limit), "", Text("send less"))
    return body


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else."""
    value = strict.parse(body, Text("the request's body"), Text("correct it"))
    if not isinstance(value, dict):
        raise CheckpointError(Text("this JSON is no object"), Text("the request's body"), Text("send {{...}}"))
    return value


def to_query(values: Mapping[str, Any]) -> Query:
    """Parameters, of a query string or a JSON body, as a Query. Raises CheckpointError for what no widget has."""
    chosen: dict[str, Any] = {}
    for name in _TEXTS:
        value = values.get(name)
        if value is None or value == "" and name not in ("reference",):
            continue
        if not isinstance(value, str):
            raise CheckpointError(Text("{name} is no text", name=name), Text("the request"), Text("correct it"))
        chosen[name] = cleaned(value)
    rank = values.get("rank")
    rank = "0" if rank is None or rank == "" else str(rank) if type(rank) in (int, str) else ""
    if not re.fullmatch("-?[0-9]{1,9}", rank):
        raise CheckpointError(Text("rank is no number"), repr(rank[:80]), Text("correct it"))
    chosen["rank"] = int(rank)
    layers = values.get("layers")
    if not (layers is None or type(layers) in (bool, int) or isinstance(layers, str)):
        raise CheckpointError(Text("{name} is no text", name="layers"), Text("the request"), Text("correct it"))
    chosen["layers"] = layers in (1, "1", "true", "True")
    chosen.setdefault("reference", "")
    return Query(**chosen)


def to_download(values: Mapping[str, Any]) -> Asked:
    """The body of POST download. Raises CheckpointError for what no page of ours sends."""
    items, target = values.get("items"), values.get("target", TARGETS[0])
    licences, hub = values.get("licences", []), values.get("hub") or ""
    if not isinstance(items, list) or not 0 < len(items) <= MAX_ITEMS \
            or not all(isinstance(one, dict) for one in items):
        raise CheckpointError(Text("items is no list of 1 to {most} objects", most=MAX_ITEMS), Text("the request"),
                              Text("correct it"))
    if target not in TARGETS:
        raise CheckpointError(Text("{name} is none of {allowed}", name="target", allowed=", ".join(TARGETS)),
                              repr(str(target)[:80]), Text("correct it"))
    if hub not in ("", *hubs.MODULES):
        raise CheckpointError(Text("{name} is none of {allowed}", name="hub", allowed=", ".join(hubs.MODULES)),
                              repr(str(hub)[:80]), Text("correct it"))
    if not isinstance(licences, list) or not all(isinstance(repo, str) for repo in licences):
        raise CheckpointError(Text("licences is no list of repo ids"), Text("the request"), Text("correct it"))
    return Asked(tuple(map(to_query, items)), target, hub, frozenset(licences))
