"""`doctor`: what this machine is made of, and what each family of checkpoints will do on it; or a server of SGLang."""

from __future__ import annotations

import argparse
import json
from typing import Any

from . import options as shared

HELP = "what this machine can do, or a server of SGLang"
NEEDS_HOST = "if found"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--server", metavar="URL", help="an SGLang server: whether it is healthy, and what it serves")
    which.add_argument("--sglang", metavar="PATH", help="an installation of SGLang, by its program: what it can serve")
    parser.add_argument("--picture", action="store_true", help="have the server draw something small, too")
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..host.texts import said

    found, text, right = _found(options)
    print(json.dumps(found, indent=1) if options.json else "\n".join(map(said, text)))
    return 0 if right else 1


def _found(options: argparse.Namespace) -> tuple[dict[str, Any], list[str], bool]:
    """(JSON-able facts, the same as lines, whether all is well)."""
    if options.server is None and options.sglang is None:
        from ..views.doctor import facts, lines

        here = facts()
        return here, lines(here), True
    from ..engines.sglang import report
    from ..engines.sglang.checks import REFUSED

    if options.server is not None:
        there = report.of_server(options.server, options.picture)
        drew = not options.picture or all(check["level"] != REFUSED for check in there["checks"])
        return there, report.lines(there), there["healthy"] and there["identity"].startswith("qt:") and drew
    from ..engines.sglang.installed import COMMAND, find

    installed = find(options.sglang or COMMAND)
    assert installed is not None  # a given one that is not there is an error
    known = report.of_installed(installed)
    return known, report.lines(known), bool(installed.sglang)
