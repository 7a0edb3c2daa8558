"""One picture or video of a server that is ready for it: the questions, and what comes, not yet looked at."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from . import client, requests, results
from .client import Answer
from .failures import failure
from .requests import Drawing
from .waiting import Wait

FASTEST, SLOWEST = 0.5, 2.0  # seconds between two looks at a video


async def image(wait: Wait, drawing: Drawing, pipeline: str, files: Sequence[bytes]) -> Answer:
    """What a server answers to a request of one picture, or of one edit of `files`, which are PNG."""
    parts = [("image[]" if len(files) > 1 else "image", f"{number}.png", "image/png", data)
             for number, data in enumerate(files)]
    form = _form(requests.edit(drawing, pipeline), parts) if files else None
    return await client.ask(wait.address, "/v1/images/edits" if files else "/v1/images/generations", method="POST",
                            json_body=None if files else requests.image(drawing, pipeline), form=form,
                            seconds=wait.patience, largest=results.largest(drawing) * 4 // 3)


async def job(wait: Wait, drawing: Drawing, pipeline: str, files: Sequence[tuple[str, str, str, bytes]]
               ) -> tuple[bytes, float]:
    """(an .mp4, seconds that it took) of a job of the server's."""
    form = _form(requests.video_form(drawing, pipeline), files) if files else None
    body = None if files else requests.video(drawing, pipeline)
    answer = await wait.until(client.ask(wait.address, "/v1/videos", method="POST", json_body=body, form=form,
                                         seconds=wait.patience), Text("asks for the video"))
    if answer.status != 200 or not isinstance(answer.body, dict) or not str(answer.body.get("id", "")).strip():
        raise await failure(answer, wait.address, sent(drawing))
    path, done = f"/v1/videos/{_plain(answer.body['id'])}", False
    try:
        record = await _finished(wait, path)
        done = True
    finally:
        if not done:  # it goes on all the same; a server that can stop one will
            with suppress(CheckpointError, asyncio.TimeoutError):
                await asyncio.wait_for(client.ask(wait.address, path, method="DELETE"), 0.7)
    wait.drawing = ""
    content = await wait.until(client.ask(wait.address, f"{path}/content", seconds=wait.patience, raw=True,
                                          largest=results.largest(drawing)), Text("fetches the video"))
    if content.status != 200 or not isinstance(content.body, bytes):
        raise await failure(content, wait.address, sent(drawing))
    return content.body, seconds(record)


async def _finished(wait: Wait, path: str) -> dict[str, Any]:
    """The record of a job that is done. Raises CheckpointError where it failed, or is gone."""
    pause = FASTEST
    while True:
        answer = await wait.until(client.ask(wait.address, path, seconds=min(wait.patience, 60)),
                                  Text("draws the video"))
        job = answer.body if isinstance(answer.body, dict) else {}
        status = job.get("status")
        if answer.status == 404:
            raise CheckpointError(Text("the server was restarted: the video is lost"), wait.address.url,
                                  Text("queue it again"))
        if answer.status != 200 or status not in ("queued", "in_progress", "completed", "failed"):
            raise await failure(answer, wait.address, path)
        if status == "failed":
            error = job.get("error")
            message = error.get("message") if isinstance(error, dict) else error
            raise CheckpointError(Text("the server failed: {words}", words=str(message or "?")[:2000]),
                                  wait.address.url, Text("change what it names, or look at its log"))
        if status == "completed":
            return job
        progress = job.get("progress")
        wait.shown.show(progress if isinstance(progress, int) else 0, 100)
        await wait.until(asyncio.sleep(pause), Text("draws the video") if status == "in_progress"
                         else Text("waits in the server's queue"))
        pause = min(pause * 1.5, SLOWEST)


async def frames(wait: Wait, drawing: Drawing, pipeline: str) -> bytes:
    """The answer of /rollout/generate."""
    body = requests.frames(drawing, pipeline)
    answer = await wait.until(client.ask(wait.address, "/rollout/generate", method="POST", json_body=body, raw=True,
                                         seconds=wait.patience, largest=results.largest(drawing) * 2),
                              Text("draws the video"))
    wait.drawing = ""
    if answer.status != 200 or not isinstance(answer.body, bytes):
        raise await failure(answer, wait.address, sent(drawing))
    return answer.body


def _form(fields: Sequence[tuple[str, str]], files: Sequence[tuple[str, str, str, bytes]]) -> Any:
    import aiohttp

    form = aiohttp.FormData()
    for name, value in fields:
        form.add_field(name, value)
    for name, filename, kind, data in files:
        form.add_field(name, data, filename=filename, content_type=kind)
    return form


def _plain(name: object) -> str:
    from urllib.parse import quote

    return quote(str(name), safe="")


def seconds(body: Any) -> float:
    value = body.get("inference_time_s") if isinstance(body, dict) else None
    return float(value) if isinstance(value, (int, float)) else 0.0


def sent(drawing: Drawing) -> str:
    frames = f" x {drawing.frames}" if drawing.frames else ""
    return Text("{size}, steps: {steps}, seed {seed}", size=f"{drawing.width} x {drawing.height}{frames}",
                steps=drawing.steps or Text("the model's"), seed=drawing.seed)
