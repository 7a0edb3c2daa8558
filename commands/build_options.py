"""What both builders share on the command line."""

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
    """Build with a progress line on stderr, then print the report, or with --json the statistics."""
    from ..makers.builders.options import shard_bytes
    from ..makers.builders.progress import terminal_progress

    try:
        # a relative output is below the folder this is run in, not below ComfyUI's
        built = build({"output_dir": os.path.abspath(options.output_dir) if options.output_dir.strip() else "",
                       "shard_bytes": shard_bytes(options.max_shard_size), "overwrite": options.overwrite,
                       "progress": terminal_progress})
    except KeyboardInterrupt:
        print("\nstopped: nothing was published; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    print(json.dumps(built.statistics, indent=2, sort_keys=True) if options.json else built.report)
    return 0
