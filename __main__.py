"""Command line: `python <pack folder> COMMAND ...`, the nodes' code without a server. `--help` lists the commands."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
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


def start_host(needed: str, options: argparse.Namespace | None = None) -> None:
    """Put ComfyUI on sys.path with its default options (on the CPU where torch has no accelerator)."""
    path = find_comfyui()
    if options is not None:
        options.comfyui = str(path or "")
    folders = [options.base_directory] if needed == "folders" and options and options.base_directory else []
    if (needed == "yes" or folders) and path is None:
        sys.exit("ComfyUI was not found.\n  what to do: put this pack into its custom_nodes folder, or set "
                 "COMFYUI_PATH")
    if path is None:
        return
    if needed == "no":
        from quantized_transformers import host

        host.starters.append(lambda: start_host("maybe"))  # for what only ComfyUI knows
        return
    if needed == "folders":
        assert options is not None
        if folders and not os.path.isdir(options.base_directory):
            sys.exit(f"--base-directory: there is no folder {options.base_directory}")
        _read_arguments(path, "--cpu", *(["--base-directory", *folders] if folders else []))
        _model_folders(path, options.extra_model_paths_config)
        return
    import torch
    there = torch.cuda.is_available() or torch.backends.mps.is_available() or hasattr(torch, "npu")
    _read_arguments(path, *([] if there else ["--cpu"]))
    _model_folders(path)


def _read_arguments(comfyui: Path, *arguments: str) -> None:
    """Put ComfyUI on sys.path and let it read these as its command line, which it does once."""
    sys.path.insert(0, str(comfyui))
    ours, sys.argv = sys.argv, [sys.argv[0], *arguments]
    import comfy.options
    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401
    sys.argv = ours


def _model_folders(comfyui: Path, more: Sequence[str] = ()) -> None:
    """ComfyUI's model folders as its server has them: extra_model_paths.yaml, and this pack's own."""
    from quantized_transformers import host

    usual = comfyui / "extra_model_paths.yaml"
    for file in (*([str(usual)] if usual.is_file() else ()), *more):
        from utils.extra_config import load_extra_path_config

        load_extra_path_config(file)
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
    start_host(module.NEEDS_HOST, options)
    try:
        return module.run(options)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
