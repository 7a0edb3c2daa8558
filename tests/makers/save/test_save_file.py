"""Where a saved MODEL may go, and that its file appears whole or not at all."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantized_transformers import host
from quantized_transformers.loaders.containers.writing import Piece, declared, whole
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers.save import target_file
from quantized_transformers.makers.save import writer as module
from quantized_transformers.makers.save.writer import write

pytestmark = pytest.mark.parity

MB = 1 << 20
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and limits")


@pytest.fixture
def output(tmp_path):
    import folder_paths

    before, folder = folder_paths.get_output_directory(), tmp_path / "output"
    folder.mkdir()
    folder_paths.set_output_directory(str(folder))
    yield folder
    folder_paths.set_output_directory(before)


def layers(value: int = 1, megabytes: int = 4) -> list[Piece]:
    """One layer a megabyte, of U8."""
    def one(i: int) -> Piece:
        tensor = torch.full((MB,), value, dtype=torch.uint8)
        return whole([declared(f"l{i}", tensor)], lambda: {f"l{i}": tensor})

    return [one(i) for i in range(megabytes)]


def test_names(output, tmp_path):
    assert target_file("a") == output / "a.safetensors"
    assert target_file("sub/folder/a.b") == output / "sub" / "folder" / "a.b.safetensors"
    assert target_file(" a.SafeTensors ") == output / "a.SafeTensors"
    inside = Path(host.model_folders()[0]) / "mine"
    assert target_file(str(inside)) == Path(os.path.realpath(inside.parent)) / "mine.safetensors"
    assert target_file(str(output / "x")) == output / "x.safetensors"
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (output / "link").symlink_to(outside)
    for name, message in (("", "no file name"), ("../a", "no name of a file"), ("a/", "no name of a file"),
                          ("a/../../b", "no name of a file"), (str(outside / "a"), "outside of ComfyUI's"),
                          ("link/a", "outside of ComfyUI's"), ("~/a", "outside of ComfyUI's"), (".a", "hidden"),
                          (".safetensors", "hidden"), ("a\0b", "no name of a file")):
        with pytest.raises(CheckpointError, match=message):
            target_file(name)
    assert list(output.iterdir()) == [output / "link"]


def test_odd_tensors_are_whole_and_aligned(output):
    """Every dtype and size that safetensors has, among them empty ones and scalars, in an order that would misalign."""
    g = torch.Generator().manual_seed(3)
    tensors = {}
    for i, dtype in enumerate((torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.float16, torch.int8,
                               torch.float8_e8m0fnu, torch.int32, torch.float64, torch.int64, torch.bool)):
        for j, shape in enumerate(((), (3,), (0, 4), (5, 7), (8, 16))):
            tensors[f"t{i}.{j}"] = torch.randint(0, 2, shape, generator=g).to(dtype)
    tensors["view"] = torch.arange(64, dtype=torch.float32).view(8, 8).t()
    groups = [dict(list(tensors.items())[i:i + 5]) for i in range(0, len(tensors), 5)]
    made = [whole([declared(n, t) for n, t in group.items()], lambda group=group: group) for group in groups]
    seen: list[int] = []
    write(target := output / "odd.safetensors", made, {"format": "pt", "ü": "\"\\"}, step=seen.append)
    back = load_file(str(target))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name].contiguous().view(-1).view(torch.uint8),
                           tensor.contiguous().view(-1).view(torch.uint8)), name
    assert sum(seen) == sum(t.numel() * t.element_size() for t in tensors.values())


def test_existing_files_are_kept_unless_asked(output):
    target = output / "model.safetensors"
    write(target, layers(1), {})
    before = target.read_bytes()
    with pytest.raises(CheckpointError, match="this file exists"):
        write(target, layers(2), {})
    assert target.read_bytes() == before
    write(target, layers(2), {}, overwrite=True)
    assert set(load_file(str(target))["l0"].tolist()) == {2}
    with pytest.raises(CheckpointError, match="this is a folder"):
        (output / "folder.safetensors").mkdir()
        write(output / "folder.safetensors", layers(1), {}, overwrite=True)
    assert not list(output.glob(".*"))


def test_cancel_and_broken_layers_leave_what_was_there(output):
    target = output / "model.safetensors"
    write(target, layers(1), {})
    before = target.read_bytes()

    class Cancelled(BaseException):
        pass

    def step(amount: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        write(target, layers(2), {}, overwrite=True, step=step)
    liar = [*layers(2, 2), whole([declared("x", torch.zeros(4))], lambda: {"x": torch.zeros(5)})]
    with pytest.raises(CheckpointError, match=r"the tensor x is torch.float32 \[5\] on cpu, declared was F32 \[4\]"):
        write(target, liar, {}, overwrite=True)
    with pytest.raises(CheckpointError, match="no"):
        write(target, layers(2), {}, overwrite=True, check=lambda path: (_ for _ in ()).throw(CheckpointError("no")))
    with pytest.raises(CheckpointError, match="complex64, which a safetensors file cannot hold"):
        declared("c", torch.zeros(2, dtype=torch.complex64))
    assert target.read_bytes() == before and os.listdir(output) == ["model.safetensors"]


@posix
def test_a_full_disk(output, monkeypatch):
    """Told beforehand where the file system says so, and by the write that fails where it does not."""
    import resource

    target = output / "model.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: os.stat_result((0,) * 10) and type("U", (), {"free": MB})())
        with pytest.raises(CheckpointError, match=r"the file needs 4.19 MB, 1.05 MB are free"):
            write(target, layers(), {})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MB, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write the file: File too large(?s:.)*make space"):
            write(target, layers(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(output.iterdir())


@posix
@pytest.mark.parametrize("after", [0, 2, 4])
def test_killed_at_any_point_leaves_nothing_that_loads(after, output):
    """kill -9 after so many megabytes (4: all of them, before the file gets its name)."""
    import folder_paths

    target = output / "model.safetensors"
    written = 0

    def step(amount: int) -> None:
        nonlocal written
        written += amount
        if written > after * MB:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the threads of OpenMP's pool are not in a fork
        write(target, layers(), {}, step=step, check=lambda path: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert os.listdir(output) == [".model.safetensors.part"]
    found, _ = folder_paths.recursive_search(str(output), excluded_dir_names=[])
    assert folder_paths.filter_files_extensions(found, folder_paths.supported_pt_extensions) == []
    write(target, layers(3), {})
    assert set(load_file(str(target))["l3"].tolist()) == {3} and os.listdir(output) == ["model.safetensors"]


@posix
def test_two_runs_on_one_name(output):
    """The second is refused while the first writes, and does not touch its file."""
    target = output / "model.safetensors"
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the threads of OpenMP's pool are not in a fork
        write(target, layers(1), {}, step=lambda amount: time.sleep(0.05))
        os._exit(0)
    while not (output / ".model.safetensors.part").exists() or not (output / ".model.safetensors.part").stat().st_size:
        time.sleep(0.005)
    with pytest.raises(CheckpointError, match="another run is writing this file"):
        write(target, layers(2), {})
    assert os.waitpid(child, 0)[1] == 0
    assert set(load_file(str(target))["l3"].tolist()) == {1}


@posix
def test_a_file_that_got_its_name_while_it_was_opened(output, monkeypatch):
    """Between opening and locking another run may finish: then what is open is its result, and stays as it is."""
    import fcntl

    target, part, lock = output / "model.safetensors", output / ".model.safetensors.part", fcntl.flock
    part.write_bytes(b"whole")

    def late(file, how) -> None:
        part.rename(target)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(CheckpointError, match="another run is writing this file"):
        write(target, layers(2), {}, overwrite=True)
    assert target.read_bytes() == b"whole"
