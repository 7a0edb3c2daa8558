"""The forms of a model, on a node and in the sidebar: one click puts another in its place."""

from __future__ import annotations

import pytest
from browser.extension import FLUX, FP8, IMAGES, NODES, OUT, SVDQ, badge, build, sidebar

pytestmark = pytest.mark.browser

# () -> {type: reference} of our loaders, and what the sampler's MODEL comes from
GRAPH = """() => {
  const ours = app.graph.nodes.filter((n) => n.type.startsWith('QT_'))
  const sampler = app.graph.nodes.find((n) => n.type === 'KSampler')
  const value = (n, name) => n.widgets.find((w) => w.name === name)?.value
  return { nodes: Object.fromEntries(ours.map((n) => [n.type, value(n, 'reference') || n.widgets[0].value])),
    weights: ours.map((n) => value(n, 'weights')).find((v) => v === 'load' || v === 'defer to override'),
    from: sampler.getInputNode(0)?.type, model: ours.map((n) => [n.type, n.getInputNode?.(0)?.type]) }
}"""


@pytest.fixture(scope="module")
def server(extension_server):
    return extension_server


def take(page, form: str) -> None:
    """Click on the button of the node's badge that has one, then on the form's."""
    page.page.locator(".qt-forms").last.click()
    page.page.locator(".qt-variants").wait_for()
    page.page.get_by_role("button", name=f"Take: {form}", exact=True).click()
    page.page.locator(".qt-dialog").wait_for(state="detached")


@pytest.mark.parametrize("vue", NODES)
def test_one_click_takes_another_form(another, vue):
    """A base, an override on it, and a loader that needs none, each in the place of each; the sampler keeps its MODEL."""
    another.open(IMAGES | {"Comfy.VueNodes.Enabled": vue})
    ids = build(another, ("base", "QT_LoadBaseModel", {"base_model": FLUX, "weights": "load"}), ("sample", "KSampler", {}),
                sample_model="base")
    badge(another, ids["base"])
    another.page.locator(".qt-forms").click()
    another.page.locator(".qt-variants").wait_for()
    text = another.page.locator(".qt-dialog").inner_text()
    assert "Forms of FLUX.1 dev" in text and "emulated" in text and "fits" in text
    there = [row.get_by_role("rowheader").inner_text() for row in another.page.locator(".qt-variants tr", has_text="on disk").all()]
    assert sorted(there) == ["BF16", "FP8, ModelOpt", "SVDQuant INT4, rank 32"]  # the repo's other files are not here
    another.screenshot(OUT / f"variants_{'vue' if vue else 'canvas'}.png")
    another.page.get_by_role("button", name="Take: FP8, ModelOpt", exact=True).click()
    chain = {"nodes": {"QT_LoadBaseModel": FLUX, "QT_ApplyTransformerOverride": FP8}, "weights": "defer to override",
             "from": "QT_ApplyTransformerOverride"}
    whole = {"nodes": {"QT_LoadBaseModel": FLUX}, "weights": "load", "from": "QT_LoadBaseModel"}
    single = {"nodes": {"QT_NunchakuSVDQLoader": SVDQ}, "weights": None, "from": "QT_NunchakuSVDQLoader"}

    def is_now(wanted: dict) -> None:
        found = another.run(GRAPH)
        assert {key: found[key] for key in wanted} == wanted, found
        if wanted is chain:
            assert ["QT_ApplyTransformerOverride", "QT_LoadBaseModel"] in found["model"]

    is_now(chain)
    for form, wanted in (("SVDQuant INT4, rank 32", single), ("FP8, ModelOpt", chain), ("BF16", whole),
                         ("SVDQuant INT4, rank 32", single), ("BF16", whole), ("FP8, ModelOpt", chain)):
        another.page.wait_for_function("() => document.querySelector('.qt-forms')")
        take(another, form)
        is_now(wanted)
    assert not another.problems


def test_forms_from_the_sidebar(classic):
    build(classic)
    sidebar(classic).locator(f'.qt-item[data-reference="{FP8}"] .qt-look').click()
    classic.page.get_by_role("button", name="Forms of FLUX.1 dev").click()
    classic.page.get_by_role("button", name="Take: SVDQuant INT4, rank 32", exact=True).click()
    made, = classic.run("() => app.graph.nodes.map((n) => [n.type, n.widgets.find((w) => w.name === 'rank').value])")
    assert made == ["QT_NunchakuSVDQLoader", 32] and not classic.problems
