"""The host's web server, where there is one: its routes, and what its command line allows other origins."""

from __future__ import annotations

import sys
from typing import Any


def routes() -> Any | None:
    """The route table that the server adds to itself after all packs are loaded; None where no server runs.

    What is put into it is served with and without the prefix /api.
    """
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    return getattr(getattr(server, "instance", None), "routes", None)


def other_origins_allowed() -> bool:
    """Whether the user lets pages of other origins read this server (--enable-cors-header)."""
    from comfy.cli_args import args

    return bool(getattr(args, "enable_cors_header", False))
