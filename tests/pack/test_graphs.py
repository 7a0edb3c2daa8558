"""The judge of graphs and prompts: another way to write the same is no difference, anything else is one."""

from __future__ import annotations

import copy

import pytest

from support.graphs import graph_differences, prompt_differences

pytestmark = pytest.mark.unit

GRAPH = {
    "nodes": [
        {"id": 1, "type": "QT_LoadBaseModel", "mode": 0, "inputs": [], "widgets_values": ["a", "b"]},
        {"id": 2, "type": "SaveVideo", "mode": 0, "title": "Save", "inputs": [{"name": "x"}, {"name": "y"}],
         "widgets_values": ["auto"]},
        {"id": 3, "type": "VAEDecode", "mode": 0, "widgets_values": []}],
    "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 3, 0, 2, 1, "IMAGE"]], "groups": [{"title": "g"}],
    "definitions": {"subgraphs": [{
        "id": "s", "name": "Inner", "inputs": [{"name": "seed"}], "outputs": [{"name": "LATENT"}], "outputNode": {"id": -20},
        "nodes": [{"id": 4, "type": "KSampler", "mode": 0, "inputs": [{"name": "seed"}], "widgets_values": [1]}], "links": [
            {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 4, "target_slot": 0, "type": "INT"},
            {"id": 2, "origin_id": 4, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "LATENT"}]}]}}
PROMPT = {"1": {"class_type": "QT_LoadBaseModel", "inputs": {"base_model": "a"}, "_meta": {"title": "Base"}},
          "2": {"class_type": "SaveVideo", "inputs": {"x": ["1", 0], "format": "auto"}, "_meta": {"title": "Save"}}}


def inner(graph):
    return graph["definitions"]["subgraphs"][0]


def newer(graph):
    """As frontend 1.58.1 and ComfyUI 0.33 write it, and by name, as they may."""
    nodes = graph["nodes"]
    graph["links"] = [[7, *link[1:]] for link in reversed(graph["links"])]
    graph["extra"] = {"ds": {}}
    nodes[0] |= {"size": [1, 2], "widgets_values": {"base_model": "a", "component": "b"}, "inputs": None}
    nodes[1]["widgets_values"].append("codec")
    del nodes[2]["widgets_values"]


def test_what_newer_ones_write_is_the_same():
    graph, prompt = copy.deepcopy(GRAPH), copy.deepcopy(PROMPT)
    newer(graph)
    prompt["1"]["_meta"]["ver"] = "0.1.0"
    prompt["2"]["inputs"]["format.codec"] = "auto"
    assert graph_differences(GRAPH, graph) == [] and prompt_differences(PROMPT, prompt) == []


@pytest.mark.parametrize(("change", "says"), [
    (lambda g: g["nodes"][0]["widgets_values"].append("c"), "values"),
    (lambda g: g["nodes"][1]["widgets_values"].pop(), "values"),
    (lambda g: g["nodes"][0].update(mode=4), "mode"), (lambda g: g["nodes"][1].pop("title"), "title"),
    (lambda g: g["nodes"][2].update(type="VAEEncode"), "type"), (lambda g: g["nodes"].append({"id": 4}), "too much"),
    (lambda g: g["links"][0].__setitem__(4, 1), "link"), (lambda g: g["links"][0].__setitem__(2, 1), "link"),
    (lambda g: g["groups"].pop(), "groups"), (lambda g: g["definitions"]["subgraphs"].pop(), "subgraph s is missing"),
    (lambda g: inner(g)["nodes"][0].update(widgets_values=[2]), "in Inner: node 4: values"),
    (lambda g: inner(g)["links"].pop(), "in Inner: link 4.0 → -20.LATENT is missing"),
    (lambda g: inner(g)["inputs"].clear(), "slots"), (lambda g: inner(g).update(name="Other"), "name")])
def test_other_graphs(change, says):
    graph = copy.deepcopy(GRAPH)
    change(graph)
    assert says in " ".join(graph_differences(GRAPH, graph))


@pytest.mark.parametrize(("change", "says"), [
    (lambda p: p["1"]["inputs"].update(new="x"), "new"), (lambda p: p["2"]["inputs"].update(z=["1", 0]), "z"),
    (lambda p: p["2"]["inputs"].update(x=["1", 1]), "x"), (lambda p: p["2"]["inputs"].pop("x"), "x"),
    (lambda p: p["2"]["inputs"].update(format="mp4"), "format"), (lambda p: p["1"]["_meta"].update(title="B"), "title"),
    (lambda p: p.pop("1"), "node 1 is missing"), (lambda p: p["2"].update(class_type="SaveImage"), "type")])
def test_other_prompts(change, says):
    prompt = copy.deepcopy(PROMPT)
    change(prompt)
    assert says in " ".join(prompt_differences(PROMPT, prompt))
