"""The pack's JavaScript in ComfyUI's real frontend, against the real server: badges, graphs, texts, both renderers.

One server with a local Hub beside it, and one browser, for all of a file. Screenshots go to output/browser.
Dialogs, the sidebar and settings are in test_extension_panels.py.
"""

from __future__ import annotations

import json
import re

import pytest
from browser.extension import (
    BADGE,
    CHOOSE,
    COLOURS,
    FLUX,
    FP8,
    GGUF,
    GPTQ,
    HOSTILE,
    IMAGES,
    LOAD_SUBGRAPH,
    NODES,
    OUT,
    QWEN,
    SLIM,
    SVDQ,
    TIMED,
    WHOLE,
    badge,
    build,
    colour_of,
    next_choice,
    picture,
    run_in_page,
    shown,
    sidebar,
    stored_formats,
    wait_for,
    wait_inside,
)

from quantized_transformers.views.layer_map import PROBLEM_COLOUR, format_colours
from support.pack import PACK
from support.server import outputs
from support.workflow import apply_override, load_base, text_to_image

pytestmark = pytest.mark.browser

BLUEPRINT = PACK / "subgraphs" / "FLUX.1 ModelOpt FP8 text to image.json"

DYNAMIC = ("kind_", "verdict_", "target_", "hub_", "fact_")  # keys of texts that the page puts together


@pytest.fixture(scope="module")
def server(extension_server):
    return extension_server


def test_the_pack_loads_without_a_complaint(classic, server):
    assert classic.at_start == []
    listed = server.get("/extensions")
    ours = {path.relative_to(PACK / "web").as_posix() for path in (PACK / "web").rglob("*.js")}
    assert {f"/extensions/quantized-transformers/{name}" for name in ours} <= set(listed)
    commands = classic.run("() => app.extensionManager.command.commands.map((c) => c.id)")
    assert commands.count("QuantizedTransformers.Doctor") == commands.count("QuantizedTransformers.Convert") == 1


@pytest.mark.full
def test_picture_for_the_readme(classic):
    """docs/graph.png is this screenshot, with fewer colours."""
    minimap = "(on) => app.extensionManager.setting.set('Comfy.Minimap.Visible', on)"
    classic.run(minimap, False)
    ids = build(
        classic, ("base", "QT_LoadBaseModel", {"base_model": FLUX, "weights": "defer to override"}),
        ("fp8", "QT_ApplyTransformerOverride", {"override": FP8}), ("wrong", "QT_ApplyTransformerOverride", {"override": QWEN}),
        ("svdq", "QT_NunchakuSVDQLoader", {"weights": SVDQ}), ("slim", "QT_ModelSlimLoader", {}),
        fp8_model="base", wrong_model="base")
    sidebar(classic).get_by_role("searchbox").fill("dev")
    for key, state in (("base", "ready"), ("fp8", "ready"), ("wrong", "ready"), ("svdq", "ready"), ("slim", "missing")):
        badge(classic, ids[key], state)
    assert classic.run(BADGE, ids["fp8"])["text"][:2] == ["ModelOpt FP8", "FLUX.1"]
    assert classic.run(BADGE, ids["wrong"])["mark"] == "mismatch"
    classic.run("() => { app.canvas.ds.offset = [0, 60]; app.canvas.setDirty(true, true) }")
    classic.page.wait_for_timeout(200)
    classic.screenshot(OUT / "graph.png")
    assert classic.problems == []
    classic.run(minimap, True)
    classic.page.locator(".side-bar-button", has_text="Quantized").click()


def test_a_badge_says_what_the_file_is(classic, tiny):
    ids = build(classic, ("q", "QT_ApplyTransformerOverride", {"override": "tiny-mixed"}))
    seen = badge(classic, ids["q"])
    path, = tiny.mixed.glob("*.safetensors")
    counts = stored_formats(path)
    assert set(counts) == {"FP8", "BF16"} and {p["format"]: p["grow"] for p in seen["bar"]} == counts
    assert seen["text"][:3] == ["ModelOpt FP8", "FLUX.1", "emulated"] and seen["verdict"] == "amber"
    assert f"{path.stat().st_size / 1e6:.2f} MB" in " ".join(seen["text"]) and "VRAM" in seen["text"][-1]
    assert "no FP8 matmul" in seen["title"]
    assert [p["colour"] for p in seen["bar"]] == [colour_of(p["format"]) for p in seen["bar"]]
    assert classic.run(COLOURS, [*format_colours(), "?"]) == {
        name: f"#{bytes(colour).hex()}" for name, colour in {**format_colours(), "?": PROBLEM_COLOUR}.items()}


def test_a_model_that_only_comfyui_knows(classic, server):
    """In an all-in-one checkpoint: badges of its three parts, the layer map, and a run that saves it."""
    ids = build(classic, ("base", "QT_LoadBaseModel", {"base_model": WHOLE}),
                ("texts", "QT_LoadBaseTextEncoder", {"base_model": WHOLE}), ("pictures", "QT_LoadBaseVAE", {"base_model": WHOLE}))
    seen = badge(classic, ids["base"])
    assert seen["text"][:2] == ["FP8", "WAN21_Vace"] and {part["format"] for part in seen["bar"]} == {"FP8", "BF16"}
    assert [badge(classic, ids[part])["text"][:2] for part in ("texts", "pictures")] == [
        ["BF16", "whole checkpoint"], ["F16", "whole checkpoint"]]
    sidebar(classic).locator(f'.qt-item[data-reference="{WHOLE}"] .qt-look').click()
    classic.page.locator(".qt-map table").wait_for()
    cells = classic.page.eval_on_selector_all(".qt-map td[title]", "(cells) => cells.map((cell) => cell.title)")
    assert any(cell.startswith("vace_blocks.1 ") and cell.endswith(": FP8") for cell in cells) and "top head.head: BF16" in cells
    classic.screenshot(OUT / "host_model.png")
    classic.page.keyboard.press("Escape")
    prompt = {"1": {"class_type": "QT_LoadBaseModel", "inputs": {"base_model": WHOLE, "component": "transformer", "weights": "load"}},
              "2": {"class_type": "QT_SaveQuantizedModel", "inputs": {
                  "model": ["1", 0], "filename": "diffusion_models/vace", "format": "exact", "overwrite": True}},
              "3": {"class_type": "QT_InspectCheckpoint", "inputs": {"checkpoint": WHOLE}}}
    server.run(prompt)
    assert classic.problems == []


@pytest.mark.parametrize(("reference", "title", "name"), [
    (GGUF, "GGUF", "GGUF Q8_0"), (GPTQ, "GPTQ, AWQ", "UINT4 (groups)")])
def test_files_of_other_tools(classic, server, reference, title, name):
    """Badge, the browser's row and filter, the layer map, and a picture."""
    ids = build(classic, ("base", "QT_LoadBaseModel", {"base_model": "tiny-flux"}),
                ("q", "QT_ApplyTransformerOverride", {"override": reference}), q_model="base")
    seen = badge(classic, ids["q"])
    assert seen["text"][:3] == [title, "FLUX.1", "emulated"] and seen["mark"] == ""
    assert {part["format"]: part["colour"] for part in seen["bar"]}[name] == colour_of(name)
    browser = sidebar(classic)
    browser.get_by_label("Format").select_option(name)
    assert reference in shown(browser) and "tiny-flux" not in shown(browser)
    browser.locator(f'.qt-item[data-reference="{reference}"] .qt-look').click()
    classic.page.locator(".qt-map table").wait_for()
    cells = classic.page.eval_on_selector_all(".qt-map td[title]", "(cells) => cells.map((cell) => cell.title)")
    assert any(cell.endswith(f": {name}") for cell in cells)
    classic.page.keyboard.press("Escape")
    browser.get_by_label("Format").select_option("")
    done = server.run({"base": load_base("tiny-flux"), "q": apply_override(["base", 0], reference),
                       **text_to_image(["q", 0], "t", steps=1, size=64)})
    assert outputs(server, done, "images") and classic.problems == []


def test_a_badge_comes_within_300_ms(classic):
    ids = build(classic, ("q", "QT_ApplyTransformerOverride", {"override": "tiny-mixed"}))
    badge(classic, ids["q"])
    times = [classic.run(TIMED, [ids["q"], "override", name]) for name in ("tiny-fp8", "tiny-sharded", FP8)]
    print("badge after", [f"{ms:.0f} ms" for ms in times])
    assert min(times) < 300, times


def test_precision_and_rank_are_filled_in(classic):
    ids = build(classic, ("svdq", "QT_NunchakuSVDQLoader", {"weights": SVDQ}))
    assert badge(classic, ids["svdq"])["text"][-1].endswith("auto: int4, r32")
    classic.run(CHOOSE, [ids["svdq"], "precision", "int4"])
    classic.run(CHOOSE, [ids["svdq"], "rank", 32])
    classic.page.wait_for_function(f"({BADGE})({json.dumps(ids['svdq'])}).text.at(-1).endsWith('VRAM · int4, r32')")


def test_a_click_on_the_canvas_changes_the_badge(classic):
    ids = build(classic, ("base", "QT_LoadBaseModel", {"base_model": "tiny-flux"}))
    assert badge(classic, ids["base"])["text"][0] == "BF16"
    next_choice(classic, ids["base"], "weights")
    classic.page.wait_for_function(f"({BADGE})({json.dumps(ids['base'])}).text[0] === 'deferred'")


def test_what_is_typed_or_linked(classic):
    """A reference by hand wins over the list; what is nowhere, outside or linked says so; names are never markup."""
    ids = build(classic, ("q", "QT_ApplyTransformerOverride", {"override": "tiny-mixed", "reference": "tiny-fp8"}),
                ("text", "PrimitiveString", {}))
    assert badge(classic, ids["q"])["title"].startswith("tiny-fp8\n")
    classic.run(CHOOSE, [ids["q"], "reference", "no-such-folder"])
    assert "no-such-folder" in badge(classic, ids["q"], "error")["title"]
    classic.run(CHOOSE, [ids["q"], "reference", "/etc/passwd"])
    assert badge(classic, ids["q"], "empty")["text"] == ["Outside of the model folders: looked at when the workflow runs"]
    classic.run(CHOOSE, [ids["q"], "reference", HOSTILE])
    assert badge(classic, ids["q"])["title"].startswith(HOSTILE)
    classic.run("""([text, q]) => { const node = app.graph.getNodeById(q)
      app.graph.getNodeById(text).connect(0, node, node.inputs.findIndex((i) => i.name === 'reference')) }""",
                [ids["text"], ids["q"]])
    assert "link" in badge(classic, ids["q"], "empty")["title"]
    assert classic.run("() => window.hit") is None


def test_the_panel_of_a_nodes_parameters_leaves_the_badge_where_it_is(classic):
    ids = build(classic, ("q", "QT_ApplyTransformerOverride", {"override": "tiny-mixed"}))
    badge(classic, ids["q"])
    width = "() => document.querySelector('.qt-badge').getBoundingClientRect().width"
    before = classic.run(width)
    classic.run("(id) => app.canvas.selectNode(app.graph.getNodeById(id))", ids["q"])
    classic.page.get_by_role("button", name="Toggle properties panel").click()
    panel = classic.page.get_by_test_id("properties-panel")
    panel.get_by_text("compute").first.wait_for()
    classic.page.wait_for_timeout(300)
    classic.screenshot(OUT / "parameters_panel.png")
    assert "checkpoint_info" not in panel.inner_text() and not panel.locator(".qt-badge").count()
    assert classic.run(width) == before and classic.run("() => document.querySelectorAll('.qt-badge').length") == 1
    classic.page.get_by_role("button", name="Toggle properties panel").click()


def test_the_mismatch_mark_appears_and_goes(classic):
    ids = build(classic, ("base", "QT_LoadBaseModel", {"base_model": "tiny-flux", "weights": "defer to override"}),
                ("q", "QT_ApplyTransformerOverride", {"override": "tiny-mixed"}), q_model="base")
    assert badge(classic, ids["q"])["mark"] == ""
    classic.run(CHOOSE, [ids["q"], "override", QWEN])
    wait_for(classic, ids["q"], mark="mismatch")
    seen = classic.run(BADGE, ids["q"])
    assert "Qwen-Image" in seen["text"][-1] and seen["verdict"] == "red", "it cannot run behind this base"
    assert classic.run(BADGE, ids["base"]).get("verdict") is None, "nothing of a base without weights runs"
    classic.screenshot(OUT / "mismatch.png")
    classic.run(CHOOSE, [ids["q"], "override", "tiny-mixed"])
    wait_for(classic, ids["q"], mark="")


@pytest.mark.parametrize("between", ["reroute", "patched", "bypassed", "base in a subgraph", "override in a subgraph"])
def test_the_base_is_found_upstream(between, classic):
    middle = {"reroute": [("m", "Reroute", {})], "patched": [("m", "ModelSamplingFlux", {})],
              "bypassed": [("m", "QT_ApplyTransformerOverride", {"override": QWEN})]}.get(between, [])
    links = {"q_model": "m", ("m_" if between == "reroute" else "m_model"): "base"} if middle else {"q_model": "base"}
    ids = build(classic, ("base", "QT_LoadBaseModel", {"base_model": "tiny-flux", "weights": "defer to override"}), *middle,
                ("q", "QT_ApplyTransformerOverride", {"override": QWEN}), **links)
    wait_for(classic, ids["q"], mark="mismatch")
    if between == "bypassed":
        classic.run("(id) => { app.graph.getNodeById(id).mode = 4 }", ids["m"])
    if "subgraph" in between:
        moved = "base" if between.startswith("base") else "q"
        classic.run("(id) => { app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)])) }", ids[moved])
        found = """() => [app.rootGraph, ...app.rootGraph.subgraphs.values()].flatMap((g) => g.nodes)
          .find((n) => n.type === 'QT_ApplyTransformerOverride').widgets.at(-1).element.dataset.mark"""
        classic.page.wait_for_function(f"({found})() === 'mismatch'")
        return
    if between == "patched":  # muted with its key: no node of ours is told
        classic.run("(id) => { app.canvas.selectNode(app.graph.getNodeById(id)); app.canvas.canvas.focus() }", ids["m"])
        classic.page.keyboard.press("Control+m")
    else:
        classic.run("(id) => app.graph.getNodeById(id).disconnectInput(0)", ids["m"])
    wait_for(classic, ids["q"], mark="")


def test_a_widget_that_a_subgraph_shows(classic):
    inner = follows_the_subgraph(classic, lambda holder: next_choice(classic, holder, "override"))
    # what is dropped on the node inside wins over what the subgraph's node says
    sidebar(classic)
    x, y = classic.run("""(id) => { const node = app.canvas.graph.getNodeById(id)
      app.canvas.ds.offset = [700 - node.pos[0], 300 - node.pos[1]]
      return app.canvas.ds.convertOffsetToCanvas([node.pos[0] + 60, node.pos[1] - 10]) }""", inner)
    classic.page.drag_and_drop('.qt-item[data-reference="tiny-sharded"]', "#graph-canvas", target_position={"x": x, "y": y})
    wait_inside(classic, inner, "tiny-sharded")
    ids = build(classic, ("base", "QT_LoadBaseModel", {"base_model": "tiny-flux"}))
    badge(classic, ids["base"])
    classic.problems.clear()
    classic.run("() => app.refreshComboInNodes()")
    classic.page.wait_for_timeout(500)
    assert not classic.problems, "nodes of a graph that is gone ask for what their base does not have"


def follows_the_subgraph(frontend, choose):
    """Badge, mark and details of a node inside follow a widget of the subgraph's node, which the frontend sets without
    telling anybody inside. `choose` takes another choice there by hand. Returns the id of the node inside."""
    holder, inner = frontend.run(LOAD_SUBGRAPH, json.loads(BLUEPRINT.read_text(encoding="utf-8")))
    wait_inside(frontend, inner, FP8)
    value = "app.graph.getNodeById(id).widgets.find((w) => w.name === 'override').value"
    frontend.run(f"([id, name]) => {{ {value} = name }}", [holder, QWEN])
    wait_inside(frontend, inner, QWEN, "mismatch")
    choose(holder)
    chosen = frontend.run(f"(id) => {value}", holder)
    assert chosen != QWEN
    wait_inside(frontend, inner, chosen)
    frontend.run(f"([id, name]) => {{ {value} = name }}", [holder, "tiny-mixed"])
    frontend.run("(id) => app.canvas.setGraph(app.graph.getNodeById(id).subgraph)", holder)
    # the frontend then fits the whole graph to the page, which may be too small for it to show anything on nodes
    frontend.page.wait_for_function("""(inner) => { app.canvas.ds.scale = 1
      app.canvas.centerOnNode(app.canvas.graph.getNodeById(inner))
      return document.querySelector('.qt-badge[title^="tiny-mixed"] .qt-bar')?.checkVisibility() }""", arg=inner)
    frontend.page.locator('.qt-badge[title^="tiny-mixed"] .qt-bar').click()
    details = frontend.page.locator(".qt-dialog")
    details.locator(".qt-map").wait_for()
    assert "tiny-mixed" in details.inner_text()
    frontend.page.keyboard.press("Escape")
    return inner


def test_saved_workflows_and_prompts_know_nothing_of_badges(classic, server):
    types = [name for name in server.get("/object_info") if name.startswith("QT_")]
    build(classic, *((name, name, {}) for name in types))
    saved = classic.run("async () => JSON.parse(JSON.stringify(await app.graphToPrompt()))")
    for node in saved["workflow"]["nodes"]:
        info = server.get(f"/object_info/{node['type']}")[node["type"]]
        widgets = [name for group in ("required", "optional") for name, (kind, *_) in info["input"].get(group, {}).items()
                   if isinstance(kind, list) or kind in ("COMBO", "STRING", "INT", "FLOAT", "BOOLEAN")]
        assert len(node["widgets_values"]) == len(widgets) + ("seed" in widgets), node["type"]
        assert "checkpoint_info" not in json.dumps(node)
    assert all("checkpoint_info" not in node["inputs"] for node in saved["output"].values())


def test_a_workflow_runs_to_its_picture(classic, server):
    from PIL import Image

    file, = run_in_page(classic, server, 11)
    assert Image.open(file).size == (32, 32)
    classic.page.wait_for_timeout(300)
    classic.screenshot(OUT / "picture.png")
    assert not classic.problems


def test_translations_are_complete(classic, server):
    """English texts are the schemas'; Chinese ones have every one of them, and vue-i18n can read both."""
    info = {name: node for name, node in server.get("/object_info").items() if name.startswith("QT_")}
    texts = server.get("/i18n")
    english, chinese = texts["en"], texts["zh"]
    for name, node in info.items():
        known = english["nodeDefs"][name]
        assert (known["display_name"], known["description"]) == (node["display_name"], node["description"])
        schema = {key: (more[0] if more else {}).get("tooltip") for group in ("required", "optional")
                  for key, (_, *more) in node["input"].get(group, {}).items()}
        assert {key: value.get("tooltip") for key, value in known["inputs"].items()} == schema, name

    def strings(value):
        return [value] if isinstance(value, str) else [text for inner in value.values() for text in strings(inner)]

    def keys(value, at=""):
        if not isinstance(value, dict):
            return {at} if value else set()
        return {key for name, inner in value.items() for key in keys(inner, f"{at}/{name}")}

    for part in ("quantizedTransformers", "nodeDefs", "commands", "settings"):
        ours = [{key for key in keys(texts[part]) if part == "quantizedTransformers" or key.startswith(("/QT_", "/Quantized"))}
                for texts in (english, chinese)]
        assert ours[0] == ours[1] and ours[0], ours[0] ^ ours[1]
    words = [text for name in info for text in strings(chinese["nodeDefs"][name])]
    assert words and not any(set("{}@|") & set(text) for text in words), "vue-i18n would read these as its syntax"
    used = "\n".join(path.read_text(encoding="utf-8") for path in (PACK / "web" / "src").glob("*.js"))
    kinds = server.get("/quantized_transformers/catalog")["kinds"]
    assert [key for key in english["quantizedTransformers"] if key.startswith("kind_")] == [f"kind_{kind}" for kind in kinds]
    unused = [key for key in english["quantizedTransformers"] if f"'{key}'" not in used and not key.startswith(DYNAMIC)]
    assert not unused


def test_everything_runs_with_the_javascript_blocked(classic, server):
    """Without a single file of ours the page opens, saves the same workflow, and runs it."""
    classic.run("(prompt) => app.loadApiJson(prompt, 'picture')", picture(12))
    with_badges = classic.run("() => app.graph.serialize()")
    classic.other = True
    classic.open(blocked="/extensions/quantized-transformers/")
    assert classic.run("() => document.querySelectorAll('.qt-badge').length") == 0
    assert len(run_in_page(classic, server, 12)) == 1
    without = classic.run("() => app.graph.serialize()")
    ours = [[(n["type"], n["widgets_values"], n["inputs"]) for n in graph["nodes"] if n["type"].startswith("QT_")]
            for graph in (with_badges, without)]
    assert len(ours[0]) == 2 and ours[0] == ours[1]
    assert classic.problems and all("quantized-transformers" in problem for problem in classic.problems), classic.problems


def test_without_the_servers_answer_there_are_just_no_badges(another, server):
    """The graph, its settings and the sidebar work; the page complains of that one request only."""
    another.open(blocked="/api/quantized_transformers/page")
    ids = build(another, ("base", "QT_LoadBaseModel", {"base_model": "tiny-flux"}), ("q", "QT_ApplyTransformerOverride", {}))
    sidebar(another).locator('.qt-item[data-reference="tiny-mixed"] .qt-add').press("Enter")
    another.page.wait_for_timeout(1000)
    nodes = another.run("() => app.graph.nodes.map((n) => [n.type, n.widgets.find((w) => w.name === 'override')?.value])")
    assert len(ids) == 2 and nodes[-1] == ["QT_ApplyTransformerOverride", "tiny-mixed"]
    assert another.run("() => document.querySelectorAll('.qt-badge').length") == 0
    assert another.problems and all("/quantized_transformers/page" in text for text in another.problems), another.problems


@pytest.mark.parametrize("vue", NODES)
def test_a_new_node_starts_with_what_it_loads(another, server, vue):
    """What is local and fits, as /object_info says; a known repo where nothing local is the node's."""
    another.open(IMAGES | {"Comfy.VueNodes.Enabled": vue})
    lists = {"QT_LoadBaseModel": ("base_model", HOSTILE), "QT_LoadBaseTextEncoder": ("base_model", WHOLE), "QT_LoadBaseVAE": ("base_model", WHOLE),
             "QT_ApplyTransformerOverride": ("override", HOSTILE), "QT_NunchakuSVDQLoader": ("weights", f"{SVDQ}/svdq-int4_r32-flux.1-dev.safetensors"),
             "QT_InspectCheckpoint": ("checkpoint", HOSTILE), "QT_ModelSlimLoader": ("folder", SLIM)}
    ids = build(another, *((node, node, {}) for node in lists))
    for node, (name, start) in lists.items():
        seen = badge(another, ids[node], "missing" if start == SLIM else "ready")
        value = "([id, name]) => app.graph.getNodeById(id).widgets.find((w) => w.name === name).value"
        given = server.get(f"/object_info/{node}")[node]["input"]["optional"][name][1]
        assert another.run(value, [ids[node], name]) == start == given["default"], node
        assert seen["verdict"] != "red" and seen["mark"] == "", (node, seen)
    another.screenshot(OUT / f"new_nodes_{'vue' if vue else 'canvas'}.png")
    assert another.problems == []


@pytest.mark.full
def test_vue_nodes_in_chinese(another):
    another.open({"Comfy.VueNodes.Enabled": True, "Comfy.Locale": "zh"})
    ids = build(another, ("base", "QT_LoadBaseModel", {"base_model": "tiny-flux"}),
                ("q", "QT_ApplyTransformerOverride", {"override": "tiny-mixed"}), q_model="base")
    node = another.page.locator(f'[data-node-id="{ids["q"]}"]')
    node.locator(".qt-badge[data-state=ready]").wait_for()
    assert "ModelOpt FP8" in node.inner_text() and "模拟" in node.inner_text() and "应用 Transformer 覆盖" in node.inner_text()
    assert "权重在内存中保持量化" in node.locator(".qt-verdict").get_attribute("title")
    node.get_by_role("combobox").first.click()  # as a user does
    option = another.page.get_by_role("option", name=QWEN, exact=True)
    another.page.get_by_role("option").first.hover()
    for _ in range(50):  # newer pages render only what of a long list is in view
        if option.count():
            break
        another.page.mouse.wheel(0, 100)
        another.page.wait_for_timeout(50)
    option.click()
    node.locator(".qt-badge[data-mark=mismatch]").wait_for()
    assert re.search("[\u4e00-\u9fff]{4}", node.locator(".qt-wrong").inner_text())
    another.screenshot(OUT / "vue_nodes.png")
    another.run("() => void app.extensionManager.command.execute('QuantizedTransformers.Doctor')")
    doctor = another.page.locator(".qt-dialog")
    doctor.get_by_text("设备类型").wait_for()
    assert "未量化：按 ComfyUI 自身的方式运行" in doctor.inner_text()
    another.screenshot(OUT / "doctor_in_chinese.png")
    assert another.problems == []


@pytest.mark.full
def test_a_widget_that_a_subgraph_shows_in_vue_nodes(another):
    another.open(IMAGES | {"Comfy.VueNodes.Enabled": True})

    def choose(holder):
        another.page.locator(f'[data-node-id="{holder}"]').get_by_role("combobox").click()
        another.page.get_by_role("option", selected=False).first.click()

    follows_the_subgraph(another, choose)
