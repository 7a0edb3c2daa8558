"""Which nodes ComfyUI's real search box offers for what people call these files.

The page puts nodes first whose name or id has the words, and ranks those that are found by an alias behind: among them,
ComfyUI's own come first wherever its fuzzy search takes their names for a match.
"""

from __future__ import annotations

import pytest
from browser.extension import NODES

pytestmark = pytest.mark.browser

LOAD, OVERRIDE, SVDQ, SLIM = "QT_LoadBaseModel", "QT_ApplyTransformerOverride", "QT_NunchakuSVDQLoader", "QT_ModelSlimLoader"
WORDS = {
    "fp8": LOAD, "nvfp4": LOAD, "quantized": LOAD, "gguf": LOAD, "awq": LOAD, "gptq": LOAD, "bitsandbytes": LOAD, "nf4": LOAD,
    "compressed-tensors": LOAD, "gguf loader": LOAD, "load gguf": LOAD, "unet loader": LOAD, "diffusion model": LOAD,
    "svdq": SVDQ, "svdquant": SVDQ, "nunchaku": SVDQ, "int4": SVDQ, "modelslim": SLIM, "w8a8": SLIM, "mxfp8": SLIM}
# Where names of ComfyUI's nodes are a fuzzy match: how many of them, with those that have the words, may come before.
FUZZY = {"int4": 10, "quantized": 2, "gguf": 2, "unet loader": 2}
IDS = "() => Object.fromEntries(Object.entries(LiteGraph.registered_node_types).map(([id, type]) => [type.title, id]))"


def said(words: str, title: str, name: str) -> bool:
    """Whether a node's title or id has all the words."""
    return any(all(word in text.lower() for word in words.split()) for text in (title, name))


@pytest.fixture(scope="module", params=NODES)
def box(frontend, request):
    frontend.open({"Comfy.VueNodes.Enabled": request.param})
    frontend.run("() => app.graph.clear()")
    box = frontend.page.get_by_role("combobox", name="Add a node...")
    for _ in range(10):  # a page that has just opened may not listen yet
        frontend.page.locator("#graph-canvas").dblclick(position={"x": 900, "y": 500})
        for _ in range(30):
            if box.is_visible():
                return box
            frontend.page.wait_for_timeout(100)
    raise TimeoutError("the search box does not open")


@pytest.mark.parametrize("words", WORDS)
def test_the_loader_is_found(frontend, box, words):
    box.fill("a word that no node has")
    results = frontend.page.get_by_test_id("result-item")
    results.first.wait_for(state="detached")
    box.fill(words)
    results.first.wait_for()
    titles = [text.splitlines()[0] for text in results.all_inner_texts()]
    ids = frontend.run(IDS)
    names = [ids.get(title, title) for title in titles]
    at = names.index(WORDS[words])
    strangers = [(title, name) for title, name in zip(titles[:at], names[:at], strict=True)
                 if not said(words, title, name)]
    assert not [title for title, name in strangers if name.startswith("QT_")], titles
    assert len(strangers) <= FUZZY.get(words, 0), titles
    assert at <= 10, "on the first screen"
    others = [loader for loader in (LOAD, OVERRIDE, SVDQ, SLIM) if loader in names[:at]]
    assert not others, titles


def test_enter_puts_the_first_one_into_the_graph(frontend, box):
    box.fill("nunchaku")
    frontend.page.get_by_test_id("result-item").filter(has_text="Nunchaku SVDQ Loader").first.wait_for()
    box.press("Enter")
    box.wait_for(state="detached")
    assert frontend.run("() => app.graph.nodes.map((node) => node.type)") == [SVDQ] and not frontend.problems
