"""`doctor`: what this machine is made of, and what each family of checkpoints will do on it."""

from __future__ import annotations

import argparse
import json

from . import options as shared

HELP = "what this machine can do"
NEEDS_HOST = "if found"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..host.texts import said
    from ..views.doctor import facts, lines

    found = facts()
    print(json.dumps(found, indent=1) if options.json else "\n".join(map(said, lines(found))))
    return 0
