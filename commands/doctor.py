"""`doctor`: what this machine can do."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from . import options as shared

HELP = "what this machine can do"
NEEDS_HOST = "if found"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from importlib import metadata

    from .. import host

    def version_of(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    facts: dict[str, Any] = {"python": sys.version.split()[0], "ComfyUI": host.version()}
    facts |= {p: version_of(p) for p in ("torch", "safetensors", "comfy-kitchen", "huggingface_hub", "diffusers")}
    if facts["ComfyUI"] != "not found":
        facts["device"] = host.device_name()
        for kind, needs in (("FP8", "SM 8.9"), ("NVFP4", "SM 10.0")):
            facts[f"{kind} matmul"] = "native" if host.has_matmul(kind) else f"emulated (needs NVIDIA {needs} or newer)"
        facts["model folders"] = host.model_folders()
    facts |= host.environment()
    print(json.dumps(facts, indent=1) if options.json
          else "\n".join(f"{key}: {value}" for key, value in facts.items()))
    return 0
