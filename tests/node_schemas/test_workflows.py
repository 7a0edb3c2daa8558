"""The example workflows, queued as committed in the real server and run to the end with small stand-ins.

The stand-ins (support/bases.py) lie where `hf download` would put the real repos. Of a prompt only CHEAP changes, and
every loader's report is shown.
"""

from __future__ import annotations

import copy
import json
import re
import urllib.request

import numpy
import pytest
import torch
from browser.definitions import WORKFLOWS
from browser.make_thumbnails import thumbnail
from browser.notes import NOTES
from PIL import Image

from support import bases
from support.pack import COMFYUI, PACK
from support.server import Server, error_of, outputs

pytestmark = pytest.mark.host

FOLDER = PACK / "workflows"
SERVED = {workflow.name for workflow in WORKFLOWS if workflow.flat}  # tests/engines has them
PROMPTS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((FOLDER / "api").glob("*.json"))
           if path.stem not in SERVED}
IDS = {workflow.name: workflow.ids() for workflow in WORKFLOWS}
SIZE, FRAMES, LTX_FRAMES, STEPS = 128, 5, 9, 4  # LTX-2's VAE makes eight frames of one
# The whole difference to the committed prompts: (input, committed value) -> what is run. 26 of 40 steps are 3 of 4.
CHEAP = {**{(name, value): SIZE for name in ("width", "height", "value") for value in (480, 512, 544, 720, 768, 832, 960, 1024, 1280, 1328)},
         ("value", 26): 3, ("value", 121): LTX_FRAMES, **{("length", value): FRAMES for value in (17, 81, 121)},
         **{("steps", value): STEPS for value in (4, 8, 20, 26, 30, 40, 50)}, ("megapixels", 1): 0.02,
         ("end_at_step", 10000): 10000, ("start_at_step", 0): 0}
FP8, NVFP4 = "on cpu: it has no FP8 matmul", "on cpu: it has no NVFP4 matmul"
DEQUANTIZED = ": dequantize (chosen for this device) on cpu"
KITCHEN = ": comfy_kitchen (chosen for this device) on cpu: "
# Every format, and pictures and films: what runs without `test full`.
SOME = ("flux1_dev_modelopt_fp8", "flux1_dev_svdq_int4_lora", "flux2_dev_nvfp4", "sd35_large_fp8", "wan21_vace_14b_gguf",
        "wan22_t2v_a14b_modelslim_w8a8", "wan22_t2v_a14b_online_mxfp8")
# What stands between the shift and the loader of the high-noise and of the low-noise model.
CHAINS = {"modelopt": (["ApplyTransformerOverride", "LoadBaseModel"], ["LoadBaseModel"]),
          "modelslim": (["ModelSlimLoader"],) * 2, "online": (["AscendMXFP8Quantize", "LoadBaseModel"],) * 2}
# What the reports must say, by the title of the node that shows them.
SAID = {
    "flux1_dev_modelopt_fp8": {
        "transformer": ["override as component", "FLUX.1 · modelopt-fp8 (by modelopt", "20 BF16, 30 FP8", FP8],
        "text encoder": ["CLIPTextModel", "T5EncoderModel"], "VAE": ["AutoencoderKL"]},
    "flux1_dev_modelopt_nvfp4": {
        "transformer": ["override as component", "FLUX.1 · modelopt-nvfp4 (by modelopt", "22 BF16, 28 NVFP4", NVFP4,
                        "even columns in the low nibble"],
        "text encoder": ["CLIPTextModel", "T5EncoderModel"], "VAE": ["AutoencoderKL"]},
    "flux2_dev_modelopt_fp8": {
        "transformer": ["override as component", "FLUX.2 · modelopt-fp8 (by modelopt", "11 BF16, 28 FP8", FP8],
        "text encoder": ["Mistral3ForConditionalGeneration"], "VAE": ["AutoencoderKLFlux2"]},
    "flux2_dev_nvfp4": {
        "transformer": ["override as weights only", "FLUX.2 · nvfp4", "flux2-dev-nvfp4-mixed.safetensors",
                        "15 BF16, 16 NVFP4", NVFP4, "even columns in the high nibble", "packed q/k/v",
                        "dynamic activation scales in 4 layers"],
        "text encoder": ["Mistral3ForConditionalGeneration"], "VAE": ["AutoencoderKLFlux2"]},
    "wan22_t2v_a14b_modelopt_fp8": {
        "transformer": ["override as component", "Wan · modelopt-fp8 (by modelopt", "25 FP8, 1 BF16", FP8],
        "transformer_2": ["Wan · not quantized", "layers: 26 BF16"],
        "text encoder": ["UMT5EncoderModel"], "VAE": ["AutoencoderKLWan"]},
    "wan22_t2v_a14b_modelopt_nvfp4": {
        "transformer": ["override as component", "Wan · modelopt-nvfp4 (by modelopt", "25 NVFP4, 1 BF16", NVFP4,
                        "FlashInfer (cudnn) was asked for NVFP4"],
        "transformer_2": ["Wan · not quantized", "layers: 26 BF16"],
        "text encoder": ["UMT5EncoderModel"], "VAE": ["AutoencoderKLWan"]},
    "wan22_t2v_a14b_modelslim_w8a8": {
        "transformer": ["Wan · modelslim (by msmodelslim, MindIE", "diffusers names", "6 BF16, 10 W8A8", KITCHEN],
        "transformer_2": ["Wan · modelslim (by msmodelslim, AscendV1", "diffusers names", "6 F16, 10 W8A8", KITCHEN],
        "text encoder": ["UMT5EncoderModel"], "VAE": ["AutoencoderKLWan"]},
    "wan22_t2v_a14b_modelslim_mxfp8": {
        "transformer": ["Wan · modelslim (by msmodelslim, MindIE", "native names", "6 BF16, 10 W8A8_MXFP8", KITCHEN, "~13 % of blocks"],
        "transformer_2": ["Wan · modelslim (by msmodelslim, MindIE", "native names", "6 BF16, 10 W8A8_MXFP8", KITCHEN, "~13 % of blocks"],
        "text encoder": ["UMT5EncoderModel"], "VAE": ["AutoencoderKLWan"]},
    "wan22_t2v_a14b_online_mxfp8": {
        "transformer": ["MXFP8: 26 Linear layers", "Ascend's rule", "runs: comfy_kitchen (chosen for this device) on cpu", "~13 % of blocks"],
        "transformer_2": ["MXFP8: 26 Linear layers", "Ascend's rule", "runs: comfy_kitchen (chosen for this device) on cpu", "~13 % of blocks"],
        "text encoder": ["UMT5EncoderModel"], "VAE": ["AutoencoderKLWan"]},
    "hunyuanvideo_modelopt_fp8": {
        "transformer": ["override as component", "HunyuanVideo · modelopt-fp8 (by modelopt", "37 BF16, 16 FP8", FP8],
        "text encoder": ["LlamaModel", "CLIPTextModel"], "VAE": ["AutoencoderKLHunyuanVideo"]},
    "qwen_image_modelopt_fp8": {
        "transformer": ["override as component", "Qwen-Image · modelopt-fp8 (by modelopt", "zero_cond_t 0",
                        "12 BF16, 22 FP8", FP8],
        "text encoder": ["Qwen2_5_VLForConditionalGeneration"], "VAE": ["AutoencoderKLQwenImage"]},
    "flux1_dev_svdq_int4_lora": {
        "transformer": ["FLUX.1 · svdquant-int4", "svdq-int4_r32-flux.1-dev.safetensors", "low rank: 32",
                        "3 AWQ INT4", "12 SVDQ INT4", DEQUANTIZED],
        "text encoder": ["CLIPTextModel", "T5EncoderModel"], "VAE": ["AutoencoderKL"]},
    "qwen_image_svdq_lightning_4steps": {
        "transformer": ["Qwen-Image · svdquant-int4", "svdq-int4_r32-qwen-image-lightningv1.0-4steps.safetensors",
                        "low rank: 32", "2 AWQ INT4, 8 SVDQ INT4", DEQUANTIZED,
                        "asks for 4 steps; set KSampler steps=4, cfg=1.0"],
        "text encoder": ["Qwen2_5_VLForConditionalGeneration"], "VAE": ["AutoencoderKLQwenImage"]},
    "qwen_image_edit_svdq": {
        "transformer": ["Qwen-Image · svdquant-int4", "svdq-int4_r32-qwen-image-edit-2509.safetensors", "zero_cond_t 0",
                        "low rank: 32", "2 AWQ INT4, 8 SVDQ INT4", DEQUANTIZED],
        "text encoder": ["Qwen2_5_VLForConditionalGeneration"], "VAE": ["AutoencoderKLQwenImage"]},
    "z_image_turbo_svdq": {
        "transformer": ["Z-Image · svdquant-int4", "svdq-int4_r32-z-image-turbo.safetensors", "low rank: 32",
                        "20 SVDQ INT4", DEQUANTIZED],
        "text encoder": ["Qwen3ForCausalLM"], "VAE": ["AutoencoderKL"]},
    "flux2_klein_4b_fp8": {
        "transformer": ["override as weights only", "FLUX.2 · fp8", "flux-2-klein-4b-fp8.safetensors", "21 FP8", FP8],
        "text encoder": ["FLUX.2 klein", "Qwen3ForCausalLM"], "VAE": ["AutoencoderKLFlux2"]},
    "sd35_large_fp8": {
        "transformer": ["override as weights only", "SD3 · fp8", "sd3.5_large_fp8_scaled.safetensors", "34 FP8", FP8,
                        "left out, as no part of the transformer: a VAE"],
        "text encoder": ["CLIPTextModelWithProjection", "T5EncoderModel", "padded to 256"], "VAE": ["AutoencoderKL"]},
    "chroma1_hd_fp8": {
        "transformer": ["override as weights only", "Chroma · fp8", "Chroma1-HD-fp8mixed.safetensors", "237 FP8", FP8],
        "text encoder": ["Chroma", "T5EncoderModel", "min_padding 1"], "VAE": ["AutoencoderKL"]},
    "wan21_vace_14b_gguf": {
        "transformer": ["override as weights only", "WAN21_Vace · gguf", "Wan2.1_14B_VACE-Q4_K_M.gguf", "47 GGUF Q4_K, 22 GGUF Q6_K",
                        "run: dequantize (chosen for this device) on cpu"],
        "text encoder": ["UMT5EncoderModel"], "VAE": ["AutoencoderKLWan"]},
    "hunyuanvideo15_720p_gguf": {
        "transformer": ["override as weights only", "HunyuanVideo15 · gguf", "hunyuanvideo1.5_720p_t2v-Q4_K_M.gguf",
                        "27 GGUF Q4_K, 14 GGUF Q6_K", "run: dequantize (chosen for this device) on cpu"],
        "text encoder": ["Qwen2_5_VLTextModel", "T5EncoderModel"], "VAE": ["AutoencoderKLHunyuanVideo15"]},
    "ltx2_fp8": {
        "transformer": ["override as weights only", "LTXAV · fp8", "ltx-2-19b-dev-fp8.safetensors", "82 FP8", FP8,
                        "other parts of a whole checkpoint"],
        "text encoder": ["Gemma3ForCausalLM", "LTX2TextConnectors"], "VAE": ["AutoencoderKLLTX2Video"]},
    "hidream_i1_full_fp8": {
        "transformer": ["override as weights only", "HiDream · fp8", "hidream_i1_full_fp8.safetensors", "78 FP8", FP8],
        "VAE": ["AutoencoderKL"]},
    "qwen_image_edit_2511_modelopt_fp8": {
        "transformer": ["override as component", "Qwen-Image · modelopt-fp8 (by modelopt", "zero_cond_t 1",
                        "12 BF16, 22 FP8", FP8],
        "text encoder": ["Qwen2_5_VLForConditionalGeneration"], "VAE": ["AutoencoderKLQwenImage"]},
}


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    base = tmp_path_factory.mktemp("workflows")
    made = bases.Bases(base)
    (base / "input").mkdir()
    # the committed name; a picture that is neither square nor of a round size
    Image.open(COMFYUI / "input" / "example.png").convert("RGB").resize((333, 250)).save(base / "input" / "example.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin cost a shared CPU several times the work
        with Server(base, env={"QT_SERVER_URL": "http://127.0.0.1:9"}) as running:  # where nobody listens
            yield running, made


@pytest.fixture(scope="module")
def server(installation):
    return installation[0]


@pytest.fixture
def models(installation, name):
    """Those of the workflow of this name are there."""
    installation[1].place(name)


def cheap(prompt):
    """The prompt with nothing but CHEAP changed; every size and step count must be one that CHEAP knows."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, int | float) and (name, value) in CHEAP:
                node["inputs"][name] = CHEAP[name, value]
            elif name in ("width", "height", "length", "steps", "megapixels", "end_at_step"):
                assert isinstance(value, list), (name, value)
    return prompt


def free(server):
    """Let the server drop models and results, so that the models of all bases never add up."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/free",
                                     json.dumps({"unload_models": True, "free_memory": True}).encode(),
                                     {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=30).close()


def frames_of(path):
    """U8 [T, H, W, 3] of a picture or a video."""
    if path.suffix == ".png":
        return numpy.asarray(Image.open(path).convert("RGB"))[None]
    import av

    with av.open(str(path)) as video:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def sound_of(path):
    """F32 [channels, samples] of a video."""
    import av

    with av.open(str(path)) as video:
        return numpy.concatenate([frame.to_ndarray() for frame in video.decode(audio=0)], -1)


def test_folders_hold_what_the_host_expects():
    """UI format and a thumbnail each at the top, where the host lists every JSON by its file's name, which no system and no
    address takes for something else; their twins in api/."""
    assert {workflow.name for workflow in WORKFLOWS} == SAID.keys() | SERVED
    titles = sorted(NOTES[workflow.name].title for workflow in WORKFLOWS)
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(
        ["api", *(f"{title}.{kind}" for title in titles for kind in ("json", "jpg"))])
    assert sorted(path.name for path in (FOLDER / "api").iterdir()) == [f"{name}.json" for name in sorted(SAID.keys() | SERVED)]
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 .,()-]*[A-Za-z0-9)]", title) for title in titles)
    for name in SAID.keys() | SERVED:
        graph = json.loads((FOLDER / f"{NOTES[name].title}.json").read_text(encoding="utf-8"))
        twin = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
        assert {"nodes", "links", "groups", "version"} <= graph.keys()
        subgraphs = {inner["id"]: inner["nodes"] for inner in graph.get("definitions", {}).get("subgraphs", [])}
        assert len(subgraphs) == (name not in SERVED)
        shown = {str(node["id"]): node["type"] for node in graph["nodes"] if node["type"] not in ("MarkdownNote", *subgraphs)}
        inside = {f"{holder['id']}:{node['id']}": node["type"] for holder in graph["nodes"]
                  for node in subgraphs.get(holder["type"], ())}
        assert shown | inside == {key: node["class_type"] for key, node in twin.items()}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
def test_thumbnails_show_what_is_true(workflow):
    """They are what their maker draws of today's notes, as near as other versions of Pillow come to it."""
    from quantized_transformers.views.layer_map import format_colours

    file = FOLDER / f"{NOTES[workflow.name].title}.jpg"
    assert file.stat().st_size < 60_000 and Image.open(file).format == "JPEG"
    wanted, found = (numpy.asarray(image.convert("L"), dtype=float) for image in (
        thumbnail(workflow, format_colours()), Image.open(file)))
    blocks = abs(wanted - found).reshape(60, 8, 60, 8).mean((1, 3))  # a digit is some of these
    assert wanted.shape == found.shape and blocks.max() < 24


@pytest.fixture(scope="module")
def of_base(server):
    """Called with a workflow's prompt: frees the server unless it has the base of the one before. Then it keeps text
    encoder, VAE and the states of the words, which all workflows of a base have in common; transformers are loaded anew."""
    before = []

    def prepare(prompt):
        base = {node["inputs"]["base_model"] for node in prompt.values() if "base_model" in node["inputs"]}
        if before != [base]:
            free(server)
        before[:] = [base]

    return prepare


def reporting(name, prompt):
    """The prompt with the reports that a template has no room for."""
    ids = IDS[name]
    return prompt | {f"{key}_report": {"class_type": "PreviewAny", "inputs": {"source": [ids[key], 1]},
                                       "_meta": {"title": f"Report: {title}"}}
                     for key, title in {"clip": "text encoder", "vae": "VAE", "low": "transformer_2"}.items()
                     if key in ids and prompt[ids[key]]["class_type"].startswith("QT_")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SOME else [pytest.mark.full]) for name in PROMPTS])
def test_workflow_runs(name, server, models, of_base):
    prompt = reporting(name, cheap(PROMPTS[name]))
    of_base(prompt)
    history = server.run(prompt, timeout=300)
    assert not error_of(history) and history["status"]["status_str"] == "success", error_of(history)
    file, = [path for path in outputs(server, history, "images") if path.parent.is_relative_to(server.base / "output")]
    frames = frames_of(file)
    video = next((count for word, count in (("wan", FRAMES), ("hunyuan", FRAMES), ("ltx", LTX_FRAMES)) if word in name), 0)
    assert file.suffix == (".mp4" if video else ".png") and len(frames) == (video or 1)
    # the edit keeps the picture's shape, in multiples of 32
    assert frames.shape[1:3] == ((128, 160) if "edit" in name else (SIZE, SIZE))
    assert all(frame.std() > 2 for frame in frames), "a constant picture"
    if name.startswith("ltx"):
        assert sound_of(file).shape[0] == 2 and sound_of(file).std() > 1e-3, "no sound"
    assert "invalid value encountered in cast" not in server.text(), "NaN in a picture"
    said = {prompt[key]["_meta"]["title"].removeprefix("Report: "): output["text"][0]
            for key, output in history["outputs"].items() if "text" in output}
    assert said.keys() == SAID[name].keys()
    for title, texts in SAID[name].items():
        assert not [text for text in texts if text not in said[title]], said[title]


@pytest.mark.parametrize("name", [name for name in PROMPTS if name.startswith("wan22")])
def test_wan_changes_transformers_at_its_boundary(name):
    """boundary_ratio 0.875 of Wan2.2-T2V-A14B: steps that start at or above it are the high-noise transformer's."""
    import comfy.model_sampling
    import comfy.samplers

    high, low = (PROMPTS[name][IDS[name][key]]["inputs"] for key in ("high_sample", "sample"))
    assert high["start_at_step"] == 0 and low["end_at_step"] >= low["steps"] == high["steps"]
    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=PROMPTS[name][high["model"][0]]["inputs"]["shift"], multiplier=1000)
    sigmas = comfy.samplers.simple_scheduler(sampling, high["steps"])
    assert high["end_at_step"] == low["start_at_step"] == [IDS[name]["boundary"], 0]
    assert PROMPTS[name][IDS[name]["boundary"]]["inputs"]["value"] == int((torch.as_tensor(sigmas) >= 0.875).sum())

    def chain(inputs):  # the types behind the shift, and the inputs of the loader at the end
        node, types = PROMPTS[name][inputs["model"][0]], []
        while "model" in node["inputs"]:
            node = PROMPTS[name][node["inputs"]["model"][0]]
            types.append(node["class_type"].removeprefix("QT_"))
        return types, node["inputs"]

    types, loaders = zip(*map(chain, (high, low)), strict=True)
    assert types == CHAINS[next(word for word in CHAINS if word in name)]
    assert [loader["component"] for loader in loaders] == ["transformer", "transformer_2"]
    assert loaders[1].get("weights", "load") == "load"


def picture(server, prompt):
    """The saved picture of a prompt, I64 [H, W, 3]."""
    history = server.run(prompt)
    assert not error_of(history), error_of(history)
    return frames_of(outputs(server, history, "images")[0])[0].astype(int)


@pytest.mark.parametrize("name", ["flux1_dev_svdq_int4_lora"])
def test_the_lora_acts(name, server, models):
    """At its committed strength it changes the picture; at strength 0 the picture is that of the transformer alone."""
    prompt = cheap(PROMPTS[name])
    key, lora = next((key, node["inputs"]) for key, node in prompt.items() if node["class_type"] == "LoraLoaderModelOnly")
    assert 0 < lora["strength_model"] < 1
    acting = picture(server, prompt)
    lora["strength_model"] = 0
    idle = picture(server, prompt)
    for node in prompt.values():
        node["inputs"] = {name: lora["model"] if value == [key, 0] else value for name, value in node["inputs"].items()}
    del prompt[key]
    assert (picture(server, prompt) == idle).all()
    assert abs(acting - idle).mean() > 1, "grey levels of 255"


@pytest.mark.parametrize("name", sorted(SERVED))
def test_a_server_that_is_not_there(name, server):
    """It says so, with the command that starts one for just these models."""
    prompt = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    history = server.run(prompt)
    assert "there is no server" in error_of(history) and "http://127.0.0.1:9" in error_of(history)
    report, = (output["text"][0] for output in history["outputs"].values() if "text" in output)
    assert f"serve {NOTES[name].base} --override {NOTES[name].repo}" in report


def test_nothing_is_downloaded_without_being_asked():
    for prompt in PROMPTS.values():
        asked = [node["inputs"]["download_missing"] for node in prompt.values() if node["class_type"].startswith("QT_")
                 and node["class_type"] != "QT_AscendMXFP8Quantize"]  # which loads nothing
        own = any(node["class_type"] == "QuadrupleCLIPLoader" for node in prompt.values())  # in place of one
        assert len(asked) >= 3 - own and not any(asked)


def repos(names, *inputs):
    """(workflow, repo id) of the repos that loader nodes of these workflows name in these inputs."""
    found = sorted({(name, node["inputs"][key]) for name in names for node in PROMPTS[name].values() for key in inputs
                    if node["class_type"].startswith("QT_") and "/" in node["inputs"].get(key, "")})
    return [pytest.param(*row, marks=() if row[0] in SOME else [pytest.mark.full]) for row in found]


@pytest.mark.parametrize(("name", "repo"), [
    *repos(PROMPTS, "base_model"),
    *repos(("flux1_dev_modelopt_fp8", "flux2_dev_nvfp4", "qwen_image_svdq_lightning_4steps"), "override", "weights")])
def test_a_repo_that_is_not_there(name, repo, server, models):
    """Every node that needs it says so before anything runs, with the command that fetches it."""
    prompt = cheap(PROMPTS[name])
    folder = server.base / "models" / "diffusers" / repo
    folder.rename(folder.with_name("away"))
    try:
        status, answer = server.post("/prompt", {"prompt": prompt})
        if status == 200:  # ComfyUI runs what does not need it
            server.wait_for(answer["prompt_id"])
    finally:
        folder.with_name("away").rename(folder)
    marked = {node for node, entry in answer["node_errors"].items() if all(
        f"hf download {repo}" in error["details"] and error["details"].endswith("code: missing") for error in entry["errors"])}
    assert marked == answer["node_errors"].keys() == {
        node for node, found in prompt.items() if found["class_type"].startswith("QT_") and repo in found["inputs"].values()}


def test_log_is_clean(server):
    log = server.text()
    for line in ("unet missing", "unet unexpected", "left over keys", "clip unexpected", "lora key not loaded",
                 "IMPORT FAILED"):
        assert line not in log
    # HunyuanVideo 1.5's base has no vision tower, and LTX-2's is left out: the host builds them, and runs them for pictures only
    missing = [name for line in re.findall(r"clip missing: \[(.*)\]", log) for name in re.findall(r"'([\w.]+)'", line)]
    assert all(name.startswith(("visual.", "vision_model.", "multi_modal_projector.")) for name in missing), missing
    # the only tracebacks are those of the prompts above that had to fail
    assert log.count("Traceback (most recent call last)") == log.count("!!! Exception during processing !!!")
