"""What test_extension*.py do with the page, and checkpoints of full size without bytes."""

from __future__ import annotations

import json
import math
import struct
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support import gguf_files, host_models, packed, svdquant_tables
from support.browser import Frontend
from support.common import save
from support.pack import PACK
from support.server import Server, outputs
from support.workflow import apply_override, load_base, text_to_image

FLUX, FP8 = "black-forest-labs/FLUX.1-dev", "lmsys/flux1-dev-modelopt-fp8-sglang-transformer"
QWEN, SVDQ = "nunchaku-tech/nunchaku-qwen-image", "nunchaku-tech/nunchaku-flux.1-dev"
SLIM = "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8"  # not on this machine
WHOLE = "wan-vace-all-in-one.safetensors"
GGUF, GPTQ = "tiny-Q8_0.gguf", "tiny-gptq"
LORA, BROKEN = "style.safetensors", "cut.safetensors"  # a name that does not say it
WEIGHTS = "diffusion_pytorch_model.safetensors"
OUT = PACK / "output" / "browser"
HOSTILE = "<img src=x onerror=window.hit=1>"
# Of tests in both kinds of nodes, one is for every run.
NODES = [pytest.param(False, id="canvas", marks=pytest.mark.full), pytest.param(True, id="Vue nodes")]
IMAGES = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en",
          "QuantizedTransformers.OfferDownloads": False}

# ({nodes: [[key, type, {widget: value}]], links: {key_input: source key}}) -> {key: id}. Two columns, from left to right.
BUILD = """async ({ nodes, links }) => {
  await app.loadGraphData({ id: crypto.randomUUID(), revision: 0, last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [],
    config: {}, extra: {}, version: 0.4 })
  app.canvas.ds.scale = 1
  app.canvas.ds.offset = [0, 0]
  const made = {}
  const heights = [80, 80, 80]
  for (const [i, [key, type, widgets]] of nodes.entries()) {
    const node = made[key] = LiteGraph.createNode(type)
    const column = nodes.length > 4 ? i % 3 : i % 2
    app.graph.add(node)
    node.setSize([Math.max(node.size[0], 380), node.size[1]])
    node.pos = [480 + column * 440, heights[column]]
    heights[column] += node.size[1] + 70
    for (const [name, value] of Object.entries(widgets)) {
      const widget = node.widgets.find((w) => w.name === name)
      widget.value = value
      widget.callback?.(value)
    }
  }
  for (const [target, source] of Object.entries(links)) {
    const [key, input] = target.split('_')
    made[source].connect(0, made[key], Math.max(made[key].inputs.findIndex((i) => i.name === input), 0))
  }
  await new Promise(requestAnimationFrame)
  return Object.fromEntries(Object.entries(made).map(([key, node]) => [key, node.id]))
}"""
# (node id) -> what its badge shows
BADGE = """(id) => {
  const badge = app.graph.getNodeById(id)?.widgets.find((w) => w.name === 'checkpoint_info')?.element
  if (!badge) return null
  const { state, mark } = badge.dataset
  const texts = [...badge.querySelectorAll('b, span, small, button:not(.qt-bar), div.qt-wrong')]
  return { state, mark, title: badge.title, text: texts.map((e) => e.textContent), verdict: badge.querySelector('.qt-verdict')?.dataset.verdict,
    bar: [...badge.querySelectorAll('.qt-bar i')].map((part, i) => ({ grow: Number(part.style.flexGrow), colour: part.style.backgroundColor,
      format: badge.querySelector('small')?.textContent.split(', ')[i].replace(/^\\d+ /, '') })) }
}"""
# ([node id, widget, value]): as both renderers do when a user chooses
CHOOSE = """([id, name, value]) => {
  const widget = app.graph.getNodeById(id).widgets.find((w) => w.name === name)
  widget.value = value
  widget.callback(value)
}"""
# ([node id, widget, value]) -> milliseconds from the change of the widget to the badge of that value in the document
TIMED = """async ([id, name, value]) => {
  const node = app.graph.getNodeById(id), widget = node.widgets.find((w) => w.name === name)
  const badge = node.widgets.at(-1).element, title = value.split('/').at(-1)
  if (!badge.isConnected) throw new Error('the badge is not in the document')
  const shown = new Promise((done) => {
    const look = new MutationObserver(() => {
      if (badge.dataset.state !== 'ready' || !badge.title.startsWith(title)) return
      look.disconnect()
      done(performance.now())
    })
    look.observe(badge, { subtree: true, childList: true, attributes: true })
  })
  const start = performance.now()
  widget.value = value
  widget.callback(value)
  return await shown - start
}"""
# (a graph of one subgraph's node) -> the ids of that node and of Apply Transformer Override inside
LOAD_SUBGRAPH = """async (graph) => {
  await app.loadGraphData(graph)
  app.canvas.ds.scale = 1
  const [holder] = app.graph.nodes
  app.canvas.ds.offset = [500 - holder.pos[0], 200 - holder.pos[1]]
  app.canvas.setDirty(true, true)
  await new Promise((done) => setTimeout(done, 300))
  return [holder.id, holder.subgraph.nodes.find((node) => node.type === 'QT_ApplyTransformerOverride').id]
}"""
# ([node id, widget]) -> where the page shows the arrow at the widget's right end, which takes the next choice
ARROW = """([id, name]) => {
  const node = app.graph.getNodeById(id), widget = node.widgets.find((w) => w.name === name)
  return app.canvasPosToClientPos([node.pos[0] + node.size[0] - 25, node.pos[1] + widget.y + 10])
}"""
# (names of formats) -> the colours that badges have for them
COLOURS = """async (names) => {
  const { colour } = await import('/extensions/quantized-transformers/src/known.js')
  return Object.fromEntries(names.map((name) => [name, colour(name)]))
}"""


def colour_of(name: str) -> str:
    """The CSS colour of a format in Inspect Checkpoint's picture, as the browser writes it."""
    from quantized_transformers.views.layer_map import format_colours

    return "rgb({}, {}, {})".format(*format_colours()[name])


def sparse(path: Path, shapes: Mapping[str, Sequence[int]], fp8: Sequence[str] = ()) -> None:
    """A safetensors file of these BF16 tensors whose bytes are a hole; weights whose names hold one of `fp8` are FP8, with
    two scales."""
    header, at = {}, 0

    def add(name: str, dtype: str, width: int, shape: Sequence[int]) -> None:
        nonlocal at
        end = at + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end

    for name, shape in shapes.items():
        quantized = name.endswith(".weight") and len(shape) == 2 and any(part in name for part in fp8)
        add(name, "F8_E4M3" if quantized else "BF16", 1 if quantized else 2, shape)
        if quantized:
            add(f"{name}_scale", "F32", 4, ())
            add(name.removesuffix("weight") + "input_scale", "F32", 4, ())
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def full_size(models: Path) -> None:
    """FLUX.1-dev in BF16, in ModelOpt's FP8 and as SVDQuant, and Qwen-Image as SVDQuant: headers of the real sizes."""
    import torch
    from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel

    with torch.device("meta"):
        flux, qwen = FluxTransformer2DModel(guidance_embeds=True), QwenImageTransformer2DModel()
    flux_shapes, qwen_shapes = ({name: tuple(t.shape) for name, t in net.state_dict().items()} for net in (flux, qwen))
    for folder, names in ((models / FLUX / "transformer", ()), (models / FP8, ("attn.to_", "attn.add_", "proj_mlp"))):
        folder.mkdir(parents=True)
        sparse(folder / WEIGHTS, flux_shapes, names)
        flux.save_config(folder)
    config = json.loads((models / FP8 / "config.json").read_text(encoding="utf-8"))
    quantization = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (models / FP8 / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}), encoding="utf-8")
    (models / FLUX / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    for repo, shapes, table, rename, name in (
            (SVDQ, flux_shapes, svdquant_tables.flux_table(19, 38, 3072), svdquant_tables.flux_plain, "flux.1-dev"),
            (QWEN, qwen_shapes, svdquant_tables.qwen_table(60), lambda name: name, "qwen-image")):
        (models / repo).mkdir(parents=True)
        svdquant_tables.header_only(models / repo / f"svdq-int4_r32-{name}.safetensors", shapes, table, "int4", 32, rename,
                                    legacy=repo == SVDQ)


def whole_checkpoint(folder: Path) -> None:
    """An all-in-one file of a model that only ComfyUI knows, in its first scaled FP8."""
    made = host_models.make("Wan VACE")
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in made.items()}
    for name, tensor in made.items():
        if "blocks." in name and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = scale
    beside = {"vae.decoder.conv_in.weight": torch.ones(8, 8, 3, 3, dtype=torch.float16),
              "text_encoders.umt5xxl.transformer.shared.weight": torch.ones(64, 8, dtype=torch.bfloat16)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()} | beside, folder / WHOLE)


def other_tools(models: Path, transformer: Path) -> None:
    """A FLUX.1 in diffusers' folder as a GGUF file, and packed as GPTQ's tools pack it."""
    tensors = {name: tensor for file in transformer.glob("*.safetensors") for name, tensor in load_file(file).items()}
    (models / "diffusion_models").mkdir(exist_ok=True)
    gguf_files.write(models / "diffusion_models" / GGUF, gguf_files.packed(tensors, "Q8_0")[0])
    made = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.ndim == 2 and "blocks" in name:
            leaves, _ = packed.gptq(made.pop(name).float(), size=64)
            made |= {name.replace("weight", leaf): part for leaf, part in leaves.items()}
    config = json.loads((transformer / "config.json").read_text(encoding="utf-8"))
    save(models / "diffusers" / GPTQ, made, {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})


def strangers(folder: Path) -> None:
    """A LoRA among the transformers, and a file that was cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 64),
               "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(64, 4)}, folder / LORA)
    (folder / BROKEN).write_bytes((folder / LORA).read_bytes()[:-8])


def build(frontend: Frontend, *nodes: tuple[str, str, dict[str, Any]], **links: str) -> dict[str, int]:
    """A new graph of (key, type, widget values); links are target_input="source". Returns node ids by key."""
    return frontend.run(BUILD, {"nodes": nodes, "links": links})


def badge(frontend: Frontend, node: int, state: str = "ready") -> dict[str, Any]:
    """What a node's badge says, once it is in one of these states: {state, mark, title, text, verdict, bar}."""
    frontend.page.wait_for_function(f"({BADGE})({json.dumps(node)})?.state === {json.dumps(state)}", timeout=20_000)
    return frontend.run(BADGE, node)


def wait_for(frontend: Frontend, node: int, **wanted: str) -> None:
    """Wait until a badge has these values."""
    frontend.page.wait_for_function(
        f"([id, wanted]) => {{ const b = ({BADGE})(id); return b && Object.entries(wanted).every(([k, v]) => b[k] === v) }}",
        arg=[node, wanted], timeout=20_000)


def wait_inside(frontend: Frontend, node: int, reference: str, mark: str | None = None) -> None:
    """Wait until the badge of a node in the first subgraph is about `reference`, and has this mark."""
    frontend.page.wait_for_function("""([id, title, mark]) => {
      const [subgraph] = app.rootGraph.subgraphs.values()
      const { element } = subgraph.getNodeById(id).widgets.find((w) => w.name === 'checkpoint_info')
      return element.title.startsWith(title) && (mark === null || element.dataset.mark === mark)
    }""", arg=[node, reference.rpartition("/")[2], mark], timeout=10_000)


def next_choice(frontend: Frontend, node: int, widget: str) -> None:
    """Click on a widget's arrow on the classic canvas, which wants to have seen the pointer come."""
    x, y = frontend.run(ARROW, [node, widget])
    frontend.page.mouse.move(x - 5, y)
    frontend.page.mouse.click(x, y)


def stored_formats(path: Path) -> Counter[str]:
    """Linear layers of a checkpoint by the dtype of their weight, read with safetensors itself."""
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys() if name.endswith(".weight")}  # noqa: SIM118
        return Counter({"F8_E4M3": "FP8"}.get(part.get_dtype(), part.get_dtype())
                       for part in slices.values() if len(part.get_shape()) == 2)


def sidebar(frontend: Frontend) -> Any:
    """The open checkpoint browser, with everything described."""
    if not frontend.page.locator(".qt-browser").count():
        frontend.page.locator(".side-bar-button", has_text="Quantized").click()
    frontend.page.wait_for_function("() => / of /.test(document.querySelector('.qt-status')?.textContent)")
    return frontend.page.locator(".qt-browser")


def shown(browser: Any) -> list[str]:
    """The references that it lists."""
    return browser.page.eval_on_selector_all(".qt-item", "(items) => items.map((item) => item.dataset.reference)")


def picture(seed: int) -> dict[str, Any]:
    """A prompt from a tiny base and its FP8 override to a picture."""
    return {"1": load_base("", "defer to override", base_model="tiny-flux"),
            "2": apply_override(["1", 0], "", override="tiny-fp8"), **text_to_image(["2", 0], "p", seed=seed, steps=1, size=64)}


def press_run(frontend: Frontend) -> None:
    """Press Run until the page sends the prompt, as a user does: while it draws a graph that was just loaded, the page
    loses a click on its button (and a key) now and then."""
    from playwright.sync_api import TimeoutError as NothingSent

    for _ in range(3):
        try:
            with frontend.page.expect_request(  # without its websocket the page asks GET /prompt every second
                    lambda request: request.method == "POST" and request.url.endswith("/prompt"), timeout=8_000):
                frontend.page.get_by_test_id("queue-button").click()
            return
        except NothingSent:
            continue
    raise AssertionError("the page sent no prompt, three times")


def run_in_page(frontend: Frontend, server: Server, seed: int) -> list[Path]:
    """Load a prompt as a graph, press Run, and wait for its picture."""
    frontend.run("(prompt) => app.loadApiJson(prompt, 'picture')", picture(seed))
    return run(frontend, server)


def run(frontend: Frontend, server: Server) -> list[Path]:
    """Press Run, and wait for the picture."""
    before = set(server.get("/history"))
    press_run(frontend)
    deadline = time.time() + 60
    while time.time() < deadline:
        done = {key: entry for key, entry in server.get("/history").items() if key not in before}
        if done:
            entry, = done.values()
            assert entry["status"]["status_str"] == "success", entry["status"]
            return outputs(server, entry, "images")
        time.sleep(0.05)
    raise TimeoutError(server.text()[-2000:])
