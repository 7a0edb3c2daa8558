"""The host's web server, where there is one: the languages of its pages, and what its command line allows other
origins."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

KEPT = 1000  # pages whose language is known
_languages: OrderedDict[str, str] = OrderedDict()


def server() -> Any | None:
    """The web server; None where none runs."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def page_speaks(client: str, language: str) -> None:
    """Remember the language of a page, by the id with which it queues prompts."""
    _languages[client] = language
    _languages.move_to_end(client)
    while len(_languages) > KEPT:
        _languages.popitem(last=False)


def language_of(client: object) -> str:
    """The language of a page; empty where it is not known."""
    return _languages.get(client, "") if isinstance(client, str) else ""


def language_of_run() -> str:
    """The language of the page whose prompt runs now; empty where none runs, or it is not known."""
    return language_of(getattr(server(), "client_id", None))


def output_types(node_class: str) -> tuple[str, ...]:
    """The types of the outputs of a node class; empty for one that is not installed."""
    classes = getattr(getattr(sys.modules.get("server"), "nodes", None), "NODE_CLASS_MAPPINGS", {})
    return tuple(map(str, getattr(classes.get(node_class), "RETURN_TYPES", ())))


def other_origins_allowed() -> bool:
    """Whether the user lets pages of other origins read this server (--enable-cors-header)."""
    from comfy.cli_args import args

    return bool(getattr(args, "enable_cors_header", False))
