"""What the pack costs every start of ComfyUI, and that one broken part does not take the others down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from support.pack import COMFYUI, FOLDERS, PACK

pytestmark = pytest.mark.host

# The host's own imports at the time custom nodes load (main.py imports these first), then the pack as the host loads it.
MEASURE = """
import asyncio, importlib.util, json, os, sys
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.options; comfy.options.enable_args_parsing()
import folder_paths, nodes, server, execution
from comfy_api.latest import ComfyExtension, io, ui
import comfy_extras.nodes_preview_any
before = set(sys.modules)
name = os.environ["PACK"].replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, os.path.join(os.environ["PACK"], "__init__.py"))
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
async def start():
    server.PromptServer(asyncio.get_running_loop())
    spec.loader.exec_module(module)
    extension = await module.comfy_entrypoint()
    await extension.on_load()
    return [c.GET_SCHEMA().node_id for c in await extension.get_node_list()]
schemas = asyncio.run(start())
print(json.dumps({"nodes": schemas, "all": sorted(sys.modules), "routes": len(server.PromptServer.instance.routes),
                  "new": sorted(m for m in set(sys.modules) - before if not m.startswith(name))}))
"""
NODES = ["QT_LoadBaseModel", "QT_LoadBaseTextEncoder", "QT_LoadBaseVAE", "QT_ApplyTransformerOverride",
         "QT_NunchakuSVDQLoader", "QT_ModelSlimLoader", "QT_AscendMXFP8Quantize", "QT_LoadLoRA", "QT_KeepDecoded",
         "QT_InspectCheckpoint",
         "QT_RepackModelSlimWan", "QT_BuildGGUF", "QT_BuildFP8Transformer", "QT_BuildNVFP4Transformer", "QT_SaveQuantizedModel",
         "QT_CompareModels", "QT_ServerModel", "QT_ServerLoRA", "QT_ServerImage", "QT_ServerVideo"]
HEAVY = ("diffusers", "transformers.models", "torchao", "peft", "flashinfer", "nunchaku", "torch_npu", "matplotlib")


@cache
def measure(pack=PACK, without: str = "") -> dict:
    """Start the pack in a fresh process with the host's imports and its server in place, as the host does: node ids, all
    modules, new foreign ones.

    `without`: a name of the host's that is deleted before.
    """
    code = MEASURE.replace("before = ", f"import comfy.samplers; del {without}\nbefore = ") if without else MEASURE
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, "PACK": str(pack), "COMFYUI_PATH": str(COMFYUI)}, cwd=COMFYUI)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"log": done.stderr}


def test_import_is_light():
    found = measure()
    assert found["nodes"] == NODES
    assert len(found["new"]) <= 20, found["new"]
    assert not [m for m in found["new"] if m.startswith(HEAVY)]
    ours = started(found)
    assert len(ours) <= 20, ours
    assert not [name for name in ours if name.startswith(("commands", "engines", "loaders", "makers", "quant", "views"))], \
        "what loads, and what lists need, is imported when it is asked for"


def test_a_broken_part_costs_only_its_own_nodes(tmp_path):
    import shutil

    for name in FOLDERS:
        shutil.copytree(PACK / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PACK / "__init__.py", tmp_path)
    (tmp_path / "nodes" / "apply_override.py").write_text("import a_package_that_is_not_there\n", encoding="utf-8")
    found = measure(tmp_path)
    assert found["nodes"] == [name for name in NODES if name != "QT_ApplyTransformerOverride"]
    assert "QT_ApplyTransformerOverride is not available" in found["log"]
    assert "a_package_that_is_not_there" in found["log"]


def started(found: dict) -> list[str]:
    """The pack's own modules of what was imported, by their paths."""
    prefix = str(PACK).replace(".", "_x_")
    return [name.removeprefix(prefix).strip(".").replace(".", "/") for name in found["all"] if name.startswith(prefix)]


def test_the_seam_says_what_it_has():
    """host/__init__.py imports a module with the first of its names; what it tells type checkers is the same."""
    import ast

    from quantized_transformers import host

    tree = ast.parse((PACK / "host" / "__init__.py").read_text(encoding="utf-8"))
    told = next(node for node in tree.body if isinstance(node, ast.If))
    assert {node.module: [alias.name for alias in node.names] for node in told.body} == \
        {module: names.split() for module, names in host._NAMES.items()}
    assert all(getattr(host, name) is not None for name in host._HOMES)
    assert not {path.stem for path in (PACK / "host").glob("*.py")} & set(host._HOMES), "a module would hide it"
    assert not hasattr(host, "no_such_name")


@pytest.mark.full
def test_a_host_without_sampler_names_costs_one_node():
    found = measure(without="comfy.samplers.KSampler.SAMPLERS")
    assert found["nodes"] == [name for name in NODES if name != "QT_CompareModels"]
    assert "lacks comfy.samplers.KSampler.SAMPLERS: Compare Models does not work" in found["log"]


def test_no_optional_package_is_needed():
    """Nothing at module level beyond the standard library, the pack itself and the host's API; in modules that only loads
    import, what every ComfyUI has besides. What Triton compiles is at module level: quant/kernels/triton.py imports it,
    where there is one."""
    import ast

    always = {"comfy_api", "__future__"} | set(sys.stdlib_module_names)
    first = set(started(measure()))
    for folder in (*FOLDERS, "."):
        for path in (PACK / folder).rglob("*.py") if folder != "." else (PACK / "__init__.py", PACK / "__main__.py"):
            module = path.relative_to(PACK).with_suffix("").as_posix().removesuffix("__init__").rstrip("/")
            allowed = always if module in first else always | {"torch", "numpy", "comfy_kitchen"}
            allowed = allowed | {"triton"} if module.startswith("quant/kernels/triton_code/") else allowed
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                    [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert all(name.split(".")[0] in allowed for name in names), (path, names)


def test_pyproject_and_requirements_agree():
    if sys.version_info < (3, 11):
        return
    import tomllib

    project = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
    listed = [line for line in (PACK / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert listed == project["project"]["dependencies"] and not any("torch" in line for line in listed)
    optional = [line for lines in project["project"]["optional-dependencies"].values() for line in lines]
    sys.path.append(str(PACK))
    from dev import at_the_end, requirement

    oldest = at_the_end("oldest", COMFYUI)  # where every bound, also of what is optional, is what is tested
    assert all(line.replace(">=", "==") in oldest for line in listed + optional), oldest
    developers = {requirement(line)[0] for line in (PACK / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()}
    assert {requirement(line)[0] for line in optional} <= developers
    assert project["project"]["name"] == "quantized-transformers"
    comfy = project["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"] and "web" not in comfy  # WEB_DIRECTORY says it already
