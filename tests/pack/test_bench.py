"""What `dev.py bench` is made of: medians against budgets, chosen parts, and a history that is whole or untouched. Nothing
here depends on how long anything takes."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest

from support import bench, bench_history
from support.bench import Row
from support.pack import PACK

pytestmark = pytest.mark.host

PART = '''
from support.bench import Row
TITLE = "a part of a test"
def cases(folder):
    return CASES
def measure(value):
    import torch
    return [Row(f"case {value}, threads {torch.get_num_threads()}", value, 1.5, {"stock": 8.0})]
'''


def rows(*values: float, budget: float | None = 2) -> list[Row]:
    return [Row(f"row {i}", value, budget, {"stock": value + 1}) for i, value in enumerate(values)]


def dev_bench():
    spec = importlib.util.spec_from_file_location("dev_bench", PACK / "tests" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gate_is_the_median_of_the_runs():
    first, second, third = bench.gate([rows(9, 1, math.nan), rows(1.5, 9, math.nan), rows(2, 8, math.nan)])
    assert (first.row.value, first.least, first.most, first.over) == (2, 1.5, 9, False)
    assert first.row.beside == {"stock": 3} and (second.row.value, second.over) == (8, True)
    assert third.over, "no number is within no budget"
    assert not bench.gate([rows(1e9, budget=None)])[0].over
    lines = bench.table([first, second]).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["ok", "OVER"] and "1.50 .. 9.00" in lines[1]
    with pytest.raises(ValueError, match="more than their numbers"):
        bench.gate([rows(1), rows(1, budget=3)])
    with pytest.raises(ValueError):
        bench.gate([rows(1, 2), rows(1)])


def test_arms_take_turns_and_the_first_round_does_not_count():
    calls: list[str] = []
    now, takes = [0.0], {"a": iter((100, 1, 9, 2)), "b": iter((50, 4, 4, 5))}

    def arm(name: str) -> None:
        calls.append(name)
        now[0] += next(takes[name])

    def before(name: str) -> None:
        calls.append(f"({name})")
        now[0] += 1000

    found = bench.spent({"a": lambda: arm("a"), "b": lambda: arm("b")}, 3, before, lambda: now[0])
    assert calls == [*["(a)", "a", "(b)", "b"], *["(b)", "b", "(a)", "a"]] * 2 and found == {"a": 2, "b": 4}


def test_parts_run_in_processes_of_one_thread_and_set_the_exit_code(tmp_path, monkeypatch, capsys):
    for name, wanted in (("over", "[(2.0,)]"), ("nothing", "[]")):
        (tmp_path / f"bench_part_{name}.py").write_text(PART.replace("CASES", wanted), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    main, parts, page = dev_bench().main, {name: f"bench_part_{name}" for name in ("over", "nothing")}, tmp_path / "bench.md"
    page.write_text("# Recorded\n", encoding="utf-8")
    assert main(["--only", "nothing"], parts, page) == 0
    assert "nothing: " in (said := capsys.readouterr().out) and "over: " not in said
    for wrong in (["--only", "another"], ["--record", "--only", "over"]):
        with pytest.raises(SystemExit) as stopped:
            main(wrong, parts, page)
        assert stopped.value.code == 2
    assert bench_history.parse(page.read_text(encoding="utf-8")) == []
    assert main(["--record", "a machine at rest"], parts, page, runs=1) == 1
    recorded, = bench_history.parse(page.read_text(encoding="utf-8"))
    assert list(recorded.rows) == [("over", "case 2.0, threads 1")]
    assert recorded.about.endswith("a machine at rest") and "torch " in recorded.about and "ComfyUI 0." in recorded.about


def results(*values: float) -> dict[str, list[bench.Result]]:
    return {"part": bench.gate([rows(*values)])}


def test_the_history_puts_the_newest_beside_the_one_before(tmp_path):
    page = tmp_path / "bench.md"
    page.write_text("# Recorded\n\nWords, and a | in them.\n", encoding="utf-8")
    bench_history.append(page, results(1.5, 9), ("the first", "a machine"))
    first = page.read_text(encoding="utf-8")
    bench_history.append(page, results(1.25, 99, 3), ("the second", "another"))
    text = page.read_text(encoding="utf-8")
    assert text.startswith(first.rstrip()) and [run.title for run in bench_history.parse(text)] == ["the first", "the second"]
    new = bench_history.parse(text)[1].rows
    assert [(row["ours"], row["before"], row["budget"]) for row in new.values()] == \
        [("1.25", "1.50", "2"), ("99.0", "9.00", "2 **over**"), ("3.00", "", "2 **over**")]
    assert new["part", "row 1"]["others"] == "stock 100"


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of what a process may write")
def test_the_history_is_whole_or_untouched(tmp_path):
    import resource
    import signal

    page = tmp_path / "bench.md"
    page.write_text("# Recorded\n" + 2000 * "word ", encoding="utf-8")
    before = page.read_bytes()

    def unchanged() -> bool:
        return page.read_bytes() == before and list(tmp_path.iterdir()) == [page]

    for found, title in (({"part": bench.gate([[Row("a | b", 1)]])}, "run"), ({}, "run"), (results(1), "two\nlines")):
        with pytest.raises(ValueError, match="cannot be written as a table"):
            bench_history.append(page, found, (title, "a machine"))
        assert unchanged()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # a disk that is full halfway
    try:
        with pytest.raises(OSError):
            bench_history.append(page, results(1), ("run", "a machine"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert unchanged()


def test_what_was_recorded_can_be_read():
    runs = bench_history.parse(bench_history.PAGE.read_text(encoding="utf-8"))
    assert runs and all(run.rows for run in runs)
    assert not any(math.isnan(float(row["ours"].split()[0])) for run in runs for row in run.rows.values())
