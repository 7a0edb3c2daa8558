#!/usr/bin/env python3
"""Writes loaders/files/addresses.json: where the weight files that ComfyUI's own templates name are published.

The templates of the installed comfyui-workflow-templates say it themselves (`properties.models`: name, url, directory).
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "loaders" / "files" / "addresses.json"
FOLDERS = ("checkpoints", "diffusion_models", "text_encoders", "vae")  # of ComfyUI's models: what this pack's nodes load
# /resolve/ is the file, /blob/ its page
ADDRESS = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/(?:resolve|blob)/main/([^?]+\.(?:safetensors|sft|gguf))(?:\?.*)?")


def source() -> str:
    """The package that is read, and its version."""
    return f"comfyui-workflow-templates {version('comfyui-workflow-templates')}"


def templates() -> Iterator[object]:
    """The JSON of every template that is installed."""
    packages = [path for path in Path(importlib.util.find_spec("comfyui_workflow_templates").origin).parent.parent.glob(
        "comfyui_workflow_templates*") if path.is_dir()]
    for path in sorted(file for package in packages for file in package.rglob("*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def models(value: object) -> Iterator[tuple[str, str, str]]:
    """(name, url, directory) of every model that a template names, also in subgraphs."""
    if isinstance(value, dict):
        if {"name", "url", "directory"} <= set(value):
            yield value["name"], value["url"], value["directory"]
        for inner in value.values():
            yield from models(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from models(inner)


def derive() -> dict[str, str]:
    """File name -> owner/name/path. Of several the one that most templates have, then the first by name."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for template in templates():
        for name, url, folder in models(template):
            address = ADDRESS.fullmatch(url)
            if address and folder in FOLDERS and address[2].rpartition("/")[2] == name:
                found[name]["/".join(address.groups())] += 1
    return {name: min(places, key=lambda place: (-places[place], place)) for name, places in sorted(found.items())}


if __name__ == "__main__":
    FILE.write_text(json.dumps({"source": source(), "files": derive()}, indent=0) + "\n", encoding="utf-8")
