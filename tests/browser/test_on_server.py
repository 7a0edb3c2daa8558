"""Run on server, in a loader's menu: what comes beside the graph has the graph's models, prompt and numbers."""

from __future__ import annotations

import json

import pytest
from browser.definitions import ASTRONAUT, CAR, FOX, LOGO, LTX_NEGATIVE, PUPPET, WAN_NEGATIVE, WATERCOLOR
from browser.extension import FLUX, FP8, HOSTILE, IMAGES, LOAD_SUBGRAPH, NODES, OUT, QWEN, SVDQ, build
from browser.graph import SEED
from browser.notes import LIGHTNING, NOTES

from support.pack import PACK

pytestmark = pytest.mark.browser

LABEL = "Run on server"
WAN, EDIT = "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Qwen/Qwen-Image-Edit-2511"
# (graph) -> opened; the nodes, by their titles, fill the view
OPEN = """async (graph) => {
  await app.loadGraphData(graph)
  await new Promise((done) => setTimeout(done, 500))
}"""
# (id) -> where the page shows a node's title
PLACE = """async (id) => {
  const node = app.graph.getNodeById(id)
  app.canvas.ds.scale = 1
  app.canvas.centerOnNode(node)
  app.canvas.setDirty(true, true)
  await new Promise((done) => setTimeout(done, 300))
  return app.canvasPosToClientPos([node.pos[0] + 120, node.pos[1] - 12])
}"""
# () -> {workflow, prompt} as they would be saved and queued
STATE = "async () => { const { workflow, output } = await app.graphToPrompt(); return { workflow, prompt: output } }"
# (with a loader's type) -> the id of the first one that has this title
FIND = "([type, title]) => app.graph.nodes.find((n) => n.type === type && (!title || n.title === title)).id"


@pytest.fixture(scope="module")
def server(extension_server):
    return extension_server


def template(page, name: str) -> None:
    page.run(OPEN, json.loads((PACK / "workflows" / f"{NOTES[name].title}.json").read_text(encoding="utf-8")))


def menu(page, node: int):
    """A node's menu, as a user opens it: the entry."""
    x, y = page.run(PLACE, node)
    page.page.mouse.click(x, y, button="right")
    return page.page.get_by_text(LABEL, exact=True)


def run_on_server(page, node: int) -> dict[str, dict]:
    """What came beside the graph, inputs by node type; all that was there is as it was."""
    before = page.run(STATE)
    menu(page, node).click()
    toast(page)
    after = page.run(STATE)
    old, new = ({one["id"]: (one["type"], one.get("widgets_values"), one["pos"], one["mode"]) for one in state["workflow"]["nodes"]}
                for state in (before, after))
    assert {key: new[key] for key in old} == old
    assert {key: after["prompt"][key] for key in before["prompt"]} == before["prompt"]
    made = {key: one for key, one in after["prompt"].items() if key not in before["prompt"]}
    assert len(made) == len(new) - len(old) == 3
    lefts = {key: new[key][2][0] for key in new}
    assert min(lefts[int(key)] for key in made) > max(lefts[key] for key in old), "to the right of all that was there"
    kinds = {one["class_type"]: one["inputs"] for one in made.values()}
    key = {one["class_type"]: key for key, one in made.items()}
    drawn = next(kind for kind in kinds if kind in ("QT_ServerImage", "QT_ServerVideo"))
    assert kinds[drawn]["server_model"] == [key["QT_ServerModel"], 0]
    saved, slot = ("SaveVideo", "video") if drawn == "QT_ServerVideo" else ("SaveImage", "images")
    assert kinds[saved][slot] == [key[drawn], 0]
    return kinds


def toast(page) -> str:
    shown = page.page.locator(".p-toast-message", has_text=LABEL)
    shown.wait_for()
    text = shown.inner_text()
    shown.locator("button").click()
    shown.wait_for(state="detached")
    return text


def parts(inputs: dict, *names: str) -> dict:
    return {name: inputs[name] for name in names}


MODEL = ("base_model", "override", "kind", "reference", "override_reference", "weights_name", "transformer_2", "revision", "server")
NUMBERS = ("prompt", "negative_prompt", "width", "height", "steps", "cfg", "seed", "true_cfg")


def model(base: str, override: str = "none", **others: str) -> dict:
    return {"base_model": base, "override": override, "kind": "auto", **dict.fromkeys(MODEL[3:], ""), **others}


# Template, node and title to click on -> Server Model, and what is drawn: by which node, with which numbers.
CASES = {
    "flux1_dev_modelopt_fp8": ("QT_ApplyTransformerOverride", model(FLUX, FP8, kind="component"), "QT_ServerImage", {
        "prompt": LOGO, "negative_prompt": "", "width": 1024, "height": 1024, "steps": 20, "cfg": 3.5, "true_cfg": 0}),
    "flux2_dev_nvfp4": ("QT_LoadBaseModel", model(
        "black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-dev-NVFP4", kind="weights",
        weights_name="flux2-dev-nvfp4-mixed.safetensors"), "QT_ServerImage", {
        "prompt": LOGO, "negative_prompt": "", "width": 1024, "height": 1024, "steps": 20, "cfg": 4, "true_cfg": 0}),
    "qwen_image_svdq_lightning_4steps": ("QT_NunchakuSVDQLoader", model("Qwen/Qwen-Image", QWEN, weights_name=LIGHTNING),
        "QT_ServerImage", {"prompt": ASTRONAUT, "negative_prompt": "", "width": 1328, "height": 1328, "steps": 4, "cfg": 1}),
    "flux1_dev_svdq_int4_lora": ("QT_NunchakuSVDQLoader", model(FLUX, SVDQ), "QT_ServerImage", {"prompt": LOGO, "steps": 8, "cfg": 3.5}),
    "hunyuanvideo_modelopt_fp8": ("QT_ApplyTransformerOverride", model(
        "hunyuanvideo-community/HunyuanVideo", "lmsys/hunyuanvideo-modelopt-fp8-sglang-transformer", kind="component"), "QT_ServerVideo", {
        "prompt": CAR, "negative_prompt": "", "width": 960, "height": 544, "length": 17, "fps": 24, "steps": 30, "cfg": 6}),
    "wan22_t2v_a14b_modelopt_fp8": ("QT_ApplyTransformerOverride", model(
        WAN, "lmsys/wan22-t2v-a14b-modelopt-fp8-sglang-transformer", kind="component"), "QT_ServerVideo", {
        "prompt": FOX, "negative_prompt": WAN_NEGATIVE, "width": 832, "height": 480, "length": 81, "fps": 16, "steps": 40, "cfg": 4,
        "cfg_2": 3}),
    "ltx2_fp8": ("QT_ApplyTransformerOverride", model(
        "Lightricks/LTX-2", "Lightricks/LTX-2/ltx-2-19b-dev-fp8.safetensors", kind="weights"), "QT_ServerVideo", {
        "prompt": PUPPET, "negative_prompt": LTX_NEGATIVE, "width": 768, "height": 512, "length": 121, "fps": 24, "steps": 20, "cfg": 4}),
    "qwen_image_edit_2511_modelopt_fp8": ("QT_ApplyTransformerOverride", model(
        EDIT, "lmsys/qwen-image-edit-modelopt-fp8-sglang-transformer", kind="component"), "QT_ServerImage", {
        "prompt": WATERCOLOR, "negative_prompt": "", "width": 1024, "height": 1024, "steps": 40, "cfg": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_template_samples(classic, name):
    """Through subgraphs with widgets of their own, guiders, primitive nodes, LoRAs and shifts."""
    clicked, wanted, drawn, numbers = CASES[name]
    template(classic, name)
    made = run_on_server(classic, classic.run(FIND, [clicked, ""]))
    assert parts(made["QT_ServerModel"], *MODEL) == wanted
    assert parts(made[drawn], *numbers, "seed") == numbers | {"seed": SEED}
    if "edit" in name:
        assert made[drawn]["images"] == [str(classic.run(FIND, ["LoadImage", ""])), 0]
    assert not ours(classic)


def ours(page) -> list[str]:
    """Problems, but for what the templates name and is not here."""
    elsewhere = ("/describe)", "/api/view)", "/missingModelDownload")
    return [problem for problem in page.problems if not any(place in problem for place in elsewhere)]


def chain(page, base: str = FLUX, override: str = FP8, **links: str) -> dict[str, int]:
    """A base, an override behind it and a sampler with a prompt."""
    return build(page, ("base", "QT_LoadBaseModel", {"base_model": base, "weights": "defer to override"}),
                 ("fp8", "QT_ApplyTransformerOverride", {"reference": override}), ("sample", "KSampler", {"seed": 7, "steps": 9, "cfg": 2.5}),
                 ("words", "CLIPTextEncode", {"text": "a fox"}), fp8_model="base", sample_model="fp8", sample_positive="words", **links)


@pytest.mark.parametrize("vue", NODES)
def test_the_menu_asks_nothing(another, vue):
    """Of the server or anyone, before the entry is chosen; and it is on loaders of transformers alone."""
    another.open(IMAGES | {"Comfy.VueNodes.Enabled": vue})
    menu(another, chain(another)["sample"])
    another.page.get_by_text("Properties Panel", exact=True).or_(another.page.get_by_text("Rename", exact=True)).first.wait_for()
    assert not another.page.get_by_text(LABEL, exact=True).count()
    another.open(IMAGES | {"Comfy.VueNodes.Enabled": vue})
    ids = chain(another)
    another.page.wait_for_timeout(500)
    urls: list[str] = []

    def note(request) -> None:
        urls.append(request.url)

    another.page.on("request", note)
    entry = menu(another, ids["base"])
    entry.wait_for()
    another.screenshot(OUT / f"on_server_menu_{'vue' if vue else 'canvas'}.png")
    assert not [url for url in urls if "/quantized_transformers/" in url or not url.startswith(f"http://127.0.0.1:{another.port}/")]
    entry.click()
    toast(another)
    found = another.run(STATE)["prompt"].values()
    made = {one["class_type"]: one["inputs"] for one in found}
    assert made["QT_ServerModel"]["override"] == FP8 and made["QT_ServerImage"]["prompt"] == "a fox"
    assert parts(made["QT_ServerImage"], "seed", "steps", "true_cfg") == {"seed": 7, "steps": 9, "true_cfg": 2.5}
    another.screenshot(OUT / f"on_server_{'vue' if vue else 'canvas'}.png")
    assert not ours(another)


def test_it_is_one_step_of_undo_and_selects_what_came(classic):
    ids = chain(classic)
    classic.page.wait_for_timeout(300)
    run_on_server(classic, ids["fp8"])
    assert sorted(classic.run("() => Object.values(app.canvas.selected_nodes).map((n) => n.type)")) == [
        "QT_ServerImage", "QT_ServerModel", "SaveImage"]
    assert classic.run("async () => { await app.extensionManager.workflow.activeWorkflow.changeTracker.undo(); return app.graph.nodes.length }") == 4


def test_a_name_is_text(classic):
    """In the toast and in the menu."""
    ids = chain(classic, override=HOSTILE)
    menu(classic, ids["fp8"]).click()
    assert HOSTILE in toast(classic).replace("'", "")
    assert classic.run("() => window.hit") is None
    assert classic.run("() => app.graph.nodes.find((n) => n.type === 'QT_ServerModel').widgets.find((w) => w.name === 'override').value") == HOSTILE


def test_the_toast_has_the_sentence_and_the_command(classic):
    ids = chain(classic)
    menu(classic, ids["fp8"]).click()
    said = toast(classic)
    assert "The same seed makes another result there" in said and f"serve {FLUX} --override {FP8}" in said


def test_the_second_transformer(classic):
    """Low noise, clicked on: its override is the server's transformer_2, and the numbers are those of the first."""
    template(classic, "wan22_t2v_a14b_modelopt_fp8")
    low = classic.run(FIND, ["QT_LoadBaseModel", "Low noise: transformer_2"])
    wanted = CASES["wan22_t2v_a14b_modelopt_fp8"]
    made = run_on_server(classic, low)
    assert parts(made["QT_ServerModel"], *MODEL) == wanted[1] and parts(made["QT_ServerVideo"], *wanted[3]) == wanted[3]
    template(classic, "wan22_t2v_a14b_modelopt_fp8")
    nvfp4 = "lmsys/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer"
    classic.run("""([id, override]) => {
      const low = app.graph.getNodeById(id), made = LiteGraph.createNode('QT_ApplyTransformerOverride')
      app.graph.add(made)
      const [link] = low.outputs[0].links, { target_id, target_slot } = app.graph.getLink(link)
      low.connect(0, made, 0)
      made.connect(0, app.graph.getNodeById(target_id), target_slot)
      made.widgets.find((w) => w.name === 'override').value = override
    }""", [low, nvfp4])
    made = run_on_server(classic, low)
    assert parts(made["QT_ServerModel"], *MODEL) == wanted[1] | {"transformer_2": nvfp4}


def test_inside_a_subgraph(classic):
    """Beside the loader, with the values that the subgraph's node shows."""
    graph = json.loads((PACK / "subgraphs" / "FLUX.1 ModelOpt FP8 text to image.json").read_text(encoding="utf-8"))
    holder, inner = classic.run(LOAD_SUBGRAPH, graph)
    found = classic.run("""async ([holder, id]) => {
      const node = app.graph.getNodeById(holder)
      node.widgets.find((w) => w.name === 'prompt').value = 'a heron'
      node.widgets.find((w) => w.name === 'steps').value = 11
      app.canvas.setGraph(node.subgraph)
      const { runOnServer } = await import('/extensions/quantized-transformers/src/on_server.js')
      await runOnServer(node.subgraph.getNodeById(id))
      const made = node.subgraph.nodes.find((n) => n.type === 'QT_ServerImage')
      app.canvas.setGraph(app.rootGraph)
      return Object.fromEntries(made.widgets.map((w) => [w.name, w.value]))
    }""", [holder, inner])
    toast(classic)
    assert parts(found, "prompt", "steps", "cfg", "width") == {"prompt": "a heron", "steps": 11, "cfg": 3.5, "width": 1024}
    assert not ours(classic)


def refused(page, node: int) -> str:
    """What is said, and nothing added."""
    before = page.run("() => app.graph.nodes.length")
    menu(page, node).click()
    said = toast(page)
    assert page.run("() => app.graph.nodes.length") == before
    return said


def test_what_is_not_known_before_the_run(classic):
    """A reference that comes by a link, one outside of the model folders, and weights without a base."""
    ids = build(classic, ("words", "PrimitiveString", {"value": FP8}), ("fp8", "QT_ApplyTransformerOverride", {}),
                ("base", "QT_LoadBaseModel", {"reference": "/etc"}), ("svdq", "QT_NunchakuSVDQLoader", {"reference": "somebody/quantized"}),
                fp8_reference="words")
    assert "comes by a link" in refused(classic, ids["fp8"])
    assert "outside of the model folders" in refused(classic, ids["base"])
    assert "load the base's text encoder in the same graph" in refused(classic, ids["svdq"])
    classic.run("""(repo) => {
      const node = LiteGraph.createNode('QT_LoadBaseTextEncoder')
      app.graph.add(node)
      node.widgets.find((w) => w.name === 'reference').value = repo
    }""", "somebody/base")
    made = run_on_server(classic, ids["svdq"])
    assert parts(made["QT_ServerModel"], *MODEL) == model(made["QT_ServerModel"]["base_model"], "none", reference="somebody/base",
                                                          override_reference="somebody/quantized")
