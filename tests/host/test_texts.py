"""What a user reads is short, whatever a file says."""

from __future__ import annotations

import pytest

from quantized_transformers.host.texts import Text, brief, joined, said
from quantized_transformers.loaders.errors import CheckpointError

pytestmark = pytest.mark.unit


def test_values_are_cut_and_sentences_are_not():
    """A list of many sentences stays whole, and can still be said in another language."""
    inner = Text("a number in it is too large")
    long = joined("\n", [Text("invalid JSON: {error}", error=inner)] * 100 + [Text("{name} is no JSON object", name="x" * 10 ** 6)])
    short = brief(long)
    assert len(short) < 100 * 60 + 1100 and short.count("invalid JSON") == 100 and short.endswith("... is no JSON object")
    assert said(brief(Text("invalid JSON: {error}", error=Text("{error}", error="y" * 5000))), "zh").count("y") == 1000


def test_refusals_are():
    error = CheckpointError(Text("{name} is no JSON object", name="x" * 10 ** 6), "w" * 10 ** 6, "do")
    assert len(str(error)) < 2200 and error.where == "w" * 10 ** 6
    assert str(CheckpointError("a" * 100, "b")) == f"{'a' * 100}\n  where: b"
