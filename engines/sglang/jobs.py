"""Pictures and videos of a server: verified before, drawn as asked for, and checked after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import host
from ...host.texts import Text, either, joined, said
from ...loaders.errors import CheckpointError
from . import client, exchange, results
from . import loras as adapters
from .address import Address, address_of
from .client import State
from .failures import failure
from .requests import Drawing
from .turns import turn
from .waiting import Wait
from .wanted import Server

if TYPE_CHECKING:
    import torch

IMAGE_TASKS, EDIT_TASKS = ("T2I", "TI2I"), ("I2I", "TI2I")
VIDEO_TASKS, START_TASKS, CLIP_TASKS = ("T2V", "TI2V"), ("I2V", "TI2V"), ("V2V", "F2V")
TRANSPORTS = ("mp4", "lossless")
NEVER = float("inf")
SEEDS = 1 << 64  # as ComfyUI has them


class Ready(NamedTuple):
    """A server that is what was wanted, with the LoRAs that were wanted."""

    state: State
    loras: tuple[adapters.LoRA, ...]
    lines: list[str]


async def draw(server: Server, drawing: Drawing, count: int = 1, images: torch.Tensor | None = None,
               timeout: float = 1800) -> tuple[torch.Tensor, str]:
    """(IMAGE, float [count, H, W, 3]; the report): one request a picture, of seed, seed + 1, ... `images` (float
    [B, H, W, C]) are edited. `timeout` is for each picture. Raises CheckpointError."""
    shown, spent = host.Waiting(), 0.0
    pictures: list[Any] = []
    lines: list[str] = []
    files = [results.png(image) for image in images] if images is not None else []
    address = address_of(server.server)
    async with turn(Wait(address, NEVER, shown), server.loras):
        for number in range(count):
            one = replace(drawing, seed=(drawing.seed + number) % SEEDS)
            wait = Wait(address, timeout, shown)
            ready = await _prepare(server, wait, EDIT_TASKS if files else IMAGE_TASKS)
            wait.drawing = Text("the server still finishes this picture: it cannot be told to stop")
            answer = await wait.until(exchange.image(wait, one, ready.state.pipeline, files),
                                      Text("picture {number} of {count}", number=number + 1, count=count))
            wait.drawing = ""
            if answer.status != 200:
                raise await failure(answer, address, exchange.sent(one))
            await _unchanged(wait, ready)
            pictures.append(results.picture(answer.body, one, address.url))
            spent += exchange.seconds(answer.body)
            shown.show(number + 1, count, pictures[-1].convert("RGB"))
            lines = lines or [*ready.lines, *drawing.notes(ready.state.pipeline)]
    lines.append(Text("drawn: {count}, in {seconds:.1f} s of the server", count=count, seconds=spent))
    shown.say(said(lines[-1]))
    return results.tensor(pictures), joined("\n", lines)


async def film(server: Server, drawing: Drawing, start: torch.Tensor | None = None, clip: Any = None,
               transport: str = TRANSPORTS[0], timeout: float = 1800) -> tuple[Any, str]:
    """(VIDEO, the report). `start` is the first frame, float [1, H, W, C]; `clip` a VIDEO to work on. "lossless" takes
    the decoded frames themselves, without progress, and without either of these. Raises CheckpointError."""
    if transport == TRANSPORTS[1]:
        _can_be_lossless(start, clip)
    address, shown = address_of(server.server), host.Waiting()
    files = [("input_reference", "start.png", "image/png", results.png(start[0]))] if start is not None else []
    files += [("video_reference", "clip.mp4", "video/mp4", host.file_of_video(clip))] if clip is not None else []
    tasks = CLIP_TASKS if clip is not None else START_TASKS if start is not None else VIDEO_TASKS
    async with turn(Wait(address, NEVER, shown), server.loras):
        wait = Wait(address, timeout, shown)
        ready = await _prepare(server, wait, tasks)
        wait.drawing = Text("the server still finishes this video: it cannot be told to stop")
        lines = [*ready.lines, *drawing.notes(ready.state.pipeline),
                 Text("{frames} frames, {fps} a second", frames=drawing.frames, fps=drawing.fps)]
        if transport == TRANSPORTS[1]:
            data, read = await exchange.frames(wait, drawing, ready.state.pipeline), results.lossless
        else:
            data, seconds = await exchange.job(wait, drawing, ready.state.pipeline, files)
            read = results.video
            lines.append(Text("made in {seconds:.1f} s of the server", seconds=seconds))
        await _unchanged(wait, ready)
    shown.say(said(lines[-1]))
    return read(data, drawing, address.url), joined("\n", lines)


async def try_out(address: Address, timeout: float = 1800) -> float:
    """Have a server draw something small in one step, with the LoRAs that are on: seconds that it took. Raises
    CheckpointError where it does not."""
    state, wait = await client.state(address), Wait(address, timeout, host.Waiting())
    small = Drawing("a cat", width=256, height=256, steps=1, frames=5, fps=16, extra='{"accept_size": true}')
    start = time.monotonic()
    if set(state.tasks) & {*IMAGE_TASKS, *EDIT_TASKS}:
        import torch

        files = [] if set(state.tasks) & set(IMAGE_TASKS) else [results.png(torch.full((256, 256, 3), 0.5))]
        answer = await wait.until(exchange.image(wait, small, state.pipeline, files), Text("draws"))
        if answer.status != 200:
            raise await failure(answer, address, exchange.sent(small))
        results.picture(answer.body, small, address.url)
    elif set(state.tasks) & set(VIDEO_TASKS):
        await exchange.job(wait, small, state.pipeline, [])
    else:
        raise CheckpointError(Text("this server needs more than a prompt: {tasks}", tasks=", ".join(state.tasks)),
                              address.url, Text("try it with Server Video"))
    return time.monotonic() - start


async def _prepare(server: Server, wait: Wait, tasks: Sequence[str]) -> Ready:
    """The server as it is wanted. Raises CheckpointError where it serves something else, or cannot do this task."""
    await wait.healthy()
    state = await wait.until(client.state(wait.address), Text("asks the server how it is"))
    lines = [Text("{url}, SGLang {version}, GPUs: {gpus}", url=wait.address.url, version=state.version or "?",
                  gpus=state.gpus), *server.verify(state, wait.address.url)]
    if not set(tasks) & set(state.tasks):
        raise CheckpointError(Text("this server does {does}, and this needs {needs}", does=", ".join(state.tasks),
                                   needs=either(tasks)), wait.address.url,
                              Text("use the node, or a server of a model, for that"))
    loras = tuple(lora for lora in server.loras if lora.strength) or adapters.of_start(state.identity)
    active = await wait.until(client.loras(wait.address, wait.patience), Text("waits for the pictures before this one"))
    if adapters.differs(active, loras):
        await _set(wait, bool(active), loras)
    if loras:
        lines.append(Text("LoRAs: {names}", names=", ".join(f"{one.path or one.name} x {one.strength:g}"
                                                            for one in loras)))
    return Ready(state, loras, lines)


async def _set(wait: Wait, some: bool, loras: Sequence[adapters.LoRA]) -> None:
    """Have just these LoRAs on, where `some` others are. Raises CheckpointError where the server refuses, or says yes
    and does not."""
    asked = [("/v1/unmerge_lora_weights", {"target": "all"})] if some else []
    asked += [("/v1/set_lora", adapters.request(loras))] if loras else []
    wait.drawing = Text("the server still puts the LoRAs on")
    for path, body in asked:
        answer = await wait.until(client.ask(wait.address, path, method="POST", json_body=body,
                                             seconds=min(wait.patience, adapters.SECONDS)), Text("sets the LoRAs"))
        if answer.status != 200:
            raise await failure(answer, wait.address, Text("LoRAs"), Text(
                "a LoRA is a path on the server's machine, or a repo id that it has or may fetch"))
    wait.drawing = ""
    active = await wait.until(client.loras(wait.address, wait.patience), Text("looks which LoRAs are on"))
    if problem := adapters.differs(active, loras):
        raise CheckpointError(Text("the server said yes to the LoRAs, and {problem}", problem=problem),
                              wait.address.url, Text("the target or the path is wrong for this model"))


async def _unchanged(wait: Wait, ready: Ready) -> None:
    """Raise CheckpointError where other LoRAs are on than before: nobody knows with which this was drawn."""
    active = await wait.until(client.loras(wait.address, wait.patience), Text("looks which LoRAs are on"))
    if problem := adapters.differs(active, ready.loras):
        raise CheckpointError(Text("another client changed the LoRAs while this was drawn: {problem}", problem=problem),
                              wait.address.url, Text("use one set of LoRAs a server at a time, and queue this again"))


def _can_be_lossless(start: object, clip: object) -> None:
    if start is not None or clip is not None:
        raise CheckpointError(Text("lossless takes no picture or video to start from"), "", Text("use transport mp4"))
    try:
        import msgpack  # noqa: F401
    except ImportError:
        raise CheckpointError(Text("lossless needs the package msgpack"), "",
                              Text("pip install msgpack, or use transport mp4")) from None
