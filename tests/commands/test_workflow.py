"""`workflow`: what a workflow needs, what of it is here, and its affinity key; all against files, a hub and ComfyUI's own
folders, in processes of their own."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from browser.notes import NOTES

from quantized_transformers.engines.worker.graphs import NoWorkflowError, prompt_of
from quantized_transformers.engines.worker.loaders import QUERIED, STOCK
from quantized_transformers.engines.worker.workflow import Workflow
from quantized_transformers.loaders.errors import CheckpointError
from support import downloads
from support import text_encoders as texts
from support.hub import FakeRepo, Hub
from support.pack import COMFYUI, PACK

pytestmark = pytest.mark.host

API = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((PACK / "workflows" / "api").glob("*.json"))}
PAGE = {name: json.loads((PACK / "workflows" / f"{NOTES[name].title}.json").read_text(encoding="utf-8")) for name in API}
WAN = "wan22_t2v_a14b_modelopt_fp8"


def rows(workflow: dict) -> list[tuple]:
    return sorted((one.node, one.kind, one.input, one.reference, one.component) for one in
                  Workflow(prompt_of(workflow)).asked())


def key(workflow: dict) -> str:
    found = Workflow(prompt_of(workflow)).affinity()
    assert len(found) == 12 and int(found, 16) >= 0
    return found


def look(tmp_path: Path, workflow: dict, *options: str, hub: Hub | None = None) -> tuple[int, dict]:
    """(exit code, JSON) of the command."""
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(workflow), encoding="utf-8")
    process = downloads.start(hub, tmp_path / "home", str(file), "--json", *options, command="workflow")
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, json.loads(out) | {"stderr": err}


def of(found: dict, kind: str, name: str = "") -> dict:
    row, = [row for row in found["references"] if row["class"] == kind and row["input"].startswith(name)]
    return row


@pytest.fixture
def base(tmp_path):
    """A --base-directory."""
    for folder in ("diffusers", "diffusion_models", "loras", "vae", "text_encoders", "checkpoints"):
        (tmp_path / "base" / "models" / folder).mkdir(parents=True)
    return tmp_path / "base"


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


# Reading workflows


@pytest.mark.parametrize("name", API)
def test_both_formats_of_a_template_say_the_same(name):
    assert rows(PAGE[name]) == rows(API[name]) and key(PAGE[name]) == key(API[name])
    expected = set()
    for number, one in API[name].items():  # read without this pack's code
        kind, inputs = one["class_type"], one["inputs"]
        main = ["reference"] if inputs.get("reference") else ["base_model", "folder", "weights", "override"]
        listed = [inputs.get(field) for field in {*main, *(("override", "override_2") if "base_model" in inputs else ())}
                  if kind.startswith("QT_") and inputs.get(field) not in (None, "none", "load", "defer to override")]
        listed += [value for field, value in inputs.items() if kind.endswith("Loader") or kind.startswith("Lora")
                   if isinstance(value, str) and value.endswith((".safetensors", ".gguf")) and not kind.startswith("QT_")]
        expected |= {(number, kind, value) for value in listed}
    assert {(number, kind, reference) for number, kind, _, reference, _ in rows(API[name])} == expected and expected


def test_templates_of_one_model_have_keys_of_their_own():
    assert len({key(workflow) for workflow in API.values()}) == len(API)


@pytest.mark.parametrize("file", sorted((PACK / "subgraphs").glob("*.json")), ids=lambda file: file.stem)
def test_inside_a_subgraph_the_shown_widget_says(file):
    """The blueprint's loaders are inside; what its own widget says goes in."""
    blueprint = json.loads(file.read_text(encoding="utf-8"))
    found = rows(blueprint)
    assert len(found) >= 3 and all(":" in one[0] and one[3] for one in found)
    holder, = blueprint["nodes"]
    shown = [socket["widget"]["name"] for socket in holder["inputs"] if "widget" in socket]
    names = {"override", "weights", "base_model"} & set(shown)
    for name in names:
        changed = copy.deepcopy(blueprint)
        changed["nodes"][0]["widgets_values"][shown.index(name)] = "owner/other"
        assert "owner/other" in {one[3] for one in rows(changed)} and key(changed) != key(blueprint)
    changed = copy.deepcopy(blueprint)
    changed["nodes"][0]["mode"] = 2
    assert rows(changed) == []


def page(nodes: list[dict], links: list[list], **more) -> dict:
    return {"nodes": [{"mode": 0, "inputs": [], "outputs": [], **one} for one in nodes], "links": links, **more}


def test_what_does_not_run_is_not_asked_for_and_what_passes_on_passes():
    """A muted loader; an override behind a bypassed LoRA and a reroute; a text that a primitive says."""
    model = {"name": "model", "type": "MODEL"}
    nodes = [
        {"id": 1, "type": "QT_LoadBaseModel", "outputs": [{"type": "MODEL"}],
         "widgets_values": ["owner/base", "transformer_2", "load", ""]},
        {"id": 2, "type": "LoraLoaderModelOnly", "mode": 4, "inputs": [model | {"link": 1}], "outputs": [{"type": "MODEL"}],
         "widgets_values": ["away.safetensors", 1]},
        {"id": 3, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 2}], "outputs": [{"type": "*"}]},
        {"id": 4, "type": "QT_ApplyTransformerOverride", "inputs": [
            model | {"link": 3}, {"name": "reference", "type": "STRING", "widget": {"name": "reference"}, "link": 4}],
         "widgets_values": ["owner/listed", "auto", "", "", "auto", "auto", "", False, "auto"]},
        {"id": 5, "type": "PrimitiveNode", "outputs": [{"type": "STRING"}], "widgets_values": ["owner/free", "fixed"]},
        {"id": 6, "type": "QT_LoadBaseVAE", "mode": 2, "widgets_values": ["owner/muted"]},
    ]
    links = [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "*"], [3, 3, 0, 4, 0, "MODEL"], [4, 5, 0, 4, 1, "STRING"]]
    sent = {"1": node("QT_LoadBaseModel", base_model="owner/base", component="transformer_2"),
            "4": node("QT_ApplyTransformerOverride", model=["1", 0], override="owner/listed", reference="owner/free")}
    assert rows(page(nodes, links)) == rows(sent) == [
        ("1", "QT_LoadBaseModel", "base_model", "owner/base", "transformer_2"),
        ("4", "QT_ApplyTransformerOverride", "reference", "owner/free", "transformer_2")]
    assert key(page(nodes, links)) == key(sent)
    for node_of_links in (nodes[0], nodes[4]):  # muted: its link is as none, and the widget says what it said
        node_of_links["mode"] = 2
    nodes[4]["type"], nodes[3]["widgets_values"][2] = "PrimitiveString", "owner/own"
    assert rows(page(nodes, links)) == [("4", "QT_ApplyTransformerOverride", "reference", "owner/own", "transformer")]
    by_link = copy.deepcopy(sent) | {"7": node("PrimitiveString", value="owner/free")}
    by_link["4"]["inputs"]["reference"] = ["7", 0]
    assert rows(by_link) == rows(sent) and key(by_link) == key(sent)


def test_a_subgraph_used_twice_and_links_that_go_nowhere():
    inner = {"id": "sub", "inputs": [{"name": "base_model"}], "outputs": [{"name": "MODEL"}], "nodes": [
        {"id": 1, "type": "QT_LoadBaseModel", "mode": 0, "inputs": [
            {"name": "base_model", "type": "COMBO", "widget": {"name": "base_model"}, "link": 1}],
         "outputs": [{"type": "MODEL"}], "widgets_values": ["owner/inside", "transformer", "load", ""]}],
        "links": [{"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 1, "target_slot": 0},
                  {"id": 2, "origin_id": 1, "origin_slot": 0, "target_id": -20, "target_slot": 0}]}
    holder = {"type": "sub", "outputs": [{"type": "MODEL"}]}
    override = {"type": "QT_ApplyTransformerOverride", "widgets_values": ["owner/o", "auto", ""]}
    workflow = page(
        [holder | {"id": 2, "widgets_values": ["owner/one"]}, holder | {"id": 3, "widgets_values": []},
         override | {"id": 4, "inputs": [{"name": "model", "type": "MODEL", "link": 5}]},
         override | {"id": 6, "inputs": [{"name": "model", "type": "MODEL", "link": 77}]}],
        [[5, 2, 0, 4, 0, "MODEL"]], definitions={"subgraphs": [inner]})
    assert [(row[0], row[3]) for row in rows(workflow)] == [
        ("2:1", "owner/one"), ("3:1", "owner/inside"), ("4", "owner/o"), ("6", "owner/o")]
    bases = {row[1:3] for number in ("4", "6") for row in Workflow(prompt_of(workflow))._models(number)}
    assert bases == {("owner/one", "owner/o"), ("", "owner/o")}


def test_a_workflow_without_end_and_group_nodes():
    loop = {"id": "sub", "inputs": [], "outputs": [], "links": [], "nodes": [{"id": 1, "type": "sub", "mode": 0}]}
    with pytest.raises(CheckpointError, match="malformed"):
        prompt_of(page([{"id": 1, "type": "sub"}], [], definitions={"subgraphs": [loop]}))
    grouped = page([{"id": 1, "type": "workflow>mine"}], [], extra={"groupNodes": {
        "mine": {"nodes": [{"type": "UNETLoader"}]}, "unused": {"nodes": [{"type": "VAELoader"}]}}})
    with pytest.raises(CheckpointError, match="group node mine holds UNETLoader"):
        prompt_of(grouped)
    for strange in ({}, {"nodes": 3}, {"a": {"b": 1}}, {"prompt": []}):
        with pytest.raises(NoWorkflowError):
            prompt_of(strange)
    with pytest.raises(CheckpointError, match="malformed"):
        prompt_of({"nodes": [{"type": "QT_LoadBaseVAE"}], "links": []})


# Affinity


def test_affinity_is_of_the_models_alone():
    def changed(number: str, **inputs) -> dict:
        workflow = copy.deepcopy(API[WAN])
        assert inputs.keys() <= workflow[number]["inputs"].keys()
        workflow[number]["inputs"] |= inputs
        return workflow

    usual, prompts = key(API[WAN]), [number for number, one in API[WAN].items() if one["class_type"] == "CLIPTextEncode"]
    seeds = [number for number, one in API[WAN].items() if "noise_seed" in one["inputs"]]
    for number in prompts:
        assert key(changed(number, text="a cat")) == usual
    for number in seeds:
        assert key(changed(number, noise_seed=7, steps=3)) == usual
    for seed in range(3):
        shuffled = list(API[WAN].items())
        random.Random(seed).shuffle(shuffled)
        assert key(dict(shuffled)) == usual
    # neither how it is computed nor how it is spelled
    assert key(changed("3", compute="native", download_missing=True)) == usual
    assert key(changed("3", override=" https://huggingface.co/lmsys/wan22-t2v-a14b-modelopt-fp8-sglang-transformer ")) == usual
    assert key(API[WAN] | {"90": node("LoraLoaderModelOnly", lora_name="a.safetensors", model=["3", 0])}) == usual
    assert key(API[WAN] | {"90": node("QT_InspectCheckpoint", checkpoint="owner/x")}) == usual
    others = [changed("2", base_model="owner/base"), changed("3", override="owner/override"), changed("3", reference="a/b"),
              changed("2", component="transformer_2"), changed("5", revision="abc"), changed("3", revision="abc"),
              changed("3", weights_name="other.safetensors"), changed("6", override="t5.gguf"), changed("7", base_model="a/b"),
              API[WAN] | {"90": node("UNETLoader", unet_name="x.safetensors")},
              API[WAN] | {"90": node("VAELoader", vae_name="x.safetensors")}]
    assert len({usual, *map(key, others)}) == len(others) + 1


def test_affinity_knows_which_transformer_an_override_replaces():
    def pair(first: str, second: str) -> dict:
        return {"1": node("QT_LoadBaseModel", base_model="a/b", component="transformer"),
                "2": node("QT_LoadBaseModel", base_model="a/b", component="transformer_2"),
                "3": node("QT_ApplyTransformerOverride", override=first, model=["1", 0]),
                "4": node("QT_ApplyTransformerOverride", override=second, model=["2", 0])}

    assert key(pair("o/high", "o/low")) != key(pair("o/low", "o/high"))


def test_affinity_reads_either_slash_and_every_rank():
    loaders = [node("QT_NunchakuSVDQLoader", weights=name, rank=rank) for name, rank in
               (("svdq\\flux.safetensors", 0), ("svdq/flux.safetensors", 0), ("svdq/flux.safetensors", 32))]
    first, same, other = (key({"1": loader}) for loader in loaders)
    assert first == same != other


# What is here


def test_all_is_here(tmp_path, base, tiny):
    (base / "models" / "diffusers" / "owner").mkdir()
    (base / "models" / "diffusers" / "owner" / "base").symlink_to(tiny.pipeline)
    (base / "models" / "diffusion_models" / "fp8").symlink_to(tiny.fp8)
    for folder, name in (("loras", "sub/l.safetensors"), ("vae", "v.safetensors"), ("text_encoders", "t.safetensors")):
        (base / "models" / folder / name).parent.mkdir(exist_ok=True)
        (base / "models" / folder / name).write_bytes(b"x")
    workflow = {"1": node("QT_LoadBaseModel", base_model="owner\\base", weights="defer to override"),
                "2": node("QT_ApplyTransformerOverride", override="fp8", model=["1", 0]),
                "3": node("LoraLoader", lora_name="sub/l.safetensors", model=["2", 0]),
                "4": node("QT_LoadLoRA", lora="sub/l.safetensors"),
                "5": node("VAELoader", vae_name="v.safetensors"), "6": node("VAELoader", vae_name="pixel_space"),
                "7": node("CLIPLoader", clip_name="t.safetensors"),
                "8": node("QT_BuildGGUF", base=str(tiny.bf16), output="out")}
    code, found = look(tmp_path, workflow, "--base-directory", str(base))
    assert code == 0 and not found["missing"] and found["bytes_missing"] == 0
    assert {row["where"] for row in found["references"]} == {"local"} and len(found["references"]) == 7
    assert {row["problem"] for row in found["references"]} == {None}
    assert Path(of(found, "QT_LoadBaseModel")["path"]).resolve().is_relative_to(tiny.pipeline)
    assert of(found, "LoraLoader")["path"] == str(base / "models" / "loras" / "sub" / "l.safetensors")
    assert found["affinity"] == key(workflow)
    # the same without a ComfyUI: names of lists are nowhere then
    process = subprocess.run([sys.executable, str(PACK), "workflow", str(tmp_path / "workflow.json"), "--base-directory",
                              str(base)], capture_output=True, text=True, check=False,
                             env=downloads.environment(None, tmp_path / "home", COMFYUI_PATH=""))
    assert process.returncode == 1 and "ComfyUI was not found" in process.stderr


def test_torch_and_the_server_are_not_started(tmp_path, base):
    file = tmp_path / "w.json"
    file.write_text(json.dumps(API[WAN] | {"90": node("LoraLoader", lora_name="a.safetensors")}), encoding="utf-8")
    script = ("import runpy, sys\nsys.modules['torch'] = None\n"
              f"sys.argv = ['qt', 'workflow', {str(file)!r}, '--base-directory', {str(base)!r}]\n"
              f"try: runpy.run_path({str(PACK)!r}, run_name='__main__')\n"
              "finally: print([name for name in sys.modules if name in ('nodes', 'execution', 'comfy.sd')])")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False,
                          env=downloads.environment(None, tmp_path / "home", HF_HUB_OFFLINE="1"))
    assert done.returncode == 1 and done.stdout.endswith("[]\n"), done.stderr
    assert "LoraLoader, lora_name: a.safetensors\n  MISSING" in done.stdout


def test_what_is_nowhere(tmp_path, base):
    (base / "models" / "loras" / "sub").mkdir()
    (base / "models" / "loras" / "sub" / "l.safetensors").write_bytes(b"x")
    workflow = {"1": node("QT_LoadBaseModel", base_model="gone.safetensors"),
                "2": node("LoraLoaderModelOnly", lora_name="sub\\l.safetensors"),
                "3": node("CheckpointLoaderSimple", ckpt_name="gone.ckpt"), "4": node("QT_LoadBaseVAE", base_model=""),
                "5": node("QT_ApplyTransformerOverride", override=["9", 0]), "9": node("SomeNode")}
    code, found = look(tmp_path, workflow, "--base-directory", str(base))
    assert code == 1 and found["missing"] and found["bytes_missing"] == 0
    assert {row["node"]: row["missing"] for row in found["references"]} == {
        "1": ["gone.safetensors"], "2": ["sub\\l.safetensors"], "3": ["gone.ckpt"], "4": ["-"], "5": []}
    assert "takes no backslashes: here it is sub/l.safetensors" in of(found, "LoraLoaderModelOnly")["problem"]
    assert "folder checkpoints" in of(found, "CheckpointLoaderSimple")["problem"]
    assert "no checkpoint is chosen" in of(found, "QT_LoadBaseVAE")["problem"]
    assert "comes from another node" in of(found, "QT_ApplyTransformerOverride")["problem"]
    assert {row["where"] for row in found["references"]} == {"local"}


def test_folders_of_extra_model_paths(tmp_path, base):
    (tmp_path / "shared" / "loras").mkdir(parents=True)
    (tmp_path / "shared" / "loras" / "l.safetensors").write_bytes(b"x")
    (tmp_path / "shared" / "unets" / "m.safetensors").parent.mkdir()
    (tmp_path / "shared" / "unets" / "m.safetensors").write_bytes(b"x")
    extra = tmp_path / "extra.yaml"
    extra.write_text("mine:\n  base_path: shared\n  loras: loras\n  diffusion_models: unets\n", encoding="utf-8")
    workflow = {"1": node("LoraLoader", lora_name="l.safetensors"), "2": node("UNETLoader", unet_name="m.safetensors"),
                "3": node("QT_LoadBaseModel", base_model="m.safetensors")}
    code, found = look(tmp_path, workflow, "--base-directory", str(base))
    assert code == 1 and all(row["missing"] for row in found["references"])
    code, found = look(tmp_path, workflow, "--base-directory", str(base), "--extra-model-paths-config", str(extra))
    assert code == 0 and {row["path"] for row in found["references"]} == {
        str(tmp_path / "shared" / "loras" / "l.safetensors"), str(tmp_path / "shared" / "unets" / "m.safetensors")}


def test_the_yaml_beside_comfyui_counts(tmp_path):
    """That of the ComfyUI that is found, which need hold no more than its code."""
    other = tmp_path / "comfyui"
    other.mkdir()
    for name in ("comfy", "utils", "folder_paths.py", "main.py"):
        (other / name).symlink_to(COMFYUI / name)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "l.safetensors").write_bytes(b"x")
    (other / "extra_model_paths.yaml").write_text(f"a:\n  loras: {tmp_path / 'kept'}\n", encoding="utf-8")
    file = tmp_path / "w.json"
    file.write_text(json.dumps({"1": node("LoraLoader", lora_name="l.safetensors")}), encoding="utf-8")
    code, text = downloads.run(None, tmp_path / "home", str(file), "--base-directory", str(tmp_path), command="workflow",
                               COMFYUI_PATH=str(other))
    assert code == 0 and str(tmp_path / "kept" / "l.safetensors") in text and "1 references, nothing is missing" in text


def test_what_is_on_a_server_is_not_missing(tmp_path):
    """By the class's name, in both formats; a base and an override that nobody has."""
    sent = {"1": node("QT_ServerModel", base_model="owner/nowhere", override="none", override_reference="owner/o",
                      transformer_2="owner/o2", server="gpu1", kind="auto", reference="")}
    values = {"base_model": "owner/nowhere", "new": 3, "override": "none", "override_reference": "owner/o",
              "transformer_2": "owner/o2"}  # an order of widgets that is not known here
    opened = page([{"id": 1, "type": "QT_ServerModel", "widgets_values": list(values.values()), "inputs": [
        {"name": name, "type": "STRING", "widget": {"name": name}, "link": None} for name in values]}], [])
    assert rows(opened) == rows(sent) and key(opened) == key(sent)
    code, found = look(tmp_path, sent)
    assert code == 0 and not found["missing"] and {row["where"] for row in found["references"]} == {"server"}
    assert [(row["input"], row["reference"], row["component"]) for row in found["references"]] == [
        ("base_model", "owner/nowhere", ""), ("override_reference", "owner/o", ""),
        ("transformer_2", "owner/o2", "transformer_2")]
    for name, value in (("base_model", "a/b"), ("override", "c/d"), ("transformer_2", "e/f"), ("revision", "g")):
        inputs = {**sent["1"]["inputs"], "override_reference": "" if name == "override" else "owner/o", name: value}
        assert key({"1": node("QT_ServerModel", **inputs)}) != key(sent)
    assert key({"1": node("QT_ServerModel", **sent["1"]["inputs"] | {"server": "gpu2"})}) == key(sent)


# Downloads


def test_missing_on_a_hub_then_fetched(tmp_path, base, tiny):
    of_base, override, _ = downloads.repos(FakeRepo, tiny)
    workflow = {"1": node("QT_LoadBaseModel", base_model="owner/base", weights="defer to override"),
                "2": node("QT_ApplyTransformerOverride", override="owner/fp8", model=["1", 0]),
                "3": node("QT_ApplyTransformerOverride", override="owner/fp8", model=["1", 0])}
    with Hub({"owner/base": of_base, "owner/fp8": override}) as hub:
        code, found = look(tmp_path, workflow, "--base-directory", str(base), hub=hub)
        sizes = {name: len(data) for name, data in override.files.items() if name in ("config.json", downloads.WEIGHTS)}
        first, second, third = found["references"]
        assert code == 1 and found["missing"] and first["where"] == second["where"] == "hub"
        assert set(second["missing"]) == set(sizes) and second["bytes_missing"] == sum(sizes.values())
        assert set(first["missing"]) == {"model_index.json", "transformer/config.json"} and third["bytes_missing"]
        assert found["bytes_missing"] == first["bytes_missing"] + second["bytes_missing"], "each file once"
        assert not hub.asked_for(downloads.WEIGHTS), "looked at only"
        code, fetched = look(tmp_path, workflow, "--base-directory", str(base), "--download", hub=hub)
        assert code == 0 and not fetched["missing"] and fetched["affinity"] == found["affinity"]
        assert f"fetching {downloads.WEIGHTS}" in fetched["stderr"] and hub.asked_for(downloads.WEIGHTS) == [""]
        hub.log.clear()
        code, again = look(tmp_path, workflow, "--base-directory", str(base))  # and without the hub
        assert code == 0 and {row["where"] for row in again["references"]} == {"local"} and not hub.log


def test_gated_repos_and_no_hub_at_all(tmp_path, base, tiny):
    repo = FakeRepo.of(tiny.fp8, gated=True)
    workflow = {"1": node("QT_LoadBaseModel", base_model="owner/fp8")}
    with Hub({"owner/fp8": repo}) as hub:
        code, found = look(tmp_path, workflow, "--download", "--base-directory", str(base), hub=hub)
        row = of(found, "QT_LoadBaseModel")
        assert code == 1 and row["licence"].endswith("owner/fp8") and f"gated: {row['licence']}" in found["stderr"]
        assert "error: " in found["stderr"]
        repo.granted = True
        assert look(tmp_path, workflow, "--download", "--base-directory", str(base), hub=hub)[0] == 0
    code, found = look(tmp_path, {"1": node("QT_LoadBaseModel", base_model="owner/gone")}, "--base-directory", str(base))
    row = of(found, "QT_LoadBaseModel")
    assert code == 1 and row["where"] == "hub" and row["missing"] == ["owner/gone"] and row["bytes_missing"] == 0
    assert "is not on this machine; its size is not known" in row["problem"]


def test_text_encoders_that_are_replaced(tmp_path, base):
    """A row for the base and one for what takes the place of an encoder, whose own weights need not be there."""
    kept = texts.base("flux1", tmp_path / "flux")
    repo = FakeRepo.of(kept)
    whole, t5 = sorted(repo.files), FakeRepo.of(kept / "text_encoder_2")
    own = {name for name in whole if name.startswith("text_encoder_2/") and name.endswith(".safetensors")}
    workflow = {"1": node("QT_LoadBaseTextEncoder", base_model="owner/flux", override="owner/t5", override_2="none")}
    with Hub({"owner/flux": repo, "owner/t5": t5, "owner/other": t5}) as hub:
        code, found = look(tmp_path, workflow, "--base-directory", str(base), hub=hub)
        of_base, replaced = found["references"]
        assert code == 1 and replaced["input"] == "override" and set(replaced["missing"]) == set(t5.files)
        assert "model_index.json" in of_base["missing"] and not own & set(of_base["missing"])
        code, found = look(tmp_path, workflow, "--base-directory", str(base), "--download", hub=hub)
        assert code == 0 and len(found["references"]) == 2, found
        assert not [name for name in own if hub.asked_for(f"owner/flux/resolve/{repo.commit}/{name}")]
        another = {"1": node("QT_LoadBaseTextEncoder", base_model="owner/flux", override_reference="owner/other")}
        code, found = look(tmp_path, another, "--base-directory", str(base), hub=hub)
        of_base, replaced = found["references"]
        assert code == 1 and not of_base["missing"] and of_base["path"] and "owner/other is here" in of_base["problem"]
        assert set(replaced["missing"]) == set(t5.files) and found["bytes_missing"] == replaced["bytes_missing"] > 0
    # the override alone is not here, nor anywhere; then the base's weights alone
    lost = {"1": node("QT_LoadBaseTextEncoder", base_model="owner/flux", override="gone.safetensors")}
    code, found = look(tmp_path, lost, "--base-directory", str(base))
    of_base, replaced = found["references"]
    assert code == 1 and replaced["missing"] == ["gone.safetensors"] and not of_base["missing"]
    assert "is known when gone.safetensors is here" in of_base["problem"]
    code, found = look(tmp_path, {"1": node("QT_LoadBaseTextEncoder", base_model="owner/flux")}, "--base-directory", str(base))
    assert code == 1 and of(found, "QT_LoadBaseTextEncoder")["missing"] == ["owner/flux"]


# Files that are none


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"a": 1}', '"text"', '{"nodes": {}}', "\x00"])
def test_no_workflow(tmp_path, content):
    (tmp_path / "w.json").write_text(content, encoding="utf-8")
    code, text = downloads.run(None, tmp_path, str(tmp_path / "w.json"), command="workflow")
    assert code == 2 and text.startswith("error: ") and "what to do" in text and "Traceback" not in text


def test_no_file_and_no_folder(tmp_path):
    code, text = downloads.run(None, tmp_path, str(tmp_path / "gone.json"), command="workflow")
    assert code == 2 and "gone.json" in text and "Traceback" not in text
    (tmp_path / "w.json").write_text(json.dumps(API[WAN]), encoding="utf-8")
    code, text = downloads.run(None, tmp_path, str(tmp_path / "w.json"), "--base-directory", str(tmp_path / "gone"),
                               command="workflow")
    assert code == 1 and "there is no folder" in text


def test_a_workflow_of_nothing(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps({"1": node("PreviewAny")}), encoding="utf-8")
    code, text = downloads.run(None, tmp_path, str(tmp_path / "w.json"), command="workflow")
    assert code == 0 and "this workflow names no model" in text


def test_every_queried_node_has_a_badge():
    """No node with a reference is forgotten."""
    from quantized_transformers.loaders.queries import NODES

    assert QUERIED.keys() == set(NODES) and not QUERIED.keys() & STOCK.keys()
