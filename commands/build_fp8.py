"""`build-fp8`: a ModelOpt FP8 export and its base, or a BF16 base alone, as a transformer override."""

from __future__ import annotations

import argparse

from . import build_options

HELP = "make an FP8 transformer from a ModelOpt export, or straight from BF16"
NEEDS_HOST = "no"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..makers.builders.presets import MODEL_TYPES

    parser.add_argument("--modelopt-hf-dir", default="", help="nvidia-modelopt's diffusers export (--hf-ckpt-dir), or "
                        "its transformer folder; without it, the base is quantized")
    parser.add_argument("--modelopt-backbone-ckpt", default="", help="backbone.pt or its folder; needed when the "
                        "export carries no scales")
    parser.add_argument("--base-transformer-dir", default="", help="the BF16 transformer, or its pipeline")
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="auto", help="which layers stay in BF16; auto: by "
                        "_class_name in config.json; none: all but the Linear layers of blocks, by their names")
    parser.add_argument("--keep-bf16-pattern", action="append", default=[], metavar="REGEX", help="more layers that "
                        "stay in BF16: searched in module names; repeatable")
    parser.add_argument("--maxbound", type=float, default=448.0, help="what an amax is divided by (448)")
    build_options.add_output(parser)


def run(options: argparse.Namespace) -> int:
    from ..makers.builders.fp8 import build_fp8

    return build_options.run(options, lambda common: build_fp8(
        modelopt_hf_dir=options.modelopt_hf_dir, modelopt_backbone_ckpt=options.modelopt_backbone_ckpt,
        base_transformer_dir=options.base_transformer_dir, model_type=options.model_type,
        keep_bf16_patterns=options.keep_bf16_pattern, maxbound=options.maxbound, **common))
