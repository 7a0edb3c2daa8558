"""Workflows of ComfyUI-nunchaku, ComfyUI-GGUF and SGLang's pack, in both formats, made by hand after those packs' own
examples; and the command that migrates them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers.migrate import migrate
from support.pack import PACK

pytestmark = pytest.mark.unit

SVDQ = "svdq-int4_r32-flux.1-dev.safetensors"


def node(name: int, kind: str, values: list, inputs: list = (), outputs: list = (), **more) -> dict:
    """A node as the page saves it: inputs (name, type, link), outputs (name, type, links)."""
    return {"id": name, "type": kind, "pos": [10 * name, 20], "size": [315, 202], "flags": {}, "order": name, "mode": 0,
            "inputs": [{"name": n, "type": t, "link": link} for n, t, link in inputs],
            "outputs": [{"name": n, "type": t, "slot_index": 0, "links": links} for n, t, links in outputs],
            "properties": {"Node name for S&R": kind, "cnr_id": "other-pack", "ver": "1.2.3"},
            "widgets_values": values, **more}


def page(nodes: list[dict], links: list, **more) -> dict:
    return {"last_node_id": 99, "last_link_id": 99, "nodes": nodes, "links": links, "groups": [], "config": {},
            "extra": {}, "version": 0.4, **more}


FLUX = ["models\\" + SVDQ, 0.12, "nunchaku-fp16", "auto", 0, "bfloat16", "enabled"]


def flux_page() -> dict:
    """Loader -> LoRA -> KSampler, as ComfyUI-nunchaku's example nunchaku-flux.1-dev.json has them."""
    return page([
        node(45, "NunchakuFluxDiTLoader", FLUX, outputs=[("MODEL", "MODEL", [3])], title="My model"),
        node(46, "NunchakuFluxLoraLoader", ["turbo.safetensors", 0.5], [("model", "MODEL", 3)],
             [("MODEL", "MODEL", [4])]),
        node(44, "NunchakuTextEncoderLoaderV2", ["flux.1", "clip_l.safetensors", "t5xxl_fp16.safetensors", 512],
             outputs=[("CLIP", "CLIP", [5])]),
        node(7, "KSampler", [1, "fixed"], [("model", "MODEL", 4)]),
        node(8, "CLIPTextEncode", ["a cat"], [("clip", "CLIP", 5)])],
        [[3, 45, 0, 46, 0, "MODEL"], [4, 46, 0, 7, 0, "MODEL"], [5, 44, 0, 8, 0, "CLIP"]])


def whole(graph: dict) -> None:
    """Every link is where its ends say, and the other way round. Independent of the pack."""
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = {one["id"]: one for one in (dict(zip(keys, link, strict=True)) if isinstance(link, list) else link
                                        for link in graph["links"])}
    nodes = {one["id"]: one for one in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and len(links) == len(graph["links"])
    out = {(one["id"], slot, link) for one in graph["nodes"] for slot, output in enumerate(one["outputs"])
           for link in output["links"] or ()}
    into = {(one["id"], slot, socket["link"]) for one in graph["nodes"] for slot, socket in enumerate(one["inputs"])
            if socket["link"] is not None}
    assert out == {(one["origin_id"], one["origin_slot"], one["id"]) for one in links.values() if one["origin_id"] >= 0}
    assert into == {(one["target_id"], one["target_slot"], one["id"]) for one in links.values()
                    if one["target_id"] >= 0}


def by_id(workflow: dict, name: int) -> dict:
    return next(one for one in workflow["nodes"] if one["id"] == name)


def test_nunchaku_on_the_page():
    before = flux_page()
    given = copy.deepcopy(before)
    done = migrate(given)
    assert given == before and done.left == [] and len(done.changes) == 3
    whole(done.workflow)
    loader, lora, text = (by_id(done.workflow, name) for name in (45, 46, 44))
    assert loader["type"] == "QT_NunchakuSVDQLoader"
    assert loader["widgets_values"] == ["models/" + SVDQ, "auto", 0, "", "", "auto", "", False]
    assert loader["properties"] == {"Node name for S&R": "QT_NunchakuSVDQLoader", "cnr_id": "quantized-transformers"}
    assert [(one["name"], one["type"], one["links"]) for one in loader["outputs"]] == [
        ("MODEL", "MODEL", [3]), ("report", "STRING", None)]
    kept = ("id", "pos", "size", "flags", "order", "mode", "title")
    assert {key: loader.get(key) for key in kept} == {key: by_id(before, 45).get(key) for key in kept}
    assert lora["type"] == "LoraLoaderModelOnly" and lora["widgets_values"] == ["turbo.safetensors", 0.5]
    assert text["type"] == "DualCLIPLoader"
    assert text["widgets_values"] == ["clip_l.safetensors", "t5xxl_fp16.safetensors", "flux", "default"]
    lines = "\n".join(done.changes)
    assert "cache_threshold 0.12 is dropped" in lines and "min_length 512" in lines and "attention" not in lines
    for one in (7, 8):
        assert by_id(done.workflow, one) == by_id(before, one)


def test_linked_widgets_keep_their_links():
    """Newer pages list every widget as an input; a linked one moves to the new widget, or is cut and named."""
    graph = page([
        node(1, "PrimitiveNode", [SVDQ], outputs=[("COMBO", "COMBO", [1])]),
        node(2, "PrimitiveNode", [0.1], outputs=[("FLOAT", "FLOAT", [2])]),
        node(3, "NunchakuFluxDiTLoader", FLUX, outputs=[("MODEL", "MODEL", [3])]),
        node(4, "PrimitiveNode", [0.5], outputs=[("FLOAT", "FLOAT", [4])]),
        node(5, "NunchakuFluxLoraLoader", ["a", 0.5], outputs=[("MODEL", "MODEL", [])])],
        [[1, 1, 0, 3, 0, "COMBO"], [2, 2, 0, 3, 1, "FLOAT"], [3, 3, 0, 5, 0, "MODEL"], [4, 4, 0, 5, 2, "FLOAT"]])
    graph["nodes"][4]["inputs"] = [
        {"name": "model", "type": "MODEL", "link": 3},
        {"name": "lora_name", "type": "COMBO", "widget": {"name": "lora_name"}, "link": None},
        {"name": "lora_strength", "type": "FLOAT", "widget": {"name": "lora_strength"}, "link": 4}]
    graph["nodes"][2]["inputs"] = [
        {"name": name, "type": kind, "widget": {"name": name}, "link": link} for name, kind, link in (
            ("model_path", "COMBO", 1), ("cache_threshold", "FLOAT", 2), ("attention", "COMBO", None))]
    done = migrate(graph)
    whole(done.workflow)
    assert by_id(done.workflow, 3)["inputs"] == [
        {"name": "weights", "type": "COMBO", "widget": {"name": "weights"}, "link": 1}]
    assert by_id(done.workflow, 2)["outputs"][0]["links"] == [] and "connection to cache_threshold" in done.changes[0]
    assert [(one["name"], one["link"]) for one in by_id(done.workflow, 5)["inputs"]] == [
        ("model", 3), ("strength_model", 4)]


def test_subgraphs():
    inner = {"id": "aaaa-bbbb", "name": "Loading", "version": 1, "state": {"lastNodeId": 5, "lastLinkId": 9},
             "inputs": [{"id": "x", "name": "threshold", "type": "FLOAT", "linkIds": [9]}],
             "outputs": [{"id": "y", "name": "MODEL", "type": "MODEL", "linkIds": [8]}],
             "nodes": [node(5, "NunchakuFluxDiTLoader", FLUX, outputs=[("MODEL", "MODEL", [8])])],
             "links": [{"id": 8, "origin_id": 5, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "MODEL"},
                       {"id": 9, "origin_id": -10, "origin_slot": 0, "target_id": 5, "target_slot": 0,
                        "type": "FLOAT"}]}
    inner["nodes"][0]["inputs"] = [{"name": "cache_threshold", "type": "FLOAT", "link": 9,
                                    "widget": {"name": "cache_threshold"}}]
    wrapper = node(1, "aaaa-bbbb", [], [("threshold", "FLOAT", None)], [("MODEL", "MODEL", [])])
    wrapper["properties"] = {"proxyWidgets": [["5", "model_path"], ["5", "attention"], ["6", "attention"]]}
    done = migrate(page([wrapper], [], definitions={"subgraphs": [inner]}))
    graph = done.workflow["definitions"]["subgraphs"][0]
    whole(graph)
    assert graph["nodes"][0]["type"] == "QT_NunchakuSVDQLoader" and graph["inputs"][0]["linkIds"] == []
    assert done.workflow["nodes"][0]["properties"]["proxyWidgets"] == [["5", "weights"], ["6", "attention"]]
    assert done.changes[0].startswith("node 5 in Loading NunchakuFluxDiTLoader")


def stack(*loras: tuple[str, float]) -> list:
    values = [value for lora in loras for value in lora]
    return values + ["None", 1.0] * (15 - len(loras))


@pytest.mark.parametrize("objects", [False, True])
def test_a_lora_stack_becomes_a_chain(objects):
    graph = page([node(1, "NunchakuFluxDiTLoader", FLUX, outputs=[("MODEL", "MODEL", [1])]),
                  node(2, "NunchakuFluxLoraStack", stack(("a", 0.1), ("None", 1.0), ("b", 0.2), ("c", 0.3)),
                       [("model", "MODEL", 1)], [("MODEL", "MODEL", [2, 3])]),
                  node(3, "KSampler", [], [("model", "MODEL", 2)]), node(4, "KSampler", [], [("model", "MODEL", 3)])],
                 [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"], [3, 2, 0, 4, 0, "MODEL"]])
    if objects:
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        graph["links"] = [dict(zip(keys, link, strict=True)) for link in graph["links"]]
        graph |= {"state": {"lastNodeId": 40, "lastLinkId": 50}}
        del graph["last_node_id"], graph["last_link_id"]
    done = migrate(graph)
    whole(done.workflow)
    ends = {(one["origin_id"], one["target_id"]) if objects else (one[1], one[3]) for one in done.workflow["links"]}
    new = sorted(one["id"] for one in done.workflow["nodes"])[-2:]
    assert new == ([41, 42] if objects else [100, 101])
    assert ends == {(1, 2), (2, new[0]), (new[0], new[1]), (new[1], 3), (new[1], 4)}
    assert [by_id(done.workflow, name)["widgets_values"] for name in (2, *new)] == [["a", 0.1], ["b", 0.2], ["c", 0.3]]
    assert (done.workflow["state"]["lastNodeId"] if objects else done.workflow["last_node_id"]) == new[1]


API = {
    "1": {"class_type": "NunchakuQwenImageDiTLoader", "_meta": {"title": "Mine"}, "inputs": {
        "model_name": "svdq-int4_r128-qwen-image.safetensors", "cpu_offload": "enable", "num_blocks_on_gpu": 20,
        "use_pin_memory": "disable"}},
    "2": {"class_type": "NunchakuFluxLoraStack", "inputs": {
        "model": ["1", 0], "lora_name_1": "a", "lora_strength_1": 0.5, "lora_name_2": "None", "lora_strength_2": 1.0,
        "lora_name_3": "b", "lora_strength_3": 0.25}},
    "3": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "seed": 1}}}


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_api_format(wrapped):
    given = {"prompt": copy.deepcopy(API), "client_id": "x"} if wrapped else copy.deepcopy(API)
    done = migrate(given)
    prompt = done.workflow["prompt"] if wrapped else done.workflow
    assert prompt["1"] == {"class_type": "QT_NunchakuSVDQLoader", "_meta": {"title": "Mine"}, "inputs": {
        "weights": "svdq-int4_r128-qwen-image.safetensors", "precision": "auto", "rank": 0, "reference": "",
        "weights_name": "", "backend": "auto", "revision": "", "download_missing": False}}
    assert prompt["2"] == {"class_type": "LoraLoaderModelOnly",
                           "inputs": {"model": ["1", 0], "lora_name": "a", "strength_model": 0.5}}
    assert prompt["4"] == {"class_type": "LoraLoaderModelOnly",
                           "inputs": {"model": ["2", 0], "lora_name": "b", "strength_model": 0.25}}
    assert prompt["3"]["inputs"] == {"model": ["4", 0], "seed": 1} and len(prompt) == 4
    assert "num_blocks_on_gpu 20" in done.changes[0] and "cpu_offload 'enable'" in done.changes[0]


def test_linked_values_in_the_api_format():
    given = {"1": {"class_type": "NunchakuZImageDiTLoader", "inputs": {"model_name": ["9", 0]}},
             "2": {"class_type": "NunchakuFluxLoraLoader",
                   "inputs": {"model": ["1", 0], "lora_name": "a", "lora_strength": ["8", 0]}}}
    prompt = migrate(given).workflow
    assert prompt["1"]["inputs"]["weights"] == ["9", 0]
    assert prompt["2"]["inputs"] == {"model": ["1", 0], "lora_name": "a", "strength_model": ["8", 0]}


def test_legacy_folders_go_into_the_reference():
    given = {"1": {"class_type": "NunchakuFluxDiTLoader", "inputs": {"model_path": "svdq-int4-flux.1-dev"}}}
    assert migrate(given).workflow["1"]["inputs"]["reference"] == "svdq-int4-flux.1-dev"


def test_what_needs_nunchakus_own_model_keeps_it():
    graph = flux_page()
    graph["nodes"].append(node(9, "NunchakuPuLIDLoaderV2", [], [("model", "MODEL", 6)]))
    graph["links"].append([6, 46, 0, 9, 0, "MODEL"])
    by_id(graph, 46)["outputs"][0]["links"].append(6)
    done = migrate(graph)
    assert [line.split(":")[0] for line in done.left] == [
        "node 45 NunchakuFluxDiTLoader", "node 46 NunchakuFluxLoraLoader", "node 9 NunchakuPuLIDLoaderV2"]
    assert "NunchakuPuLIDLoaderV2 in this workflow takes" in done.left[0] and len(done.changes) == 1
    assert by_id(done.workflow, 45) == by_id(graph, 45)


def test_gguf():
    given = {"1": {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "flux1-dev-Q4_K_S.gguf"}},
             "2": {"class_type": "UnetLoaderGGUFAdvanced", "inputs": {
                 "unet_name": "flux1-dev.safetensors", "dequant_dtype": "target", "patch_dtype": "default",
                 "patch_on_device": False}},
             "3": {"class_type": "DualCLIPLoaderGGUF", "inputs": {
                 "clip_name1": "clip_l.safetensors", "clip_name2": "a\\t5-v1_1-xxl-encoder-Q8_0.gguf", "type": "flux"}},
             "4": {"class_type": "CLIPLoaderGGUF", "inputs": {"clip_name": "umt5.safetensors", "type": "wan"}},
             "5": {"class_type": "QuadrupleCLIPLoaderGGUF", "inputs": {f"clip_name{i}": f"{i}.sft" for i in range(1, 5)}},
             "6": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}}}
    done = migrate(given)
    assert not done.left
    prompt = done.workflow
    assert prompt["6"] == given["6"]
    assert prompt["1"]["class_type"] == "QT_LoadBaseModel" and prompt["1"]["inputs"]["base_model"] == "flux1-dev-Q4_K_S.gguf"
    assert prompt["2"]["class_type"] == "QT_LoadBaseModel" and "dequant_dtype 'target' is dropped" in done.changes[1]
    assert prompt["2"]["inputs"]["base_model"] == "flux1-dev.safetensors"
    assert prompt["3"] == {"class_type": "QT_LoadBaseTextEncoder", "inputs": {
        "base_model": "black-forest-labs/FLUX.1-dev", "reference": "", "dtype": "default", "revision": "",
        "download_missing": False, "override": "clip_l.safetensors", "override_reference": "",
        "override_2": "a/t5-v1_1-xxl-encoder-Q8_0.gguf", "override_2_reference": ""}}
    assert "tokenizers and config.json come from black-forest-labs/FLUX.1-dev" in done.changes[2]
    assert "T5TokenizerOptions with min_length 256" in done.changes[2]
    assert prompt["4"] == {"class_type": "CLIPLoader",
                           "inputs": {"clip_name": "umt5.safetensors", "type": "wan", "device": "default"}}
    assert prompt["5"]["class_type"] == "QuadrupleCLIPLoader" and prompt["5"]["inputs"]["clip_name4"] == "4.sft"


# Type, file names as published, the base; or words of why there is none.
TEXT_ENCODERS = [
    ("flux", ["t5xxl-Q5_K_M.gguf", "ViT-L-14-TEXT-detail-improved.safetensors"], "black-forest-labs/FLUX.1-dev"),
    ("hunyuan_video", ["clip_l.safetensors", "llava-llama-3-8b-text-Q4_K_M.gguf"], "hunyuanvideo-community/HunyuanVideo"),
    ("wan", ["umt5-xxl-encoder-Q8_0.gguf"], "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
    ("wan", ["text-encoder-q8.gguf"], "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),  # the type says it
    ("qwen_image", ["Qwen2.5-VL-7B-Instruct-UD-Q4_K_S.gguf"], "Qwen/Qwen-Image"),
    ("flux2", ["Mistral-Small-3.2-24B-Instruct-2506-Q4_K_M.gguf"], "black-forest-labs/FLUX.2-dev"),
    ("lumina2", ["qwen_3_4b-Q8_0.gguf"], "Tongyi-MAI/Z-Image-Turbo"),
    ("lumina2", ["Qwen3-4B-UD-Q6_K_XL.gguf"], "Tongyi-MAI/Z-Image-Turbo"),
    ("lumina2", ["gemma-2-2b-it-Q8_0.gguf"], "is Gemma, and Tongyi-MAI/Z-Image-Turbo"),
    ("lumina2", ["encoder.gguf"], "does not say which text encoder it is"),
    ("flux2", ["Qwen3-4B-Q8_0.gguf"], "is Qwen3 4B, and black-forest-labs/FLUX.2-dev"),  # FLUX.2 [klein]
    ("flux2", ["Qwen3-8B-Q4_K_M.gguf"], "is another Qwen"),
    ("flux2", ["flux2-te.gguf"], "does not say which text encoder it is"),
    ("wan", ["t5-v1_1-xxl-encoder-Q8_0.gguf"], "is T5-XXL"),
    ("qwen_image", ["Qwen3-VL-4B-Q8_0.gguf"], "is Qwen3-VL"),
    ("qwen_image", ["Qwen2.5-VL-3B-Instruct-Q8_0.gguf"], "is another Qwen"),
    ("qwen_image", ["Qwen2.5-VL-7B-Instruct-mmproj-BF16.gguf"], "is an mmproj"),
    ("flux", ["t5xxl.gguf", "t5-v1_1-xxl-encoder-Q8_0.gguf"], "the same text encoder"),
    ("flux", ["a.gguf", "a.gguf"], "the same text encoder"),
    ("flux", ["clip_g.safetensors", "t5xxl.gguf"], "is CLIP-G"),
    *((kind, ["t5xxl-Q8_0.gguf"], f"text encoders of type {kind}") for kind in ("sd3", "chroma", "mochi", "ltxv", "hidream")),
    *((kind, ["clip_l.safetensors", "x.gguf"], f"text encoders of type {kind}") for kind in ("sdxl", "hunyuan_video_15", "wan")),
    ("sd3", ["clip_l.safetensors", "clip_g.safetensors", "t5xxl.gguf"], "text encoders of type sd3"),
    ("hidream", ["clip_l.sft", "clip_g.sft", "t5xxl.gguf", "llama.gguf"], "text encoders of type hidream"),
    (["7", 0], ["umt5.gguf"], "its type comes from another node"),
    ("wan", [["7", 0]], "which files it loads comes from other nodes"),
]
SIZES = {1: "CLIPLoaderGGUF", 2: "DualCLIPLoaderGGUF", 3: "TripleCLIPLoaderGGUF", 4: "QuadrupleCLIPLoaderGGUF"}


@pytest.mark.parametrize(("kind", "files", "wanted"), TEXT_ENCODERS, ids=[f"{kind} {files[0]}" for kind, files, _ in TEXT_ENCODERS])
def test_the_base_of_gguf_text_encoders(kind, files, wanted):
    """A base where type and names leave no choice; each that is chosen is one of the node's list."""
    from quantized_transformers.loaders.families.repos import KNOWN_BASES

    names = {f"clip_name{i + 1}": file for i, file in enumerate(files)} if len(files) > 1 else {"clip_name": files[0]}
    inputs = names | ({"type": kind} if len(files) < 3 else {})
    given = {"3": {"class_type": SIZES[len(files)], "inputs": inputs}}
    done = migrate(given)
    if "/" not in wanted or " " in wanted:
        assert done.workflow == given and wanted in done.left[0]
        return
    made = done.workflow["3"]["inputs"]
    assert made["base_model"] == wanted and wanted in KNOWN_BASES
    assert [made["override"], made["override_2"]] == [*files, "none"][:2]


def test_qwen_image_edit_needs_eyes():
    """Where pictures go into the text encoder, the base is one that refuses a text encoder without eyes."""
    given = {"3": {"class_type": "CLIPLoaderGGUF", "inputs": {"clip_name": "Qwen2.5-VL-7B-Q8_0.gguf", "type": "qwen_image"}},
             "4": {"class_type": "TextEncodeQwenImageEditPlus", "inputs": {"clip": ["3", 0]}}}
    done = migrate(given)
    assert done.workflow["3"]["inputs"]["base_model"] == "Qwen/Qwen-Image-Edit-2509"
    assert "mmproj file" in done.changes[0] and "override_2" in done.changes[0]


def test_gguf_text_encoders_of_the_page():
    """Links and linked widgets stay: the CLIP's, and what a subgraph shows of the file's widget."""
    inner = {"id": "s", "name": "Sub", "inputs": [], "outputs": [], "links": [], "state": {"lastNodeId": 2, "lastLinkId": 0},
             "nodes": [node(2, "CLIPLoaderGGUF", ["umt5-Q8_0.gguf", "wan"], outputs=[("CLIP", "CLIP", None)])]}
    graph = page([node(3, "DualCLIPLoaderGGUF", ["clip_l.safetensors", "t5xxl.gguf", "flux"], outputs=[("CLIP", "CLIP", [1])]),
                  node(4, "CLIPTextEncode", ["a cat"], [("clip", "CLIP", 1)]),
                  node(5, "s", [], properties={"proxyWidgets": [["2", "clip_name"], ["2", "type"]]})],
                 [[1, 3, 0, 4, 0, "CLIP"]], definitions={"subgraphs": [inner]})
    done = migrate(graph)
    whole(done.workflow)
    made = by_id(done.workflow, 3)
    assert (made["type"], made["widgets_values"]) == ("QT_LoadBaseTextEncoder", [
        "black-forest-labs/FLUX.1-dev", "", "default", "", False, "clip_l.safetensors", "", "t5xxl.gguf", ""])
    assert [(one["name"], one["links"]) for one in made["outputs"]] == [("CLIP", [1]), ("report", None)]
    inside = done.workflow["definitions"]["subgraphs"][0]["nodes"][0]
    assert inside["type"] == "QT_LoadBaseTextEncoder" and inside["widgets_values"][5] == "umt5-Q8_0.gguf"
    assert by_id(done.workflow, 5)["properties"]["proxyWidgets"] == [["2", "override"]]


def test_sglang():
    graph = page([node(1, "SGLDOptions", ["auto-detect"], outputs=[("sgld_options", "SGLD_OPTIONS", [1])]),
                  node(2, "SGLDUNETLoader", ["flux1-dev.safetensors", "default"], [("sgld_options", "SGLD_OPTIONS", 1)],
                       [("MODEL", "MODEL", [2])]),
                  node(3, "SGLDLoraLoader", ["a.safetensors", 0.7, "nick", "transformer_2"], [("model", "MODEL", 2)],
                       [("MODEL", "MODEL", None)]),
                  node(4, "SGLDUNETLoader", ["flux1-dev.safetensors", "fp8_e4m3fn"], outputs=[("MODEL", "MODEL", [])]),
                  node(5, "SGLDUNETLoader", ["ltx-2.3.safetensors", "default"], outputs=[("MODEL", "MODEL", [])]),
                  node(6, "SGLDiffusionGenerateImage", [])],
                 [[1, 1, 0, 2, 0, "SGLD_OPTIONS"], [2, 2, 0, 3, 0, "MODEL"]])
    done = migrate(graph)
    whole(done.workflow)
    kinds = {one["id"]: (one["type"], one["widgets_values"]) for one in done.workflow["nodes"]}
    assert kinds == {
        2: ("QT_LoadBaseModel", ["flux1-dev.safetensors", "transformer", "load", "", "default", "", False, "auto"]),
        3: ("LoraLoaderModelOnly", ["a.safetensors", 0.7]),
        4: ("UNETLoader", ["flux1-dev.safetensors", "fp8_e4m3fn"]),  # the cast is kept
        5: ("UNETLoader", ["ltx-2.3.safetensors", "default"]),  # of no architecture that ours loads
        6: ("SGLDiffusionGenerateImage", [])}
    assert "nickname 'nick' is dropped" in done.changes[1] and "target 'transformer_2'" in done.changes[1]
    assert done.changes[-1].startswith("node 1 SGLDOptions removed") and len(done.left) == 1


def test_nothing_to_do_and_no_workflow():
    plain = page([node(1, "UNETLoader", ["x.safetensors", "default"])], [])
    done = migrate(plain)
    assert done.workflow == plain and not done.changes and not done.left
    for wrong in ({}, {"a": 1}, {"1": {"inputs": {}}}, {"prompt": {"1": {}}}):
        with pytest.raises(CheckpointError, match="no workflow"):
            migrate(wrong)
    for broken in (page([{"type": "SGLDOptions"}], []), page([7], []), page([node(1, "SGLDUNETLoader", [])], None)):
        broken["nodes"] = [*broken["nodes"], node(2, "NunchakuFluxDiTLoader", FLUX, [("model_path", "COMBO", 3)])]
        with pytest.raises(CheckpointError, match="malformed"):
            migrate(broken)
    groups = migrate(page([], [], extra={"groupNodes": {"G": {"nodes": [{"type": "UnetLoaderGGUF"}]}}}))
    assert groups.left == ["group node G: it holds UnetLoaderGGUF; ungroup it, then migrate again"]


def test_the_command(tmp_path):
    source = tmp_path / "work flow.json"
    text = json.dumps(flux_page())
    source.write_text(text, encoding="utf-8")

    def run(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(PACK), "migrate", *map(str, arguments)], capture_output=True,
                              text=True, check=False)

    done = run(source)
    made = tmp_path / "work flow.migrated.json"
    assert done.returncode == 0 and source.read_text(encoding="utf-8") == text
    assert json.loads(made.read_text(encoding="utf-8")) == migrate(flux_page()).workflow
    assert done.stdout.splitlines()[-1] == f"3 changed, 0 left: {made}"
    again = run(source)  # nothing is overwritten that was not named
    assert again.returncode == 1 and "exists already" in again.stderr
    named = run(source, "--output", source, "--json")
    assert named.returncode == 0 and len(json.loads(named.stdout)["changes"]) == 3
    assert source.read_text(encoding="utf-8") == made.read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {source.name, made.name}  # no partial files
    wrong = run(tmp_path / "none.json")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
