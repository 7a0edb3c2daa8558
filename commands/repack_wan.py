"""`repack-wan SOURCE --base REPO --output FOLDER`: a ModelSlim export of Wan as a diffusers repo, and back."""

from __future__ import annotations

import argparse
import json
import os

from . import options as shared

HELP = "a ModelSlim export of Wan as a diffusers repo, and back"
NEEDS_HOST = "no"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="SOURCE", help="the export (to original: the diffusers repo)")
    parser.add_argument("--base", "--original-model-path", default="", help="the diffusers repo of the same model")
    parser.add_argument("--output", "--output-path", required=True, help="a new folder")
    parser.add_argument("--direction", default="to diffusers", choices=["to diffusers", "to original"])
    parser.add_argument("--copy", action="store_true", help="copy what is no transformer, instead of links")
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..host.texts import said
    from ..makers.repack_wan import repack

    # a relative output is below the folder this is run in, not below ComfyUI's
    output = os.path.abspath(options.output)
    report = repack(options.reference, options.base, output, options.direction, not options.copy)
    print(json.dumps({"report": report.splitlines(), "output": output}, indent=1) if options.json else said(report))
    return 0
