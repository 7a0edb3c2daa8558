"""The subgraph blueprints in ComfyUI's real node library and graph: they stand for the workflows they were made from."""

from __future__ import annotations

import json

import pytest
from browser.definitions import WORKFLOWS
from browser.make_blueprints import BLUEPRINTS

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
    workflow = next(workflow for workflow in WORKFLOWS if workflow.name == blueprint.workflow)
    kept = named(whole, workflow.ids())
    within = {node.key for column in blueprint.graph().inside for node in column}
    kept = {key: node for key, node in kept.items() if key in within}
    for node in kept.values():
        for name, value in list(node["inputs"].items()):
            if isinstance(value, list) and value[0] not in kept:
                del node["inputs"][name]
    # behind the id of the subgraph's node, which is another one in every graph
    inside = {id_.rpartition(":")[2]: key for key, id_ in blueprint.graph().ids().items()}
    return prompt_differences(kept, named(seen["output"], {inside[id_.rpartition(":")[2]]: id_ for id_ in seen["output"]}))


def named(prompt, ids):
    """A prompt by the keys of its nodes in the definitions."""
    keys = {id_: key for key, id_ in ids.items()}
    return {keys[id_]: {**node, "inputs": {
        name: [keys[value[0]], value[1]] if isinstance(value, list) else value for name, value in node["inputs"].items()}}
        for id_, node in prompt.items()}


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
    assert [name for name in seen["inputs"] if name != "image"] == [shown.name for shown in blueprint.graph().shown]
    assert seen["outputs"] == ["VIDEO" if "Wan" in blueprint.title else "IMAGE"]


def test_a_changed_value_would_be_seen(frontend):
    blueprint = BLUEPRINTS[0]
    graph = file(blueprint.title)
    sampler = next(node for node in graph["definitions"]["subgraphs"][0]["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][4] = "heun"  # not one of those that the subgraph's node shows and holds
    seen = json.loads(frontend.run(OPEN, graph))
    assert differences(blueprint, seen)
