"""What the example workflows are made of: nodes, groups, columns, and the nodes that most of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Link = tuple[str, int]


@dataclass(frozen=True)
class Node:
    """One node: a key to link to, its type, (node key, output) by input name, and widget values that differ.

    `models` are files that it names: name, url and directory, as ComfyUI's missing-model dialog reads them.
    """

    key: str
    type: str
    inputs: dict[str, Link] = field(default_factory=dict)
    widgets: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    width: int = 340
    height: int = 0
    models: tuple[dict[str, str], ...] = ()


Group = tuple[str, list[Node]]  # a title and its nodes, from top to bottom


@dataclass(frozen=True)
class Workflow:
    """A graph as columns from left to right, each of groups from top to bottom."""

    name: str
    note: str
    columns: list[list[Group]]

    @property
    def nodes(self) -> list[Node]:
        return [node for column in self.columns for _, nodes in column for node in nodes]


SEED = 42


def override(base: str, repo: str, kind: str = "component", **widgets: Any) -> list[Node]:
    """The base without its weights, and the quantized transformer in its place."""
    return [Node("base", "QT_LoadBaseModel", {}, {"base_model": base, "weights": "defer to override"}, width=400),
            Node("override", "QT_ApplyTransformerOverride", {"model": ("base", 0)}, {"override": repo, "kind": kind, **widgets},
                 width=400)]


def encoder_and_vae(base: str) -> list[Node]:
    return [Node("clip", "QT_LoadBaseTextEncoder", {}, {"base_model": base}, width=400),
            Node("vae", "QT_LoadBaseVAE", {}, {"base_model": base}, width=400)]


def text(key: str, prompt: str, title: str) -> Node:
    return Node(key, "CLIPTextEncode", {"clip": ("clip", 0)}, {"text": prompt}, title, height=150)


def nothing() -> Node:
    """The negative prompt of models that are sampled with cfg 1."""
    return Node("none", "ConditioningZeroOut", {"conditioning": ("prompt", 0)}, title="No negative prompt")


def reports(*keys: str) -> Group:
    """What each loader says: formats found, how they run on this device, notes."""
    titles = {"override": "Report: transformer", "svdq": "Report: transformer", "high": "Report: transformer",
              "low": "Report: transformer_2", "low_quantized": "Report: transformer_2", "clip": "Report: text encoder",
              "vae": "Report: VAE"}
    heights = {"override": 240, "svdq": 240, "high": 240, "low_quantized": 240}
    return "Reports", [Node(f"report_{key}", "PreviewAny", {"source": (key, 1)}, {}, titles[key], 420,
                            heights.get(key, 130)) for key in keys]


def result(images: Link, name: str, fps: int = 0) -> Group:
    if not fps:
        return "Result", [Node("save", "SaveImage", {"images": images}, {"filename_prefix": name}, width=420, height=380)]
    return "Result", [Node("video", "CreateVideo", {"images": images}, {"fps": fps}, width=420),
                      Node("save", "SaveVideo", {"video": ("video", 0)}, {"filename_prefix": f"video/{name}"}, width=420,
                           height=300)]


def ksampler(model: Link, positive: Link, negative: Link, latent: Link, steps: int, cfg: float) -> Node:
    return Node("sample", "KSampler", {"model": model, "positive": positive, "negative": negative, "latent_image": latent},
                {"seed": SEED, "control_after_generate": "fixed", "steps": steps, "cfg": cfg, "sampler_name": "euler",
                 "scheduler": "simple"})


def decode(samples: str = "sample") -> Node:
    return Node("decode", "VAEDecode", {"samples": (samples, 0), "vae": ("vae", 0)})


def size(width: int, height: int) -> list[Node]:
    return [Node(key, "PrimitiveInt", {}, {"value": value}, key)
            for key, value in (("width", width), ("height", height))]


def sampled(conditioning: Link, model: Link, sigmas: Node, latent: str) -> list[Node]:
    """SamplerCustomAdvanced without negative prompt: for models that have guidance as an input."""
    return [Node("guider", "BasicGuider", {"model": model, "conditioning": conditioning}),
            Node("noise", "RandomNoise", {}, {"noise_seed": SEED, "control_after_generate": "fixed"}),
            Node("sampler", "KSamplerSelect", {}, {"sampler_name": "euler"}), sigmas,
            Node("sample", "SamplerCustomAdvanced", {"noise": ("noise", 0), "guider": ("guider", 0), "sampler": ("sampler", 0),
                                                     "sigmas": ("sigmas", 0), "latent_image": (latent, 0)})]
