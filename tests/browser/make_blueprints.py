"""Write subgraphs/*.json: blueprints for ComfyUI's node library, made from the graphs of workflows (a maintainer's tool).

    python tests/browser/make_blueprints.py      in the environment of dev.py, COMFYUI_PATH set

A blueprint is a workflow whose subgraph also has the loaders: a picture and an instruction go in, a picture comes out.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from browser.definitions import WORKFLOWS, place_models
from browser.graph import Workflow, shown
from browser.make_workflows import BUILD, fixed, versions, write

from support.browser import Frontend
from support.pack import PACK
from support.server import Server

SERIALIZED = "() => JSON.stringify(app.graph.serialize())"  # unlike a saved file with the inputs that widgets stand for
DROPPED, OUTSIDE = "PreviewAny", "LoadImage"  # of the workflow, not of the blueprint; what it is fed from


@dataclass(frozen=True)
class Blueprint:
    """A workflow as one node."""

    title: str
    workflow: str
    category: str
    description: str

    def graph(self) -> Workflow:
        """The workflow with its loaders in the subgraph, whose node shows the override too."""
        made = next(workflow for workflow in WORKFLOWS if workflow.name == self.workflow)
        nodes = [[node for node in column if node.type != DROPPED] for column in made.outside]
        return dataclasses.replace(
            made, note="", title=self.title, outside=[[node for node in column if node.type == OUTSIDE] for column in nodes],
            inside=[*([node for node in column if node.type != OUTSIDE] for column in nodes), *made.inside],
            shown=(*made.shown, shown("override", "override")), slots={})


BLUEPRINTS = (
    Blueprint("FLUX.1 ModelOpt FP8 text to image", "flux1_dev_modelopt_fp8", "Image generation and editing/Text to image",
              "FLUX.1-dev with its transformer exchanged for NVIDIA ModelOpt FP8 weights."),
    Blueprint("Wan2.2 dual transformer with override", "wan22_t2v_a14b_modelopt_fp8",
              "Video generation and editing/Text to video",
              "Wan2.2 T2V A14B: the high-noise transformer in ModelOpt FP8, transformer_2 in BF16 from the base."),
    Blueprint("Qwen-Image-Edit", "qwen_image_edit_2511_modelopt_fp8", "Image generation and editing/Edit image",
              "Qwen-Image-Edit-2511 in ModelOpt FP8: a picture and an instruction in, a picture out."),
)


def build(frontend: Frontend, blueprint: Blueprint, version: dict[str, str]) -> dict[str, Any]:
    """The blueprint as the frontend serialises its node and subgraph; ids do not depend on the run."""
    frontend.run(BUILD, {**dataclasses.asdict(blueprint.graph()), "versions": version})
    saved = json.loads(fixed(frontend.run(SERIALIZED), blueprint.title))
    subgraph, = saved["definitions"]["subgraphs"]
    subgraph |= {"category": blueprint.category, "description": blueprint.description}
    node, = (node for node in saved["nodes"] if node["type"] == subgraph["id"])
    node |= {"pos": [0, 0], "order": 0, "properties": {"cnr_id": "quantized-transformers"},
             "inputs": [{**given, "link": None} for given in node["inputs"]],
             "outputs": [{**given, "links": []} for given in node["outputs"]]}
    return {"revision": 0, "last_node_id": saved["last_node_id"], "last_link_id": saved["last_link_id"], "nodes": [node],
            "links": [], "version": 0.4, "definitions": {"subgraphs": [subgraph]}, "extra": {}}


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
                made = build(frontend, blueprint, versions(server))
                write(PACK / "subgraphs" / f"{blueprint.title}.json", made)
                print(blueprint.title, [i["name"] for i in made["nodes"][0]["inputs"]],
                      [o["name"] for o in made["nodes"][0]["outputs"]])


if __name__ == "__main__":
    main()
