"""`inspect REF`: what a checkpoint is."""

from __future__ import annotations

import argparse
import json

from . import options as shared

HELP = "say what a checkpoint is (reads headers only)"
NEEDS_HOST = "no"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_reference(parser)
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..host.texts import said
    from ..loaders.containers.checkpoint import Checkpoint
    from ..loaders.describe import describe
    from ..loaders.locate import locate
    from ..loaders.report import describe_report

    description = describe(Checkpoint(locate(options.reference, weights_name=options.weights_name,
                                             revision=options.revision, component=options.component,
                                             download=options.download)))
    print(json.dumps(description.to_json(), indent=1) if options.json else said(describe_report(description)))
    return 1 if description.problems else 0
