"""What the pack costs a start of ComfyUI, beside thirteen of ComfyUI's own extra modules, and its first list of nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import process_time

from support.bench import Row
from support.pack import COMFYUI, PACK

# Every ninth of those of ComfyUI 0.30.0's extra modules that import no other package, in its order: together they take
# what thirteen of all 118 take on average (13.3 against 12.9 ms).
EXTRAS = ("tomesd", "video_model", "sdupscale", "pag", "hunyuan", "lt_audio", "wan", "apg", "joyimage", "nop", "color",
          "frame_interpolation", "triposplat")
MODULES = 20  # of the pack, when ComfyUI has started
TITLE = (f"the pack in a start of ComfyUI, by its own loader, over {len(EXTRAS)} of ComfyUI's extra modules (bytecode cached), and "
         "asking ComfyUI for all that this pack leans on (host/contract.py)")
LINUX = True  # forks
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


def cases(folder: Path) -> list[tuple[Path, Path, Path]]:
    empty, models = folder / "no models", folder / "a pipeline"
    empty.mkdir()
    pipeline(models)
    return [(empty, models, folder / "bytecode")]


def measure(empty: str, models: str, bytecode: str, rounds: int = 15) -> list[Row]:
    """The start with cached bytecode, with no models and with a diffusers pipeline among them."""
    import comfy.sample  # noqa: F401  # what is there when it is asked
    import comfy.samplers  # noqa: F401
    import comfy.sd  # noqa: F401
    import latent_preview  # noqa: F401

    from quantized_transformers import host

    arms = [("extras", empty), ("ours", empty), ("ours", models)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=COMFYUI, env={
        **environment, "PYTHONPYCACHEPREFIX": bytecode, "COMFYUI_PATH": str(COMFYUI),
        "BENCH": json.dumps([arms, EXTRAS, str(PACK), rounds])})
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    # the best counts: others on the machine can only make it worse
    extras, ours, among = ({key: min(one[key] for one in rows) for key in rows[0]} for rows in found)
    extra = extras["start"]
    begun = process_time()
    lacks = host.all_lacks()  # remembered from here on
    asked = (process_time() - begun) * 1e3
    if lacks:
        raise RuntimeError(str(lacks))
    return [Row("start, but for ComfyUI's reading of pyproject.toml", (ours["start"] - ours["project"]) / extra, 0.5),
            Row("the same with a pipeline among the models", (among["start"] - among["project"]) / extra, 0.5),
            Row("start", ours["start"] / extra),
            Row("start and first list of its nodes, with a pipeline", (among["start"] + among["first"]) / extra, 2),
            Row("a list of its nodes again", ours["again"] / extra), Row("the same with a pipeline", among["again"] / extra),
            Row("asking for all that is leaned on, once", asked / extra, 2),
            Row("modules of the pack", max(ours["modules"], among["modules"]), MODULES, unit="modules")]
