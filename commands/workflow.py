"""`workflow FILE`: what a workflow needs of this machine, and by which models its jobs belong to one worker. Exit code
0: everything is here; 1: something is missing; 2: the file is no workflow."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from . import options as shared

HELP = "a workflow's references, what is missing of them, and its affinity key"
NEEDS_HOST = "folders"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workflow", metavar="FILE", help="a JSON file that ComfyUI saved, or exported for the API")
    parser.add_argument("--base-directory", default="", metavar="DIR",
                        help="ComfyUI's own option: the folder that models is in (default: that of ComfyUI)")
    parser.add_argument("--extra-model-paths-config", default=[], action="append", metavar="FILE",
                        help="ComfyUI's own option, beside its extra_model_paths.yaml")
    parser.add_argument("--download", action="store_true", help="fetch what is missing and on a hub")
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..engines.worker.found import bytes_missing, fetch, look
    from ..engines.worker.graphs import NoWorkflowError, prompt_of
    from ..engines.worker.report import lines
    from ..engines.worker.workflow import Workflow
    from ..host.texts import said
    from ..loaders.files import hub

    try:
        workflow = Workflow(prompt_of(_read(options.workflow)))
    except NoWorkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def tell(name: str) -> None:
        print(f"fetching {name}", file=sys.stderr, flush=True)

    found = look(workflow.asked())
    if options.download and any(one.missing for one in found):
        for page in dict.fromkeys(one.licence for one in found if one.licence):
            print(f"gated: {page} (accept its licence there, and have that account's HF_TOKEN)", file=sys.stderr)
        for failed in fetch(found, hub.Watcher(lambda total: lambda amount=1: None, tell)):
            print(f"error: {failed}", file=sys.stderr)
        found = look(workflow.asked())
    missing = any(one.missing for one in found)
    if options.json:
        print(json.dumps({"references": [one.to_json() for one in found], "missing": missing,
                          "bytes_missing": bytes_missing(found), "affinity": workflow.affinity()}, indent=1,
                         ensure_ascii=False))
    else:
        print("\n".join(map(said, lines(found, workflow.affinity()))))
    return 1 if missing else 0


def _read(path: str) -> dict[str, Any]:
    from ..engines.worker.graphs import NoWorkflowError
    from ..loaders.errors import CheckpointError
    from ..loaders.files.source import read_json

    try:
        return read_json(path)
    except CheckpointError as error:
        raise NoWorkflowError(error.what, error.where, error.do) from error
