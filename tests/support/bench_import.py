"""What the pack costs a start of ComfyUI, beside thirteen of ComfyUI's own extra modules, and its first list of nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from support.pack import COMFYUI, PACK

# Every ninth of those of ComfyUI 0.30.0's extra modules that import no other package, in its order: together they take
# what thirteen of all 118 take on average (13.3 against 12.9 ms).
EXTRAS = ("tomesd", "video_model", "sdupscale", "pag", "hunyuan", "lt_audio", "wan", "apg", "joyimage", "nop", "color",
          "frame_interpolation", "triposplat")
MODULES = 20  # of the pack, when ComfyUI has started
# As ComfyUI's main.py does it, in the order of it: its own modules and its server, then ours by its own loader; then
# what it answers to a page that asks for our nodes. Each arm in a process of its own, forked from one that has imported
# ComfyUI. Nothing is in the model folders but what is said; the first round writes the bytecode.
SCRIPT = r"""
import asyncio, gc, json, os, sys, time
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.options; comfy.options.enable_args_parsing()
import folder_paths, nodes, server, execution
from comfy_api.latest import ComfyExtension, io, ui
arms, extras, pack, rounds = json.loads(os.environ["BENCH"])

async def extra(name):
    path = os.path.join(os.environ["COMFYUI_PATH"], "comfy_extras", f"nodes_{name}.py")
    assert await nodes.load_custom_node(path, set(), "comfy_extras"), name

async def start(wanted, models):
    for key in list(folder_paths.folder_names_and_paths):
        folder_paths.folder_names_and_paths[key] = ([], set())
    folder_paths.models_dir = models
    server.PromptServer(asyncio.get_running_loop())
    # what the first module, and the first pyproject.toml, bring is ComfyUI's own
    await extra("preview_any")
    from comfy_config import config_parser
    config_parser.extract_node_configuration(os.environ["COMFYUI_PATH"])
    gc.collect()
    gc.disable()  # whoever happens to fill its first generation
    begun = time.process_time()
    if wanted == "extras":
        for name in extras:
            await extra(name)
    else:
        assert await nodes.load_custom_node(pack, set(), "custom_nodes")
    spent = {"start": (time.process_time() - begun) * 1e3}
    loaded = [name for name in sys.modules if name.startswith(pack.replace(".", "_x_"))]
    spent["modules"] = len(loaded)
    if wanted == "ours":
        begun = time.process_time()  # what its loader does for any pack, beside importing it
        config_parser.extract_node_configuration(pack)
        spent["project"] = (time.process_time() - begun) * 1e3
        ours = [found for found in nodes.NODE_CLASS_MAPPINGS.values() if found.__module__ in loaded]
        spent["nodes"] = len(ours)
        for name in ("first", "again"):
            begun = time.process_time()
            with folder_paths.cache_helper:
                json.dumps([found.GET_NODE_INFO_V1() for found in ours])
            spent[name] = (time.process_time() - begun) * 1e3
    return spent

def measure(arm):
    out, into = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(into, json.dumps(asyncio.run(start(*arm))).encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        said = file.read()
    os.waitpid(child, 0)
    return json.loads(said)

found = []
for number in range(rounds + 1):
    turn = {index: measure(arms[index]) for index in (range(len(arms)) if number % 2 else reversed(range(len(arms))))}
    found.append([turn[index] for index in range(len(arms))])
print(json.dumps(found[1:]))
"""


def pipeline(models: Path) -> None:
    """A folder of models with one pipeline of FLUX.1 in it; of its weights there are only the names."""
    folder = models / "diffusers_components" / "flux"
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"],
             "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
             "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
             "tokenizer_2": ["transformers", "T5TokenizerFast"]}
    for name in index:
        if name[0] != "_":
            (folder / name).mkdir(parents=True)
            (folder / name / "config.json").write_text("{}", encoding="utf-8")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").touch()
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def importing(folder: Path, budget: Callable[[str, float, float, str], None], rounds: int = 15) -> None:
    """The start with cached bytecode, with no models and with a diffusers pipeline among them; `rounds` of each in turns."""
    places = {"empty": folder / "no models", "pipeline": folder / "a pipeline"}
    places["empty"].mkdir()
    pipeline(places["pipeline"])
    arms = [("extras", "empty"), ("ours", "empty"), ("ours", "pipeline")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=COMFYUI, env={
        **environment, "PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "COMFYUI_PATH": str(COMFYUI), "BENCH": json.dumps(
            [[(wanted, str(places[place])) for wanted, place in arms], EXTRAS, str(PACK), rounds])})
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = list(zip(*json.loads(done.stdout.splitlines()[-1]), strict=True))
    # the best counts: others on the machine can only make it worse
    stock, ours, among = ({key: min(one[key] for one in rows) for key in rows[0]} for rows in found)
    print(f"the pack in a start of ComfyUI, by its own loader, beside {len(EXTRAS)} of its extra modules: processor time, "
          f"bytecode cached, best of {rounds} forks each\n"
          f"  {ours['nodes']:.0f} nodes, {ours['modules']:.0f} modules: {ours['start']:.1f} ms (with a pipeline among the models "
          f"{among['start']:.1f}), of which ComfyUI reads pyproject.toml {ours['project']:.1f}; {len(EXTRAS)} extra modules "
          f"{stock['start']:.1f} ms, {ours['start'] / stock['start']:.2f} x as a whole\n"
          f"  first list of its nodes {ours['first']:.1f} ms, then {ours['again']:.1f} (with a pipeline {among['first']:.1f}, "
          f"then {among['again']:.1f})")
    for name, one in (("import", ours), ("import with a pipeline", among)):
        budget(f"{name}, over the extra modules", (one["start"] - one["project"]) / stock["start"], 0.5, "x")
    budget("modules of the pack", max(one["modules"] for rows in found[1:] for one in rows), MODULES, "")
    budget("start and first list with a pipeline, over the extra modules",
           (among["start"] + among["first"]) / stock["start"], 2, "x")
