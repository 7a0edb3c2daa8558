"""A server that is asked about hostile checkpoints, and given prompts of them, answers everybody else as ever."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from urllib.parse import quote

import aiohttp
import pytest

from support import hostile, svdquant_models
from support.server import Server
from support.workflow import apply_override, load_base, text_to_image

pytestmark = pytest.mark.host

PROMPTS = 500  # every second one of them of a hostile checkpoint
SLOWEST = 0.25  # seconds for 99 of 100 pings
# In a process of its own, which the test's own work does not hold up: a request every 50 ms until stdin ends.
PING = """
import http.client, json, select, sys, time
took, port = [], int(sys.argv[1])
while not select.select([sys.stdin], [], [], 0.05)[0]:
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/system_stats")
    assert connection.getresponse().read()
    connection.close()
    took.append(time.perf_counter() - start)
print(json.dumps(took))
"""


@pytest.fixture()
def server(tiny, tmp_path):
    models = tmp_path / "models"
    svdq = svdquant_models.make_flux()
    (models / "diffusion_models").mkdir(parents=True)
    svdq.write(models / "diffusion_models")
    for name in ("pipeline", "fp8", "nvfp4", "sharded"):
        shutil.copytree(getattr(tiny, name), models / "diffusers" / name)
    with Server(tmp_path) as running:
        running.good = ["pipeline", "fp8", "nvfp4", "sharded", svdq.file]
        yield running


def of_hostile(number: int, name: str) -> dict:
    """A prompt that loads or inspects it, by every node that does."""
    kind = ("QT_InspectCheckpoint", "QT_LoadBaseModel", "QT_ApplyTransformerOverride", "QT_NunchakuSVDQLoader", "QT_ModelSlimLoader")[number % 5]
    first = {"QT_InspectCheckpoint": "checkpoint", "QT_NunchakuSVDQLoader": "weights", "QT_ModelSlimLoader": "folder"}.get(kind)
    if kind == "QT_ApplyTransformerOverride":
        return {"base": load_base("pipeline"), "it": apply_override(["base", 0], name), **text_to_image(["it", 0], "p_", 1, 64)}
    if kind == "QT_LoadBaseModel":
        return {"it": load_base(name), **text_to_image(["it", 0], "p_", 1, 64)}
    it = {"class_type": kind, "inputs": {first: name}}
    return {"it": it} if kind == "QT_InspectCheckpoint" else {"it": it, **text_to_image(["it", 0], "p_", 1, 64)}


def of_good(number: int, name: str) -> dict:
    if number % 10 == 1:
        return {"base": load_base("pipeline"), "it": apply_override(["base", 0], "fp8"), **text_to_image(["it", 0], f"{number}_", 1, 64)}
    return {f"look{number}": {"class_type": "QT_InspectCheckpoint", "inputs": {"checkpoint": name}}}


async def ask_all(server: Server, prompts: list[dict], references: list[str]) -> tuple[list[int], list[int]]:
    """The statuses of all prompts, four of which are posted at a time, and of a description of every reference."""
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}", timeout=aiohttp.ClientTimeout(300)) as session:
        turns = asyncio.Semaphore(4)

        async def post(prompt: dict) -> int:
            async with turns, session.post("/prompt", json={"prompt": prompt}) as response:
                await response.read()
                return response.status

        async def describe(reference: str) -> int:
            async with session.get(f"/quantized_transformers/describe?reference={quote(reference)}") as response:
                assert set(await response.json()) >= {"error"} or response.status == 200
                return response.status

        described = asyncio.gather(*map(describe, references))
        posted = await asyncio.gather(*map(post, prompts))
        return posted, await described


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[int(part * (len(values) - 1))]


@pytest.mark.full
def test_pings_while_hostile_checkpoints_are_read(server):
    """99 of 100 who ask for something else are answered at once, while prompts are checked and run, and files described.
    That ComfyUI itself collects its garbage every 10 s, with the interpreter held, is among it."""
    count = PROMPTS
    names = hostile.write(server.base / "models" / "diffusion_models" / "hostile", server.base / "models" / "diffusers" / "harm", count // 2)
    prompts = [of_hostile(number // 2, names[number // 2]) if number % 2 else of_good(number // 2, server.good[number // 2 % 5])
               for number in range(count)]
    server.get("/quantized_transformers/describe?reference=fp8")  # the process that reads is there
    ping = subprocess.Popen([sys.executable, "-c", PING, str(server.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    start = time.monotonic()
    posted, described = asyncio.run(ask_all(server, prompts, [*names, *server.good]))
    asked = time.monotonic() - start
    while server.get("/prompt")["exec_info"]["queue_remaining"]:
        time.sleep(0.2)
    took = json.loads(ping.communicate("end", timeout=90)[0])
    p50, p99, worst = percentile(took, 0.5), percentile(took, 0.99), max(took)
    print(f"{count} prompts, {len(described)} descriptions: asked in {asked:.1f} s, done in {time.monotonic() - start:.1f} s; {len(took)} pings: "
          f"median {1e3 * p50:.0f} ms, 99 of 100 {1e3 * p99:.0f} ms, worst {1e3 * worst:.0f} ms; posted {sorted(set(posted))}")
    assert set(described) <= {200, 400, 413} and described[-5:] == [200] * 5
    assert posted[::2] == [200] * (count // 2) and set(posted[1::2]) <= {200, 400}
    assert p99 < SLOWEST, sorted(took)[-20:]
