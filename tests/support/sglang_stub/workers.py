"""What SGLang's workers are to its HTTP server, without a model: runs in SGLang's Python, beside its own app (front.py).

The server's process sends pickled requests to a socket and gets pickled `OutputBatch`es back, one after the other as the
real ones work. What is drawn here says what was asked for: the seed's colour, and below it that of each input image.
"""

from __future__ import annotations

import dataclasses
import pickle
import threading
import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
import zmq
from PIL import Image
from sglang.multimodal_gen.runtime.entrypoints.control_requests import ListLorasReq, SetLoraReq, UnmergeLoraWeightsReq
from sglang.multimodal_gen.runtime.managers.progress_reporter import ProgressReporter
from sglang.multimodal_gen.runtime.pipelines_core.lora.pipeline import LoRAPipeline
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req

TWO = ("Wan2.2-T2V-A14B-Diffusers", "Wan2.2-I2V-A14B-Diffusers")  # of MODELS: those with a transformer_2


def colour(seed: int) -> list[float]:
    """RGB in 0..1, another for each small seed."""
    return [(40 + 37 * seed) % 200 / 255, (80 + 59 * seed) % 200 / 255, (120 + 83 * seed) % 200 / 255]


def image(path: str) -> dict[str, Any]:
    """Size and mean colour (0..255) of an image that the server was sent."""
    with Image.open(path) as opened:
        pixels = torch.frombuffer(bytearray(opened.convert("RGB").tobytes()), dtype=torch.uint8)
        return {"size": list(opened.size), "mean": [round(x, 1) for x in pixels.view(-1, 3).float().mean(0).tolist()]}


class Loras:
    """The state of a server's LoRAs, changed by what SGLang's pipeline changes it by, and told by its own function."""

    def __init__(self, two: bool) -> None:
        self.modules = {"transformer": object(), **({"transformer_2": object()} if two else {})}
        self.paths: dict[str, str] = {}
        self.active: dict[str, list[tuple[str, str, float]]] = {}
        self.merged: dict[str, bool] = {}

    def set(self, asked: SetLoraReq) -> None:
        """As LoRAPipeline.set_lora: each target takes the place of what its transformers had, and others keep theirs; a
        target that the model has not changes nothing, and is no error."""
        given = LoRAPipeline._normalize_lora_params(None, asked.lora_nickname, asked.lora_path, asked.strength,  # type: ignore[arg-type]
                                                    asked.target, asked.lora_alpha)
        wrong = [target for target in given[3] if target not in LoRAPipeline.VALID_TARGETS]
        if wrong:
            raise ValueError(f"Invalid target(s): {wrong}. Valid targets: {LoRAPipeline.VALID_TARGETS}")
        targets: dict[str, list[tuple[str, str, float]]] = {}
        for name, path, strength, target, _ in zip(*given, strict=True):
            if path is None and name not in self.paths:
                raise ValueError(f"Adapter {name} not found in the pipeline. Please provide lora_path to load it.")
            self.paths[name] = path or self.paths[name]
            targets.setdefault(target, []).append((name, self.paths[name], strength))
        for target, loras in targets.items():
            for module in self.modules if target == "all" else {target} & self.modules.keys():
                self.active[module], self.merged[module] = loras, asked.merge_mode != "dynamic"

    def unmerge(self, target: str) -> None:
        for module in [*self.active] if target == "all" else [target]:
            self.active.pop(module, None)
            self.merged.pop(module, None)

    def status(self) -> dict[str, Any]:
        each = {module: list(zip(*loras, strict=True)) for module, loras in self.active.items()}
        return LoRAPipeline.get_lora_status(SimpleNamespace(  # type: ignore[arg-type]
            loaded_adapter_paths=self.paths, modules=self.modules, is_lora_merged=self.merged, lora_layers={},
            lora_layers_transformer_2={}, lora_layers_critic={},
            _is_lora_effective_for_module=lambda module, layers: module in self.active,
            cur_adapter_name={module: ",".join(one[0]) for module, one in each.items()},
            cur_adapter_path={module: ",".join(one[1]) for module, one in each.items()},
            cur_adapter_strength={module: one[2][0] for module, one in each.items()},
            cur_adapter_config={module: (list(one[0]), list(one[2])) for module, one in each.items()}))


class Workers(threading.Thread):
    """Answers one request after the other. `plans` and `lora_plans` say how the next ones go, else as they should.

    A plan of a picture or video: "delay" (seconds), "hold" (until `released`), "error" (text), "size" [W, H], "count",
    "frames", "steps" (of its progress; 0: none, as with diffusers' backend), "loras" (what another client sets
    meanwhile). Of a LoRA: "error" (text), or "nothing": it says ok and does not do it.
    """

    def __init__(self, server_args: Any) -> None:
        super().__init__(daemon=True)
        self.server_args = server_args
        self.plans: deque[dict[str, Any]] = deque()
        self.lora_plans: deque[dict[str, Any]] = deque()
        self.seen: list[dict[str, Any]] = []
        self.loras = Loras(server_args.model_id in TWO)
        self.released, self.warm = threading.Event(), threading.Event()
        self.stopped = threading.Event()  # the server does, or its worker is dead
        self.context = zmq.Context()
        self.context.setsockopt(zmq.RECONNECT_IVL, 5)  # ms: what is reported before the app listens is lost
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.bind(server_args.scheduler_endpoint)
        self.progress = ProgressReporter(self.context, server_args.progress_endpoint)

    def run(self) -> None:
        while not self.stopped.is_set():
            if self.socket.poll(50):
                who, _, payload = self.socket.recv_multipart()
                try:
                    answer = self.answer(pickle.loads(payload))
                except Exception as error:  # as Scheduler.event_loop
                    answer = OutputBatch(error=str(error))
                if not self.stopped.is_set():  # the dead do not answer
                    self.socket.send_multipart([who, b"", pickle.dumps(answer)])
        self.context.destroy(linger=0)

    def answer(self, asked: Any) -> OutputBatch:
        if isinstance(asked, list):
            asked, = asked
        if isinstance(asked, Req):
            return self.draw(asked)
        if isinstance(asked, ListLorasReq):
            return OutputBatch(output=self.loras.status())
        self.seen.append({"asked": type(asked).__name__, **msgspec.structs.asdict(asked)})
        plan = self.lora_plans.popleft() if self.lora_plans else {}
        if plan.get("error"):
            raise ValueError(plan["error"])
        if isinstance(asked, SetLoraReq) and not plan.get("nothing"):
            self.loras.set(asked)
        if isinstance(asked, UnmergeLoraWeightsReq) and not plan.get("nothing"):
            self.loras.unmerge(asked.target)
        return OutputBatch()

    def wait(self, event: threading.Event | None, seconds: float) -> None:
        """So long, or until `event`, or until there is nobody to answer."""
        end = time.monotonic() + seconds
        while not self.stopped.is_set() and time.monotonic() < end and not (event and event.is_set()):
            time.sleep(0.01)

    def draw(self, asked: Req) -> OutputBatch:
        if asked.is_warmup:
            self.wait(self.warm, 600)
            return OutputBatch(output=torch.zeros(1, 3, 8, 8))
        fields = {field.name: getattr(asked.sampling_params, field.name) for field in dataclasses.fields(asked.sampling_params)}
        paths = asked.image_path or []
        images = [image(path) for path in ([paths] if isinstance(paths, str) else paths)]
        self.seen.append({"asked": "Req", **fields, "images": images, "data_type": asked.data_type.name,
                          "cfg": asked.do_classifier_free_guidance, "loras": self.loras.status()["active"]})
        plan = self.plans.popleft() if self.plans else {}
        steps = plan.get("steps", asked.num_inference_steps) if asked.report_progress else 0
        if asked.report_progress:
            self.progress.start([asked.request_id])
        if plan.get("hold"):
            self.released.clear()
            self.wait(self.released, 600)
        for step in range(max(steps, 1)):
            self.wait(None, plan.get("delay", 0) / max(steps, 1))
            if steps:
                self.progress.step([asked.request_id], step + 1, steps)
        if plan.get("error"):
            raise RuntimeError(plan["error"])
        if plan.get("loras") is not None:
            self.loras.unmerge("all")
            for one in plan["loras"]:
                self.loras.set(SetLoraReq(**one))
        count = plan.get("count", asked.num_outputs_per_prompt)
        width, height = plan.get("size", (asked.width, asked.height))
        frames = plan.get("frames", asked.num_frames) if asked.data_type.name == "VIDEO" else 0
        made = torch.stack([self.picture(asked.seed + i, width, height, images) for i in range(count)])
        # of a video [N, 3, T, H, W], ever brighter
        made = made[:, :, None] * torch.linspace(0.5, 1, frames)[:, None, None] if frames else made.bfloat16()
        asked.metrics.total_duration_ms = 1000 * plan.get("delay", 0.25)
        return OutputBatch(output=made, metrics=asked.metrics, peak_memory_mb=64.0)

    def picture(self, seed: int, width: int, height: int, images: list[dict[str, Any]]) -> torch.Tensor:
        """[3, H, W] in 0..1: the seed's colour, below it the images' from left to right; LoRAs take its red."""
        made = torch.tensor(colour(seed))[:, None, None].repeat(1, height, width)
        for at, one in enumerate(images):
            made[:, height // 2:, width * at // len(images):] = torch.tensor(one["mean"])[:, None, None] / 255
        for active in self.loras.active.values():
            made[0] *= 1 - min(0.9, sum(abs(strength) for _, _, strength in active) / 2)
        return made
