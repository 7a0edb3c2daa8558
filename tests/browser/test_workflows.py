"""The example workflows in ComfyUI's real frontend: they open without complaint, unchanged, and queue what is committed."""

from __future__ import annotations

import json
import re

import pytest
from browser.definitions import WORKFLOWS
from browser.notes import HYPER, MISSING, NOTES, START

from support.graphs import graph_differences, prompt_differences
from support.pack import PACK

pytestmark = pytest.mark.browser

FOLDER = PACK / "workflows"
NAMES = [workflow.name for workflow in WORKFLOWS]
# Loads a graph as the template browser does (useTemplateWorkflows.ts, with its addresses), and says what the frontend made
# of it. The stores are those behind its error panel, its dialogs and its missing-model, missing-node and missing-picture
# lists. Boxes are [left, top, right, bottom] of nodes with their titles, in pixels of the page.
OPEN = """async ([title, graph]) => {
  const url = (kind) => window.comfyAPI.api.api.apiURL(`/workflow_templates/quantized-transformers/${title}.${kind}`)
  graph ??= await (await fetch(url('json'))).json()
  const thumbnail = new Image()
  thumbnail.src = url('jpg')
  await thumbnail.decode()
  await app.loadGraphData(structuredClone(graph), true, true, title, { openSource: 'template' })
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
  const { scale, offset } = app.canvas.ds
  const vue = LiteGraph.vueNodesMode
  const element = ({ id }) => document.querySelector(`[data-node-id="${id}"]`)
  const box = (node) => {
    const { left, top, right, bottom } = vue ? element(node).getBoundingClientRect() : {}
    const [x, y, wide, tall] = node.boundingRect
    return vue ? [left, top, right, bottom]
      : [x + offset[0], y + offset[1], x + wide + offset[0], y + tall + offset[1]].map((n) => n * scale)
  }
  const holder = app.graph.nodes.find((node) => node.isSubgraphNode())
  const view = { vue, scale, simplified: app.canvas.low_quality, boxes: app.graph.nodes.map((node) => [node.title, box(node)]),
    widgets: !holder ? [] : vue ? element(holder).innerText + [...element(holder).querySelectorAll('textarea')].map((e) => e.placeholder)
      : holder.widgets.map((widget) => widget.label ?? widget.name) }
  const name = app.extensionManager.workflow.activeWorkflow.filename
  const { workflow, output } = await app.graphToPrompt()
  return JSON.stringify({ complaints, workflow, output, view, name, thumbnail: [thumbnail.naturalWidth, thumbnail.naturalHeight] })
}"""
QUIET = {"errors": [False, None], "nodes": None, "models": None, "pictures": None, "dialogs": [], "shown": []}
# Below 0.57 the classic canvas leaves out texts (8 of 14 pixels, LiteGraph.Canvas.MinFontSizeForLOD). On this page of
# 1920 x 1080 the frontend gives a graph three quarters of each side.
LEGIBLE = 0.75


def opened(frontend, name, graph=None):
    """What OPEN says of a template, or of a graph in its place, and the frontend's problems since then."""
    frontend.problems.clear()
    seen = json.loads(frontend.run(OPEN, [NOTES[name].title, graph]))
    return seen, list(frontend.problems)


def committed(name):
    return json.loads((FOLDER / f"{NOTES[name].title}.json").read_text(encoding="utf-8"))


def prompt(name):
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def of(name):
    return next(workflow for workflow in WORKFLOWS if workflow.name == name)


def is_legible(view):
    """The whole graph is on the page, as large as it says, and no node covers another or what the page has at its edges."""
    assert view["scale"] >= LEGIBLE and not view["simplified"]
    for i, (title, a) in enumerate(view["boxes"]):
        assert a[0] > 60 and a[1] > 100 and a[2] < 1920 and a[3] < 1080, title
        for other, b in view["boxes"][:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (title, other)


def test_the_templates_are_listed(server):
    listed = server.get("/api/workflow_templates")["quantized-transformers"]
    assert sorted(listed) == sorted(NOTES[name].title for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_workflow_opens_as_committed(name, frontend):
    seen, problems = opened(frontend, name)
    assert seen["complaints"] == QUIET and not problems
    assert not prompt_differences(prompt(name), seen["output"])
    assert not graph_differences(committed(name), seen["workflow"])
    assert re.fullmatch(re.escape(NOTES[name].title) + r"( \(\d+\))?", seen["name"]) and seen["thumbnail"] == [480, 480]
    is_legible(seen["view"])
    assert len(seen["view"]["boxes"]) <= 10 and seen["view"]["widgets"] == [shown.name for shown in of(name).shown]


@pytest.mark.full
def test_they_are_legible_in_vue_nodes(frontend):
    """Of other heights than on the canvas, and with advanced widgets hidden: none of those that a template shows is one."""
    switch = "(on) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    layouts = {str([[[node.type for node in column] for column in workflow.outside], workflow.shown]): workflow
               for workflow in WORKFLOWS}  # what others of the same have is of the same size
    frontend.run(switch, True)
    try:
        for workflow in layouts.values():
            view = opened(frontend, workflow.name)[0]["view"]
            is_legible(view)
            assert view["vue"] and not [shown.name for shown in workflow.shown if shown.name not in view["widgets"]], workflow.name
    finally:
        frontend.run(switch, False)
    assert len(layouts) > 8


def test_values_are_those_of_the_definitions(server):
    """A widget is what definitions.py says, else the node's default: nothing came in from elsewhere while building."""
    for workflow in WORKFLOWS:
        note, twin, ids = committed(workflow.name)["nodes"][0], prompt(workflow.name), workflow.ids()
        assert note["widgets_values"] == [workflow.note] and (START if workflow.flat else MISSING) in workflow.note
        assert twin.keys() == set(ids.values())
        for node in workflow.nodes:
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
        frontend.run("() => app.reloadNodeDefs()")
        complaints = opened(frontend, "flux1_dev_svdq_int4_lora")[0]["complaints"]
    finally:
        file.touch()
        frontend.run("() => app.reloadNodeDefs()")
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
    name = "qwen_image_edit_2511_modelopt_fp8"
    graph = committed(name)
    change(graph)
    seen, _ = opened(frontend, name, graph)
    assert seen["complaints"][where] and seen["complaints"] != QUIET


def moved_widget(graph, nodes):
    values = nodes["override"]["widgets_values"]
    values[0], values[1] = values[1], values[0]


def changed_widget(graph, nodes):
    nodes["base"]["widgets_values"][4] = "bf16"


def changed_inside(graph, nodes):
    nodes["sample"]["widgets_values"][4] = "heun"


def changed_outside(graph, nodes):
    """A widget of the subgraph's node: it, and not the one inside, has the value."""
    nodes["holder"]["widgets_values"][4] += 1


def changed_note(graph, nodes):
    nodes["note"]["widgets_values"][0] += "."


def cut_link(graph, nodes):
    slot = nodes["save"]["inputs"][0]
    graph["links"] = [link for link in graph["links"] if link[0] != slot["link"]]
    slot["link"] = nodes["holder"]["outputs"][0]["links"] = None


def led_elsewhere(graph, nodes):
    """The report tells of the base instead."""
    link = next(link for link in graph["links"] if link[0] == nodes["report_override"]["inputs"][0]["link"])
    link[1] = nodes["base"]["id"]
    nodes["base"]["outputs"][1]["links"], nodes["override"]["outputs"][1]["links"] = [link[0]], None


def removed_node(graph, nodes):
    cut_link(graph, nodes)
    graph["nodes"].remove(nodes["save"])


@pytest.mark.parametrize("change", [moved_widget, changed_widget, changed_inside, changed_outside, changed_note, cut_link,
                                    led_elsewhere, removed_node])
def test_a_changed_graph_would_be_seen(change, frontend):
    name = "flux1_dev_modelopt_fp8"
    graph, workflow = committed(name), of(name)
    subgraph, = graph["definitions"]["subgraphs"]
    by_id = {str(node["id"]): node for node in [*graph["nodes"], *subgraph["nodes"]]}
    nodes = {key: by_id[id_.rpartition(":")[2]] for key, id_ in workflow.ids().items()}
    nodes |= {"note": graph["nodes"][0], "holder": next(n for n in graph["nodes"] if n["type"] == subgraph["id"])}
    change(graph, nodes)
    seen, _ = opened(frontend, name, graph)
    assert graph_differences(committed(name), seen["workflow"])
    assert change is changed_note or prompt_differences(prompt(name), seen["output"])
