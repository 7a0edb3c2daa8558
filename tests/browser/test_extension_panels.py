"""What the pack's JavaScript shows beside the graph in ComfyUI's real frontend: dialogs, the sidebar, settings."""

from __future__ import annotations

from collections import Counter

import pytest
from browser.extension import (
    BROKEN,
    HOSTILE,
    IMAGES,
    LORA,
    NODES,
    OUT,
    QWEN,
    WEIGHTS,
    badge,
    build,
    shown,
    sidebar,
    stored_formats,
)

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(extension_server):
    return extension_server


def test_download_then_the_badge(classic, server, hub):
    ids = build(classic, ("q", "QT_ApplyTransformerOverride", {"reference": "owner/hub-fp8"}))
    assert badge(classic, ids["q"], "missing")["text"][-1] == "Download" and not hub.log
    page = classic.page
    page.get_by_role("button", name="Download", exact=True).click()
    page.locator(".qt-dialog").get_by_text(WEIGHTS).wait_for()
    classic.screenshot(OUT / "download.png")
    page.keyboard.press("Escape")
    page.locator(".qt-dialog").wait_for(state="detached")
    assert not hub.asked_for(WEIGHTS), "Escape must not download"
    page.get_by_role("button", name="Download", exact=True).press("Enter")
    page.locator(".qt-dialog .qt-main").click()
    assert badge(classic, ids["q"])["text"][0] == "ModelOpt FP8"
    assert list((server.base / "hf").rglob(WEIGHTS)) and not classic.problems


def test_a_download_is_cancelled(classic, server, hub):
    hub.seconds_per_mb = 0.4
    ids = build(classic, ("base", "QT_LoadBaseModel", {"reference": "owner/big"}))
    badge(classic, ids["base"], "missing")
    classic.run("""() => { window.said = []
      const look = () => document.querySelectorAll('.qt-badge [role=status]').forEach((e) => said.push(e.textContent))
      new MutationObserver(look).observe(document.body, { subtree: true, childList: true }) }""")
    classic.page.locator(".qt-download").click()
    classic.page.locator(".qt-dialog .qt-main").click()
    badge(classic, ids["base"], "downloading")
    classic.page.wait_for_function("() => document.querySelector('.qt-badge progress')?.value > 0", timeout=20_000)
    said = classic.run("() => [...new Set(said)]")
    assert any(WEIGHTS in text for text in said) and not any("[" in text or text.startswith("0 B of 0") for text in said), said
    classic.page.locator(".qt-cancel").click()
    badge(classic, ids["base"], "missing")
    hub.seconds_per_mb = 0
    assert not list((server.base / "hf").rglob(f"*owner--big/snapshots/*/{WEIGHTS}"))
    assert not classic.problems


def test_a_download_is_followed_by_a_page_that_comes_later(classic, server, hub):
    hub.seconds_per_mb = 1
    chosen = ("base", "QT_LoadBaseModel", {"reference": "owner/big"})
    ids = build(classic, chosen)
    badge(classic, ids["base"], "missing")
    classic.page.locator(".qt-download").click()
    classic.page.locator(".qt-dialog .qt-main").click()
    badge(classic, ids["base"], "downloading")
    classic.open(IMAGES)
    ids = build(classic, chosen)
    badge(classic, ids["base"], "downloading")
    classic.page.locator(".qt-cancel").click()
    badge(classic, ids["base"], "missing")
    hub.seconds_per_mb = 0
    assert not list((server.base / "hf").rglob(f"*owner--big/snapshots/*/{WEIGHTS}")) and not classic.problems


def test_a_gated_repo_asks_for_its_licence(classic, hub):
    ids = build(classic, ("q", "QT_ApplyTransformerOverride", {"reference": "owner/gated"}))
    badge(classic, ids["q"], "missing")
    classic.page.locator(".qt-download").click()
    start = classic.page.locator(".qt-dialog .qt-main")
    assert start.is_disabled() and "huggingface.co/owner/gated" in classic.page.locator(".qt-licence").inner_text()
    classic.page.locator(".qt-licence input").check()
    start.click()
    page = classic.page
    page.get_by_role("alert").filter(has=page.get_by_text("Download failed", exact=True)).wait_for()
    badge(classic, ids["q"], "missing")


def test_the_sidebar_searches_and_filters(classic, server):
    browser = sidebar(classic)
    everything = shown(browser)
    assert {"tiny-flux", "tiny-mixed", HOSTILE, QWEN, "Qwen/Qwen-Image"} <= set(everything)
    browser.get_by_role("searchbox").fill("modelopt TINY")
    assert sorted(shown(browser)) == sorted([HOSTILE, "tiny-fp8", "tiny-mixed", "tiny-sharded"][1:]), shown(browser)
    browser.get_by_role("searchbox").fill("")
    browser.get_by_label("Architecture").select_option("Qwen-Image")
    assert QWEN in shown(browser) and "tiny-flux" not in shown(browser)
    browser.get_by_label("Architecture").select_option("")
    browser.get_by_label("Format").select_option("FP8")
    assert "tiny-mixed" in shown(browser) and "tiny-flux" not in shown(browser)
    browser.get_by_label("Format").select_option("")
    native = browser.get_by_role("checkbox", name="Runs natively here")
    native.check()
    assert "tiny-flux" in shown(browser) and "tiny-mixed" not in shown(browser), "no FP8 matmul on a CPU"
    native.uncheck()
    browser.get_by_role("checkbox", name="On disk").check()
    assert {"tiny-mixed", QWEN} <= set(shown(browser)) and "Qwen/Qwen-Image" not in shown(browser)
    browser.get_by_role("checkbox", name="On disk").uncheck()
    # a LoRA among the transformers is none of these nodes': grey, never "cannot run", and out of the way
    assert LORA not in shown(browser)
    browser.get_by_role("checkbox", name="Show files of other kinds").check()
    row = browser.locator(f'.qt-item[data-reference="{LORA}"]')
    assert row.locator(".qt-foreign").inner_text() == "other kind" and not row.locator(".qt-verdict").count()
    assert "this is a LoRA" in row.locator(".qt-add").get_attribute("title") and row.locator(".qt-add").is_disabled()
    broken = browser.locator(f'.qt-item[data-reference="{BROKEN}"] .qt-verdict')
    assert broken.get_attribute("data-verdict") == "red" and "header" in broken.get_attribute("title")
    classic.screenshot(OUT / "sidebar_other_kinds.png")
    browser.get_by_role("checkbox", name="Show files of other kinds").uncheck()
    assert shown(browser) == everything and classic.run("() => window.hit") is None


@pytest.mark.parametrize("vue", NODES)
def test_dragging_from_the_sidebar(another, vue):
    another.open(IMAGES | {"Comfy.VueNodes.Enabled": vue})
    ids = build(another, ("base", "QT_LoadBaseModel", {"base_model": "tiny-flux"}))
    sidebar(another)
    another.run("(id) => app.canvas.selectNode(app.graph.getNodeById(id))", ids["base"])
    another.page.drag_and_drop('.qt-item[data-reference="tiny-mixed"]', "#graph-canvas", target_position={"x": 1200, "y": 600})
    made = another.run("""(base) => { const node = app.graph.nodes.find((n) => n.type === 'QT_ApplyTransformerOverride')
      return { id: node.id, at: app.canvasPosToClientPos(node.pos), from: node.getInputNode(0)?.id, value: node.widgets[0].value } }""")
    assert made["from"] == ids["base"] and made["value"] == "tiny-mixed"
    assert made["at"] == pytest.approx([1200, 600], abs=12)
    assert badge(another, made["id"])["mark"] == ""
    another.screenshot(OUT / f"sidebar_drag_{'vue' if vue else 'canvas'}.png")
    # Enter does the same, beside what is selected
    another.page.locator('.qt-item[data-reference="tiny-flux"] .qt-add').press("Enter")
    nodes = another.run("() => app.graph.nodes.map((n) => [n.type, n.widgets[0].value])")
    assert nodes[-1] == ["QT_LoadBaseModel", "tiny-flux"] and len(nodes) == 3
    # and its details are those of what lies there
    another.page.locator('.qt-item[data-reference="tiny-mixed"] .qt-look').click()
    another.page.locator(".qt-map table").wait_for()
    another.page.keyboard.press("Escape")
    assert not another.problems


def test_the_layer_map(classic, tiny):
    browser = sidebar(classic)
    browser.locator('.qt-item[data-reference="tiny-mixed"] .qt-look').click()
    classic.page.locator(".qt-map table").wait_for()
    path, = tiny.mixed.glob("*.safetensors")
    cells = classic.page.eval_on_selector_all(".qt-map td[title]", "(cells) => cells.map((cell) => cell.title).filter(Boolean)")
    assert Counter(cell.rpartition(": ")[2] for cell in cells) == stored_formats(path)
    assert any(cell.startswith("transformer_blocks.1 attn.to_q:") for cell in cells)
    classic.screenshot(OUT / "layer_map.png")
    classic.page.keyboard.press("Escape")


def test_doctor_and_convert(classic, server):
    classic.run("() => void app.extensionManager.command.execute('QuantizedTransformers.Doctor')")
    dialog = classic.page.locator(".qt-dialog")
    dialog.locator(".qt-families").wait_for()
    device = server.get("/quantized_transformers/device")
    assert device["torch"] in dialog.inner_text() and all(row["family"] in dialog.inner_text() for row in device["families"])
    classic.page.keyboard.press("Escape")
    graph = {"version": 0.4, "last_node_id": 1, "last_link_id": 0, "links": [], "groups": [], "config": {}, "extra": {},
             "nodes": [{"id": 1, "type": "UnetLoaderGGUF", "pos": [0, 0], "size": [300, 60], "flags": {}, "order": 0, "mode": 0,
                        "outputs": [{"name": "MODEL", "type": "MODEL", "links": []}], "properties": {},
                        "widgets_values": ["flux1-dev-Q4_0.gguf"]},
                       {"id": 2, "type": "NunchakuFluxDiTLoader", "pos": [0, 200], "size": [300, 180], "flags": {}, "order": 1,
                        "mode": 0, "outputs": [{"name": "MODEL", "type": "MODEL", "links": []}], "properties": {},
                        "widgets_values": ["svdq-int4_r32-flux.1-dev.safetensors", 0, "nunchaku-fp16", "auto", 0, "auto",
                                           "enabled"]}]}
    classic.run("(graph) => app.loadGraphData(graph)", graph)
    classic.run("() => void app.extensionManager.command.execute('QuantizedTransformers.Convert')")
    dialog.locator("ul").first.wait_for()
    assert "NunchakuFluxDiTLoader" in dialog.inner_text() and "UnetLoaderGGUF" in dialog.inner_text()
    classic.page.keyboard.press("Escape")
    types = classic.run("() => app.graph.nodes.map((n) => n.type)")
    assert "QT_NunchakuSVDQLoader" in types and "NunchakuFluxDiTLoader" not in types


def test_settings_are_what_new_nodes_start_with(classic, server):
    found = classic.run("() => Object.values(app.extensionManager.setting.settings).filter((s) => s.id.startsWith('Quantized'))"
                        ".map(({ id, options }) => [id, options ?? null])")
    info = server.get("/object_info")
    ours = {"QuantizedTransformers.Compute": ("QT_ApplyTransformerOverride", "compute"),
            "QuantizedTransformers.SVDQBackend": ("QT_NunchakuSVDQLoader", "backend"),
            "QuantizedTransformers.FP4Backend": ("QT_ApplyTransformerOverride", "fp4_backend")}
    for name, (node, widget) in ours.items():
        assert dict(found)[name] == info[node]["input"]["optional"][widget][1]["options"]
    set_to = "(value) => app.extensionManager.setting.set('QuantizedTransformers.Compute', value)"
    classic.run(set_to, "dequantize")
    ids = build(classic, ("q", "QT_ApplyTransformerOverride", {}))
    value = "(id) => app.graph.getNodeById(id).widgets.find((w) => w.name === 'compute').value"
    assert classic.run(value, ids["q"]) == "dequantize"
    saved = classic.run("() => app.graph.serialize()")
    classic.run(set_to, "native")
    classic.run("(graph) => app.loadGraphData(graph)", saved)
    assert classic.run(value, ids["q"]) == "dequantize", "a saved workflow keeps its own"
    classic.run(set_to, "auto")
    classic.run("() => void app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    dialog = classic.page.get_by_role("dialog")
    dialog.get_by_text("Quantized Transformers", exact=True).first.click()
    dialog.locator(".qt-folder", has_text=str(server.base / "hf")).wait_for()
    classic.screenshot(OUT / "settings.png")
    dialog.get_by_text("About", exact=True).first.click()
    dialog.get_by_role("link", name="Quantized Transformers").wait_for()
    classic.page.keyboard.press("Escape")
