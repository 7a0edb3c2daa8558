"""Everything that a workflow lacks, in one dialog: from an installation without models to a picture in two clicks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from browser.extension import IMAGES, NODES, OUT, WEIGHTS, badge, build, run, sidebar

from quantized_transformers.loaders.words import size
from support.workflow import apply_override, load_base, text_to_image

pytestmark = pytest.mark.browser

BASE, LICENSED, BIG = "owner/hub-base", "owner/licensed", "owner/big"
# (prompt) -> loads it as a graph, as one that was shared
OPEN = """async (prompt) => {
  await app.loadApiJson(prompt, 'shared')
  const graph = app.graph.serialize()
  sessionStorage.clear()
  return app.loadGraphData(graph)
}"""


@pytest.fixture(scope="module")
def server(extension_server):
    return extension_server


@pytest.fixture
def empty(another, server, hub):
    """A page that offers downloads, on a server that has none of them."""
    hub.log.clear()
    for path in (server.base / "hf" / "hub", server.base / "models" / "diffusers_components"):
        shutil.rmtree(path, ignore_errors=True)
    return another


def offering(page_of, **settings):
    page_of.open({**IMAGES, "QuantizedTransformers.OfferDownloads": True, "QuantizedTransformers.DownloadTo": "cache",
                  "QuantizedTransformers.Hub": "auto", **settings})
    return page_of.page.locator(".qt-dialog")


def kept(server, repo: str = "owner/*") -> list[Path]:
    """Files of a repo in the cache, begun or whole."""
    return [path for path in server.base.rglob(f"models--{repo.replace('/', '--')}/**/*") if path.is_file()]


def shared(*, seed: int = 1) -> dict:
    return {"1": load_base(BASE, "defer to override"), "2": apply_override(["1", 0], LICENSED),
            **text_to_image(["2", 0], "p", seed=seed, steps=1, size=64)}


@pytest.mark.parametrize("vue,target", [pytest.param(False, "cache", id="canvas", marks=pytest.mark.full),
                                        pytest.param(True, "models", id="Vue nodes")])
def test_two_clicks_and_a_licence(empty, server, hub, vue, target):
    dialog = offering(empty, **{"Comfy.VueNodes.Enabled": vue})
    empty.run("() => { window.clicks = 0; addEventListener('click', (e) => { clicks += e.isTrusted }, true) }")
    empty.run(OPEN, shared(seed=10 + vue))
    dialog.get_by_text(LICENSED, exact=True).wait_for()
    start = dialog.locator(".qt-main")
    text = dialog.inner_text()
    config = len(hub.repos[BASE].files["transformer/config.json"]) + len(hub.repos[BASE].files["model_index.json"])
    assert size(config) in text and "Free space" in text and "huggingface.co/owner/licensed" in text
    assert not kept(server)  # asked, and nothing kept
    if target == "models":
        dialog.locator(".qt-target select").select_option("models")
        dialog.get_by_text(str(server.base / "models" / "diffusers_components" / "owner" / "licensed")).wait_for()
    assert start.is_disabled()
    dialog.locator(".qt-licence input").check()
    empty.screenshot(OUT / f"missing_{target}.png")
    before = empty.run("() => clicks")
    start.click()
    dialog.wait_for(state="detached")
    empty.page.get_by_role("alert").filter(has_text="press Run").wait_for(timeout=30_000)
    assert run(empty, server)
    assert empty.run("() => clicks") - before == 2  # beside the choice of the place and the licence
    root = server.base / ("hf/hub" if target == "cache" else "models/diffusers_components")
    place = "models--owner--licensed" if target == "cache" else "owner/licensed"
    assert list((root / place).rglob(WEIGHTS)) and not empty.problems


def test_one_progress_with_cancel_and_hide(empty, server, hub):
    """Hidden, it goes on on the nodes; opened once, it is not offered again; what is left out is not fetched."""
    dialog = offering(empty)
    hub.seconds_per_mb = 0.4
    try:
        prompt = {"1": load_base(BIG), "2": load_base(BASE, "defer to override"), **text_to_image(["1", 0], "a"),
                  **text_to_image(["2", 0], "b")}
        empty.run(OPEN, prompt)
        dialog.get_by_text(BASE, exact=True).wait_for()
        asked = dialog.locator(".qt-main").inner_text()
        dialog.locator(".qt-rows li", has_text=BASE).get_by_role("checkbox").uncheck()
        assert dialog.locator(".qt-main").inner_text() == asked == "Download 24.00 MB"
        dialog.locator(".qt-main").click()
        dialog.locator("progress").wait_for()
        empty.page.wait_for_function("() => document.querySelector('.qt-dialog progress').value > 0", timeout=20_000)
        empty.screenshot(OUT / "missing_progress.png")
        empty.page.keyboard.press("Escape")
        dialog.wait_for(state="detached")
        ids = empty.run("() => Object.fromEntries(app.graph.nodes.map((n) => [n.widgets?.find((w) => w.name === 'reference')?.value, n.id]))")
        badge(empty, ids[BIG], "downloading")
        badge(empty, ids[BASE], "missing")
        empty.page.locator(".qt-cancel").click()
        badge(empty, ids[BIG], "missing")
    finally:
        hub.seconds_per_mb = 0
    assert kept(server, BIG) and not kept(server, BASE)
    graph = empty.run("() => app.graph.serialize()")
    empty.run("(graph) => app.loadGraphData(graph)", graph)
    badge(empty, ids[BIG], "missing")
    empty.page.wait_for_timeout(300)
    assert not dialog.count()
    empty.run("() => void app.extensionManager.command.execute('QuantizedTransformers.Download')")
    dialog.get_by_text(BIG, exact=True).wait_for()
    dialog.get_by_text(BASE, exact=True).wait_for()
    empty.page.keyboard.press("Escape")
    assert not empty.problems


@pytest.mark.parametrize("vue", NODES)
def test_from_a_badge_a_row_and_the_details(empty, vue):
    dialog = offering(empty, **{"QuantizedTransformers.OfferDownloads": False, "Comfy.VueNodes.Enabled": vue})
    ids = build(empty, ("base", "QT_LoadBaseModel", {"reference": BASE, "weights": "defer to override"}),
                ("q", "QT_ApplyTransformerOverride", {"reference": "owner/hub-fp8"}),
                ("none", "QT_LoadBaseModel", {"reference": "owner/nothing"}), q_model="base")
    for key in ids:
        badge(empty, ids[key], "missing")
    assert not dialog.count()  # switched off
    empty.page.locator(".qt-download").first.click()
    dialog.get_by_text(BASE, exact=True).wait_for()
    assert not dialog.get_by_text("owner/hub-fp8", exact=True).count()
    dialog.get_by_role("button", name="Everything missing (3)").click()
    dialog.get_by_text("owner/hub-fp8", exact=True).wait_for()
    assert "no repo owner/nothing" in dialog.get_by_role("alert").inner_text()
    dialog.locator(".qt-main").click()
    badge(empty, ids["base"])
    assert badge(empty, ids["q"])["text"][0] == "ModelOpt FP8"
    badge(empty, ids["none"], "missing")
    known = "lmsys/flux1-dev-modelopt-nvfp4-sglang-transformer"
    row = sidebar(empty).locator(f'.qt-item[data-reference="{known}"]')
    row.locator(".qt-get").click()
    dialog.get_by_text(f"there is no repo {known}", exact=False).wait_for()  # not on this hub
    empty.page.keyboard.press("Escape")
    row.locator(".qt-look").click()
    dialog.get_by_role("button", name="Download").click()
    dialog.get_by_text(f"there is no repo {known}", exact=False).wait_for()
    assert dialog.locator(".qt-main").is_disabled()
    empty.page.keyboard.press("Escape")
    assert not empty.problems


@pytest.mark.parametrize("vue", NODES)
def test_from_modelscope(empty, server, scope, vue):
    """By a pasted address, and a plain repo id by the hub that the dialog is set to."""
    shutil.rmtree(server.base / "modelscope", ignore_errors=True)
    dialog = offering(empty, **{"Comfy.VueNodes.Enabled": vue})
    prompt = {"1": apply_override(["3", 0], "https://modelscope.cn/models/owner/only-there"), "3": load_base("tiny-flux"),
              "4": apply_override(["1", 0], "owner/another"), **text_to_image(["4", 0], "a")}
    empty.run(OPEN, prompt)
    dialog.get_by_text("owner/only-there", exact=True).wait_for()
    row = dialog.locator(".qt-rows li")
    assert "ModelScope" in row.filter(has_text="owner/only-there").inner_text()
    assert "no repo owner/another" in row.filter(has_text="owner/another").inner_text()
    dialog.locator(".qt-hub select").select_option("modelscope")
    dialog.get_by_text("no repo owner/another").wait_for(state="detached")
    empty.screenshot(OUT / f"missing_modelscope_{'vue' if vue else 'canvas'}.png")
    dialog.locator(".qt-main").click()
    empty.page.get_by_role("alert").filter(has_text="press Run").wait_for(timeout=30_000)
    found = [str(path) for path in (server.base / "modelscope").rglob("*.safetensors")]
    assert all(any(name in path for path in found) for name in ("only-there", "another")) and not list((server.base / "hf").rglob("*another*/snapshots"))
    assert not empty.problems


def test_a_shared_nunchaku_workflow_is_converted_and_offered(empty):
    """Its file is named without a repo: the offer comes when the list of changes was read."""
    name = "svdq-int4_r32-flux.1-krea-dev.safetensors"
    dialog = offering(empty)
    node = {"id": 1, "type": "NunchakuFluxDiTLoader", "pos": [500, 200], "size": [300, 180], "flags": {}, "order": 0, "mode": 0,
            "outputs": [{"name": "MODEL", "type": "MODEL", "links": []}], "properties": {},
            "widgets_values": [f"flux\\{name}", 0, "nunchaku-fp16", "auto", 0, "bfloat16", "enabled"]}
    empty.run("""(node) => { sessionStorage.clear(); return app.loadGraphData({ version: 0.4, last_node_id: 1, last_link_id: 0,
      links: [], groups: [], config: {}, extra: {}, nodes: [node] }) }""", node)
    empty.run("() => void app.extensionManager.command.execute('QuantizedTransformers.Convert')")
    dialog.get_by_text("Converted", exact=False).wait_for()
    empty.page.keyboard.press("Escape")
    dialog.get_by_text("nunchaku-tech/nunchaku-flux.1-krea-dev", exact=True).wait_for()
    assert name in dialog.inner_text() and dialog.locator(".qt-main").inner_text() == "Download 2.0 kB"
    empty.screenshot(OUT / "missing_converted.png")
    empty.page.keyboard.press("Escape")
    assert not [problem for problem in empty.problems if "api.comfy.org" not in problem]  # what the other pack's node is
