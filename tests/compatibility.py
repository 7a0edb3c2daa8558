"""What `dev.py test newest` and `test oldest` print after the tests: versions, counts by folder, and a row for
docs/compatibility.md. Reads pytest's JUnit XML; exit code 1 where something failed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

PACKAGES = ("torch", "torchvision", "torchaudio", "comfy-kitchen", "comfy-aimdo", "comfyui-frontend-package",
            "comfyui-workflow-templates", "diffusers", "transformers", "tokenizers", "huggingface_hub", "safetensors",
            "numpy", "nvidia-modelopt")


def versions() -> dict[str, str]:
    """Package -> version, with the ComfyUI tree and Python first."""
    tree = Path(os.environ["COMFYUI_PATH"]) / "comfyui_version.py"
    comfyui = re.search(r'__version__ = "([^"]+)"', tree.read_text(encoding="utf-8"))
    out = {"ComfyUI": comfyui[1] if comfyui else "unknown", "python": platform.python_version()}
    for package in PACKAGES:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "-"
    return out


def results(path: Path) -> tuple[dict[str, Counter[str]], list[str]]:
    """(folder -> outcome -> how many tests, the tests that failed) of a JUnit XML file."""
    folders: dict[str, Counter[str]] = {}
    failed = []
    for case in ElementTree.parse(path).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        outcome = "failed" if outcome in ("failure", "error") else outcome
        parts = str(case.get("classname")).split(".")
        folders.setdefault(next((part for part in parts if part not in ("tests", "")), "?"), Counter())[outcome] += 1
        if outcome == "failed":
            failed.append(f"{'/'.join(parts)}.py::{case.get('name')}")
    return folders, failed


def main() -> int:
    end, junit = sys.argv[1], Path(sys.argv[2])
    found = versions()
    width = max(map(len, found))
    print(f"\n{end} versions")
    print("\n".join(f"  {name:{width}}  {version}" for name, version in found.items()))
    if not junit.is_file():
        print("the tests did not get as far as a result")
        return 1
    folders, failed = results(junit)
    total: Counter[str] = sum(folders.values(), Counter())
    for folder, counts in sorted(folders.items()):
        print(f"  {folder:{width}}  {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}")
    print("\n".join(f"  FAILED {test}" for test in failed))
    cells = [time.strftime("%Y-%m-%d"), end, *found.values(), str(total["passed"]),
             str(total["failed"]), str(total["skipped"])]
    print("the row for docs/compatibility.md (in its last cell: what failed or was skipped, and why):")
    print(f"| {' | '.join(cells)} |  |")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
