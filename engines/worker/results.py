"""The ids of jobs, and the folder of their results: DIR/<prompt_id>/, which is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...host.texts import Text
from ...loaders.errors import CheckpointError


def job_id(given: object) -> str:
    """A prompt_id as ComfyUI takes it: a UUID in its canonical spelling. A new one for None."""
    if given is None:
        return str(uuid.uuid4())
    try:
        if isinstance(given, str) and str(uuid.UUID(given)) == given:
            return given
    except ValueError:
        pass
    raise CheckpointError(Text("prompt_id is no UUID in lower case with hyphens"), repr(given)[:100],
                          Text("give one, or leave it out"))


class Results:
    """DIR, which all workers and the dispatcher see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self, job: str) -> list[str] | None:
        """What a job made, as paths with slashes below its folder; None where nothing was published."""
        root = self.folder / job
        if not root.is_dir():
            return None
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

    def file(self, job: str, name: str) -> Path | None:
        """One of the files above, by exactly that name: no other path is ever opened."""
        return self.folder / job / name if name in (self.files(job) or ()) else None

    def publish(self, job: str, outputs: Mapping[str, Any], made: Path) -> list[str]:
        """Copy what a job wrote under another name, then show it whole; of two that did the same job the first is kept.

        `outputs`: ComfyUI's, node -> kind -> files; `made`: its output folder, out of which nothing may point.
        """
        target, made = self.folder / job, made.resolve()
        partial = self.folder / f".{job}.{uuid.uuid4().hex[:8]}"
        partial.mkdir(parents=True)
        try:
            for place in _places(outputs):
                source = (made / place).resolve()
                if not source.is_relative_to(made):
                    raise CheckpointError(Text("a node names a result outside of ComfyUI's output folder"), str(place))
                copy = partial / source.relative_to(made)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, copy)
            try:
                os.rename(partial, target)
            except OSError:
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return self.files(job) or []


def _places(outputs: Mapping[str, Any]) -> set[Path]:
    """The saved files, not the previews, below the output folder."""
    items = (item for kinds in outputs.values() if isinstance(kinds, dict) for of_kind in kinds.values()
             if isinstance(of_kind, list) for item in of_kind)
    return {Path(str(item.get("subfolder") or ""), str(item["filename"])) for item in items
            if isinstance(item, dict) and item.get("type") == "output" and "filename" in item}
