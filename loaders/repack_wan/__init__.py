"""Repack a ModelSlim export of Wan under diffusers' names into a diffusers repo, and back (specs/ascend.md section 4).

Only names change: tensor data are copied as they are, in their order, behind a new header.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ... import host
from ..errors import CheckpointError
from ..report import size
from ..sources import find_path
from .files import File, Step, place_link, sync_folder, write
from .names import DIRECTIONS
from .plan import make_plan

__all__ = ["DIRECTIONS", "repack", "target_folder"]
MARK, CONTENT, PART = "repack-wan", "unfinished", ".part"


def repack(source: str, base: str, output: str, direction: str = DIRECTIONS[0], link: bool = True,
           step: Step | None = None) -> str:
    """Write the folder `output` from the export `source` and the repo `base`; returns the report.

    "to diffusers": `source` is the export (high_noise_model and low_noise_model, or a single model), `base` the
    diffusers repo that config.json and everything but the transformers come from. "to original" is the inverse;
    `base`, which may be empty, is then the vendor's original repo.

    All work is in a hidden folder beside `output`, which appears whole, by one rename. An interrupted run (Cancel, a
    crash) leaves that folder, whose weights have a name that nothing loads; the next run compares what is in it with
    the source and goes on. `step` is called with numbers of bytes (default: the node's progress bar and Cancel).

    Raises CheckpointError when the export is incomplete or of another model than the base, and when `output` is not
    empty, cannot be written, lacks space, or lies in the source or base.
    """
    if direction not in DIRECTIONS:
        raise CheckpointError(f"the direction is {direction!r}", "", f"choose one of: {', '.join(DIRECTIONS)}")
    export = find_path(source)
    repo = find_path(base) if base.strip() or direction == DIRECTIONS[0] else None
    for folder in (export, repo):
        if folder is not None and not folder.is_dir():
            raise CheckpointError("this is a file", folder, "give the folder")
    target = target_folder(output, [export, *([repo] if repo else [])])
    plan = make_plan(export, repo, direction, link)
    try:
        with _work_folder(target) as content:
            reused = _write_all(content, plan.files, step or host.progress(sum(file.size for file in plan.files)))
            _publish(content, target, plan.files)
    except OSError as error:
        raise CheckpointError(f"cannot write: {error.strerror or error}", error.filename or target,
                              "check space and rights, then run this again: it goes on where it stopped") from error
    lines = [f"repacked Wan {direction}: {export} → {target}", *plan.lines]
    if reused:
        lines.append(f"taken over from an interrupted run, after comparing it with the source: {size(reused)}")
    return "\n".join(lines)


def target_folder(output: str, inputs: list[Path]) -> Path:
    """The folder that `output` names; a relative one is below this pack's model folder.

    Raises CheckpointError unless it is new or empty, no link, and neither in one of `inputs` nor around one.
    """
    text = output.strip()
    path = Path(text).expanduser()
    if not text or ".." in path.parts or "\0" in text:
        raise CheckpointError("no output folder is given" if not text else "an output folder must not contain '..'",
                              text, "give the full path of a new folder")
    if not path.is_absolute():
        path = Path(next(iter(host.model_folders()), os.getcwd()), path)
    if path.is_symlink() or path.exists() and not path.is_dir():
        raise CheckpointError("the output is a link or a file", path, "give the full path of a new folder")
    if path.exists() and any(path.iterdir()):
        raise CheckpointError("the output folder is not empty", path, "give a new folder; nothing is overwritten")
    real = Path(os.path.realpath(path))
    for folder in inputs:
        top = Path(os.path.realpath(folder))
        if real.is_relative_to(top) or top.is_relative_to(real):
            raise CheckpointError("the output folder and an input lie in each other", path,
                                  f"give a folder outside {folder}")
    return real


@contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """The hidden folder beside the target, for one process at a time; removed when all went well."""
    work = target.parent / f".{target.name}.repack"
    target.parent.mkdir(parents=True, exist_ok=True)
    if work.is_symlink() or work.exists() and not (work / MARK).is_file():
        raise CheckpointError("the folder for unfinished work exists, and is not this tool's", work, "remove it")
    work.mkdir(exist_ok=True)
    with open(work / MARK, "a", encoding="utf-8") as mark:
        try:
            import fcntl
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except BlockingIOError as error:
            raise CheckpointError("another run writes this folder", target, "wait for it") from error
        (work / CONTENT).mkdir(exist_ok=True)
        yield work / CONTENT
    shutil.rmtree(work)


def _write_all(content: Path, files: list[File], step: Step) -> int:
    """Write every file into `content`, weights under an unfinished name. Returns the bytes that were there already."""
    wanted = {_part(file) for file in files}
    for file in files:
        done, part = content / file.name, content / _part(file)
        if done != part and done.is_file() and not part.exists():
            done.rename(part)  # stopped while it was finishing
    for path in content.rglob("*"):
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(content).as_posix() not in wanted:
            path.unlink()  # of another base or export
    for folder in sorted((path for path in content.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    there = sum(path.stat().st_size for path in content.rglob("*") if path.is_file() and not path.is_symlink())
    need, free = sum(file.size for file in files) - there, shutil.disk_usage(content).free
    if need > free:
        raise CheckpointError(f"the new folder needs {size(need)} more, {size(free)} are free", content.parent.parent,
                              "make space, or choose another disk")
    reused = 0
    for file in files:
        path = content / _part(file)
        if file.link and file.source and place_link(path, file.source):
            continue
        if path.is_symlink():
            path.unlink()
        reused += write(path, file._replace(link=False), step)
    return reused


def _part(file: File) -> str:
    return file.name + PART if file.name.endswith(".safetensors") and not file.link else file.name


def _publish(content: Path, target: Path, files: list[File]) -> None:
    """Give every file its name and let the folder appear, all of it on disk before."""
    for file in files:
        if (content / _part(file)).exists() and _part(file) != file.name:
            (content / _part(file)).rename(content / file.name)
    for folder in (*(path for path in content.rglob("*") if path.is_dir()), content):
        sync_folder(folder)
    if target.exists():
        target.rmdir()  # empty: looked at before; not empty any more, this raises
    content.rename(target)
    sync_folder(target.parent)
