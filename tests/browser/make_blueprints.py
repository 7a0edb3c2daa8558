"""Write subgraphs/*.json, the blueprints of ComfyUI's node library, from workflows/*.json (a maintainer's tool).

    python tests/browser/make_blueprints.py      in the environment of dev.py, COMFYUI_PATH set

The frontend itself converts a workflow's nodes into a subgraph (blueprint.js).
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from browser.definitions import WORKFLOWS, place_models

from support.browser import Frontend
from support.pack import PACK
from support.server import Server

SCRIPT = (Path(__file__).parent / "blueprint.js").read_text(encoding="utf-8")
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
DROPPED = ("MarkdownNote", "PreviewAny")  # of the workflow, not of the blueprint
OUTSIDE = ("LoadImage", "SaveImage", "SaveVideo")  # what they are linked to becomes an input or output


@dataclass(frozen=True)
class Blueprint:
    """A workflow as one node: which widgets of which of its nodes (by key) the user sees."""

    title: str
    workflow: str
    category: str
    description: str
    widgets: tuple[tuple[str, str], ...]
    labels: tuple[tuple[str, str], ...] = (("text", "prompt"),)


BLUEPRINTS = (
    Blueprint("FLUX.1 ModelOpt FP8 text to image", "flux1_dev_modelopt_fp8", "Image generation and editing/Text to image",
              "FLUX.1-dev with its transformer exchanged for NVIDIA ModelOpt FP8 weights.",
              (("prompt", "text"), ("latent", "width"), ("latent", "height"), ("sample", "seed"), ("sample", "steps"),
               ("guidance", "guidance"), ("override", "override"))),
    Blueprint("Wan2.2 dual transformer with override", "wan22_t2v_a14b_modelopt_fp8",
              "Video generation and editing/Text to video",
              "Wan2.2 T2V A14B: the high-noise transformer in ModelOpt FP8, transformer_2 in BF16 from the base.",
              (("prompt", "text"), ("latent", "width"), ("latent", "height"), ("latent", "length"),
               ("high_sample", "noise_seed"), ("override", "override")),
              (("text", "prompt"), ("text_1", "negative prompt"))),
    Blueprint("Qwen-Image-Edit", "qwen_image_edit_2511_modelopt_fp8", "Image generation and editing/Edit image",
              "Qwen-Image-Edit-2511 in ModelOpt FP8: a picture and an instruction in, a picture out.",
              (("prompt", "prompt"), ("sample", "seed"), ("sample", "steps"), ("override", "override"))),
)


def build(frontend: Frontend, blueprint: Blueprint) -> dict[str, Any]:
    """The blueprint as the frontend serialises it; ids do not depend on the run."""
    graph = json.loads((PACK / "workflows" / f"{blueprint.workflow}.json").read_text(encoding="utf-8"))
    workflow = next(workflow for workflow in WORKFLOWS if workflow.name == blueprint.workflow)
    ids = {node.key: i for i, node in enumerate(workflow.nodes, 2)}  # 1 is the note
    text = frontend.run(SCRIPT, {
        "graph": graph, "title": blueprint.title, "description": blueprint.description, "category": blueprint.category,
        "drop": DROPPED, "outside": OUTSIDE, "widgets": [[ids[key], widget] for key, widget in blueprint.widgets]})
    fixed: dict[str, str] = {}
    for found in UUID.findall(text):
        name = f"quantized-transformers/{blueprint.title}/{len(fixed)}"
        fixed.setdefault(found, str(uuid.uuid5(uuid.NAMESPACE_URL, name)))
    made = json.loads(UUID.sub(lambda match: fixed[match[0]], text))
    for each in (made["nodes"][0], made["definitions"]["subgraphs"][0]):
        for given in each["inputs"]:
            if given["name"] in dict(blueprint.labels):
                given["label"] = dict(blueprint.labels)[given["name"]]
    return made


def main() -> None:
    import shutil

    from support.pack import COMFYUI

    (PACK / "subgraphs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qt-blueprints-") as temp:
        (Path(temp) / "input").mkdir()
        shutil.copy(COMFYUI / "input" / "example.png", Path(temp) / "input")
        place_models(Path(temp))
        with Server(Path(temp)) as server, Frontend(server.port) as frontend:
            for blueprint in BLUEPRINTS:
                made = build(frontend, blueprint)
                path = PACK / "subgraphs" / f"{blueprint.title}.json"
                path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                print(path.name, [i["name"] for i in made["nodes"][0]["inputs"]],
                      [o["name"] for o in made["nodes"][0]["outputs"]])


if __name__ == "__main__":
    main()
