"""The subgraph blueprints in ComfyUI's real node library and graph: they stand for the workflows they were made from."""

from __future__ import annotations

import json

import pytest
from browser.make_blueprints import BLUEPRINTS, DROPPED, OUTSIDE

from support.graphs import prompt_differences
from support.pack import PACK

pytestmark = pytest.mark.browser

TITLES = [blueprint.title for blueprint in BLUEPRINTS]
OPEN = """async (graph) => {
  await app.loadGraphData(graph, true, true, null)
  await new Promise((done) => setTimeout(done, 700))
  const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia.state.value
  const node = app.graph.nodes[0]
  const { output } = await app.graphToPrompt()
  return JSON.stringify({ missing: stores.missingNodesError.missingNodesError, output,
    inputs: node.inputs.map((input) => input.label ?? input.name), outputs: node.outputs.map((output) => output.type) })
}"""


def file(title):
    return json.loads((PACK / "subgraphs" / f"{title}.json").read_text(encoding="utf-8"))


def differences(blueprint, seen):
    """What the blueprint does otherwise than its workflow, apart from the nodes that it leaves out."""
    whole = json.loads((PACK / "workflows" / "api" / f"{blueprint.workflow}.json").read_text(encoding="utf-8"))
    kept = {key: node for key, node in whole.items() if node["class_type"] not in (*DROPPED, *OUTSIDE)}
    for node in kept.values():
        for name, value in list(node["inputs"].items()):
            if isinstance(value, list) and value[0] not in kept:
                del node["inputs"][name]
    inside = {key.rpartition(":")[2]: node for key, node in seen["output"].items()}  # after the id of the subgraph's node
    for node in inside.values():
        for value in node["inputs"].values():
            if isinstance(value, list):
                value[0] = value[0].rpartition(":")[2]
    return prompt_differences(kept, inside)


def test_the_library_lists_them(server):
    listed = {entry["name"]: entry for entry in server.get("/api/global_subgraphs").values()}
    for title in TITLES:
        assert listed[title]["source"] == "custom_node"
        assert listed[title]["info"]["node_pack"] == "custom_nodes.quantized-transformers"


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=TITLES)
def test_blueprint_is_its_workflow(blueprint, frontend):
    frontend.problems.clear()
    seen = json.loads(frontend.run(OPEN, file(blueprint.title)))
    assert seen["missing"] is None and not frontend.problems
    assert not differences(blueprint, seen)
    assert set(seen["inputs"]) >= {dict(blueprint.labels).get(widget, widget) for _, widget in blueprint.widgets}
    assert seen["outputs"] == ["VIDEO" if "Wan" in blueprint.title else "IMAGE"]


def test_a_changed_value_would_be_seen(frontend):
    blueprint = BLUEPRINTS[0]
    graph = file(blueprint.title)
    sampler = next(node for node in graph["definitions"]["subgraphs"][0]["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][2] += 1
    seen = json.loads(frontend.run(OPEN, graph))
    assert differences(blueprint, seen)
