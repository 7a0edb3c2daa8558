"""Write workflows/*.json and workflows/api/*.json with the real frontend (a maintainer's tool).

    python tests/browser/make_workflows.py [NAME...]      in the environment of dev.py, COMFYUI_PATH set

The graphs are data in definitions.py. ComfyUI's own frontend builds, lays out and serialises them, and makes the API
twin by the same function as its Run button. A template is called as people read it, its twin as programs do.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from browser.definitions import WORKFLOWS, place_models
from browser.graph import Workflow
from browser.notes import NOTES

from support.browser import Frontend, problems_of_the_host
from support.pack import COMFYUI, PACK
from support.server import Server

BUILD = (Path(__file__).parent / "build.js").read_text(encoding="utf-8")
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


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
        with Server(Path(temp)) as server, Frontend(server.port, known=known) as frontend:
            for workflow in WORKFLOWS:
                if not chosen or workflow.name in chosen:
                    ui, api = build(frontend, workflow, versions(server))
                    write(folder / f"{NOTES[workflow.name].title}.json", ui)
                    write(folder / "api" / f"{workflow.name}.json", api)
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
    made = json.loads(fixed(frontend.run(BUILD, {**dataclasses.asdict(workflow), "versions": version}), workflow.name))
    ui = made["workflow"]
    ui["extra"] = {}  # neither the view nor what other extensions of the page left
    return ui, made["output"]


def fixed(text: str, name: str) -> str:
    """The same with random ids exchanged for ones that follow from the name and their order."""
    ids = {found: str(uuid.uuid5(uuid.NAMESPACE_URL, f"quantized-transformers/{name}/{i}"))
           for i, found in enumerate(dict.fromkeys(UUID.findall(text)))}
    return UUID.sub(lambda match: ids[match[0]], text)


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
