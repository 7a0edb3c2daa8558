"""The Wan repack tool stopped in the middle: nothing that is not whole loads, and the next run goes on."""

from __future__ import annotations

import os
import signal

import pytest

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.files.unfinished import MARKER
from quantized_transformers.loaders.words import size
from quantized_transformers.makers.repack_wan import files
from support import crash
from support.crash import everything_in, refuse_to_load, tree
from support.modelslim import DATA, EXPORTS
from support.repack import LOW, WEIGHTS, make_base, make_case, run, sub

pytestmark = pytest.mark.unit


@pytest.fixture
def case(tmp_path):
    return make_case(tmp_path)


def kill(case, count: int) -> None:
    """SIGKILL after so many bytes, which are copied in small chunks."""
    left = count

    def step(done: int) -> None:
        nonlocal left
        left -= done
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def small() -> None:
        files.CHUNK = 1 << 16
        run(case, step=step)

    assert crash.in_child(small) == -signal.SIGKILL


# in the first expert's header, in its data, between the experts, in the second one's data
@pytest.mark.parametrize("share", [0.001, 0.3, 0.99, 1.7])
def test_killed_while_it_copies(share, case, tmp_path):
    count = int(share * os.path.getsize(case[0] / LOW / WEIGHTS))
    kill(case, count)
    work = tmp_path / ".out.unfinished" / "content"
    assert not case[2].exists() and any(work.rglob("*.part")) and not list(work.rglob("*.safetensors"))
    refuse_to_load(case[2], *everything_in(work.parent))
    sizes = [path.stat().st_size for path in sorted(work.rglob("*.part"))]
    assert abs(sum(sizes) - count) < 1 << 17  # in chunks of 1 << 16: in the middle of a file
    report = run(case)
    assert "taken over" in report
    assert not work.parent.exists()
    for component in ("transformer", "transformer_2"):
        model.load(model.Request(str(case[2]), component), quiet=True)  # what is whole does load
    whole = tmp_path / "whole"
    run((*case[:2], whole))
    assert tree(case[2]) == tree(whole)


def test_killed_at_every_change(tmp_path, monkeypatch):
    """Between any two changes on disk, the renames at the end too: no folder or file that is there loads."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and of no effect on what a killed process leaves
    case = (DATA / "w8a8", make_base(tmp_path / "base", EXPORTS["w8a8"]))
    whole = tmp_path / "whole"
    run((*case, whole), link=False)
    expected, count, complete = tree(whole), 0, 0
    total = size(sum(map(len, expected.values())))
    while True:
        target = tmp_path / str(count)
        work = tmp_path / f".{count}.unfinished"
        if not crash.killed(lambda target=target: run((*case, target), link=False), count):
            break
        if target.exists() and not (target / MARKER).exists():
            assert tree(target) == expected
        else:
            places = list(everything_in(target, work))
            refuse_to_load(*places)
            named = len([path for path in places if path.name.endswith(".safetensors")]) == 2
            complete += named
            report = run((*case, target), link=False)
            assert not named or f"after comparing it with the source: {total}" in report  # nothing is done twice
            assert tree(target) == expected and not work.exists(), count
        crash.reset(target, work)
        count += 1
    assert tree(target) == expected and not work.exists()
    assert complete > 5  # transformer and VAE there under their names, and yet refused


@pytest.mark.parametrize("damage", [
    lambda data: data[:300_000] + bytes([data[300_000] ^ 1]) + data[300_001:], lambda data: data + b"too long",
    lambda data: b"", lambda data: data[:5] + b"x" + data[6:]])
def test_what_is_left_over_is_compared_not_trusted(damage, case, tmp_path):
    kill(case, 2_500_000)
    work = tmp_path / ".out.unfinished" / "content"
    part = work / "transformer/diffusion_pytorch_model.safetensors.part"
    data = part.read_bytes()
    assert len(data) > 1_700_000  # complete
    part.write_bytes(damage(data))
    (sub(work / "old") / "stray.txt").write_text("of another base", encoding="utf-8")
    run(case)
    run((*case[:2], tmp_path / "whole"))
    assert tree(case[2]) == tree(tmp_path / "whole") and not (case[2] / "old").exists()


def test_cancel(case, tmp_path):
    class Stop(Exception):
        pass

    total = 0

    def step(count):
        nonlocal total
        total += count
        if total > 1_900_000:
            raise Stop

    with pytest.raises(Stop):
        run(case, step=step)
    assert not case[2].exists()
    total = -10 ** 9
    assert "taken over" in run(case, step=step)
    assert total + 10 ** 9 == sum(len(data) for name, data in tree(case[2]).items()
                                  if not (case[2] / name).is_symlink())  # progress ends at 100 %


def test_one_run_at_a_time(case, tmp_path):
    import fcntl

    kill(case, 2_500_000)
    with open(tmp_path / ".out.unfinished" / MARKER, "a") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another run writes"):
            run(case)
    run(case)
