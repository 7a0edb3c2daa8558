"""Saved workflows keep widget values by position and API prompts by name, so inputs may only be added at the end.

`QT_RECORD_SCHEMAS=1 python3 dev.py test tests/node_schemas/test_schemas.py` records new nodes and inputs; it does not record a
change of those that are there.
"""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from support.pack import PACK

pytestmark = pytest.mark.unit

RECORD = PACK / "tests" / "data" / "schemas.json"


def schemas() -> dict[str, dict[str, list]]:
    """Node id -> inputs [name, type, choices, optional] in the order of the widgets, and output types, by the host's
    own object info."""
    from quantized_transformers.nodes import node_classes

    found = {}
    for cls in node_classes():
        info = cls.GET_NODE_INFO_V1() if hasattr(cls, "GET_NODE_INFO_V1") else None
        given = info["input"] if info else cls.INPUT_TYPES()
        inputs = [[name, *_type(name, spec), kind == "optional"] for kind in ("required", "optional")
                  for name, spec in given.get(kind, {}).items()]
        found[cls.GET_SCHEMA().node_id] = {"inputs": inputs, "outputs": [str(output.get_io_type())
                                                                        for output in cls.GET_SCHEMA().outputs]}
    return found


def _type(name: str, spec: tuple) -> list:
    """Type and, for lists that depend neither on what is on this machine nor on the host, the choices."""
    kind, options = spec[0], (spec[1] if len(spec) > 1 else {}).get("options")
    choices = list(kind) if isinstance(kind, list) else options
    fixed = choices and name not in ("sampler_name", "scheduler") and not any("/" in str(choice) for choice in choices)
    return ["COMBO" if isinstance(kind, list) else kind, choices if fixed else None]


def is_addition(old: dict, new: dict) -> bool:
    """Whether every recorded node is still there, with inputs, choices and outputs only added at the end."""
    for name, node in old.items():
        now = new.get(name, {"inputs": [], "outputs": []})
        if now["outputs"][:len(node["outputs"])] != node["outputs"] or len(now["inputs"]) < len(node["inputs"]):
            return False
        for (was, kind, choices, optional), (is_, is_kind, is_choices, is_optional) in zip(
                node["inputs"], now["inputs"], strict=False):
            if (was, kind) != (is_, is_kind) or set(choices or []) - set(is_choices or []):
                return False
            if is_optional < optional:  # what prompts leave out stays left out
                return False
        if not all(added[3] for added in now["inputs"][len(node["inputs"]):]):
            return False  # a new required input breaks saved API prompts
    return True


@pytest.fixture(scope="module")
def now() -> dict:
    found = schemas()
    if os.environ.get("QT_RECORD_SCHEMAS"):
        assert not RECORD.exists() or is_addition(json.loads(RECORD.read_text(encoding="utf-8")), found)
        lines = [f' "{name}": {json.dumps(node)}' for name, node in sorted(found.items())]
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return found


def test_schemas_are_as_recorded(now):
    old = json.loads(RECORD.read_text(encoding="utf-8"))
    assert is_addition(old, now), "an input, choice or output of a shared workflow was changed"
    assert old == now, "record what was added (see this file's first lines)"


def test_changes_are_noticed(now):
    """Inserting, renaming, reordering and removing are no additions; appending an optional input is."""
    name, node = next((name, node) for name, node in now.items() if len(node["inputs"]) > 3)
    inputs = node["inputs"]

    def changed(inputs: list) -> dict:
        return {**now, name: {**node, "inputs": inputs}}

    assert is_addition(now, changed([*inputs, ["new", "INT", None, True]]))
    assert not is_addition(now, changed([*inputs, ["new", "INT", None, False]]))
    assert not is_addition(now, changed([["new", "INT", None, True], *inputs]))
    assert not is_addition(now, changed([[f"{inputs[0][0]}_2", *inputs[0][1:]], *inputs[1:]]))
    assert not is_addition(now, changed([inputs[1], inputs[0], *inputs[2:]]))
    assert not is_addition(now, changed(inputs[:-1]))
    assert not is_addition(now, {key: value for key, value in now.items() if key != name})


def test_every_list_gives_way_to_its_reference():
    """The host compares a list with its options unless validate_inputs takes it: a new node must, too."""
    from quantized_transformers.nodes import node_classes
    from quantized_transformers.nodes.checks import referring

    found = referring(node_classes())
    assert len(found) == 7
    for cls in node_classes():
        if (node := cls.GET_SCHEMA().node_id) in found:
            listed = found[node]["input"]
            assert asyncio.run(cls.validate_inputs(**{listed: "gone", "reference": str(PACK)})) is True, node
            assert "gone was found neither" in asyncio.run(cls.validate_inputs(**{listed: "gone", "reference": " "})), node
            assert asyncio.run(cls.validate_inputs(**{listed: "gone", "reference": None})) is True, "known when it runs"


@pytest.mark.parametrize(("typed", "name"), [
    (' "a/b"', "a/b"), ("a\\b c", "a/b c"), ("/x\\y", "/x\\y"), ("'~/a'", "~/a")])
def test_names_of_what_is_written(typed, name):
    from quantized_transformers.nodes.checks import new_name

    assert new_name(typed) == (name if os.name != "nt" else typed.strip().strip("\"'"))


@pytest.mark.skipif(os.name == "nt", reason="there it is a path")
def test_a_path_of_windows_is_no_name_elsewhere():
    from quantized_transformers.nodes.save_quantized import QT_SaveQuantizedModel

    for name in ("C:\\models\\x", '"D:/x"', "\\\\server\\share\\x"):
        assert "path of Windows" in QT_SaveQuantizedModel.validate_inputs(name)


def test_defaults_are_the_builders():
    """Of what a node says at ComfyUI's start, without the module that has it."""
    import inspect

    from quantized_transformers.makers.builders.gguf_rules import KINDS
    from quantized_transformers.makers.builders.options import SHARD_SIZE
    from quantized_transformers.nodes import build, build_quantized

    assert build_quantized.SHARD_SIZE == SHARD_SIZE
    assert inspect.signature(build.QT_BuildGGUF.execute).parameters["type"].default == KINDS[0]


def test_every_input_explains_itself():
    """The help panel of a node without a page is made of these."""
    from quantized_transformers.nodes import node_classes

    for schema in [cls.GET_SCHEMA() for cls in node_classes()]:
        assert schema.description and schema.search_aliases, schema.node_id
        assert not [given.id for given in schema.inputs if not given.tooltip], schema.node_id
