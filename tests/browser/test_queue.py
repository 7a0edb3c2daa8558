"""Run, pressed on a workflow that would fail: every node that is wrong is marked at once, on the canvas and in Vue nodes,
and says why in the page's language."""

from __future__ import annotations

import pytest
from browser.extension import FP8, IMAGES, OUT, QWEN, press_run

from support.workflow import apply_override, load_base, text_to_image

pytestmark = pytest.mark.browser

MARKED = """() => Object.fromEntries(Object.entries(app.lastNodeErrors ?? {}).map(([id, { errors }]) =>
  [id, { mark: app.graph.getNodeById(id).has_errors, code: /code: (\\w+)$/.exec(errors[0].details)?.[1],
         chinese: /[\\u4e00-\\u9fff]{4}[^]*\\n +解决方法：/.test(errors[0].details) }]))"""


@pytest.fixture(scope="module")
def server(extension_server):
    return extension_server


@pytest.mark.parametrize("vue, language", [pytest.param(False, "en", id="canvas"),
                                           pytest.param(True, "en", id="Vue nodes", marks=pytest.mark.full),
                                           pytest.param(False, "zh", id="canvas in Chinese", marks=pytest.mark.full)])
def test_every_wrong_node_is_marked(another, vue, language):
    another.open(IMAGES | {"Comfy.VueNodes.Enabled": vue, "Comfy.Locale": language})
    prompt = {"1": load_base("tiny-flux"), "2": apply_override(["1", 0], QWEN), **text_to_image(["2", 0], "1"),
              "3": load_base("somebody/something"), **text_to_image(["3", 0], "2"),
              "4": {"class_type": "QT_LoadBaseVAE", "inputs": {"reference": FP8}},
              "5": {"class_type": "VAEDecode", "inputs": {"vae": ["4", 0], "samples": ["1empty", 0]}},
              "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}}}
    another.run("(prompt) => app.loadApiJson(prompt, 'wrong')", prompt)
    press_run(another)
    another.page.wait_for_function("() => Object.keys(app.lastNodeErrors ?? {}).length")
    another.page.wait_for_timeout(300)
    another.screenshot(OUT / f"queue_{'vue' if vue else 'canvas'}_{language}.png")
    types = another.run("() => Object.fromEntries(Object.keys(app.lastNodeErrors).map((id) => [id, app.graph.getNodeById(id).type]))")
    marked = {types[node]: found for node, found in another.run(MARKED).items()}
    codes = {"QT_ApplyTransformerOverride": "does_not_fit", "QT_LoadBaseModel": "missing", "QT_LoadBaseVAE": "missing"}
    assert marked == {node: {"mark": True, "code": code, "chinese": language == "zh"} for node, code in codes.items()}
