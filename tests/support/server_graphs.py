"""Graphs of the server nodes for a real ComfyUI, and what came of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import requests

from support import server as comfyui
from support import sglang
from support.miniature import STEPS
from support.sglang_real import SIZE, pixels

Graph = dict[str, dict[str, Any]]
TIMEOUT = 300.0  # s, for a picture on a machine that is busy


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def model(name: str, base: Path, server: str = "", override: Path | None = None,
          loras: Sequence[tuple[Path, float] | tuple[Path, float, str]] = (), **more: Any) -> tuple[Graph, list[Any]]:
    """(Server Model and as many Server LoRA, the output of the last)."""
    graph = {f"{name}_model": node("QT_ServerModel", reference=str(base), server=server,
                                   override_reference=str(override or ""), **more)}
    last = [f"{name}_model", 0]
    for number, (file, strength, *target) in enumerate(loras):
        graph[f"{name}_lora_{number}"] = node("QT_ServerLoRA", server_model=last, lora=str(file), strength=strength,
                                              target=target[0] if target else "all")
        last = [f"{name}_lora_{number}", 0]
    return graph, last


def picture(name: str, base: Path, server: str = "", override: Path | None = None, loras: Sequence[Any] = (),
            **drawn: Any) -> Graph:
    """A picture of the miniature, saved, with its report."""
    graph, last = model(name, base, server, override, loras)
    drawn = {"prompt": "a cat", "negative_prompt": "", "width": SIZE, "height": SIZE, "steps": STEPS, "cfg": 1.0, "seed": 7,
             "count": 1, **drawn}
    return {**graph, name: node("QT_ServerImage", server_model=last, **drawn),
            f"{name}_saved": node("SaveImage", images=[name, 0], filename_prefix=name),
            f"{name}_report": node("PreviewAny", source=[name, 1])}


def video(name: str, base: Path, server: str = "", **made: Any) -> Graph:
    """A video, saved, with its report."""
    graph, last = model(name, base, server)
    return {**graph, name: node("QT_ServerVideo", server_model=last, prompt="a cat", negative_prompt="", **made),
            f"{name}_saved": node("SaveVideo", video=[name, 0], filename_prefix=name, format="auto", codec="auto"),
            f"{name}_report": node("PreviewAny", source=[name, 1])}


def failed(comfy: comfyui.Server, graph: Graph) -> str:
    """What a graph that fails says."""
    said = comfyui.error_of(comfy.run(graph, TIMEOUT))
    assert said
    return said


def pictures(comfy: comfyui.Server, history: dict[str, Any], name: str) -> list[numpy.ndarray]:
    """float [H, W, 3] in 0..255 of each picture of a finished graph."""
    assert not comfyui.error_of(history), comfyui.error_of(history)
    saved = history["outputs"][f"{name}_saved"]["images"]
    return [pixels((comfy.base / one["type"] / one["subfolder"] / one["filename"]).read_bytes()) for one in saved]


def drawn(comfy: comfyui.Server, graph: Graph, name: str = "cat") -> numpy.ndarray:
    """The one picture of a graph."""
    one, = pictures(comfy, comfy.run(graph, TIMEOUT), name)
    return one


def report(history: dict[str, Any], name: str = "cat") -> str:
    return history["outputs"][f"{name}_report"]["text"][0]


def queued(comfy: comfyui.Server, graph: Graph) -> str:
    """The id of a graph that runs from now on."""
    status, answer = comfy.post("/prompt", {"prompt": graph})
    assert status == 200 and not answer.get("node_errors"), answer
    return answer["prompt_id"]


def is_busy(server: sglang.Server) -> bool:
    """Whether it draws: its workers answer nothing meanwhile."""
    try:
        requests.get(f"{server.url}/v1/list_loras", timeout=0.4)
    except requests.Timeout:
        return True
    return False


def all_busy(*servers: sglang.Server) -> bool:
    """Whether all draw at the same time."""
    found: list[bool] = []
    threads = [threading.Thread(target=lambda one=one: found.append(is_busy(one))) for one in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return all(found)
