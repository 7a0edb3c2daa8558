"""The real ComfyUI server, spoken to as a headless service would: no browser, no JavaScript."""

from __future__ import annotations

import json
import shutil
import time
from importlib.metadata import version

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from support import flux
from support.server import Server, error_of, outputs
from support.workflow import apply_override, load_base, text_to_image

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    base = tmp_path_factory.mktemp("server")
    folder = base / "models" / "diffusers"
    shutil.copytree(tiny.pipeline, folder / "tiny-flux")
    shutil.copytree(tiny.fp8, folder / "tiny-flux-fp8")
    shutil.copytree(tiny.sharded, folder / "tiny flux sharded")
    (base / "models" / "loras").mkdir()
    g = torch.Generator().manual_seed(1)
    save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.randn(8, 256, generator=g),
               "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.randn(256, 8, generator=g)},
              str(base / "models" / "loras" / "tiny.safetensors"))
    with Server(base) as running:
        yield running


CONTRACT = {
    "QT_LoadBaseModel": ("Load Base Model", [],
                         ["base_model", "component", "weights", "reference", "dtype", "revision", "download_missing",
                          "byte_order"], ["MODEL", "STRING"]),
    "QT_ApplyTransformerOverride": (
        "Apply Transformer Override", ["model"],
        ["override", "kind", "reference", "weights_name", "compute", "fp4_backend", "revision", "download_missing", "byte_order"],
        ["MODEL", "STRING"]),
    "QT_InspectCheckpoint": ("Inspect Checkpoint", [], ["checkpoint", "reference", "weights_name"], ["STRING", "IMAGE"]),
}
CHOICES = {
    ("QT_LoadBaseModel", "component"): (["transformer", "transformer_2"], "transformer"),
    ("QT_LoadBaseModel", "weights"): (["load", "defer to override"], "load"),
    ("QT_LoadBaseModel", "dtype"): (["default", "bf16", "fp16", "fp32"], "default"),
    ("QT_ApplyTransformerOverride", "kind"): (["auto", "component", "weights"], "auto"),
    ("QT_ApplyTransformerOverride", "compute"): (["auto", "native", "dequantize"], "auto"),
    ("QT_ApplyTransformerOverride", "fp4_backend"): (
        ["auto", "comfy_kitchen", "flashinfer_cudnn", "flashinfer_cutlass", "flashinfer_trtllm"], "auto"),
}


@pytest.mark.parametrize("node", CONTRACT)
def test_node_contract(node, server):
    """Ids, input names and their order are fixed: shared workflow files store widget values by position."""
    info = server.get(f"/object_info/{node}")[node]
    name, required, optional, out = CONTRACT[node]
    assert info["display_name"] == name and info["category"] == "loaders/quantized"
    order = {key: names for key, names in info["input_order"].items() if key != "hidden"}
    assert order == {"required": required, "optional": optional} and info["output"] == out
    assert info["output_node"] == (node == "QT_InspectCheckpoint")
    for group in (info["input"]["required"], info["input"]["optional"]):
        for key, (kind, options) in group.items():
            assert options.get("tooltip"), f"{node}.{key} has no tooltip"
            if (node, key) in CHOICES:
                assert (options["options"], options["default"]) == CHOICES[node, key], kind


def test_lists_show_folders_once_and_known_repos(server):
    options = server.get("/object_info/QT_LoadBaseModel")["QT_LoadBaseModel"]["input"]["optional"]["base_model"][1]
    assert options["options"][:4] == ["tiny flux sharded", "tiny-flux", "tiny-flux-fp8", "black-forest-labs/FLUX.1-dev"]
    assert "Qwen/Qwen-Image-Edit-2511" in options["options"]


def test_help_pages_are_served(server):
    import urllib.request

    for node in CONTRACT:
        url = f"http://127.0.0.1:{server.port}/extensions/quantized-transformers/docs/{node}.md"
        with urllib.request.urlopen(url, timeout=10) as page:
            text = page.read().decode()
        assert text.startswith("# ") and all(f"`{name}`" in text for name in CONTRACT[node][1] + CONTRACT[node][2])


def latent_of(server, history) -> torch.Tensor:
    return load_file(outputs(server, history, "latents")[0])["latent_tensor"]


def test_the_main_job(server):
    """Base deferred, transformer overridden by a real export, sampled to a PNG; close to BF16 and not equal to it."""
    fp8 = server.run({"1": load_base("", "defer to override", base_model="tiny-flux"),
                      "2": apply_override(["1", 0], "", override="tiny-flux-fp8"), **text_to_image(["2", 0], "fp8_"),
                      "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}}})
    assert not error_of(fp8)
    report = fp8["outputs"]["3"]["text"][0]
    assert f"FLUX.1 · modelopt-fp8 (by modelopt {version('nvidia-modelopt')})" in report
    assert "47 FP8, 3 BF16" in report and "FP8 runs: dequantize (chosen for this device) on cpu: it has no FP8 matmul" in report
    picture = Image.open(outputs(server, fp8, "images")[0])
    assert picture.size == (128, 128)  # four pixels a latent
    bf16 = server.run({"1": load_base("", base_model="tiny-flux"), **text_to_image(["1", 0], "bf16_")})
    assert not error_of(bf16)
    assert 1e-3 < flux.rel_l2(latent_of(server, fp8), latent_of(server, bf16)) < 0.25


def test_decoded_weights_are_kept_while_it_samples(server):
    """The same picture as without, in the node's own words on the way."""
    base = {"1": load_base("", base_model="tiny-flux-fp8")}
    plain = server.run({**base, **text_to_image(["1", 0], "decoded_")})
    kept = server.run({**base, "2": {"class_type": "QT_KeepDecoded", "inputs": {"model": ["1", 0]}},
                       **text_to_image(["2", 0], "kept_"), "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}}})
    assert not error_of(plain) and not error_of(kept)
    assert kept["outputs"]["3"]["text"][0].startswith("33 of 33 quantized layers are decoded for every product")
    assert "Keep Weights Decoded: kept 33 of 33 layers decoded, 0.03 GB." in server.text()
    assert flux.rel_l2(latent_of(server, kept), latent_of(server, plain)) < 1e-5


def test_nvfp4_of_another_architecture(server, tmp_path):
    """Wan: base deferred, transformer overridden by a real NVFP4 export, sampled as video latents."""
    from support import wan

    folder = server.base / "models" / "diffusers"
    tiny_wan = wan.make()
    tiny_wan.save_pretrained(folder / "tiny-wan" / "transformer")
    (folder / "tiny-wan" / "model_index.json").write_text("{}", encoding="utf-8")
    wan.export(tiny_wan, folder / "tiny-wan-nvfp4", "NVFP4")

    def sample(model):
        nodes = text_to_image(model, "w_")
        nodes["w_cond"]["inputs"]["text"] = 4096
        nodes["w_empty"] = {"class_type": "EmptyHunyuanLatentVideo",
                            "inputs": {"width": 64, "height": 64, "length": 5, "batch_size": 1}}
        return {key: node for key, node in nodes.items() if key not in ("w_paint", "w_save")}

    bf16 = server.run({"1": load_base("", base_model="tiny-wan"), **sample(["1", 0])})
    nvfp4 = server.run({"1": load_base("", "defer to override", base_model="tiny-wan"),
                        "2": apply_override(["1", 0], "", override="tiny-wan-nvfp4"), **sample(["2", 0]),
                        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}}})
    assert not error_of(bf16) and not error_of(nvfp4)
    assert "Wan · modelopt-nvfp4" in nvfp4["outputs"]["3"]["text"][0]
    assert 1e-3 < flux.rel_l2(latent_of(server, nvfp4), latent_of(server, bf16)) < 0.5


def test_shards_equal_the_single_file(server):
    results = [server.run({"1": load_base("", "defer to override", base_model="tiny-flux"),
                           "2": apply_override(["1", 0], "", override=name), **text_to_image(["2", 0], "s_")})
               for name in ("tiny-flux-fp8", "tiny flux sharded")]
    assert torch.equal(*(latent_of(server, result) for result in results))


def test_host_lora_nodes_on_either_side(server):
    def lora(model):
        return {"class_type": "LoraLoaderModelOnly",
                "inputs": {"model": model, "lora_name": "tiny.safetensors", "strength_model": 0.5}}

    base, plain = load_base("", "defer to override", base_model="tiny-flux"), {"override": "tiny-flux-fp8"}
    before = server.run({"1": base, "2": lora(["1", 0]), "3": apply_override(["2", 0], "", **plain),
                         **text_to_image(["3", 0], "l_")})
    after = server.run({"1": base, "2": apply_override(["1", 0], "", **plain), "3": lora(["2", 0]),
                        **text_to_image(["3", 0], "l_")})
    none = server.run({"1": base, "2": apply_override(["1", 0], "", **plain), **text_to_image(["2", 0], "l_")})
    assert not error_of(before) and not error_of(after)
    assert torch.equal(latent_of(server, before), latent_of(server, after))
    assert flux.rel_l2(latent_of(server, after), latent_of(server, none)) > 0.01


def test_inspect(server):
    history = server.run({"1": {"class_type": "QT_InspectCheckpoint", "inputs": {"checkpoint": "tiny-flux-fp8"}},
                          "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 1], "filename_prefix": "map"}}})
    text = history["outputs"]["1"]["text"][0]
    assert "47 static, 0 dynamic" in text and "declared in: config.json" in text and "this checkpoint loads" in text
    pictures = [Image.open(path).convert("RGB") for path in outputs(server, history, "images")]
    assert len(pictures) == 2 and pictures[0].tobytes() == pictures[1].tobytes()  # shown on the node, and its output
    count = dict(map(reversed, pictures[0].getcolors(1 << 20)))
    # FP8 and BF16 cells of 18 x 18, and one square of 13 x 13 each in the legend
    assert count[86, 178, 92] == 47 * 18 ** 2 + 13 ** 2 and count[140, 146, 158] == 3 * 18 ** 2 + 13 ** 2


def refused(server, **changes) -> str:
    """Queue a base load with changed inputs, expecting HTTP 400; returns the node's error details."""
    inputs = load_base("", base_model="tiny-flux")["inputs"] | changes
    status, answer = server.post("/prompt", {"prompt": {
        "1": {"class_type": "QT_LoadBaseModel", "inputs": inputs}, **text_to_image(["1", 0], "x_")}})
    assert status == 400, answer
    return json.dumps(answer["node_errors"]["1"]["errors"])


@pytest.mark.parametrize(("widget", "value"), [("component", "transformer_3"), ("weights", "sometimes"), ("dtype", "fp7")])
def test_unknown_widget_values_are_400(widget, value, server):
    text = refused(server, **{widget: value})
    assert "value_not_in_list" in text and value in text


@pytest.mark.parametrize(("widget", "value"), [("kind", "nope"), ("compute", "nope"), ("fp4_backend", "nope")])
def test_unknown_override_values_are_400(widget, value, server):
    override = apply_override(["1", 0], "", override="tiny-flux-fp8")
    override["inputs"][widget] = value
    status, answer = server.post("/prompt", {"prompt": {"1": load_base("", base_model="tiny-flux"), "2": override,
                                                        **text_to_image(["2", 0], "x_")}})
    assert status == 400 and "value_not_in_list" in json.dumps(answer["node_errors"]["2"])


def test_a_reference_that_does_not_exist_is_400(server):
    assert "no such file or folder" in refused(server, reference="/nowhere/at/all")
    assert "hf download somebody/something" in refused(server, reference="somebody/something")


def test_what_is_not_in_the_list_is_400_unless_a_reference_wins_over_it(server):
    text = refused(server, base_model="no-such-model")
    assert "no-such-model was found neither as a path nor in ComfyUI's model folders" in text and "what to do" in text
    assert "hf download somebody/something" in refused(server, base_model="somebody/something")
    assert "no checkpoint is chosen" in refused(server, base_model="")
    for override in (apply_override(["1", 0], "", override="nope"), apply_override(["1", 0], "nope", override="nope")):
        status, answer = server.post("/prompt", {"prompt": {
            "1": load_base("", base_model="tiny-flux"), "2": override, **text_to_image(["2", 0], "x_")}})
        assert status == 400 and "nope was found neither" in json.dumps(answer["node_errors"]["2"])
    shared = server.run({
        "1": load_base("tiny-flux", "defer to override", base_model="FLUX\\of another machine"),
        "2": apply_override(["1", 0], f'"{server.base / "models" / "diffusers" / "tiny-flux-fp8"}" ', override="gone"),
        "3": {"class_type": "QT_InspectCheckpoint", "inputs": {"checkpoint": "tiny-flux\\transformer"}},
        "4": {"class_type": "QT_SaveQuantizedModel", "inputs": {
            "model": ["2", 0], "filename": ' "diffusion_models\\of windows"', "format": "exact", "overwrite": False}}})
    assert not error_of(shared) and "not quantized" in shared["outputs"]["3"]["text"][0]
    assert (server.base / "output" / "diffusion_models" / "of windows.safetensors").is_file()


def test_errors_in_execution_say_what_to_do(server):
    base = load_base("", "defer to override", base_model="tiny-flux")
    done = server.run({"1": base, **text_to_image(["1", 0], "x_")})
    kind, = (data["exception_type"] for name, data in done["status"]["messages"] if name == "execution_error")
    message = error_of(done)
    assert kind == "quantized_transformers.CheckpointError", "no path, and the same in every version"
    assert "has no weights yet" in message and "connect it to Apply Transformer Override" in message


def test_a_changed_file_is_loaded_again(server):
    """Same name, new content: the cached MODEL must not be used."""
    folder = server.base / "models" / "diffusers" / "changing"
    shutil.copytree(server.base / "models" / "diffusers" / "tiny-flux-fp8", folder)
    prompt = {"1": load_base("", base_model="changing"), **text_to_image(["1", 0], "c_")}
    first = latent_of(server, server.run(prompt))
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["transformer_blocks.0.attn.to_out.0.weight_scale"] *= 3
    time.sleep(0.02)
    save_file(tensors, str(file))
    assert flux.rel_l2(latent_of(server, server.run(prompt)), first) > 0.01


def test_log_is_clean(server):
    log = server.text()
    for line in ("unet missing", "unet unexpected", "left over keys", "IMPORT FAILED", "Exception ignored in"):
        assert line not in log
    # the only tracebacks are those of the prompts above that had to fail
    assert log.count("Traceback (most recent call last)") == log.count("!!! Exception during processing !!!")
