"""Arguments that several commands share."""

from __future__ import annotations

import argparse


def add_reference(parser: argparse.ArgumentParser) -> None:
    """A checkpoint, and what chooses among its files."""
    parser.add_argument("reference", metavar="REF", help="repo id, folder or file")
    parser.add_argument("--weights-name", default="", help="file inside the folder")
    parser.add_argument("--component", default="transformer", choices=["transformer", "transformer_2"])
    parser.add_argument("--revision", default="", help="branch, tag or commit of a repo id")
    parser.add_argument("--download", action="store_true", help="fetch what is missing of a repo id")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output")
