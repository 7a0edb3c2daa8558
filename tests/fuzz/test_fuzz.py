"""Checkpoints of every family that are damaged, careless or hostile: refused in one sentence, or right; soon, and in little
memory. `python3 dev.py fuzz --minutes N` draws more."""

from __future__ import annotations

import shutil

import pytest
from fuzz.drawing import changes
from fuzz.found import FOUND
from fuzz.heavy import HEAVY
from fuzz.judge import Judge
from fuzz.ops import Op
from fuzz.run import memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def judge():
    folder = memory()
    made = Judge(folder)
    yield made
    made.close()
    shutil.rmtree(folder)


def test_drawn(judge):
    """200 of them, always the same ones."""
    @settings(max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def draw(data):
        name = data.draw(st.sampled_from(list(judge.seeds)))
        ops = data.draw(changes(judge.seeds[name]))
        outcome = judge(name, ops)
        assert not outcome.wrong, outcome

    draw()


@pytest.mark.parametrize("name, ops, kind, words", FOUND, ids=lambda value: value if isinstance(value, str) else "")
def test_found(judge, name, ops, kind, words):
    """What once went wrong."""
    outcome = judge(name, ops)
    assert outcome.kind == kind and words in outcome.detail, outcome


@pytest.mark.parametrize("name", HEAVY)
def test_heavy(judge, name, tmp_path):
    """Neither time nor memory is what a file says: 2 s of a processor and 200 MB at most."""
    outcome = judge.describe(HEAVY[name](tmp_path))
    assert outcome.kind == "refused", outcome


def test_the_judge_sees_what_is_wrong(judge):
    """A weight of another number is told from the seed's, and a layer that is renamed is refused."""
    plain = next(iter(judge.seeds))
    file, = (path.name for path in judge.seeds[plain].glob("*.safetensors"))
    assert judge(plain, [Op("bits", file, (5, 77), b"\x11\x41")]).kind == "bytes"
    assert judge(plain, [Op("rename", file, 3, "x")]).kind == "refused"
    assert judge(plain, []).kind == "same"
