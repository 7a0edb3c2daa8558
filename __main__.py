"""Command line: `python <pack folder> COMMAND ...`, the nodes' code without a server. `--help` lists the commands."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
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


def start_host(needed: str) -> None:
    """Put ComfyUI on sys.path with its default options (on the CPU where torch has no accelerator)."""
    path = find_comfyui()
    if needed == "yes" and path is None:
        sys.exit("ComfyUI was not found.\n  what to do: put this pack into its custom_nodes folder, or set "
                 "COMFYUI_PATH")
    if path is None:
        return
    if needed == "no":
        from quantized_transformers import host

        host.starters.append(lambda: start_host("maybe"))  # for what only ComfyUI knows
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


def main() -> int:
    import_pack()
    from quantized_transformers.commands import COMMANDS
    from quantized_transformers.loaders.errors import CheckpointError

    parser = argparse.ArgumentParser(prog="python <pack folder>", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: importlib.import_module(f"quantized_transformers.commands.{module}")
               for name, module in COMMANDS.items()}
    for name, module in modules.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.__doc__))
    given = sys.argv[1:]
    at = given.index("--") if "--" in given and getattr(modules.get(given[0]), "MORE", False) else len(given)
    options = parser.parse_args(given[:at])
    options.more = given[at + 1:]
    module = modules[options.command]
    start_host(module.NEEDS_HOST)
    try:
        return module.run(options)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
