"""Import the pack and a headless ComfyUI into this process."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ["COMFYUI_PATH"])
# the pack's code, from the ground up
FOLDERS = ("host", "quant", "loaders", "makers", "views", "engines", "routes", "nodes", "commands")


def import_pack() -> None:
    """Make the pack importable as `quantized_transformers`, whatever its folder is called."""
    if "quantized_transformers" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location("quantized_transformers", PACK / "__init__.py",
                                                  submodule_search_locations=[str(PACK)])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["quantized_transformers"] = module
    spec.loader.exec_module(module)


def start_comfy(*options: str, cpu: bool = True) -> None:
    """Put the real ComfyUI on sys.path, on the CPU unless told otherwise, and import the pack beside it."""
    if "comfy.cli_args" not in sys.modules:
        sys.path.insert(0, str(COMFYUI))
        arguments, sys.argv = sys.argv, ["comfyui", *(["--cpu"] if cpu else []), *options]
        import comfy.options
        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  # parses sys.argv once
        sys.argv = arguments
    import_pack()
