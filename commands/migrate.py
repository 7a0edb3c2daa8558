"""`migrate WORKFLOW`: loader nodes of ComfyUI-nunchaku, ComfyUI-GGUF and SGLang's pack as this pack's."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from . import options as shared

HELP = "a workflow with other packs' loader nodes, with this pack's"
NEEDS_HOST = "no"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workflow", metavar="WORKFLOW", help="a JSON file that ComfyUI saved, or exported for the API")
    parser.add_argument("--output", default="", help="where to write it (default: WORKFLOW.migrated.json)")
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..host.texts import said
    from ..loaders.errors import CheckpointError
    from ..loaders.files.source import read_json
    from ..makers.migrate import migrate

    source = Path(options.workflow)
    target = Path(options.output) if options.output else source.with_name(f"{source.stem}.migrated.json")
    done = migrate(read_json(str(source)))
    if not options.output and target.exists():
        raise CheckpointError("the output exists already", target, "name another with --output, or delete it")
    partial = target.with_name(f".{target.name}.part")  # one that was killed leaves it to the next
    try:
        partial.write_text(json.dumps(done.workflow, indent=2, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write the file: {error.strerror}", target, "name another --output") from error
    if options.json:
        print(json.dumps({"output": str(target), "changes": done.changes, "left": done.left}, indent=1,
                         ensure_ascii=False))
    else:
        print("\n".join([*(f"changed: {said(line)}" for line in done.changes),
                         *(f"left: {said(line)}" for line in done.left),
                         f"{len(done.changes)} changed, {len(done.left)} left: {target}"]))
    return 0
