"""What is asked of a server: bodies as sglang/multimodal_gen/runtime/entrypoints/openai/protocol.py reads them.

A server has defaults that no client wants in silence (docs/sources/sglang.md, "Server: what it leaves to its
clients"), so every body says: PNG, the picture itself, seed, size, and noise from the CPU, which is the same on any
card and number of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from . import known

QUALITIES = ("default", "exact", "lossless", "high")
ACCEPT_SIZE = "accept_size"
# What the nodes say themselves; and what names files, addresses or programs of the server's machine.
OURS = frozenset({
    "prompt", "negative_prompt", "n", "num_outputs_per_prompt", "size", "width", "height", "seed", "num_frames", "fps",
    "seconds", "output_format", "response_format", "generator_device", "background", "model", "user", "image",
    "image[]", "url", "url[]", "mask", "input_reference", "video_reference", "rollout", "enhance_prompt", "extra_body",
    "extra_json", "extra_params", "extra_sampling_params", "save_output", "profile", "profile_all_stages",
    "num_profiled_timesteps"})
_PLACES = ("_path", "_url", "_dir", "_file", "_file_name")
_BY_WIDGET = {"num_inference_steps": "steps", "guidance_scale": "cfg", "true_cfg_scale": "true_cfg",
              "guidance_scale_2": "cfg_2", "flow_shift": "flow_shift", "quality": "quality"}


@dataclass(frozen=True)
class Drawing:
    """What a node asks for. 0 and "default" leave a number to the model. `frames` and `fps` are a video's."""

    prompt: str
    negative_prompt: str = ""
    width: int = 1024
    height: int = 1024
    steps: int = 0
    cfg: float = 0.0
    seed: int = 0
    true_cfg: float = 0.0
    quality: str = QUALITIES[0]
    frames: int = 0
    fps: int = 0
    cfg_2: float = 0.0
    flow_shift: float = 0.0
    extra: str = ""

    @property
    def accepts_size(self) -> bool:
        """Whether what comes may be of another size or length."""
        return self._extra().get(ACCEPT_SIZE) is True

    def fields(self, pipeline: str) -> dict[str, Any]:
        """What all bodies have in common, for a server whose pipeline is of this class. Raises CheckpointError for an
        `extra` that would undo what a node says, or name a place on the server."""
        two = self.negative_prompt.strip() or self.true_cfg > 1 or pipeline not in known.DISTILLED  # evaluations a step
        cfg, true_cfg = self.cfg, self.true_cfg
        if known.takes_true_cfg(pipeline) and cfg and not true_cfg:
            cfg, true_cfg = 0.0, cfg
        said = {"num_inference_steps": self.steps, "guidance_scale": cfg, "true_cfg_scale": true_cfg,
                "guidance_scale_2": self.cfg_2, "flow_shift": self.flow_shift,
                "quality": "" if self.quality == QUALITIES[0] else self.quality}
        found: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed, "generator_device": "cpu"}
        found |= {"negative_prompt": self.negative_prompt} if two else {}
        found |= {name: value for name, value in said.items() if value}
        extra = self._extra()
        extra.pop(ACCEPT_SIZE, None)
        for name in _names(extra):
            if name in OURS or name.endswith(_PLACES) or name in found:
                raise CheckpointError(
                    Text("extra must not set {name}", name=name), "",
                    Text("use {widget}", widget=_BY_WIDGET[name]) if name in _BY_WIDGET else Text("leave it away"))
        return found | extra

    def notes(self, pipeline: str) -> list[str]:
        """What a report says of how this is drawn."""
        steps, cfg = self.steps or Text("the model's"), self.cfg or Text("the model's")
        lines: list[str] = [Text("{width} x {height}, steps: {steps}, cfg: {cfg}, seed {seed}", width=self.width,
                                 height=self.height, steps=steps, cfg=cfg, seed=self.seed)]
        if self.negative_prompt.strip() and pipeline in known.DISTILLED:
            lines.append(Text("the negative prompt turns true CFG on, which this model was not made for: two "
                              "evaluations a step, and another picture"))
        return lines

    def _extra(self) -> dict[str, Any]:
        if not self.extra.strip():
            return {}
        try:
            found = json.loads(self.extra)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(Text("extra is no JSON: {error}", error=error), "",
                                  Text('write it as {example}', example='{"max_sequence_length": 512}')) from None
        if not isinstance(found, dict):
            raise CheckpointError(Text("extra is no JSON object"), "",
                                  Text('write it as {example}', example='{"max_sequence_length": 512}'))
        return found


def _names(value: Any) -> Iterator[str]:
    """Every name in nested JSON."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield str(name)
        yield from _names(inner)
    for inner in value if isinstance(value, list) else ():
        yield from _names(inner)


def image(drawing: Drawing, pipeline: str) -> dict[str, Any]:
    """Of /v1/images/generations."""
    return {**drawing.fields(pipeline), "n": 1, "size": f"{drawing.width}x{drawing.height}", "output_format": "png",
            "response_format": "b64_json"}


def edit(drawing: Drawing, pipeline: str) -> list[tuple[str, str]]:
    """The text fields of /v1/images/edits, in order; pictures come beside them. Raises CheckpointError for an `extra`
    that the server would leave unread there."""
    found = image(drawing, pipeline)
    if unread := sorted(found.keys() - known.EDIT_FIELDS):
        raise CheckpointError(Text("SGLang's edits do not take {names}", names=", ".join(unread)), "",
                              Text("leave it out of extra"))
    return _form(found)


def video(drawing: Drawing, pipeline: str) -> dict[str, Any]:
    """Of /v1/videos."""
    return {**drawing.fields(pipeline), "n": 1, "size": f"{drawing.width}x{drawing.height}",
            "num_frames": drawing.frames, "fps": drawing.fps}


def video_form(drawing: Drawing, pipeline: str) -> list[tuple[str, str]]:
    """The text fields of /v1/videos where a picture or a video comes beside them."""
    return _form(video(drawing, pipeline))


def frames(drawing: Drawing, pipeline: str) -> dict[str, Any]:
    """Of /rollout/generate, which gives the decoded frames as they are."""
    found = drawing.fields(pipeline)
    direct = ("prompt", "negative_prompt", "seed", "generator_device", "num_inference_steps", "guidance_scale",
              "true_cfg_scale")
    others = {name: found.pop(name) for name in list(found) if name not in direct}
    return {**found, "width": drawing.width, "height": drawing.height, "num_frames": drawing.frames, "fps": drawing.fps,
            "num_outputs_per_prompt": 1, "rollout": False, **({"extra_sampling_params": others} if others else {})}


def _form(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """As a form says it: an empty text counts as none there, so an empty negative prompt is a blank."""
    return [(name, value if isinstance(value, str) and value else " " if value == "" else json.dumps(value))
            for name, value in fields.items()]
