"""Every writer of this pack, killed, on full disks and with sources that change: nothing that is wrong loads, nothing is
lost, and the next run with the same inputs leaves nothing but its result.

A few seeded points of each; `dev.py test full` takes the hundreds. Run with -s for the figures.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.files.frozen import Frozen
from quantized_transformers.loaders.files.unfinished import MARKER
from support import crash, faults, modelslim
from support.faults import HOW, WRITERS, Run, Writer

pytestmark = pytest.mark.parity

SOME = pytest.param(False, id="some")
ALL = pytest.param(True, id="all", marks=pytest.mark.full)
Content = dict[str, bytes] | bytes | None


class Place:
    """Where one writer writes: its sources, its target, and what an earlier and an uninterrupted run leave there."""

    def __init__(self, writer: Writer, sources: Path, folder: Path) -> None:
        self.writer, self.sources, self.target = writer, sources, folder / writer.target
        self.old: Content = None

    def run(self, overwrite: bool) -> Run:
        return self.writer.prepare(self.sources, self.target, overwrite)

    @property
    def content(self) -> Content:
        """What is at the target; None where nothing is, or what a killed run has not finished."""
        if self.target.is_dir():
            return None if (self.target / MARKER).exists() else crash.tree(self.target)
        return self.target.read_bytes() if self.target.exists() else None

    def clear(self) -> None:
        for path in self.target.parent.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def begin(self, overwrite: bool) -> None:
        """An empty folder, or one with an older model in it."""
        self.clear()
        if overwrite and "." in self.writer.target:
            shutil.copyfile(self.older, self.target)
        elif overwrite:
            shutil.copytree(self.older, self.target)
        self.old = self.content

    older: Path

    def check(self, overwrite: bool, *new: Content) -> None:
        """Nothing loads but the old model or a new one, and the old one is there unless a new one is."""
        beside = [path for path in self.target.parent.iterdir() if path != self.target]
        if self.content is None:
            crash.refuse_to_load(*crash.everything_in(self.target))
            previous = self.target.parent / f".{self.target.name}.unfinished" / "previous"
            assert not overwrite or crash.tree(previous) == self.old
        else:
            assert self.content in (self.old, *new)
        assert all(path.name.startswith(f".{self.target.name}.") for path in beside)
        crash.refuse_to_load(*crash.everything_in(*beside), *(path for path in beside if path.is_file()))

    def only(self, new: Content) -> None:
        """The new model is there, and nothing else."""
        assert self.content == new and [*self.target.parent.iterdir()] == [self.target]


@pytest.fixture(scope="module", params=WRITERS)
def made(request, tmp_path_factory, output) -> tuple[Writer, Path, Path, Content]:
    """(writer, its sources, an older model of the same kind, what an uninterrupted run writes)."""
    writer, root = WRITERS[request.param], tmp_path_factory.mktemp("faults")
    writer.make(root / "sources")
    (root / "whole").mkdir()
    place = Place(writer, root / "sources", root / "whole")
    place.run(False)()  # in this process, so that its children find all that is imported and made once
    older = root / "older"
    if place.target.is_dir():
        shutil.copytree(place.target, older)
        for path in older.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1] + b"\1")
    else:
        older.write_bytes(place.target.read_bytes()[:-1] + b"\1")
    return writer, root / "sources", older, place.content


@pytest.fixture(autouse=True)
def no_sync(monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and of no effect on what a killed process leaves


@pytest.fixture
def place(made, tmp_path) -> Place:
    (tmp_path / "out").mkdir()
    found = Place(made[0], made[1], tmp_path / "out")
    found.older = made[2]
    return found


def finish(place: Place, overwrite: bool, new: Content) -> None:
    """The next run, with the same inputs: it ends with the new model, or refuses because that is there."""
    whole = place.content == new
    try:
        place.run(overwrite)()
    except CheckpointError:
        assert whole and not overwrite
        crash.tidied()
    place.only(new)


@pytest.mark.parametrize("every", [SOME, ALL])
def test_killed(every, place, made):
    chance, new, count = random.Random(23), made[3], 0
    points = faults.measured(place.run(False))[0] + 3  # a run over an old model makes more of them
    while count < (100 if every else 4):
        overwrite = place.writer.overwrites and chance.random() < 0.5
        place.begin(overwrite)
        for _ in range(chance.choice((1, 1, 2))):  # what goes on after a kill can be killed, too
            late = chance.random() < 0.3  # in the exchange at the end
            at = points - chance.randrange(min(points, 15)) if late else chance.randrange(points)
            run = place.run(overwrite)
            count += faults.end_of(lambda at=at, run=run: crash.at_change(run, at, crash.die)) is None
            place.check(overwrite, new)
        finish(place, overwrite, new)
    print(f"\n{place.writer.target}: {count} kills among {points} changes")


@pytest.mark.parametrize("every", [SOME, ALL])
def test_full_disk(every, made, tmp_path, monkeypatch):
    """In the writes themselves: before them the disk says that there is room."""
    chance, new, count, seen = random.Random(24), made[3], 0, Counter()
    most = sum(map(len, new.values())) if isinstance(new, dict) else len(new)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 50}))
    with faults.small_disk(tmp_path / "disk") as disk:
        place = Place(made[0], made[1], disk.folder)
        place.older = made[2]
        while count < (100 if every else 4):
            overwrite = place.writer.overwrites and chance.random() < 0.5
            place.begin(overwrite)
            disk.limit(chance.randrange(most))
            said = faults.end_of(lambda overwrite=overwrite: place.run(overwrite)())
            disk.limit(None)
            assert "No space left on device" in said or not said and not disk.all, said
            place.check(overwrite, new)
            finish(place, overwrite, new)
            count += bool(said)
            seen[said.split("\n")[0]] += 1
    print(f"\n{place.writer.target}: {count} full disks; {seen.most_common(4)}")


@pytest.fixture
def saved(output, tmp_path) -> Path:
    """Where save writes to."""
    import folder_paths

    folder_paths.set_output_directory(str(tmp_path / "saved"))
    (tmp_path / "saved").mkdir()
    return tmp_path / "saved"


@pytest.mark.parametrize("job", ["exact", "stock", "compare"])
def test_cut_behind_a_mapping(job, tmp_path, saved, monkeypatch):
    """A file that is cut right after it was looked at, by whom has it mapped: all its bytes come by plain reads."""
    from quantized_transformers.loaders import model
    from quantized_transformers.loaders.locate import locate
    from quantized_transformers.makers.compare.weights import compare_weights
    from quantized_transformers.makers.save import save

    folder = modelslim.folder("w8a8", tmp_path / "export")
    file = next(folder.glob("*.safetensors"))
    monkeypatch.setattr(Frozen, "check", lambda self, at="": None)

    def cut(*_: object) -> None:
        os.truncate(file, 30_000)

    def run() -> None:
        if job == "compare":
            compare_weights(locate(str(folder)), locate(str(folder)), cut)
        else:
            loaded = model.load(model.Request(str(folder)), quiet=True).patcher
            cut()
            save(loaded, f"cut {job}", job, step=lambda count: None)

    assert "the source file changed meanwhile: it ends within a tensor" in (faults.end_of(run) or "")
    assert not list(saved.iterdir())


@pytest.mark.parametrize("how", HOW)
def test_saved_long_after_it_was_loaded(how, tmp_path, saved):
    """What is written into a MODEL's file is in the MODEL, too; what takes the file's name is not."""
    from quantized_transformers.loaders import model
    from quantized_transformers.makers.save import save

    folder = modelslim.folder("w8a8", tmp_path / "export")
    loaded = model.load(model.Request(str(folder)), quiet=True).patcher
    before, _ = save(loaded, f"before {how}", step=lambda count: None)
    whole = before.read_bytes()
    before.unlink()

    def run() -> None:
        faults.change(next(folder.glob("*.safetensors")), how)
        save(loaded, f"after {how}", step=lambda count: None)

    said = faults.end_of(run)
    if how in ("replace", "remove"):
        assert said == "" and (saved / f"after {how}.safetensors").read_bytes() == whole
    else:
        assert said.startswith("the source file changed meanwhile: it") and "load the model again" in said
        assert not list(saved.iterdir())


@pytest.mark.parametrize("every", [SOME, ALL])
def test_source_changes(every, place, made, tmp_path):
    """Half of them between two steps, half at any moment: a signal of the system would end the child. Of the last
    quarter of a run, and of its time half, publishing takes most, when nothing is read any more."""
    chance, new, seen = random.Random(25), made[3], Counter()
    kept = tmp_path / "kept"
    shutil.copytree(made[1], kept)
    files = sorted(path for path in made[1].rglob("*") if path.name.endswith(place.writer.weights)
                   and path.parent.name != "transformer")  # a base's own weights, which nobody reads
    points, seconds = faults.measured(place.run(False), made[1])
    for i in range(50 if every else 5):
        overwrite, how, file = place.writer.overwrites and chance.random() < 0.5, HOW[i % len(HOW)], chance.choice(files)
        place.begin(overwrite)

        def wrong(overwrite=overwrite, how=how, file=file, late=i % 2) -> None:
            run = place.run(overwrite)
            faults.changed_after(run, file, how, chance.random() * seconds / 2)() if late else \
                faults.changed_at(run, file, how, chance.randrange(points * 3 // 4), made[1])()

        said = faults.end_of(wrong)
        other = not said and place.content != new
        if other:  # it changed before anything was read of it
            again = Place(place.writer, made[1], tmp_path / "again")
            again.target.parent.mkdir(exist_ok=True)
            again.clear()
            again.run(False)()
            place.only(again.content)
            place.begin(overwrite)
        else:
            place.check(overwrite, new)
            assert "what to do" in said if said else place.only(new) is None
        elsewise = "before it was read" if other else "as it was"
        seen["changed meanwhile" if "meanwhile" in said else said.split("\n")[0] or elsewise] += 1
        shutil.copytree(kept, made[1], dirs_exist_ok=True)
        finish(place, overwrite, new)
    print(f"\n{place.writer.target}: {i + 1} source changes; {dict(seen)}")
