"""Repack a ModelSlim export of Wan under diffusers' names into a diffusers repo, and back (SGLang's wan_repack.py).

Only names change: tensor data are copied as they are, in their order, behind a new header.
"""

from __future__ import annotations

from ... import host
from ...host.texts import Text, joined
from ...loaders.errors import CheckpointError
from ...loaders.files.places import find_path
from ...loaders.files.unfinished import MARKER
from ...loaders.words import size
from ..publish import PART, Step, Work, target_folder, work_folder
from .files import place_link, write
from .names import DIRECTIONS
from .plan import Plan, make_plan

__all__ = ["DIRECTIONS", "repack"]


def repack(source: str, base: str, output: str, direction: str = DIRECTIONS[0], link: bool = True,
           step: Step | None = None) -> str:
    """Write the folder `output` from the export `source` and the repo `base`; returns the report.

    "to diffusers": `source` is the export (high_noise_model and low_noise_model, or a single model), `base` the
    diffusers repo that config.json and everything but the transformers come from. "to original" is the inverse;
    `base`, which may be empty, is then the vendor's original repo.

    All work is in a hidden folder beside `output`, which appears whole (publish.py). An interrupted run (Cancel, a
    crash) leaves it, marked as unfinished; the next run compares what is in it with the source and goes on. `step` is
    called with numbers of bytes (default: the node's progress bar and Cancel).

    Raises CheckpointError when the export is incomplete or of another model than the base, and when `output` is not
    empty, cannot be written, lacks space, or lies in the source or base.
    """
    if direction not in DIRECTIONS:
        raise CheckpointError(Text("the direction is {direction!r}", direction=direction), "",
                              Text("choose one of: {directions}", directions=", ".join(DIRECTIONS)))
    export = find_path(source)
    repo = find_path(base) if base.strip() or direction == DIRECTIONS[0] else None
    for folder in (export, repo):
        if folder is not None and not folder.is_dir():
            raise CheckpointError(Text("this is a file"), folder, Text("give the folder"))
    target = target_folder(output, [export, *([repo] if repo else [])])
    plan = make_plan(export, repo, direction, link)
    weights = [file.name for file in plan.files if file.name.endswith(".safetensors") and not file.link]
    with work_folder(target) as work:
        with plan.sources.held():
            reused = _write_all(work, plan, weights, step or host.progress(sum(file.size for file in plan.files)))
        plan.sources.check()
        work.publish(weights)
    lines = [Text("repacked Wan {direction}: {export} -> {target}", direction=direction, export=export, target=target),
             *plan.lines]
    if reused:
        lines.append(Text("taken over from an interrupted run, after comparing it with the source: {size}",
                          size=size(reused)))
    return joined("\n", lines)


def _write_all(work: Work, plan: Plan, weights: list[str], step: Step) -> int:
    """Write every file into the content, weights under an unfinished name. Returns the bytes that were there."""
    files = plan.files
    names = {file.name: file.name + PART if file.name in weights else file.name for file in files}
    work.reopen(weights)
    for path in work.content.rglob("*"):
        name = path.relative_to(work.content).as_posix()
        if (path.is_symlink() or not path.is_dir()) and name != MARKER and name not in names.values():
            path.unlink()  # of another base or export
    for folder in sorted((path for path in work.content.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    work.check_space(sum(file.size for file in files))
    reused = 0
    for file in files:
        path = work.content / names[file.name]
        if file.link and file.source:
            if place_link(path, file.source):
                continue
            file = file._replace(link=False, data=plan.sources.add(file.source))
        if path.is_symlink():
            path.unlink()
        reused += write(path, file, step)
        plan.sources.check(file.name)
    return reused
