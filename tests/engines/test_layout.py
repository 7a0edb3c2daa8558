"""Degrees of several GPUs: those that make no server are told before SGLang loads anything."""

from __future__ import annotations

import itertools

import pytest

from quantized_transformers.engines.sglang.layout import Layout

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("layout", [Layout(), Layout(2), Layout(8), Layout(4, tensor=2), Layout(4, ulysses=4), Layout(4, ulysses=2, ring=2),
                                    Layout(4, cfg=2), Layout(8, 2, 2, 1, 2, 1), Layout(6, data=3), Layout(3, ring=3)])
def test_products_that_fit(layout):
    assert layout.problem() == ""


@pytest.mark.parametrize("layout, word", [
    (Layout(3, ulysses=2), "does not divide"), (Layout(4, tensor=3), "does not divide"), (Layout(4, ulysses=2), "make 2, and --gpus is 4"),
    (Layout(8, ulysses=2, ring=2), "make 4, and --gpus is 8"), (Layout(2, tensor=2, ulysses=2), "make 4"), (Layout(0), "must be a positive"),
    (Layout(2, tensor=-1), "must be a positive"), (Layout(1, cfg=2), "does not divide")])
def test_products_that_do_not(layout, word):
    assert word in layout.problem()


def test_what_is_accepted_has_a_whole_number_of_gpus_left_for_the_sequence():
    for degrees in itertools.product(range(1, 9), *[(0, 1, 2, 3)] * 5):
        layout = Layout(*degrees)
        product = 1
        for degree in degrees[1:]:
            product *= degree or 1
        given = bool(layout.ulysses or layout.ring)
        fits = product == layout.gpus if given else layout.gpus % product == 0
        assert (layout.problem() == "") == fits, layout


def test_flags_are_only_those_that_were_given():
    assert Layout().flags() == [] and Layout(2).flags() == ["--num-gpus", "2"]
    assert Layout(8, 2, 2, 1, 2, 1).flags() == ["--num-gpus", "8", "--tp-size", "2", "--ulysses-degree", "2", "--ring-degree", "1",
                                                "--cfg-parallel-size", "2", "--dp-size", "1"]


def test_who_has_the_weights_whole():
    assert not Layout().sequence_parallel(True) and Layout(2).sequence_parallel(False) and not Layout(2).sequence_parallel(True)
    assert Layout(4).sequence_parallel(True) and not Layout(4, tensor=4).sequence_parallel(False)
