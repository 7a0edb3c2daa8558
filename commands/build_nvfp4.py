"""`build-nvfp4`: a ModelOpt NVFP4 export and its base, or a BF16 base alone, as a mixed transformer override."""

from __future__ import annotations

import argparse

from . import build_options

HELP = "make a mixed BF16 and NVFP4 transformer from a ModelOpt export, or straight from BF16"
NEEDS_HOST = "no"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..makers.builders.presets import PATTERN_PRESETS

    parser.add_argument("--modelopt-hf-dir", default="", help="nvidia-modelopt's diffusers export (--hf-ckpt-dir), or "
                        "its transformer folder; without it, the base is quantized")
    parser.add_argument("--base-transformer-dir", required=True, help="the BF16 transformer, or its pipeline")
    parser.add_argument("--pattern-preset", choices=list(PATTERN_PRESETS), default="none", help="which layers stay in "
                        "BF16")
    parser.add_argument("--keep-bf16-pattern", action="append", default=[], metavar="GLOB", help="more layers that "
                        "stay in BF16: compared with whole module names; repeatable")
    parser.add_argument("--swap-weight-nibbles", action=argparse.BooleanOptionalAction, default=False, help="whether "
                        "even columns are in the high nibble; always written into config.json")
    build_options.add_output(parser)


def run(options: argparse.Namespace) -> int:
    from ..makers.builders.nvfp4 import build_nvfp4

    return build_options.run(options, lambda common: build_nvfp4(
        modelopt_hf_dir=options.modelopt_hf_dir, base_transformer_dir=options.base_transformer_dir,
        pattern_preset=options.pattern_preset, keep_bf16_patterns=options.keep_bf16_pattern,
        swap_weight_nibbles=options.swap_weight_nibbles, **common))
