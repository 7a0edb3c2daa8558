"""Files that must stay as they are, and tensors that are views of files which are cut."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.files.frozen import Changed, Frozen
from quantized_transformers.loaders.files.mapped import Mapped
from quantized_transformers.loaders.files.source import Source
from support import crash, faults

pytestmark = pytest.mark.unit

TOLD = {"truncate": r"it has 6,809 bytes, and had 17,024", "empty": "it has 0 bytes", "append": "it has 17,028 bytes",
        "other bytes": "it was written to", "touch": "it was written to", "replace": "another file took its place",
        "remove": "it is gone"}


@pytest.fixture
def path(tmp_path):
    save_file({"x": torch.arange(4096, dtype=torch.float32), "y": torch.arange(64).reshape(8, 8)},
              tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("how", TOLD)
def test_what_changed(how, path):
    whole, mapped = Frozen([path]), Frozen([path]).behind((".safetensors",))
    whole.check()
    faults.change(path, how)
    with pytest.raises(Changed, match=rf"the source file changed meanwhile \(at a.weight\): {TOLD[how]}") as caught:
        whole.check("a.weight")
    assert f"where: {path}" in str(caught.value) and "what to do: run this again" in str(caught.value)
    with pytest.raises(Changed), whole.held():
        pytest.fail("it is checked before")
    if how in ("replace", "remove"):  # a mapping still has the bytes
        mapped.check()
    else:
        with pytest.raises(Changed, match="what to do: load the model again"):
            mapped.check()


def test_an_exception_whose_reason_is_a_change(path):
    frozen = Frozen([path])
    with pytest.raises(ZeroDivisionError), frozen.held():
        raise ZeroDivisionError
    with pytest.raises(Changed, match="it is gone") as caught, frozen.held("x"):
        path.unlink()
        raise ZeroDivisionError
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_first_look_counts(path, tmp_path):
    before = Frozen([path])
    assert before.add(path) == path.stat().st_size
    faults.change(path, "append")
    later = Frozen([path])
    later.check()
    with pytest.raises(Changed):
        (before | later).check()
    (later | before).check()
    assert before.add(path) + 4 == path.stat().st_size
    with pytest.raises(CheckpointError, match="cannot read the file: No such file"):
        Frozen([tmp_path / "nothing"])
    link = tmp_path / "link"
    link.symlink_to(path)
    shown = Frozen([link])
    faults.change(path, "touch")
    with pytest.raises(Changed):
        shown.check()


def test_a_checkpoint_is_frozen_before_it_is_read(path, monkeypatch):
    from quantized_transformers.loaders.containers import checkpoint

    read = checkpoint.read_header
    monkeypatch.setattr(checkpoint, "read_header", lambda file: (faults.change(path, "touch"), read(file))[1])
    with pytest.raises(Changed):
        Checkpoint(Source("x", str(path.parent), (str(path),))).frozen.check()


# --- views of files ---

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_views_are_read(path):
    there = load_file(path)
    views = [there["x"], there["y"], there["x"][100:200], there["x"][::7], there["y"].t(), there["y"][2:, 3]]
    mapped = Mapped([*there.values(), torch.ones(3)])
    assert mapped.files == [str(path)]
    for view in views:
        read = mapped.own(view)
        assert torch.equal(read, view) and read.dtype == view.dtype and read.stride() == view.stride()
        assert not there["x"].data_ptr() - 8192 <= read.data_ptr() < there["x"].data_ptr() + 32768
    for other in (torch.ones(3), torch.empty(3, device="meta"), torch.empty(0), load_file(path)["x"]):
        assert mapped.own(other) is other


@linux
def test_what_the_process_has_written_is_not_read_from_the_file(path):
    there = load_file(path)
    there["x"][5] = -1  # a page of its own from now on
    read = Mapped(there.values()).own(there["x"])
    assert read[5] == -1


@linux
def test_a_file_without_its_name(path):
    there = load_file(path)
    mapped = Mapped(there.values())
    faults.change(path, "replace")
    assert mapped.own(there["x"]) is there["x"] and mapped.files == []
    path.unlink()
    assert mapped.own(there["x"]) is there["x"]


@linux
def test_a_file_that_is_cut(path):
    """What reads it says so; what touches it is ended by the system."""
    def cut(use) -> int:
        def run() -> None:
            faulthandler.disable()  # pytest's, which would say what is meant to happen
            there = load_file(path)
            mapped = Mapped(there.values())
            os.truncate(path, 4096)
            use(mapped, there["x"])
        data = path.read_bytes()
        code = crash.in_child(run)
        path.write_bytes(data)
        return code

    def reads(mapped: Mapped, tensor: torch.Tensor) -> None:
        with pytest.raises(Changed, match="it ends within a tensor"):
            mapped.own(tensor)

    assert cut(reads) == 0
    assert cut(lambda mapped, tensor: tensor.sum()) == -signal.SIGBUS
