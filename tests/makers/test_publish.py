"""The folders that a tool writes: which may be written, what an unfinished one is refused for, what is recovered."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.components import vae
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.files.places import find_path
from quantized_transformers.loaders.files.unfinished import MARKER, refuse_unfinished
from quantized_transformers.loaders.local import references
from quantized_transformers.loaders.locate import locate
from quantized_transformers.makers.publish import target_folder, work_folder
from support import crash
from support.crash import in_child, tidied, tree

pytestmark = pytest.mark.unit


def component(folder: Path, value: float = 1) -> Path:
    """A folder of one model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}', encoding="utf-8")
    save_file({"x": torch.full((2,), value)}, folder / "diffusion_pytorch_model.safetensors")
    return folder


# --- the marker ---

def test_what_lies_in_an_unfinished_folder_is_refused(tmp_path):
    repo = tmp_path / "repo"
    part = component(repo / "transformer")
    component(repo / "vae")
    (repo / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "FluxTransformer2DModel"],
                                                       "vae": ["diffusers", "AutoencoderKL"]}), encoding="utf-8")
    (tmp_path / "folder").symlink_to(part)
    (tmp_path / "file.safetensors").symlink_to(part / "diffusion_pytorch_model.safetensors")
    references = [repo, part, part / "diffusion_pytorch_model.safetensors", tmp_path / "folder",
                  tmp_path / "file.safetensors"]
    for reference in references:
        assert Checkpoint(locate(str(reference))).tensors.keys() == {"x"}
    for marked in (repo, part):  # the pipeline, and the transformer in it
        (marked / MARKER).touch()
        for reference in references:
            with pytest.raises(CheckpointError, match="this folder is unfinished") as caught:
                locate(str(reference))
            assert f"where: {marked}\n" in str(caught.value)
            assert "run the tool again: it goes on where it stopped; or delete the folder" in str(caught.value)
        with pytest.raises(CheckpointError, match="this folder is unfinished"):
            locate(str(repo), need_weights=False)
        (marked / MARKER).unlink()
    (repo / "vae" / MARKER).touch()
    locate(str(repo))  # has nothing to do with it
    with pytest.raises(CheckpointError, match="this folder is unfinished"):
        vae.load(vae.Request(str(repo)))
    (repo / "vae" / MARKER).unlink()
    (tmp_path / MARKER).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="unfinished"):
        find_path(str(repo))
    with pytest.raises(CheckpointError, match="unfinished"):
        model.load(model.Request(str(part)), quiet=True)


def test_three_folders_above_are_looked_at(tmp_path):
    deep = tmp_path / "1/2/3/4"
    deep.mkdir(parents=True)
    (deep / "x.safetensors").touch()
    (tmp_path / "1" / MARKER).touch()
    for path in (deep, deep / "x.safetensors", tmp_path / "1"):
        with pytest.raises(CheckpointError, match="unfinished"):
            refuse_unfinished(path)
    refuse_unfinished(tmp_path)
    (deep / "5").mkdir()
    refuse_unfinished(deep / "5")


def test_lists_leave_it_out(tmp_path):
    import folder_paths

    done, begun = component(tmp_path / "models" / "done"), component(tmp_path / "models" / "begun")
    (begun / MARKER).touch()
    folder_paths.add_model_folder_path("diffusers_components", str(done.parent), is_default=True)
    try:
        found = [one.reference for one in references()]
    finally:
        folder_paths.folder_names_and_paths["diffusers_components"][0].remove(str(done.parent))
    assert "done" in found and not [name for name in found if "begun" in name]


# --- the target ---

def test_what_may_be_overwritten(tmp_path):
    base = component(tmp_path / "base")
    old = component(tmp_path / "old")
    with pytest.raises(CheckpointError, match="not empty"):
        target_folder(str(old), [base])
    assert target_folder(str(old), [base], overwrite=True) == old
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious.txt").touch()
    repo = component(tmp_path / "repo")
    (repo / "vae").mkdir()
    loose = component(tmp_path / "loose")
    (loose / "config.json").unlink()
    for folder in (home, repo, loose):
        with pytest.raises(CheckpointError, match="not that of one model"):
            target_folder(str(folder), [base], overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(old)
    with pytest.raises(CheckpointError, match="a link or a file"):
        target_folder(str(link), [base], overwrite=True)
    for inside in (base, base / "config.json"):  # inputs may be files
        with pytest.raises(CheckpointError, match="lie in each other"):
            target_folder(str(base), [inside], overwrite=True)
    (home / MARKER).touch()  # an interrupted run's
    assert target_folder(str(home), [base]) == home


def test_relative_targets_are_below_the_model_folder(tmp_path):
    import folder_paths

    folder_paths.add_model_folder_path("diffusers_components", str(tmp_path / "models"), is_default=True)
    (tmp_path / "models").mkdir()
    try:
        assert target_folder("mine/new", []) == tmp_path / "models/mine/new"
    finally:
        folder_paths.folder_names_and_paths["diffusers_components"][0].remove(str(tmp_path / "models"))


# --- work and recovery ---

def fill(work, value: float = 2) -> None:
    save_file({"x": torch.full((2,), value)}, work.content / "diffusion_pytorch_model.safetensors.part")
    (work.content / "config.json").write_text("{}", encoding="utf-8")


NAMES = ["diffusion_pytorch_model.safetensors"]


def test_exchange(tmp_path):
    target = component(tmp_path / "out")
    with work_folder(target, overwrite=True) as work:
        fill(work)
        assert tree(target).keys() == {"config.json", *NAMES}
        work.publish(NAMES)
    assert tree(target)["config.json"] == b"{}" and tree(target).keys() == {"config.json", *NAMES}
    assert os.listdir(tmp_path) == ["out"]


def exchange_killed(target: Path, at: str) -> None:
    """A run that dies right before it renames ("content": the old target is aside), commits ("marker"), or ends ("all":
    of the old target, one file is removed)."""
    def run() -> None:
        removed = 0

        def hook(event, arguments):
            nonlocal removed
            removed += event == "os.remove"
            if event == "os.remove" and at == "all" and removed == 3:
                os._exit(7)
            if event == "os.rename" and at == "content" and Path(arguments[0]).name == "content":
                os._exit(7)
            if event == "os.remove" and at == "marker" and str(arguments[0]) == str(target / MARKER):
                os._exit(7)
        sys.addaudithook(hook)
        with work_folder(target, overwrite=True) as work:
            fill(work)
            work.publish(NAMES)

    assert in_child(run) == 7


@pytest.mark.parametrize("at", ["content", "marker"])
def test_an_old_target_comes_back(at, tmp_path):
    target = component(tmp_path / "out")
    old = tree(target)
    exchange_killed(target, at)
    assert target.exists() == (at == "marker") and tree(tmp_path / ".out.unfinished/previous") == old
    with pytest.raises(CheckpointError, match="not empty"), work_folder(target):  # this run may not replace it
        pytest.fail("it may not")
    assert tree(target) == old
    with work_folder(target, overwrite=True) as work:  # what was made is still there
        assert (work.content / NAMES[0]).is_file() and not work.previous.exists()
        work.publish(NAMES)
    assert tree(target)["config.json"] == b"{}" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_published_run_has_left(overwrite, tmp_path):
    """Killed between its publication and its end, at every change: the next one takes the rest away, and one that may
    not replace what is there refuses as before."""
    base = tmp_path / "base"
    base.mkdir()
    at, left = 0, 0
    while True:
        target = component(tmp_path / "models" / "out")

        def run(target: Path = target) -> None:
            with work_folder(target, overwrite=True) as work:
                fill(work)
                work.publish(NAMES)

        if not crash.killed(run, at):
            break
        at += 1
        if target.is_dir() and not (target / MARKER).exists() and tree(target)["config.json"] == b"{}":
            left += os.listdir(target.parent) != ["out"]
            if overwrite:
                with work_folder(target, overwrite=True):
                    assert tree(target)["config.json"] == b"{}"
            else:
                with pytest.raises(CheckpointError, match="not empty"):
                    target_folder(str(target), [base])
                tidied()
            assert tree(target)["config.json"] == b"{}" and os.listdir(target.parent) == ["out"]
        crash.reset(target.parent)
    assert left > 5


def test_half_removed_is_never_put_back(tmp_path):
    target = component(tmp_path / "out")
    exchange_killed(target, "all")
    left = [path for path in (tmp_path / ".out.unfinished").rglob("*") if path.is_file() and path.name != MARKER]
    assert len(left) == 1 and tree(target)["config.json"] == b"{}"
    shutil.rmtree(target)  # by the user
    with work_folder(target) as work:
        assert not target.exists() and tree(work.folder).keys() == {MARKER, f"content/{MARKER}"}


def test_nothing_is_lost_when_its_place_is_taken(tmp_path):
    target = component(tmp_path / "out")
    old = tree(target)
    exchange_killed(target, "content")
    component(target, 3)
    with pytest.raises(CheckpointError, match="is still here, and its place is taken"), \
            work_folder(target, overwrite=True):
        pytest.fail("there are two")
    assert tree(tmp_path / ".out.unfinished/previous") == old
    shutil.rmtree(target)
    target.mkdir()  # empty
    with work_folder(target, overwrite=True) as work:
        assert tree(target) == old
        work.publish(NAMES)
    assert tree(target)["config.json"] == b"{}"


def test_a_target_that_fills_meanwhile_is_kept(tmp_path):
    with pytest.raises(CheckpointError, match="not empty"), work_folder(tmp_path / "out") as work:
        fill(work)
        component(tmp_path / "out")
        work.publish(NAMES)
    with pytest.raises(CheckpointError, match="not that of one model"), work_folder(tmp_path / "out2", True) as work:
        fill(work)
        (tmp_path / "out2" / "mine").mkdir(parents=True)
        work.publish(NAMES)
    assert (tmp_path / "out2" / "mine").is_dir()


def test_the_work_folder_of_someone_else(tmp_path):
    work = tmp_path / ".out.unfinished"
    work.mkdir()
    with work_folder(tmp_path / "out"):  # empty: killed before it was marked
        pass
    assert not work.exists()
    work.mkdir()
    (work / "mine").touch()
    with pytest.raises(CheckpointError, match="not this tool's"), work_folder(tmp_path / "out"):
        pytest.fail("not ours")
    shutil.rmtree(work)
    work.touch()
    with pytest.raises(CheckpointError, match="not this tool's"), work_folder(tmp_path / "out"):
        pytest.fail("a file")


def test_one_process_at_a_time(tmp_path):
    target = tmp_path / "out"
    with work_folder(target) as work:
        fill(work)
        with pytest.raises(CheckpointError, match="another run writes this folder"), work_folder(target):
            pytest.fail("two")
        script = (f"import fcntl, sys; f = open({str(work.folder / MARKER)!r}, 'a')\n"
                  "try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept BlockingIOError: sys.exit(5)")
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 5
        work.publish(NAMES)
    # one that opened the marker before the other run removed it has locked a file that is gone
    with open(tmp_path / "gone", "a") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
    assert os.listdir(tmp_path) == ["gone", "out"] or os.listdir(tmp_path) == ["out", "gone"]


def test_what_an_exception_leaves(tmp_path):
    target = tmp_path / "out"
    for resumable in (True, False):
        with pytest.raises(ZeroDivisionError), work_folder(target) as work:
            fill(work)
            work.resumable = resumable
            raise ZeroDivisionError
        assert (work.content / f"{NAMES[0]}.part").exists() == resumable == work.folder.exists()
    with pytest.raises(CheckpointError, match="cannot write: No space left on device") as caught, work_folder(target):
        raise OSError(28, "No space left on device", "some/file")
    assert "some/file" in str(caught.value) and "goes on where it stopped" in str(caught.value)
