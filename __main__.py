"""Command line: `python <pack folder> inspect|load|repack-wan|doctor [REF] [--json]`. The nodes' code, no server."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parent


def import_pack() -> Any:
    """Import the pack as a package by path, without its node entry point (which needs ComfyUI)."""
    # Run by folder, Python puts the pack first on sys.path, where its nodes/ would hide ComfyUI's nodes.py.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != PACK]
    name = "quantized_transformers"
    spec = importlib.util.spec_from_loader(name, loader=None, is_package=True)
    assert spec is not None
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(PACK)]
    sys.modules[name] = package
    return package


def find_comfyui() -> Path | None:
    """COMFYUI_PATH, or the ComfyUI whose custom_nodes folder holds this pack (links not followed)."""
    candidates = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    candidates += [PACK.parent.parent, Path(os.path.abspath(sys.argv[0])).parent.parent]
    return next((path for path in candidates if (path / "comfy").is_dir() and (path / "main.py").is_file()), None)


def start_host(needed: bool) -> None:
    """Put ComfyUI on sys.path with its default options (on the CPU where torch has no accelerator)."""
    path = find_comfyui()
    if path is None:
        if needed:
            sys.exit("ComfyUI was not found.\n  what to do: put this pack into its custom_nodes folder, or set "
                     "COMFYUI_PATH")
        return
    if not needed:
        return
    sys.path.insert(0, str(path))
    arguments, sys.argv = sys.argv, [sys.argv[0]]
    import comfy.options
    import torch
    comfy.options.enable_args_parsing()
    if not (torch.cuda.is_available() or torch.backends.mps.is_available() or hasattr(torch, "npu")):
        sys.argv.append("--cpu")
    import comfy.cli_args  # noqa: F401  # reads sys.argv once
    sys.argv = arguments
    _model_folders(path)


def _model_folders(comfyui: Path) -> None:
    """ComfyUI's model folders as its server has them: extra_model_paths.yaml, and this pack's own."""
    from utils.extra_config import load_extra_path_config

    from quantized_transformers import host

    if (comfyui / "extra_model_paths.yaml").is_file():
        load_extra_path_config(str(comfyui / "extra_model_paths.yaml"))
    host.register_model_folder()


def inspect(reference: str, options: argparse.Namespace) -> int:
    from quantized_transformers.loaders.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import describe
    from quantized_transformers.loaders.report import describe_report
    from quantized_transformers.loaders.sources import locate

    description = describe(Checkpoint(locate(reference, weights_name=options.weights_name, revision=options.revision,
                                             component=options.component, download=options.download)))
    print(json.dumps(description.to_json(), indent=1) if options.json else describe_report(description))
    return 1 if description.problems else 0


def load(reference: str, options: argparse.Namespace) -> int:
    from time import perf_counter

    from quantized_transformers import host
    from quantized_transformers.loaders.model import Request
    from quantized_transformers.loaders.model import load as load_model

    host.ready()
    start = perf_counter()
    loaded = load_model(Request(reference, options.component, options.weights_name, options.revision,
                                download=options.download))
    seconds = perf_counter() - start
    if options.json:
        print(json.dumps({**loaded.description.to_json(), "seconds": round(seconds, 3)}, indent=1))
    else:
        print(f"{loaded.report}\nloaded in {seconds:.2f} s")
    return 0


def repack_wan(reference: str, options: argparse.Namespace) -> int:
    from quantized_transformers.loaders.repack_wan import repack

    # a relative output is below the folder this is run in, not below ComfyUI's
    report = repack(reference, options.base, os.path.abspath(options.output), options.direction, not options.copy)
    print(json.dumps({"report": report.splitlines(), "output": os.path.abspath(options.output)}, indent=1)
          if options.json else report)
    return 0


def doctor(as_json: bool) -> int:
    from importlib import metadata

    from quantized_transformers import host

    def version_of(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    facts: dict[str, Any] = {"python": sys.version.split()[0], "ComfyUI": host.version()}
    facts |= {p: version_of(p) for p in ("torch", "safetensors", "comfy-kitchen", "huggingface_hub", "diffusers")}
    if find_comfyui() is not None:
        facts["device"] = host.device_name()
        for kind, needs in (("FP8", "SM 8.9"), ("NVFP4", "SM 10.0")):
            facts[f"{kind} matmul"] = "native" if host.has_matmul(kind) else f"emulated (needs NVIDIA {needs} or newer)"
        facts["model folders"] = host.model_folders()
    facts |= host.environment()
    print(json.dumps(facts, indent=1) if as_json else "\n".join(f"{key}: {value}" for key, value in facts.items()))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python <pack folder>", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("inspect", "say what a checkpoint is (reads headers only)"),
                       ("load", "load it as ComfyUI would, and report"), ("doctor", "what this machine can do")):
        command = commands.add_parser(name, help=text)
        if name != "doctor":
            command.add_argument("reference", metavar="REF", help="repo id, folder or file")
            command.add_argument("--weights-name", default="", help="file inside the folder")
            command.add_argument("--component", default="transformer", choices=["transformer", "transformer_2"])
            command.add_argument("--revision", default="", help="branch, tag or commit of a repo id")
            command.add_argument("--download", action="store_true", help="fetch what is missing of a repo id")
        command.add_argument("--json", action="store_true", help="machine-readable output")
    command = commands.add_parser("repack-wan", help="a ModelSlim export of Wan as a diffusers repo, and back")
    command.add_argument("reference", metavar="SOURCE", help="the export (to original: the diffusers repo)")
    command.add_argument("--base", "--original-model-path", default="", help="the diffusers repo of the same model")
    command.add_argument("--output", "--output-path", required=True, help="a new folder")
    command.add_argument("--direction", default="to diffusers", choices=["to diffusers", "to original"])
    command.add_argument("--copy", action="store_true", help="copy what is no transformer, instead of links")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    arguments = parser.parse_args()
    import_pack()
    start_host(needed=arguments.command == "load" or arguments.command == "doctor" and find_comfyui() is not None)
    from quantized_transformers.loaders.errors import CheckpointError

    try:
        if arguments.command == "doctor":
            return doctor(arguments.json)
        action = {"inspect": inspect, "load": load, "repack-wan": repack_wan}[arguments.command]
        return action(arguments.reference, arguments)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
