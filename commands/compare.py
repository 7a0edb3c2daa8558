"""`compare REF CANDIDATE`: how far the weights of two checkpoints of one model are from each other."""

from __future__ import annotations

import argparse
import json
import os

from . import options as shared

HELP = "signal-to-noise ratio of a checkpoint's weights against another's, layer by layer"
NEEDS_HOST = "yes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_reference(parser)
    parser.add_argument("candidate", metavar="CANDIDATE", help="repo id, folder or file to compare with REF")
    parser.add_argument("--candidate-weights-name", default="", help="file inside the candidate's folder")
    parser.add_argument("--plot", default="", help="write the plot to this file (.png, .svg or .pdf); needs matplotlib")
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..host.texts import said
    from ..loaders.errors import CheckpointError
    from ..loaders.locate import locate
    from ..makers.compare.plot import missing, weights_figure
    from ..makers.compare.weights import compare_weights

    if options.plot and (without := missing()):  # before minutes of work, as the next
        raise CheckpointError(without, do="install it, or leave --plot out")
    if options.plot and not os.path.isdir(os.path.dirname(os.path.abspath(options.plot))):
        raise CheckpointError("the folder for the plot does not exist", options.plot, "make it, or give another path")
    reference = locate(options.reference, weights_name=options.weights_name, component=options.component,
                       revision=options.revision, download=options.download)
    candidate = locate(options.candidate, weights_name=options.candidate_weights_name, component=options.component,
                       download=options.download)
    found = compare_weights(reference, candidate)
    if options.plot:
        try:
            weights_figure(found).savefig(options.plot)
        except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not write
            raise CheckpointError(f"the plot cannot be written: {error}", options.plot,
                                  "give the path of a .png, .svg or .pdf file") from error
    print(json.dumps(found.to_json(), indent=1) if options.json else said(found.report()))
    return 0
