"""`load REF`: load a checkpoint as the nodes do."""

from __future__ import annotations

import argparse
import json

from . import options as shared

HELP = "load it as ComfyUI would, and report"
NEEDS_HOST = "yes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_reference(parser)
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from time import perf_counter

    from .. import host
    from ..host.texts import said
    from ..loaders.model import Request
    from ..loaders.model import load as load_model

    host.ready()
    start = perf_counter()
    loaded = load_model(Request(options.reference, options.component, options.weights_name, options.revision,
                                download=options.download))
    seconds = perf_counter() - start
    if options.json:
        print(json.dumps({**loaded.description.to_json(), "seconds": round(seconds, 3)}, indent=1))
    else:
        print(f"{said(loaded.report)}\nloaded in {seconds:.2f} s")
    return 0
