"""The host's web server, where there is one: its routes, and what its command line allows other origins."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

KEPT = 1000  # pages whose language is known
_languages: OrderedDict[str, str] = OrderedDict()


def routes() -> Any | None:
    """The route table that the server adds to itself after all packs are loaded; None where no server runs.

    What is put into it is served with and without the prefix /api.
    """
    return getattr(_server(), "routes", None)


def on_prompt(handler: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Have `handler` see every prompt that is posted, and return it, before the server checks it in the same task.
    Where no server runs there are none."""
    server = _server()
    if server is not None:
        server.add_on_prompt_handler(handler)


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
    return language_of(getattr(_server(), "client_id", None))


def _server() -> Any | None:
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def output_types(node_class: str) -> tuple[str, ...]:
    """The types of the outputs of a node class; empty for one that is not installed."""
    classes = getattr(getattr(sys.modules.get("server"), "nodes", None), "NODE_CLASS_MAPPINGS", {})
    return tuple(map(str, getattr(classes.get(node_class), "RETURN_TYPES", ())))


def other_origins_allowed() -> bool:
    """Whether the user lets pages of other origins read this server (--enable-cors-header)."""
    from comfy.cli_args import args

    return bool(getattr(args, "enable_cors_header", False))
