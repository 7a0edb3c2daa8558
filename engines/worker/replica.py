"""A worker of a fleet: one ComfyUI, one job at a time. Ray Serve runs it (ray_serve.py); nothing here imports Ray."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from .comfyui import ComfyUI
from .results import Results

# in ComfyUI's words
PENDING, IN_PROGRESS, COMPLETED, FAILED, CANCELLED = "pending", "in_progress", "completed", "failed", "cancelled"
_POLL = 0.2  # seconds between two questions to ComfyUI


@dataclass(frozen=True)
class Settings:
    """Plain values, which every process of a fleet gets; paths are those of every machine. `config`: files of
    extra_model_paths.yaml's kind; `options`: more of ComfyUI's."""

    comfyui: str
    shared: str
    results: str
    work: str
    config: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class Worker:
    """It ends when its ComfyUI ends, so that a job is lost in one way only, and what is replaced is always both."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.name, self.results = name, Results(Path(settings.results))
        config = [word for file in settings.config for word in ("--extra-model-paths-config", file)]
        self.comfyui = ComfyUI(Path(settings.comfyui), Path(settings.shared), Path(settings.work) / name,
                               [*config, *settings.options])
        self.one = ThreadPoolExecutor(1)  # one question after the other: a cancel never overtakes its job
        self.comfyui.start(lambda: os._exit(1))

    def __del__(self) -> None:  # Ray Serve's way to end a replica
        if hasattr(self, "comfyui"):
            self.comfyui.stop()

    async def check_health(self) -> None:
        """Ray Serve asks every few seconds; after three errors it starts another worker in this one's place."""
        if not self.comfyui.alive() or (await asyncio.to_thread(self.comfyui.ask, "/system_stats"))[0] != 200:
            raise RuntimeError(Text("ComfyUI is not well"))

    async def run(self, job: str, prompt: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """What becomes of a job, as changes of what is known of it; the last one has a status that is final."""
        yield {"status": IN_PROGRESS, "worker": self.name}
        files = self.results.files(job)
        if files is not None:  # published by a worker that died before it could say so
            yield {"status": COMPLETED, "files": files}
            return
        try:
            yield await self._finish(job, prompt)
        except asyncio.CancelledError:
            await self._cancel(job)
            raise

    async def _ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        """As ComfyUI.ask, but with status 0 while there is no answer: either ComfyUI is at work and answers later, or
        it is gone, and this process with it."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.one, self.comfyui.ask, path, body)
        except OSError:
            return 0, None

    async def _finish(self, job: str, prompt: Mapping[str, Any]) -> dict[str, Any]:
        while True:
            status, found = await self._ask(f"/api/jobs/{job}")  # ComfyUI runs an id twice that it is given twice
            if status == 404:
                status, said = await self._ask("/prompt", {"prompt": prompt, "prompt_id": job})
                if status >= 400:
                    return {"status": FAILED, "error": _refusal(said)}
                if status == 200 and said.get("node_errors"):  # it would run what it can of it
                    await self._cancel(job)
                    return {"status": FAILED, "error": _refusal(said)}
            elif status >= 400:
                return {"status": FAILED, "error": _refusal(found)}
            elif status == 200 and found["status"] == COMPLETED:
                return await asyncio.get_running_loop().run_in_executor(self.one, self._publish, job, found)
            elif status == 200 and found["status"] in (FAILED, CANCELLED):
                return {"status": found["status"], "error": _execution(found.get("execution_error") or {})}
            await asyncio.sleep(_POLL)

    def _publish(self, job: str, found: Mapping[str, Any]) -> dict[str, Any]:
        try:
            files = self.results.publish(job, found.get("outputs") or {}, self.comfyui.base / "output")
        except (CheckpointError, OSError) as error:
            return {"status": FAILED, "error": {"message": str(error)}}
        return {"status": COMPLETED, "files": files}

    async def _cancel(self, job: str) -> None:
        """Return when ComfyUI works on it no more, so that the next job finds it free."""
        status, found = await self._ask(f"/api/jobs/{job}/cancel", {})
        while status in (0, 200):
            await asyncio.sleep(_POLL)
            status, found = await self._ask(f"/api/jobs/{job}")
            if status == 200 and found["status"] not in (PENDING, IN_PROGRESS):
                return


def _refusal(said: Any) -> dict[str, Any]:
    """ComfyUI's answer to a prompt that it does not run, or not all of."""
    if not isinstance(said, dict):
        return {"message": str(said)}
    nodes = said.get("node_errors") or {}
    words = [_words(error) for node in nodes.values() for error in node.get("errors", ())]
    words = words or [_words(said.get("error"))]
    return {"message": "\n".join(words), **({"node_errors": nodes} if nodes else {})}


def _words(error: Any) -> str:
    found = [error.get("message"), error.get("details")] if isinstance(error, dict) else [error]
    return ": ".join(str(word) for word in found if word)


def _execution(error: Mapping[str, Any]) -> dict[str, Any]:
    """What a node raised, in its own words."""
    return {"message": str(error.get("exception_message") or "").strip(),
            **{name: error[name] for name in ("node_id", "node_type", "exception_type") if name in error}}
