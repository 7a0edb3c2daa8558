"""`serve BASE`: the command that starts SGLang-Diffusion's server for a base and what replaces its transformer."""

from __future__ import annotations

import argparse
import json
import os
import shlex

from . import options as shared

HELP = "start SGLang's server for a base and an override, or print how"
NEEDS_HOST = "no"
MORE = True  # what stands behind -- is SGLang's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..engines.sglang.flags import OFFLOADS
    from ..engines.sglang.references import KINDS

    parser.add_argument("base", metavar="BASE", help="diffusers pipeline: repo id or folder")
    parser.add_argument(
        "--override", default="", metavar="REF", help="what replaces its transformer: repo id, folder or file"
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="auto",
        help="whether that is a component (a folder with config.json) or weights",
    )
    parser.add_argument("--override-2", default="", metavar="REF", help="what replaces its transformer_2")
    parser.add_argument("--weights-name", default="", help="file inside the override's folder")
    parser.add_argument("--revision", default="", help="branch, tag or commit of the base")
    for flag, words in (
        ("--gpus", "how many GPUs"),
        ("--tp", "tensor parallel: weights are split"),
        ("--ulysses", "sequence parallel"),
        ("--ring", "sequence parallel, in a ring"),
        ("--cfg-parallel", "the evaluations of classifier-free guidance side by side"),
        ("--dp", "copies of the model"),
    ):
        parser.add_argument(flag, type=int, default=1 if flag == "--gpus" else 0, metavar="N", help=words)
    parser.add_argument(
        "--offload", choices=OFFLOADS, default="auto", help="where weights wait: layerwise keeps them in RAM"
    )
    parser.add_argument("--lora", default="", metavar="REF=STRENGTH", help="a LoRA that the server starts with")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on: 127.0.0.1, or 0.0.0.0")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--sglang", default="", metavar="PATH", help="the program sglang, if it is not on PATH")
    parser.add_argument("--state", default="sglang-output", metavar="DIR", help="where a server of videos keeps them")
    parser.add_argument("--download", action="store_true", help="fetch what is missing of repo ids")
    parser.add_argument("--run", action="store_true", help="start it, instead of printing the command")
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..engines.sglang.checks import NOTE, REFUSED
    from ..engines.sglang.flags import Request, command
    from ..engines.sglang.layout import Layout
    from ..host.texts import Text, said

    layout = Layout(options.gpus, options.tp, options.ulysses, options.ring, options.cfg_parallel, options.dp)
    found = command(
        Request(
            options.base,
            options.override,
            options.kind,
            options.override_2,
            options.weights_name,
            options.revision,
            layout,
            options.offload,
            _lora(options.lora),
            options.host,
            options.port,
            options.sglang,
            options.state,
            options.download,
            tuple(options.more),
        )
    )
    if options.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        for check in found.checks:
            words = Text("{level}: {what}", level=check.level, what=check.what)
            print(said(words) + (f"\n  {said(check.do)}" if check.do and check.level != NOTE else ""))
        print(said(Text("serves {identity}", identity=found.identity)))
        if not found.refused:
            print(
                " ".join(
                    [*(f"{name}={shlex.quote(value)}" for name, value in found.env.items()), shlex.join(found.argv)]
                )
            )
    if any(check.level == REFUSED for check in found.checks):
        return 1
    if options.run:
        os.execvpe(found.argv[0], found.argv, {**os.environ, **found.env})
    return 0


def _lora(text: str) -> tuple[tuple[str, float], ...]:
    """REF=STRENGTH, or REF alone at 1."""
    from ..host.texts import Text
    from ..loaders.errors import CheckpointError

    if not text:
        return ()
    reference, equals, strength = text.rpartition("=")
    try:
        return ((reference, float(strength)),) if equals else ((text, 1.0),)
    except ValueError:
        raise CheckpointError(
            Text("the strength of a LoRA is no number"),
            repr(text[:200]),
            Text("give --lora REF=STRENGTH, as --lora owner/name=0.8"),
        ) from None
