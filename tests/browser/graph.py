"""What the example workflows are made of: nodes in columns, one subgraph, and the nodes that most of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Link = tuple[str, int]
SEED = 42
OUTSIDE = 400  # wide, of the nodes left of the subgraph. Heights that are given are those that Nodes 2.0 need


@dataclass(frozen=True)
class Node:
    """One node: a key to link to, its type, (node key, output) by input name, and widget values that differ.

    `models` are files that it names: name, url and directory, as ComfyUI's missing-model list reads them.
    """

    key: str
    type: str
    inputs: dict[str, Link] = field(default_factory=dict)
    widgets: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    width: int = 340
    height: int = 0
    models: tuple[dict[str, str], ...] = ()


Column = list[Node]


@dataclass(frozen=True)
class Shown:
    """A widget of the subgraph's node: its name, and which widgets (node key, name) inside have its value."""

    name: str
    of: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Workflow:
    """A note, columns of nodes that load, the subgraph called `title` of columns of nodes, and the node behind it.

    `slots` are labels of the subgraph's inputs for whole models, by the node outside that feeds them. `flat`: one node is all
    that would be in the subgraph, and stands in its place.
    """

    name: str
    note: str
    title: str
    outside: list[Column]
    inside: list[Column]
    save: Node
    shown: tuple[Shown, ...]
    slots: dict[str, str] = field(default_factory=dict)
    flat: bool = False

    @property
    def nodes(self) -> list[Node]:
        """All but the note, which is made first, and the subgraph's node, made last, in the order in which they are made."""
        return [*(node for column in self.outside for node in column), self.save,
                *(node for column in self.inside for node in column)]

    def ids(self) -> dict[str, str]:
        """Key → id in a prompt; inside, behind the id of the subgraph's node."""
        within = {node.key for column in self.inside for node in column if not self.flat}
        first = 2 if self.note else 1
        holder = len(self.nodes) + first
        return {node.key: f"{holder}:{i}" if node.key in within else str(i) for i, node in enumerate(self.nodes, first)}


def shown(name: str, key: str, widget: str = "") -> Shown:
    return Shown(name, ((key, widget or name),))


PROMPT = shown("prompt", "prompt", "text")
NEGATIVE = shown("negative prompt", "negative", "text")
SIZE = (shown("width", "latent"), shown("height", "latent"))
FRAMES = (*SIZE, shown("length", "latent"))
SAMPLED = (shown("seed", "sample"), shown("steps", "sample"))


def override(base: str, repo: str, kind: str = "component", title: str = "", **widgets: Any) -> Column:
    """The base without its weights, and the quantized transformer in its place."""
    return [Node("base", "QT_LoadBaseModel", {}, {"base_model": base, "weights": "defer to override"}, width=OUTSIDE),
            Node("override", "QT_ApplyTransformerOverride", {"model": ("base", 0)}, {"override": repo, "kind": kind, **widgets},
                 title, OUTSIDE)]


def encoder_and_vae(base: str) -> Column:
    return [Node("clip", "QT_LoadBaseTextEncoder", {}, {"base_model": base}, width=OUTSIDE, height=352),
            Node("vae", "QT_LoadBaseVAE", {}, {"base_model": base}, width=OUTSIDE)]


def report(key: str, component: str = "transformer", height: int = 220) -> Node:
    """What a loader says: formats found, how they run on this device, notes."""
    return Node(f"report_{key}", "PreviewAny", {"source": (key, 1)}, {}, f"Report: {component}", OUTSIDE, height)


def text(key: str, prompt: str, title: str, clip: str = "clip") -> Node:
    return Node(key, "CLIPTextEncode", {"clip": (clip, 0)}, {"text": prompt}, title, height=150)


def nothing() -> Node:
    """The negative prompt of models that are sampled with cfg 1."""
    return Node("none", "ConditioningZeroOut", {"conditioning": ("prompt", 0)}, title="No negative prompt")


def picture(name: str) -> Node:
    return Node("save", "SaveImage", {"images": ("decode", 0)}, {"filename_prefix": name})


def video(name: str) -> Node:
    return Node("save", "SaveVideo", {"video": ("video", 0)}, {"filename_prefix": f"video/{name}"})


def frames(fps: int) -> Node:
    return Node("video", "CreateVideo", {"images": ("decode", 0)}, {"fps": fps})


def ksampler(model: Link, positive: Link, negative: Link, latent: Link, steps: int, cfg: float, sampler: str = "euler",
             scheduler: str = "simple") -> Node:
    return Node("sample", "KSampler", {"model": model, "positive": positive, "negative": negative, "latent_image": latent},
                {"seed": SEED, "control_after_generate": "randomize", "steps": steps, "cfg": cfg, "sampler_name": sampler,
                 "scheduler": scheduler})


def decode(samples: str = "sample") -> Node:
    return Node("decode", "VAEDecode", {"samples": (samples, 0), "vae": ("vae", 0)})


def number(key: str, value: int, title: str) -> Node:
    return Node(key, "PrimitiveInt", {}, {"value": value}, title)


def size(width: int, height: int) -> Column:
    """A size that two nodes need."""
    return [number("width", width, "width"), number("height", height, "height")]


def sampled(conditioning: Link, model: Link, sigmas: Node, latent: str, negative: Link | None = None, cfg: float = 1.0,
            sampler: str = "euler") -> Column:
    """SamplerCustomAdvanced. Without negative prompt: for models that have guidance as an input, or need none."""
    guider = Node("guider", "CFGGuider", {"model": model, "positive": conditioning, "negative": negative}, {"cfg": cfg}) \
        if negative else Node("guider", "BasicGuider", {"model": model, "conditioning": conditioning})
    return [guider,
            Node("noise", "RandomNoise", {}, {"noise_seed": SEED, "control_after_generate": "randomize"}),
            Node("sampler", "KSamplerSelect", {}, {"sampler_name": sampler}), sigmas,
            Node("sample", "SamplerCustomAdvanced", {"noise": ("noise", 0), "guider": ("guider", 0), "sampler": ("sampler", 0),
                                                     "sigmas": ("sigmas", 0), "latent_image": (latent, 0)})]
