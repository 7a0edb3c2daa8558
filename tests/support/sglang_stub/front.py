"""SGLang's own HTTP app over workers without a model (workers.py); runs in SGLang's Python: front.py SETTINGS.

SETTINGS is JSON: {"folder", "port", "model", "name", "warm"}. Beside the app, `/stub` tells and changes what goes on. A
restart is one of the app and of what it remembers, in the same process: importing SGLang takes 15 s, this 0.2 s.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import uvicorn
from sglang.multimodal_gen.runtime.entrypoints.http_server import create_app
from sglang.multimodal_gen.runtime.entrypoints.openai.stores import IMAGE_STORE, VIDEO_STORE
from sglang.multimodal_gen.runtime.server_args import ServerArgs, prepare_server_args, set_global_server_args
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartParser
from workers import Workers

# Of `--model-id`: the class in model_index.json. What SGLang does, but drawing, goes by these two.
MODELS = {"FLUX.1-dev": "FluxPipeline", "FLUX.2-dev": "Flux2Pipeline", "Qwen-Image": "QwenImagePipeline",
          "Qwen-Image-Edit-2511": "QwenImageEditPlusPipeline", "Wan2.1-T2V-1.3B-Diffusers": "WanPipeline",
          "Wan2.2-T2V-A14B-Diffusers": "WanPipeline", "Wan2.2-I2V-A14B-Diffusers": "WanImageToVideoPipeline",
          "Wan2.2-TI2V-5B-Diffusers": "WanPipeline"}
WORKER = "import sys; sys.stdin.read()"  # a process that can die; it ends with this one


def arguments(settings: dict[str, Any]) -> ServerArgs:
    """As SGLang reads them, of a folder that has a model's names and nothing else."""
    folder, port = Path(settings["folder"]) / settings["model"], settings["port"]
    for part in ("transformer", "vae"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    index = {"_class_name": MODELS[settings["model"]], "_diffusers_version": "0.37.0", "transformer": ["diffusers", "X"],
             "vae": ["diffusers", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    output = str(Path(settings["folder"]) / "output") if settings.get("keep", True) else ""
    return prepare_server_args([
        "--model-path", str(folder), "--model-id", settings["model"], "--served-model-name", settings["name"], "--backend",
        "sglang", "--host", "127.0.0.1", "--port", str(port), "--scheduler-port", str(port + 2), "--master-port",
        str(port + 3), "--strict-ports", "--warmup-mode", "off" if settings.get("warm", True) else "server",
        "--output-path", output, "--input-save-path", ""])


async def parts(body: bytes, headers: Headers) -> list[dict[str, Any]]:
    """A multipart body as it was sent: name, filename, type, text or base64 of each part, in order."""
    async def stream():
        yield body

    found = []
    for name, value in (await MultiPartParser(headers, stream()).parse()).multi_items():
        if isinstance(value, str):
            found.append({"name": name, "text": value})
        else:
            data = await value.read()
            found.append({"name": name, "filename": value.filename, "type": value.content_type,
                          "data": base64.b64encode(data).decode()})
    return found


class Front:
    """ASGI: `/stub`, and the app, every request to which is noted before it gets it."""

    def __init__(self, settings: dict[str, Any], life: int) -> None:
        self.settings, self.life = settings, life
        self.again: dict[str, Any] | None = None
        self.requests: list[dict[str, Any]] = []
        args = arguments(settings)
        set_global_server_args(args)
        self.workers = Workers(args)
        self.worker = subprocess.Popen([sys.executable, "-S", "-c", WORKER], stdin=subprocess.PIPE)
        self.app = create_app(args, worker_pids=(self.worker.pid,))
        self.server = uvicorn.Server(uvicorn.Config(self, host="127.0.0.1", port=settings["port"], log_level="info",
                                                    timeout_graceful_shutdown=0))

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["path"] == "/stub":
            if body:
                self.change(json.loads(body))
            told = {"life": self.life, "requests": self.requests, "seen": self.workers.seen}
            answer = json.dumps(told, default=str).encode()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
            await send({"type": "http.response.body", "body": answer})
            return
        headers = Headers(scope=scope)
        noted: dict[str, Any] = {"method": scope["method"], "path": scope["path"], "query": scope["query_string"].decode(),
                                 "headers": dict(headers.items())}
        kind = headers.get("content-type", "")
        if body and kind.startswith("application/json"):
            noted["json"] = json.loads(body)
        elif body and kind.startswith("multipart/form-data"):
            noted["parts"] = await parts(body, headers)
        self.requests.append(noted)
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replay, send)

    def change(self, order: dict[str, Any]) -> None:
        self.workers.plans.extend(order.get("plans", []))
        self.workers.lora_plans.extend(order.get("lora_plans", []))
        if "clear" in order:
            self.requests.clear()
            self.workers.seen.clear()
        if "release" in order:
            self.workers.released.set()
        if "warm" in order:
            self.workers.warm.set()
        if "kill" in order:
            self.workers.stopped.set()
            self.worker.kill()
        if "restart" in order:
            self.again = {**self.settings, **order["restart"]}
            self.server.should_exit = True

    def serve(self) -> dict[str, Any] | None:
        """Until it is told to stop; the settings of the next life, or None."""
        self.workers.start()
        try:
            self.server.run()
        finally:
            self.workers.stopped.set()
            self.worker.kill()
            self.worker.wait()
            self.workers.join()
        return self.again


if __name__ == "__main__":
    wanted, lives = json.loads(sys.argv[1]), 0
    while wanted:
        wanted, lives = Front(wanted, lives).serve(), lives + 1
        for store in (VIDEO_STORE, IMAGE_STORE):
            store.__init__()  # type: ignore[misc]
