"""`build-gguf`: a transformer in BF16, F16 or F32 as one GGUF file, under the model's own names."""

from __future__ import annotations

import argparse

from . import build_options
from . import options as shared

HELP = "make a GGUF file of a BF16 transformer, as ComfyUI-GGUF's tools do"
NEEDS_HOST = "no"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..makers.builders.gguf_rules import KINDS
    from ..makers.builders.presets import MODEL_TYPES

    parser.add_argument("--base-transformer-dir", required=True, help="the transformer in BF16, F16 or F32: a "
                        "diffusers folder, its pipeline, or a single file")
    parser.add_argument("--output", required=True, help="a new .gguf file")
    parser.add_argument("--type", choices=KINDS, default=KINDS[0], help=f"of the quantized weights ({KINDS[0]})")
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="auto", help="which layers stay in 16 bits; auto: "
                        "those that ComfyUI-GGUF's tools leave; a name: those of build-fp8, too; none: no layers")
    parser.add_argument("--keep-pattern", action="append", default=[], metavar="REGEX", help="more layers that stay in "
                        "16 bits: searched in the model's own module names; repeatable")
    parser.add_argument("--overwrite", action="store_true", help="replace the GGUF file, once the new one is whole")
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..makers.builders.gguf import build_gguf
    from ..makers.builders.progress import terminal_progress

    return build_options.show(options, lambda: build_gguf(
        base=options.base_transformer_dir, output=build_options.absolute(options.output), kind=options.type,
        model_type=options.model_type, keep_patterns=options.keep_pattern, overwrite=options.overwrite,
        progress=terminal_progress), "the same command starts anew")
