"""Which server is meant: a shared workflow must not choose whom a host calls.

"" is QT_SERVER_URL, else this machine's port 30000. A name is looked up in QT_SERVERS ("flux=http://gpu1:30000,wan=...").
An address is taken where it is this machine's, or the host of one in QT_SERVERS or QT_SERVER_URL.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import NamedTuple
from urllib.parse import urlsplit

from ...host.texts import Text
from ...loaders.errors import CheckpointError

USUAL = "http://127.0.0.1:30000"
URL, SERVERS, TOKEN = "QT_SERVER_URL", "QT_SERVERS", "QT_SERVER_TOKEN"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class Address(NamedTuple):
    """Scheme, host and port, and a path where a proxy has the server below one. No user, no password."""

    url: str

    @property
    def is_local(self) -> bool:
        """Whether it is this machine's own."""
        return _is_loopback(urlsplit(self.url).hostname or "")


def address_of(text: str) -> Address:
    """The server that `text` names. Raises CheckpointError for a name that is not listed, an address that is none, and
    one of a host that whoever runs this machine has not named."""
    text, listed = text.strip(), servers()
    if not text:
        return parsed(os.environ.get(URL, "").strip() or USUAL)
    if text in listed:
        return listed[text]
    if _NAME.fullmatch(text) and ":" not in text and text != "localhost":
        raise CheckpointError(
            Text("no server is called {name}", name=text),
            "",
            Text(
                "known are {names}; name it in {variable}", names=", ".join(listed) or Text("none"), variable=SERVERS
            ),
        )
    found = parsed(text)
    if not found.is_local and _host(found) not in {_host(one) for one in _named(listed)}:
        raise CheckpointError(
            Text("this machine calls no server that a workflow names"),
            found.url,
            Text(
                "put it into {variable} where ComfyUI starts: {variable}=name={address}",
                variable=SERVERS,
                address=found.url,
            ),
        )
    return found


def servers() -> dict[str, Address]:
    """QT_SERVERS: name -> address. Raises CheckpointError where it is no such list."""
    found: dict[str, Address] = {}
    for entry in filter(None, (part.strip() for part in os.environ.get(SERVERS, "").split(","))):
        name, equals, url = entry.partition("=")
        if not equals or not _NAME.fullmatch(name.strip()):
            raise CheckpointError(
                Text("{variable} is no list of names and addresses", variable=SERVERS),
                "",
                Text("write it as flux=http://gpu1:30000,wan=http://gpu2:30000"),
            )
        found[name.strip()] = parsed(url)
    return found


def _named(listed: dict[str, Address]) -> list[Address]:
    own = os.environ.get(URL, "").strip()
    return [*listed.values(), *([parsed(own)] if own else [])]


def _host(address: Address) -> tuple[str | None, int | None]:
    parts = urlsplit(address.url)
    return parts.hostname, parts.port


def parsed(text: str) -> Address:
    """An address that one parser and every other read alike. Raises CheckpointError for all that could be read in two
    ways: user information, backslashes, numbers that stand for an address, odd ports."""

    def refuse(what: Text) -> CheckpointError:
        return CheckpointError(what, "", Text("give an address as http://127.0.0.1:30000"))

    text = text.strip()
    if "@" in text:  # what stands before it may be a password, and is not said
        raise refuse(
            Text("a server's address has no user or password in it: {variable} is for a token", variable=TOKEN)
        )
    text = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise refuse(Text("this is no address of a server: {text}", text=text[:200])) from None
    odd = set(text) & set("\\ \t\r\n#?%") or not text.isascii() or not text.isprintable()
    if odd or parts.scheme not in ("http", "https") or not host or port == 0:
        raise refuse(Text("this is no address of a server: {text}", text=text[:200]))
    if not _is_name(host):
        raise refuse(Text("this is no name or number of a host: {host}", host=host[:200]))
    path = parts.path.rstrip("/")
    shown = f"[{host}]" if ":" in host else host
    return Address(f"{parts.scheme}://{shown}{f':{port}' if port else ''}{path}")


def _is_name(host: str) -> bool:
    """Whether it is a host's name, or a number in the one usual way of writing it."""
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        last = host.rstrip(".").rpartition(".")[2]
        return bool(re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", host)) and not re.fullmatch(
            r"0x[0-9a-f]*|\d+", last
        )
    return getattr(number, "ipv4_mapped", None) is None and str(number) == host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
