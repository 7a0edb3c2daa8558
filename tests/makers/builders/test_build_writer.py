"""The writer of model folders: its files against safetensors' own writer, interruptions, faults, memory."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.containers.writing import Declared, Piece, whole, write_at
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.files.frozen import Frozen
from quantized_transformers.loaders.files.unfinished import MARKER
from quantized_transformers.loaders.locate import locate
from quantized_transformers.makers.builders.writer import terminal_progress, write_model
from support import bench, bench_build, crash

pytestmark = pytest.mark.unit

STEM = "diffusion_pytorch_model"
# (torch type, safetensors' name, shape): every type that a quantized transformer has, a scalar, odd sizes, no elements
KINDS = [(torch.float8_e4m3fn, "F8_E4M3", (3, 5)), (torch.float32, "F32", ()), (torch.bfloat16, "BF16", (7,)),
         (torch.uint8, "U8", (1, 9)), (torch.float16, "F16", (3,)), (torch.int64, "I64", (2,)),
         (torch.int8, "I8", (5,)), (torch.bool, "BOOL", (3,)), (torch.int32, "I32", (1,)),
         (torch.float8_e5m2, "F8_E5M2", (1,)), (torch.float8_e8m0fnu, "F8_E8M0", (3, 1)), (torch.float32, "F32", (0, 4)),
         (torch.int16, "I16", (2,)), (torch.float64, "F64", (1,))]


def tensors(count: int = 6) -> dict[str, torch.Tensor]:
    """Layers of an FP8 weight, its scale and a BF16 bias; seeded."""
    generator = torch.Generator().manual_seed(7)
    made: dict[str, torch.Tensor] = {}
    for i in range(count):
        weight = torch.randn(33, 65, generator=generator)
        made |= {f"blocks.{i}.weight": weight.to(torch.float8_e4m3fn), f"blocks.{i}.weight_scale": weight[0, 0].abs(),
                 f"blocks.{i}.bias": weight[0].bfloat16()}
    return made


def pieces_of(made: dict[str, torch.Tensor], group: int = 3) -> list[Piece]:
    kinds = {kind: name for kind, name, _ in KINDS}
    names = list(made)
    groups = [names[i:i + group] for i in range(0, len(names), group)]
    return [whole([(name, kinds[made[name].dtype], tuple(made[name].shape)) for name in part],
                  lambda part=part: {name: made[name] for name in part}) for part in groups]


@pytest.fixture
def source(tmp_path):
    """A file that the tensors are made from, as far as the writer knows."""
    path = tmp_path / "base" / "source.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"source")
    return path


def write(target: Path, source: Path, made: dict[str, torch.Tensor] | None = None, pieces: list[Piece] | None = None,
          **options):
    options = {"config": {"b": 1, "_class_name": "X"}, "header": {"format": "pt", "quantization": "{}"},
               "copies": {}, "sources": Frozen([source]), "shard_bytes": 5000, "step": lambda count: None} | options
    return write_model(target, pieces or pieces_of(made or tensors()), **options)


def hidden(target: Path) -> Path:
    return target.parent / f".{target.name}.unfinished"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# --- what is written ---

def test_the_file_is_safetensors_own(tmp_path, source):
    """Byte for byte what safetensors' writer makes of the same tensors."""
    generator = torch.Generator().manual_seed(3)
    made = {f"{i}.é": torch.randint(0, 2, (max(1, torch.zeros(shape).numel()) * kind.itemsize,), generator=generator,
                                    dtype=torch.uint8)[:torch.zeros(shape).numel() * kind.itemsize].view(kind)
            .reshape(shape) for i, (kind, _, shape) in enumerate(KINDS)}
    done = write(tmp_path / "out", source, made, header={"format": "pt"})
    save_file(made, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "out" / f"{STEM}.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert done.shards == 1 and done.reused == 0
    assert done.total_size == sum(tensor.nbytes for tensor in made.values())


def test_shards_index_config_copies(tmp_path, source):
    made = tensors()
    beside = tmp_path / "recipe.json"
    beside.write_text("{}", encoding="utf-8")
    done = write(tmp_path / "out", source, made, copies={"recipe.json": beside})
    out = tmp_path / "out"
    # a piece takes 33 * 65 + 4 + 65 * 2 = 2279 bytes: two fit into 5000
    files = [f"{STEM}-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    assert sorted(os.listdir(out)) == sorted(done.files) == sorted(
        [*files, "config.json", "recipe.json", f"{STEM}.safetensors.index.json"])
    assert (out / "config.json").read_text() == '{\n  "_class_name": "X",\n  "b": 1\n}\n'
    index = json.loads((out / f"{STEM}.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 6 * 2279} == {"total_size": done.total_size}
    assert list(index["weight_map"]) == sorted(made)
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt", "quantization": "{}"}
            tensor = shard.get_tensor(name)
        assert tensor.dtype == made[name].dtype and tensor.shape == made[name].shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), made[name].reshape(-1).view(torch.uint8))
    assert {index["weight_map"][f"blocks.1.{leaf}"] for leaf in ("weight", "weight_scale", "bias")} == {files[0]}
    found = Checkpoint(locate(str(out)))  # by the pack's own reader, which knows shards by their index
    assert found.tensors.keys() == made.keys()
    assert not hidden(out).exists()


def test_names_and_sizes_that_may_be_chosen(tmp_path, source):
    done = write(tmp_path / "out", source, stem="model", index_name="x.index.json", shard_bytes=1)
    assert done.shards == 6 and "model-00006-of-00006.safetensors" in done.files and "x.index.json" in done.files


def test_progress_ends_at_the_whole(tmp_path, source, capsys):
    seen: list[int] = []
    done = write(tmp_path / "out", source, step=seen.append)
    assert sum(seen) == done.total_size
    step = terminal_progress(200 << 20)  # no terminal here: a line for each 5 %
    for _ in range(200):
        step(1 << 20)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20 and lines[9].split("]")[1].split()[0] == "50" and "104.86 MB of 209.72 MB" in lines[9]
    assert "/s" in lines[9] and lines[9].endswith("left") and " in " in lines[-1]


# --- kill -9 ---

@pytest.fixture(scope="module")
def whole_tree(tmp_path_factory):
    """What uninterrupted runs write: of six layers in three shards, and of three in two."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "source").write_bytes(b"source")
    for count in (6, 3):
        write(folder / str(count), folder / "source", tensors(count))
    return {count: crash.tree(folder / str(count)) for count in (6, 3)}


def check_state(target: Path, new: dict[str, bytes], old: dict[str, bytes] | None) -> None:
    """After a kill: nothing loads but what is whole, and nothing is lost."""
    work = hidden(target)
    if target.exists() and not (target / MARKER).exists():
        assert crash.tree(target) in (new, old)
    else:
        crash.refuse_to_load(*crash.everything_in(target))
        assert old is None or crash.tree(work / "previous") in (new, old)
    crash.refuse_to_load(*crash.everything_in(work))


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_change(overwrite, tmp_path, source, whole_tree, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and of no effect on what a killed process leaves
    old, count, reused = None, 0, set()
    while True:
        target = tmp_path / str(count)
        if overwrite:
            write(target, source, tensors(1))
            old = crash.tree(target)
        if not crash.killed(lambda target=target: write(target, source, tensors(3), overwrite=overwrite), count):
            break
        check_state(target, whole_tree[3], old)
        if not target.exists() or crash.tree(target) != whole_tree[3]:
            reused.add(write(target, source, tensors(3), overwrite=overwrite).reused)
            assert not hidden(target).exists()
        assert crash.tree(target) == whole_tree[3], count
        crash.reset(target, hidden(target))
        count += 1
    assert crash.tree(target) == whole_tree[3] and not hidden(target).exists()
    assert reused == {0, 2 * 2279, 3 * 2279}  # no shard, one, or both
    assert count > 40  # heads and tensors of two shards, and everything around


def test_killed_twice(tmp_path, source, whole_tree):
    """At 20 seeded points, and the run after it again: what undoes an interrupted exchange can be interrupted, too."""
    chance = random.Random(5)
    for i in range(20):
        target = tmp_path / str(i)
        write(target, source, tensors(1))
        old = crash.tree(target)
        for _ in range(2):
            crash.killed(lambda target=target: write(target, source, tensors(3), overwrite=True),
                         chance.randrange(i % 2 * 30, 50))  # every other time in the exchange
            check_state(target, whole_tree[3], old)
        write(target, source, tensors(3), overwrite=True)
        assert crash.tree(target) == whole_tree[3] and not hidden(target).exists()


def interrupt(target: Path, source: Path, after: int, **options) -> None:
    """Stop as Cancel does, after so many bytes."""
    left = after

    def step(count: int) -> None:
        nonlocal left
        left -= count
        if left < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(target, source, **options, step=step)


def test_cancelled_and_taken_over(tmp_path, source, whole_tree):
    target = tmp_path / "out"
    interrupt(target, source, 3 * 2279)
    assert not target.exists() and len(list(hidden(target).rglob("*.part"))) == 2
    begun = list((hidden(target) / "content").glob("*.part"))
    first = min(begun)
    stamp = first.stat().st_mtime_ns
    made: list[str] = []
    pieces = [Piece(piece.tensors, lambda put, piece=piece: made.append(piece.tensors[0].name) or piece.write(put))
              for piece in pieces_of(tensors())]
    seen: list[int] = []
    done = write(target, source, pieces=pieces, step=seen.append)
    assert done.reused == 2 * 2279 and made == [f"blocks.{i}.weight" for i in range(2, 6)]
    assert (target / first.name.removesuffix(".part")).stat().st_mtime_ns == stamp
    assert sum(seen) == done.total_size and crash.tree(target) == whole_tree[6]


@pytest.mark.parametrize("change", ["options", "config", "layout", "shard", "job"])
def test_what_is_not_taken_over(change, tmp_path, source):
    target = tmp_path / "out"
    interrupt(target, source, 5 * 2279)
    part = min((hidden(target) / "content").glob("*.part"))
    options: dict = {}
    if change == "shard":
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
    elif change == "job":
        (hidden(target) / "job.json").write_text("{", encoding="utf-8")
    else:
        options = {"options": {"fingerprint": "b"}, "config": {"config": {"b": 2}},
                   "layout": {"shard_bytes": 2500}}[change]
    done = write(target, source, **options)
    assert done.reused == (2 * 2279 if change == "shard" else 0)
    assert {name: tensor.float().tolist() for name, tensor in stored(target).items()} == {
        name: tensor.float().tolist() for name, tensor in tensors().items()}


# --- faults ---

def test_source_changed_meanwhile(tmp_path, source):
    target = tmp_path / "out"

    def touched(at: int) -> list[Piece]:
        pieces = pieces_of(tensors())

        def write_other(put):
            source.write_bytes(b"another")
            yield from pieces_of(tensors())[at].write(put)
        pieces[at] = Piece(pieces[at].tensors, write_other)
        return pieces

    for at, named in ((2, r" \(at blocks.3.weight\)"), (5, "")):
        source.write_bytes(b"source")
        with pytest.raises(CheckpointError, match=f"the source file changed meanwhile{named}: it has 7 bytes, and had 6") as caught:
            write(target, source, pieces=touched(at))
        assert str(source) in str(caught.value)
        assert not target.exists() and not hidden(target).exists()
    source.write_bytes(b"source")
    interrupt(target, source, 4 * 2279)
    os.utime(source, ns=(1, 1))  # between two runs
    assert write(target, source).reused == 0 and not hidden(target).exists()
    with pytest.raises(CheckpointError, match="cannot read the file: No such file"):
        write(tmp_path / "other", tmp_path / "nothing")


@pytest.mark.parametrize(("made", "message"), [
    ({"x": torch.zeros(3)}, r"the tensor x is torch.float32 \[3\] on cpu, declared was BF16 \[3\]"),
    ({"x": torch.zeros(1, 3, dtype=torch.bfloat16)}, r"the tensor x is torch.bfloat16 \[1, 3\]"),
    ({"x": torch.zeros(3, dtype=torch.bfloat16, device="meta")}, "the tensor x is .* on meta"),
    ({}, "the tensor x was not made"),
    ({"x": torch.zeros(3, dtype=torch.bfloat16), "y": torch.zeros(1)}, "the tensor y was made, but not declared"),
    (CheckpointError("NaN in the weight x", "here", "get another"), "NaN in the weight x"),
    (OSError(5, "Input/output error", "base.safetensors"), "cannot read what x is made from: Input/output error")])
def test_a_tensor_that_cannot_be_written(made, message, tmp_path, source):
    def make():
        if isinstance(made, Exception):
            raise made
        return made

    pieces = [*pieces_of(tensors()), whole([("x", "BF16", (3,))], make)]
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "out", source, pieces=pieces)
    assert not (tmp_path / "out").exists()
    if not isinstance(made, OSError):
        assert not hidden(tmp_path / "out").exists()


@pytest.mark.parametrize(("parts", "message"), [
    ([(0, [1.0, 2.0, 3.0])], "4 bytes of x were not written"),
    ([(0, [1.0, 2.0, 3.0, 4.0]), (3, [5.0])], "-4 bytes of x were not written"),
    ([(2, [1.0, 2.0, 3.0])], r"x: 12 bytes of torch.float32 at 2 are beyond its F32 \[4\]"),
    ([(0, torch.zeros(4, dtype=torch.int32))], "x: 16 bytes of torch.int32 at 0 are beyond its F32")])
def test_parts_that_are_not_the_tensor(parts, message, tmp_path, source):
    piece = Piece((Declared("x", "F32", (4,)),),
                  lambda put: (put("x", start, torch.as_tensor(values)) for start, values in parts))
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "out", source, pieces=[piece])
    assert not (tmp_path / "out").exists() and not hidden(tmp_path / "out").exists()


def test_without_pwrite(tmp_path, source, whole_tree, monkeypatch):
    """As on Windows."""
    monkeypatch.delattr(os, "pwrite")
    write(tmp_path / "out", source)
    assert crash.tree(tmp_path / "out") == whole_tree[6]


def test_disk_full_in_the_middle(tmp_path, source, whole_tree):
    """The system's own limit on a file's size; the error of a full disk takes the same way."""
    target = tmp_path / "out"

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3500, 3500))
        with pytest.raises(CheckpointError, match="cannot write the tensor blocks.1.weight: File too large") as caught:
            write(target, source)
        assert "it goes on where it stopped" in str(caught.value)

    assert crash.in_child(limited) == 0
    assert not target.exists()
    crash.refuse_to_load(*crash.everything_in(hidden(target)))
    write(target, source)
    assert crash.tree(target) == whole_tree[6]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")
def test_no_space_left(tmp_path, source):
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        write_at(full.fileno(), 0, b"x")
    huge = whole([("x", "U8", (8 << 40,))], lambda: pytest.fail("there is no space for it"))
    with pytest.raises(CheckpointError, match=r"the new folder needs 8.80 TB more, .* are free"):
        write(tmp_path / "out", source, pieces=[huge])
    assert not (tmp_path / "out").exists()


def test_targets(tmp_path, source):
    target = tmp_path / "out"
    first = write(target, source, tensors(2))
    before = crash.tree(target)
    with pytest.raises(CheckpointError, match="not empty"):
        write(target, source)
    assert crash.tree(target) == before and first.shards == 1
    write(target, source, overwrite=True)
    assert stored(target).keys() == tensors().keys() and f"{STEM}.safetensors" not in os.listdir(target)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(CheckpointError, match="a link or a file"):
        write(tmp_path / "link", source, overwrite=True)
    (source.parent / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="lie in each other"):
        write(source.parent, source, overwrite=True)
    for name in ("config.json", "../x", MARKER):
        with pytest.raises(CheckpointError, match="two files would get one name"):
            write(tmp_path / "new", source, copies={name: source})
    with pytest.raises(CheckpointError, match="a is to be written twice"):
        write(tmp_path / "new", source, pieces=[whole([("a", "U8", (1,)), ("a", "U8", (1,))], dict)])
    with pytest.raises(CheckpointError, match="to be written twice: a"):
        write(tmp_path / "new", source, pieces=[whole([("a", "U8", (1,))], dict)] * 2, shard_bytes=1)
    with pytest.raises(CheckpointError, match="a is to be written as F4"):
        write(tmp_path / "new", source, pieces=[whole([("a", "F4", (2,))], dict)])
    assert not (tmp_path / "new").exists() and not hidden(tmp_path / "new").exists()


# --- memory ---

@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_model_of_3_gb(tmp_path):
    """BF16 tensors of 75 MB to FP8, 3 GB of them: the peak grows by no more than two of them and 200 MB."""
    memory = Path("/dev/shm")  # where the 1.5 GB that are written cost no disk
    place = memory / f"qt-writer-{os.getpid()}" if memory.is_dir() and shutil.disk_usage(memory).free > 8 << 30 \
        else tmp_path / "big"
    place.mkdir()
    try:
        found = bench.child(bench_build.writing_memory, place, 40, "half")
    finally:
        shutil.rmtree(place)
    assert found["source"] > 3e9 and found["written"] > 1.5e9 and found["shards"] == 2
    assert found["grown"] < 2 * found["largest"] + 200e6
