"""Server Image, Server Video: what a server of SGLang's draws. They wait without holding up other nodes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import inputs
from .server import CATEGORY, Server


def _drawn(*after_negative: Any) -> list[Any]:
    """The inputs with which both nodes begin."""
    return [
        Server.Input("server_model", tooltip="From Server Model or Server LoRA."),
        io.String.Input("prompt", default="", multiline=True, dynamic_prompts=True, tooltip="What to draw."),
        io.String.Input("negative_prompt", default="", multiline=True, dynamic_prompts=True,
                        tooltip="What not to draw. Empty: nothing, and not the model's default. A model with distilled "
                                "guidance (FLUX, HunyuanVideo) takes two evaluations a step with one."),
        io.Int.Input("width", default=1024, min=16, max=16384, step=16, tooltip="Pixels."),
        io.Int.Input("height", default=1024, min=16, max=16384, step=16, tooltip="Pixels."),
        *after_negative,
        io.Int.Input("steps", default=0, min=0, max=10000, tooltip="Sampling steps. 0: the model's."),
        io.Float.Input("cfg", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01,
                       tooltip="Guidance: distilled where the model has that, else classifier-free. 0: the model's."),
        io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                     tooltip="Of the noise, which the server draws on its CPU: the same on any GPU and number of them, "
                             "and another than that of ComfyUI's samplers."),
    ]


def _quality() -> Any:
    return io.Combo.Input("quality", optional=True, options=["default", "exact", "lossless", "high"], default="default",
                          advanced=True,
                          tooltip="Which shortcuts the server may take: exact none, lossless those that only round "
                                  "differently, high also those that change what is computed.")


def _timeout() -> Any:
    return io.Int.Input("timeout", optional=True, default=1800, min=1, max=604800, advanced=True,
                        tooltip="The longest wait in seconds, warm-up and the server's queue included; for each "
                                "picture.")


def _extra() -> Any:
    return io.String.Input("extra", optional=True, default="", multiline=True, advanced=True,
                           tooltip='More fields of SGLang\'s request, as JSON: {"max_sequence_length": 512}. What it '
                                   'does not know, it leaves unread. {"accept_size": true} takes a result of another '
                                   'size.')


class QT_ServerImage(io.ComfyNode):
    """Pictures, drawn or edited by a server."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_ServerImage", display_name="Server Image", category=CATEGORY,
            description="Has a server draw pictures, or edit those that are given. What it serves and its LoRAs are "
                        "verified before and after; other nodes and other servers work meanwhile.",
            search_aliases=["sglang", "remote generate", "remote sampler", "text to image", "edit image"],
            inputs=[
                *_drawn(),
                io.Int.Input("count", default=1, min=1, max=64,
                             tooltip="How many pictures: one request each, of seed, seed + 1, ..."),
                io.Image.Input("images", optional=True,
                               tooltip="What to edit: every picture of the batch, in order, goes into one edit."),
                io.Float.Input("true_cfg", optional=True, default=0.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               advanced=True, tooltip="Classifier-free guidance of a model that has a distilled one, "
                                                      "too. 0: the model's. Qwen-Image's cfg is this."),
                _quality(), _timeout(), _extra(),
            ],
            outputs=[io.Image.Output("images", display_name="images"),
                     io.String.Output("report", display_name="report")])

    @classmethod
    async def execute(cls, server_model: Any, prompt: str, negative_prompt: str = "", width: int = 1024,
                      height: int = 1024, steps: int = 0, cfg: float = 0.0, seed: int = 0, count: int = 1,
                      images: Any = None, true_cfg: float = 0.0, quality: str = "default", timeout: int = 1800,
                      extra: str = "") -> io.NodeOutput:
        from ..engines.sglang.jobs import draw
        from ..engines.sglang.requests import Drawing
        from ..engines.sglang.wanted import Server as Wanted

        drawing = Drawing(prompt, negative_prompt, width, height, steps, cfg, seed, true_cfg, quality, extra=extra)
        return inputs.loaded(*await draw(Wanted.of_json(server_model), drawing, count, images, timeout))


class QT_ServerVideo(io.ComfyNode):
    """A video, made by a server."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_ServerVideo", display_name="Server Video", category=CATEGORY,
            description="Has a server make a video, from a prompt alone, a first frame or a video. What it serves and "
                        "its LoRAs are verified before and after; other nodes and other servers work meanwhile.",
            search_aliases=["sglang", "remote generate", "text to video", "image to video", "wan", "hunyuanvideo"],
            inputs=[
                *_drawn(
                    io.Int.Input("length", default=81, min=1, max=16384,
                                 tooltip="Frames. Most models make 4n + 1 (Wan, HunyuanVideo) or 8n + 1 (LTX)."),
                    io.Int.Input("fps", default=16, min=1, max=240, tooltip="Frames a second of the video.")),
                io.Float.Input("true_cfg", optional=True, default=0.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               advanced=True, tooltip="Classifier-free guidance of a model that has a distilled one, "
                                                      "too. 0: the model's."),
                _quality(), _timeout(), _extra(),
                io.Float.Input("cfg_2", optional=True, default=0.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               advanced=True, tooltip="cfg of the second transformer (Wan2.2 A14B: low noise). 0: the "
                                                      "model's."),
                io.Image.Input("start_image", optional=True, tooltip="The first frame, for models that take one."),
                io.Video.Input("video", optional=True, tooltip="A video to work on, for models that take one."),
                io.Float.Input("flow_shift", optional=True, default=0.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               advanced=True, tooltip="Shift of the noise levels. 0: the model's."),
                io.Combo.Input("transport", optional=True, options=["mp4", "lossless"], default="mp4", advanced=True,
                               tooltip="mp4: as the server encodes it. lossless: the decoded frames, which needs the "
                                       "package msgpack here; no progress, and no start image or video."),
            ],
            outputs=[io.Video.Output("video", display_name="video"),
                     io.String.Output("report", display_name="report")])

    @classmethod
    async def execute(cls, server_model: Any, prompt: str, negative_prompt: str = "", width: int = 1024,
                      height: int = 1024, length: int = 81, fps: int = 16, steps: int = 0, cfg: float = 0.0,
                      seed: int = 0, true_cfg: float = 0.0, quality: str = "default", timeout: int = 1800,
                      extra: str = "", cfg_2: float = 0.0, start_image: Any = None, video: Any = None,
                      flow_shift: float = 0.0, transport: str = "mp4") -> io.NodeOutput:
        from ..engines.sglang.jobs import film
        from ..engines.sglang.requests import Drawing
        from ..engines.sglang.wanted import Server as Wanted

        drawing = Drawing(prompt, negative_prompt, width, height, steps, cfg, seed, true_cfg, quality, length, fps,
                          cfg_2, flow_shift, extra)
        return inputs.loaded(*await film(Wanted.of_json(server_model), drawing, start_image, video, transport, timeout))
