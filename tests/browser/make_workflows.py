"""Write workflows/*.json, workflows/api/*.json and workflows/*.jpg with the real frontend (a maintainer's tool).

    python tests/browser/make_workflows.py [NAME...]      in the environment of dev.py, COMFYUI_PATH set

The graphs are data in definitions.py. ComfyUI's own frontend builds, lays out and serialises them, and makes the API
twin by the same function as its Run button.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from browser.definitions import WORKFLOWS, place_models
from browser.graph import Workflow

from support.browser import Frontend, problems_of_the_host
from support.pack import COMFYUI, PACK
from support.server import Server

BUILD = (Path(__file__).parent / "build.js").read_text(encoding="utf-8")
# Nothing but the graph, and text however small, for the thumbnails.
PLAIN = {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasMenu": False, "Comfy.Graph.CanvasInfo": False,
         "LiteGraph.Canvas.MinFontSizeForLOD": 0, "Comfy.UseNewMenu": "Disabled", "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
         "Comfy.NodeBadge.NodeIdBadgeMode": "None", "Comfy.Workflow.WorkflowTabsPosition": "Sidebar"}
FIT = """async (text) => {
  await app.loadGraphData(JSON.parse(text))
  if (!app.extensionManager.focusMode) await app.extensionManager.command.execute('Workspace.ToggleFocusMode')
  const boxes = [...app.graph.nodes, ...app.graph.groups].map((item) => item.boundingRect ?? item._bounding)
  const left = Math.min(...boxes.map((b) => b[0])), top = Math.min(...boxes.map((b) => b[1]))
  const wide = Math.max(...boxes.map((b) => b[0] + b[2])) - left, tall = Math.max(...boxes.map((b) => b[1] + b[3])) - top
  const scale = Math.min(1880 / wide, 1040 / tall), ds = app.canvas.ds
  ds.scale = scale
  ds.offset = [960 / scale - wide / 2 - left, 540 / scale - tall / 2 - top]
  app.canvas.setDirty(true, true)
}"""


def main() -> None:
    import shutil

    chosen = sys.argv[1:]
    folder = PACK / "workflows"
    (folder / "api").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qt-workflows-") as temp:
        (Path(temp) / "input").mkdir()
        shutil.copy(COMFYUI / "input" / "example.png", Path(temp) / "input")
        place_models(Path(temp))
        known = problems_of_the_host(Path(temp) / "host")
        with Server(Path(temp)) as server, Frontend(server.port, PLAIN, known) as frontend:
            for workflow in WORKFLOWS:
                if not chosen or workflow.name in chosen:
                    ui, api = build(frontend, workflow, versions(server))
                    write(folder / f"{workflow.name}.json", ui)
                    write(folder / "api" / f"{workflow.name}.json", api)
                    thumbnail(frontend, ui, folder / f"{workflow.name}.jpg")
                    print(workflow.name, len(ui["nodes"]), "nodes")
            if frontend.problems:
                sys.exit("\n".join(frontend.problems))


def versions(server: Server) -> dict[str, str]:
    """cnr_id -> version, as ComfyUI's manager writes them beside each node."""
    pack = next(line.split('"')[1] for line in (PACK / "pyproject.toml").read_text(encoding="utf-8").splitlines()
                if line.startswith("version"))
    return {"comfy-core": server.get("/system_stats")["system"]["comfyui_version"], "quantized-transformers": pack}


def build(frontend: Frontend, workflow: Workflow, version: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(UI graph, API prompt) as the frontend serialises them; ids and view do not depend on the run."""
    columns = [[(title, [dataclasses.asdict(node) for node in nodes]) for title, nodes in column]
               for column in workflow.columns]
    made = json.loads(frontend.run(BUILD, {"note": workflow.note, "columns": columns, "versions": version}))
    ui = made["workflow"]
    ui["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"quantized-transformers/{workflow.name}"))
    ui["extra"] = {}  # neither the view nor what other extensions of the page left
    return ui, made["output"]


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def thumbnail(frontend: Frontend, graph: dict[str, Any], path: Path) -> None:
    """The whole graph as the frontend shows it, 480 x 270."""
    from PIL import Image

    frontend.run(FIT, json.dumps(graph))
    frontend.page.wait_for_timeout(1500)  # pictures in nodes load, text widgets move along
    image = Image.open(io.BytesIO(frontend.page.screenshot())).convert("RGB")
    image.resize((480, 270), Image.Resampling.LANCZOS).save(path, quality=88)


if __name__ == "__main__":
    main()
