"""The subgraph blueprints in ComfyUI's real node library and graph: they stand for the workflows they were made from."""

from __future__ import annotations

import json

import pytest
from browser.make_blueprints import BLUEPRINTS, DROPPED, OUTSIDE

from support.pack import PACK

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


def plain(prompt, drop=()):
    """An API prompt without its ids: every input that is a link names the type of the node it comes from."""
    kept = {key: node for key, node in prompt.items() if node["class_type"] not in drop}

    def value(given):
        if isinstance(given, list) and len(given) == 2 and isinstance(given[0], str):
            return (prompt[given[0]]["class_type"], given[1]) if given[0] in kept else None
        return given

    nodes = [(node["class_type"], tuple(sorted((name, repr(value(given))) for name, given in node["inputs"].items()
                                               if value(given) is not None))) for node in kept.values()]
    return sorted(nodes)


def test_the_library_lists_them(server):
    listed = {entry["name"]: entry for entry in server.get("/api/global_subgraphs").values()}
    for title in TITLES:
        assert listed[title]["source"] == "custom_node"
        assert listed[title]["info"]["node_pack"] == "custom_nodes.quantized-transformers"


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=TITLES)
def test_blueprint_is_its_workflow(blueprint, frontend):
    frontend.problems.clear()
    seen = json.loads(frontend.run(OPEN, file(blueprint.title)))
    api = json.loads((PACK / "workflows" / "api" / f"{blueprint.workflow}.json").read_text(encoding="utf-8"))
    assert seen["missing"] is None and not frontend.problems
    assert plain(seen["output"]) == plain(api, (*DROPPED, *OUTSIDE))
    assert set(seen["inputs"]) >= {dict(blueprint.labels).get(widget, widget) for _, widget in blueprint.widgets}
    assert seen["outputs"] == ["VIDEO" if "Wan" in blueprint.title else "IMAGE"]


def test_a_changed_value_would_be_seen(frontend):
    blueprint = BLUEPRINTS[0]
    graph = file(blueprint.title)
    sampler = next(node for node in graph["definitions"]["subgraphs"][0]["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][2] += 1
    seen = json.loads(frontend.run(OPEN, graph))
    api = json.loads((PACK / "workflows" / "api" / f"{blueprint.workflow}.json").read_text(encoding="utf-8"))
    assert plain(seen["output"]) != plain(api, (*DROPPED, *OUTSIDE))
