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


def test_gguf_text_encoders_are_left_and_the_rest_is_not():
    given = {"1": {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "flux1-dev-Q4_K_S.gguf"}},
             "2": {"class_type": "UnetLoaderGGUFAdvanced", "inputs": {
                 "unet_name": "flux1-dev.safetensors", "dequant_dtype": "target", "patch_dtype": "default",
                 "patch_on_device": False}},
             "3": {"class_type": "DualCLIPLoaderGGUF", "inputs": {
                 "clip_name1": "clip_l.safetensors", "clip_name2": "t5-v1_1-xxl-encoder-Q8_0.gguf", "type": "flux"}},
             "4": {"class_type": "CLIPLoaderGGUF", "inputs": {"clip_name": "umt5.safetensors", "type": "wan"}},
             "5": {"class_type": "QuadrupleCLIPLoaderGGUF", "inputs": {f"clip_name{i}": f"{i}.sft" for i in range(1, 5)}},
             "6": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}}}
    done = migrate(given)
    assert [line.split(":")[0] for line in done.left] == ["node 3 DualCLIPLoaderGGUF"]
    assert all("GGUF" in line and "ComfyUI-GGUF only" in line for line in done.left)
    prompt = done.workflow
    assert {key: prompt[key] for key in "36"} == {key: given[key] for key in "36"}
    assert prompt["1"]["class_type"] == "QT_LoadBaseModel" and prompt["1"]["inputs"]["base_model"] == "flux1-dev-Q4_K_S.gguf"
    assert prompt["2"]["class_type"] == "QT_LoadBaseModel" and "dequant_dtype 'target' is dropped" in done.changes[1]
    assert prompt["2"]["inputs"]["base_model"] == "flux1-dev.safetensors"
    assert prompt["4"] == {"class_type": "CLIPLoader",
                           "inputs": {"clip_name": "umt5.safetensors", "type": "wan", "device": "default"}}
    assert prompt["5"]["class_type"] == "QuadrupleCLIPLoader" and prompt["5"]["inputs"]["clip_name4"] == "4.sft"


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
