"""What the builders share on the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import options as shared

if TYPE_CHECKING:
    from ..makers.builders.output import Built


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where the result goes, and how."""
    from ..makers.builders.options import SHARD_SIZE

    parser.add_argument("--output-dir", required=True, help="a new folder")
    parser.add_argument("--max-shard-size", default=SHARD_SIZE, metavar="SIZE", help="of a weight file, such as 500MB "
                        f"({SHARD_SIZE})")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in the output folder, once the new "
                        "one is whole")
    shared.add_json(parser)


def run(options: argparse.Namespace, build: Callable[[dict[str, Any]], Built]) -> int:
    """Build a folder with a progress line on stderr, then print the report, or with --json the statistics."""
    from ..makers.builders.options import shard_bytes
    from ..makers.builders.progress import terminal_progress

    # a relative output is below the folder this is run in, not below ComfyUI's
    return show(options, lambda: build({
        "output_dir": absolute(options.output_dir), "shard_bytes": shard_bytes(options.max_shard_size),
        "overwrite": options.overwrite, "progress": terminal_progress}),
        "the same command goes on where this one stopped")


def absolute(path: str) -> str:
    """A path below the folder this is run in; nothing stays nothing."""
    return os.path.abspath(path) if path.strip() else ""


def show(options: argparse.Namespace, build: Callable[[], Built], stopped: str) -> int:
    """Build, then print the report, or with --json the statistics. `stopped` says what Ctrl+C leaves."""
    from ..host.texts import said

    try:
        built = build()
    except KeyboardInterrupt:
        print(f"\nstopped: nothing was published; {stopped}", file=sys.stderr)
        return 130
    print(json.dumps(built.statistics, indent=2, sort_keys=True) if options.json else said(built.report))
    return 0
