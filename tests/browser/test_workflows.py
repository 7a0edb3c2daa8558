"""The example workflows in ComfyUI's real frontend: they open without complaint, unchanged, and queue what is committed."""

from __future__ import annotations

import json
import urllib.request

import pytest
from browser.definitions import WORKFLOWS
from browser.notes import HYPER

from support.graphs import graph_differences, prompt_differences
from support.pack import PACK

pytestmark = pytest.mark.browser

FOLDER = PACK / "workflows"
NAMES = [workflow.name for workflow in WORKFLOWS]
# Loads a graph as the template browser does, and says what the frontend made of it. The stores are those behind its error
# panel, its dialogs and its missing-model, missing-node and missing-picture lists.
OPEN = """async (graph) => {
  await app.loadGraphData(graph, true, true, 'template', { openSource: 'template' })
  await new Promise((done) => setTimeout(done, 700))
  const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia.state.value
  const complaints = {
    errors: [stores.executionError.isErrorOverlayOpen, stores.executionError.lastPromptError],
    nodes: stores.missingNodesError.missingNodesError,
    models: stores.missingModel.missingModelCandidates,
    pictures: stores.missingMedia.missingMediaCandidates,
    dialogs: stores.dialog.dialogStack.map((dialog) => dialog.key),
    shown: [...document.querySelectorAll('[role=dialog], [role=alertdialog], [role=alert]')]
      .map((e) => e.innerText).filter(Boolean),
  }
  const { workflow, output } = await app.graphToPrompt()
  return JSON.stringify({ complaints, workflow, output })
}"""
QUIET = {"errors": [False, None], "nodes": None, "models": None, "pictures": None, "dialogs": [], "shown": []}


def opened(frontend, graph):
    """What OPEN says of a graph, and the frontend's problems since then."""
    frontend.problems.clear()
    seen = json.loads(frontend.run(OPEN, graph))
    return seen, list(frontend.problems)


def committed(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def prompt(name):
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_templates_are_listed(server):
    listed = server.get("/api/workflow_templates")["quantized-transformers"]
    assert sorted(listed) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_workflow_opens_as_committed(name, server, frontend):
    graph = server.get(f"/api/workflow_templates/quantized-transformers/{name}.json")
    assert graph == committed(name)
    seen, problems = opened(frontend, graph)
    assert seen["complaints"] == QUIET and not problems
    assert not prompt_differences(prompt(name), seen["output"])
    assert not graph_differences(graph, seen["workflow"])


@pytest.mark.parametrize("name", NAMES)
def test_the_thumbnail_is_served(name, server):
    url = f"http://127.0.0.1:{server.port}/api/workflow_templates/quantized-transformers/{name}.jpg"
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.read() == (FOLDER / f"{name}.jpg").read_bytes()


def test_nodes_do_not_overlap():
    for name in NAMES:
        nodes = committed(name)["nodes"]
        boxes = [(n["pos"][0], n["pos"][1] - 30, n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1]) for n in nodes]
        for i, a in enumerate(boxes):
            for j, b in enumerate(boxes[:i]):
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (name, nodes[i]["type"], nodes[j]["type"])


def test_values_are_those_of_the_definitions(server):
    """A widget is what definitions.py says, else the node's default: nothing came in from elsewhere while building."""
    for workflow in WORKFLOWS:
        twin = prompt(workflow.name)
        nodes = workflow.nodes
        assert len(twin) == len(nodes)
        ids = {node.key: str(i) for i, node in enumerate(nodes, 2)}  # 1 is the note
        for node in nodes:
            made = twin[ids[node.key]]
            assert made["class_type"] == node.type
            info = server.get(f"/object_info/{node.type}")[node.type]["input"]
            wanted = {name: [ids[key], slot] for name, (key, slot) in node.inputs.items()}
            wanted |= {name: value for name, value in node.widgets.items() if name != "control_after_generate"}
            for name, (kind, *options) in {**info["required"], **info.get("optional", {})}.items():
                if name in made["inputs"]:
                    choices = kind if isinstance(kind, list) else options[0].get("options") if kind == "COMBO" else None
                    wanted.setdefault(name, (options[0] if options else {}).get("default", choices and choices[0]))
                    if kind == "COMFY_DYNAMICCOMBO_V3":
                        wanted[name] = "auto"
            assert made["inputs"] == wanted, (workflow.name, node.key)


def test_a_missing_lora_is_named_with_its_address(server, frontend):
    """Without the LoRA that a workflow names, the frontend complains of that file alone, and knows where to get it."""
    file = server.base / "models" / HYPER["directory"] / HYPER["name"]
    file.unlink()
    try:
        frontend.open()
        complaints = opened(frontend, committed("flux1_dev_svdq_int4_lora"))[0]["complaints"]
    finally:
        file.touch()
        frontend.open()
    missing, = complaints.pop("models")
    assert missing["nodeType"] == "LoraLoaderModelOnly" and {name: missing[name] for name in HYPER} == HYPER
    assert complaints == {name: value for name, value in QUIET.items() if name != "models"} | {"errors": [True, None]}
    assert f"/{HYPER['name']}" in HYPER["url"]


def broken_node(graph):
    graph["nodes"][1]["type"] = "QT_NoSuchNode"


def broken_picture(graph):
    next(node for node in graph["nodes"] if node["type"] == "LoadImage")["widgets_values"][0] = "nowhere.png"


def broken_model(graph):
    wanted = {"name": "nowhere.safetensors", "url": "https://huggingface.co/a/b/resolve/main/nowhere.safetensors",
              "directory": "checkpoints"}
    graph["nodes"].append({**graph["nodes"][1], "id": 99, "type": "CheckpointLoaderSimple", "outputs": [], "inputs": [],
                           "widgets_values": ["nowhere.safetensors"], "properties": {"models": [wanted]}})


@pytest.mark.parametrize(("change", "where"), [(broken_node, "nodes"), (broken_picture, "pictures"), (broken_model, "models")])
def test_complaints_would_be_seen(change, where, frontend):
    """The checks above can fail: each kind of broken workflow shows where it should."""
    graph = committed("qwen_image_edit_2511_modelopt_fp8")
    change(graph)
    seen, _ = opened(frontend, graph)
    assert seen["complaints"][where] and seen["complaints"] != QUIET


def moved_widget(graph, nodes):
    values = nodes[3]["widgets_values"]
    values[0], values[1] = values[1], values[0]


def changed_widget(graph, nodes):
    nodes[2]["widgets_values"][4] = "bf16"


def changed_note(graph, nodes):
    nodes[1]["widgets_values"][0] += "."


def cut_link(graph, nodes):
    graph["links"].pop()
    nodes[5]["outputs"][1]["links"] = nodes[15]["inputs"][0]["link"] = None


def led_elsewhere(graph, nodes):
    graph["links"][-1][1] = 4
    nodes[4]["outputs"][1]["links"] = [13, 14]
    nodes[5]["outputs"][1]["links"] = None


def removed_node(graph, nodes):
    cut_link(graph, nodes)
    graph["nodes"].remove(nodes[15])


@pytest.mark.parametrize("change", [moved_widget, changed_widget, changed_note, cut_link, led_elsewhere, removed_node])
def test_a_changed_graph_would_be_seen(change, frontend):
    name = "flux1_dev_modelopt_fp8"
    graph = committed(name)
    change(graph, {node["id"]: node for node in graph["nodes"]})
    seen, _ = opened(frontend, graph)
    assert graph_differences(committed(name), seen["workflow"])
    assert change is changed_note or prompt_differences(prompt(name), seen["output"])
