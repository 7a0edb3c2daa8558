"""A server's LoRAs: what is asked for, and whether what is on is that."""

from __future__ import annotations

import pytest

from quantized_transformers.engines.sglang import loras
from quantized_transformers.engines.sglang.identity import parse
from quantized_transformers.engines.sglang.loras import LoRA, differs, of_start, request
from quantized_transformers.loaders.errors import CheckpointError
from support import sglang

pytestmark = pytest.mark.unit
A, B = LoRA("owner/a", 0.4), LoRA("/models/b, c.safetensors", -1.0)


def on(*given: LoRA, path: str | None = None) -> list[dict]:
    """As /v1/list_loras has it of one transformer."""
    strengths = [lora.strength for lora in given]
    return [{"nickname": ",".join(lora.name for lora in given), "nicknames": [lora.name for lora in given], "merged": True,
             "path": ",".join(lora.path for lora in given) if path is None else path, "mode": "merged", "strength": strengths[0],
             "strengths": strengths}]


def test_a_nickname_says_nothing_of_the_path():
    assert A.name.startswith("qt-") and len(A.name) == 15 and "owner" not in A.name and A.name != B.name
    assert A.name == LoRA("owner/a", 2.0, "transformer").name, "the server loads a file once"


def test_fields_of_the_request(protocol):
    body = request([A, B])
    assert body.keys() == sglang.parameters("common_api", "set_lora")
    assert body == {"lora_nickname": [A.name, B.name], "lora_path": [A.path, B.path], "target": ["all", "all"], "strength": [0.4, -1.0],
                    "lora_alpha": [None, None], "merge_mode": "auto"}
    assert sglang.parameters("common_api", "unmerge_lora_weights") == {"target"}


def test_of_two_lists_for_one_transformer_a_server_keeps_the_second():
    """So each transformer is given all of its own."""
    high = LoRA("high", target="transformer")
    body = request([A, high, LoRA("low", target="transformer_2", alpha=8)])
    assert list(zip(body["lora_path"], body["target"], body["lora_alpha"], strict=True)) == [
        ("owner/a", "transformer", None), ("high", "transformer", None), ("owner/a", "transformer_2", None), ("low", "transformer_2", 8)]


def test_two_ways_of_merging_are_refused():
    with pytest.raises(CheckpointError, match="dynamic, merge"):
        request([LoRA("a", merge_mode="merge"), LoRA("b", merge_mode="dynamic")])


HIGH, LOW = LoRA("h", target="transformer"), LoRA("l", target="transformer_2")


@pytest.mark.parametrize("active, wanted", [
    ({}, []), ({"transformer": on(A)}, [A]), ({"transformer": on(A, B)}, [A, B]), ({"transformer": on(A), "transformer_2": on(A)}, [A]),
    ({"transformer": on(HIGH), "transformer_2": on(LOW)}, [HIGH, LOW]), ({"transformer_2": on(LOW)}, [LOW]),
    ({"transformer": on(A, HIGH), "transformer_2": on(A)}, [A, HIGH]), ({"transformer": on(A), "critic": on(A)}, [A])])
def test_what_is_wanted_is_on(active, wanted):
    assert differs(active, wanted) == ""


@pytest.mark.parametrize("active, wanted, word", [
    ({"transformer": on(A)}, [], "has qt-"), ({}, [A], "has none on"), ({"transformer": on(B)}, [A], "has qt-"),
    ({"transformer": on(B, A)}, [A, B], "has qt-"), ({"transformer": on(LoRA("owner/a", 0.5))}, [A], "x 0.5"),
    ({"transformer": on(A, path="/other")}, [A], "/other"), ({"transformer": on(A)}, [A, B], "has qt-"), ({}, [LOW], "transformer_2 has none"),
    ({"transformer": on(LOW)}, [LOW], "transformer has qt-"), ({"transformer": on(A), "transformer_2": on(B)}, [A], "transformer_2 has"),
    ({"transformer": on(HIGH), "transformer_2": on(A)}, [HIGH], "transformer_2 has"), ({"critic": on(A)}, [], "critic has"),
    ({"transformer": [{"nicknames": None}]}, [A], "does not explain"), ({"transformer": [{}]}, [], "does not explain"),
    ({"transformer": ["x"]}, [A], "does not explain"), ({"transformer": [{"nicknames": ["a"], "strengths": [None]}]}, [A], "does not explain")])
def test_what_is_wanted_is_not_on(active, wanted, word):
    assert word in differs(active, wanted)


def test_what_a_server_was_started_with_goes_by_its_nickname():
    identity = parse("qt:base+lora=style.safetensors@0123456789ab*0.8")
    one, = of_start(identity)
    assert (one.name, one.strength, one.path) == ("qt-0123456789ab", 0.8, "")
    assert differs({"transformer": on(one, path="/srv/style.safetensors")}, [one]) == ""
    assert request([one])["lora_path"] == [None], "it is loaded: by its nickname alone"
    assert of_start(None) == of_start(parse("qt:base")) == ()


@pytest.mark.parametrize("value", [
    {}, {**A.to_json(), "path": ""}, {**A.to_json(), "path": 3}, {**A.to_json(), "target": "critic"}, {**A.to_json(), "merge_mode": "x"},
    {**A.to_json(), "strength": "nan"}, {**A.to_json(), "strength": 1e9}, {**A.to_json(), "alpha": -1}])
def test_what_is_no_lora(value):
    with pytest.raises((ValueError, TypeError, KeyError)):
        LoRA.of_json(value)
    assert LoRA.of_json(A.to_json()) == A and loras.TARGETS[0] == "all"
