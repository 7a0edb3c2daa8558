"""The door of a fleet: takes jobs over HTTP, sends each to a worker, and again to another where a worker is lost. What
is known of jobs is in memory, their results are in a folder: whoever sends a job again under its id gets the same job.

Ray Serve runs it (ray_serve.py), which hands in what knows Ray: `send` and `problem`."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import json
import re
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...host.texts import Text, each, said
from ...loaders.errors import CheckpointError
from ...loaders.prompts import prompt_in
from .found import look
from .graphs import prompt_of
from .pools import Pool, choose
from .replica import CANCELLED, COMPLETED, FAILED, IN_PROGRESS, PENDING, Settings
from .results import Results, job_id
from .workflow import Workflow

_NO_MODELS = Workflow({}).affinity()  # such a job goes anywhere, and takes no worker from others
RETRIES = 3  # of a job whose worker was lost
_KEPT = 10_000  # finished jobs that are remembered; of older ones the results are there
_ID = r"/jobs/([0-9a-f-]{36})"
_ROUTES = (("POST", "/jobs", "submit"), ("GET", _ID, "tell"), ("POST", f"{_ID}/cancel", "cancel"),
           ("GET", f"{_ID}/files/(.+)", "file"), ("GET", "/health", "health"))
Answer = tuple[int, Any]


class Lost(Exception):  # noqa: N818  # not the job's error
    """A worker went away with its job."""


# What becomes of a job, from the worker that it is sent to: (pool, key of its models or "", id, prompt). Raises Lost;
# closed early, it cancels the job wherever it is.
Send = Callable[[Pool, str, str, Mapping[str, Any]], AsyncGenerator[dict[str, Any], None]]


class Refusal(Exception):  # noqa: N818
    """An answer other than 2xx."""

    def __init__(self, status: int, message: str, **more: Any) -> None:
        self.status, self.answer = status, {"error": {"message": message, **more}}


@dataclass
class Job:
    digest: str
    known: dict[str, Any] = field(default_factory=lambda: {"status": PENDING, "retries": 0})
    accepted: asyncio.Task[None] | None = None
    work: asyncio.Task[None] | None = None

    @property
    def finished(self) -> bool:
        return self.known["status"] not in (PENDING, IN_PROGRESS)


class Dispatcher:
    """Answers requests. One for a fleet: it is what knows that an id was sent before."""

    def __init__(self, settings: Settings, pools: Sequence[Pool], send: Send,
                 running: Callable[[], Mapping[str, int]]) -> None:
        self.results, self.pools, self.send, self.running = Results(Path(settings.results)), pools, send, running
        self.jobs: dict[str, Job] = {}
        self.looking = threading.Lock()  # ComfyUI's lists of files are one thread's

    async def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """(status, JSON, or the Path of a file). `headers` in lower case."""
        try:
            for wanted, pattern, name in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method == wanted:
                    if method == "POST" and "origin" in headers:  # as every page in a browser says
                        raise Refusal(403, Text("pages of browsers may not send jobs"))
                    return await getattr(self, name)(*([_json(body)] if name == "submit" else found.groups()))
            raise Refusal(404, Text("there is nothing at {path}", path=path[:200]))
        except Refusal as refusal:
            return refusal.status, each(refusal.answer, said)

    async def submit(self, body: Any) -> Answer:
        prompt = body.get("prompt") if isinstance(body, dict) else None
        if not isinstance(prompt, dict) or prompt_in({"prompt": prompt}) is None:
            raise Refusal(400, Text("prompt is no workflow in the API's format: export it with Export (API)"))
        try:
            name = job_id(body.get("prompt_id"))
        except CheckpointError as error:
            raise Refusal(400, error.text) from error
        digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()
        job = self.jobs.get(name)
        if job is None and self.results.files(name) is not None:
            return 202, {"prompt_id": name}
        if job is None:
            job = self.jobs[name] = Job(digest)
            job.accepted = _begin(self._accept(name, job, prompt))
        elif job.digest != digest:
            raise Refusal(409, Text("another prompt has this prompt_id"))
        if job.accepted is not None:
            await asyncio.shield(job.accepted)
        return 202, {"prompt_id": name}

    async def tell(self, name: str) -> Answer:
        job = self.jobs.get(name)
        if job is not None:
            return 200, {"prompt_id": name, **job.known}
        files = self.results.files(name)
        if files is None:
            raise Refusal(404, Text("no such job; after a restart send it again, under the same prompt_id"))
        return 200, {"prompt_id": name, "status": COMPLETED, "files": files}

    async def cancel(self, name: str) -> Answer:
        """Of a job that waits or runs; of any other nothing, as ComfyUI has it."""
        job = self.jobs.get(name)
        if job is None:
            await self.tell(name)
        if job is None or job.finished or job.work is None:
            return 200, {"cancelled": False}
        job.work.cancel()
        job.known["status"] = CANCELLED
        return 200, {"cancelled": True}

    async def file(self, name: str, path: str) -> Answer:
        found = self.results.file(name, path)
        if found is None:
            raise Refusal(404, Text("this job has no such file"))
        return 200, found

    async def health(self) -> Answer:
        """200 while every pool has a worker that takes jobs."""
        running = await asyncio.to_thread(self.running)
        counts = {pool.name: {"wanted": pool.count, "running": running.get(pool.name, 0)} for pool in self.pools}
        well = all(one["running"] for one in counts.values())
        states = [job.known["status"] for job in self.jobs.values()]
        return 200 if well else 503, {"status": "ok" if well else "waiting", "workers": counts,
                                      "jobs": {state: states.count(state) for state in (PENDING, IN_PROGRESS)}}

    async def _accept(self, name: str, job: Job, prompt: dict[str, Any]) -> None:
        """Begin a job, or forget it with a Refusal for all that sent it."""
        try:
            pool, key = await asyncio.to_thread(self._check, prompt)
        except BaseException:
            del self.jobs[name]
            raise
        job.work = _begin(self._work(name, job, prompt, pool, key))
        finished = [name for name, job in self.jobs.items() if job.finished]
        for old in finished[:-_KEPT]:
            del self.jobs[old]

    def _check(self, prompt: dict[str, Any]) -> tuple[Pool, str]:
        """Where a prompt goes, when all that it names is here."""
        with self.looking:
            try:
                workflow = Workflow(prompt_of(prompt))
                missing = [one.to_json() for one in look(workflow.asked()) if one.missing]
                if missing:
                    names = ", ".join(dict.fromkeys(one["reference"] or one["input"] for one in missing))
                    raise Refusal(400, Text("not here: {names}", names=names), missing=missing)
                key = workflow.affinity()
                return choose(self.pools, key), key
            except CheckpointError as error:
                raise Refusal(400, error.text) from error

    async def _work(self, name: str, job: Job, prompt: Mapping[str, Any], pool: Pool, key: str) -> None:
        job.known |= {"pool": pool.name, "affinity": key}
        for attempt in range(1 + RETRIES):
            job.known |= {"status": PENDING, "retries": attempt}
            sent = self.send(pool, key if key != _NO_MODELS else "", name, prompt)
            try:
                async for change in sent:
                    job.known |= change
                return
            except Lost:
                await asyncio.sleep(1)  # Ray Serve takes a moment to notice
            except Exception as error:  # a defect here, or in the worker
                job.known |= {"status": FAILED, "error": {"message": f"{type(error).__name__}: {error}"}}
                return
            finally:
                await sent.aclose()
        job.known |= {"status": FAILED, "error": {
            "message": said(Text("{count} workers ended with this job", count=1 + RETRIES))}}


def _begin(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that is no part of the request that is answered now, and does not end with it."""
    return contextvars.Context().run(asyncio.create_task, work)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, Text("the body is no JSON")) from error
