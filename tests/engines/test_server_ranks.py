"""SGLang's server with two ranks, which share a picture's tokens on this CPU: what it draws, and what it answers once one of
them is dead. The last test kills one."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator

import numpy
import psutil
import pytest

from support import sglang, sglang_real
from support.miniature import psnr
from support.server_graphs import drawn, failed, is_busy, picture
from support.sglang_real import DRAWN, pixels

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def ranks(server_environment, miniature_folder, ports, tmp_path_factory) -> Iterator[sglang.Server]:
    """`serve MINIATURE --gpus 2 --run`."""
    with sglang_real.by_serve(tmp_path_factory.mktemp("ranks"), ports["ranks"], miniature_folder, "--gpus", "2") as running:
        yield running


def test_two_draw_what_one_draws(ranks, server):
    """But for sums of attention in another order, in BF16."""
    model, = ranks.request("/v1/models")[1]["data"]
    assert model["num_gpus"] == 2 and model["id"] == server.request("/v1/models")[1]["data"][0]["id"]
    assert psnr(pixels(ranks.picture(**DRAWN, seed=7)), pixels(server.picture(**DRAWN, seed=7)), 255) >= 45


def test_a_node_does_not_care_how_many(ranks, comfy, miniature_folder):
    """The name says what is served, and not by how many."""
    assert numpy.array_equal(drawn(comfy, picture("cat", miniature_folder, "ranks")), pixels(ranks.picture(**DRAWN, seed=7)))


def test_one_is_killed(ranks, comfy, miniature_folder):
    """What runs fails within seconds; it is unhealthy from then on, refuses within a second, and does not end. A node says so."""
    worker, = [one for one in psutil.Process(ranks.process.pid).children(recursive=True)
               if one.cmdline()[:1] == ["sgl_diffusion::scheduler_U1"]]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(ranks.request, "/v1/images/generations",
                              {**DRAWN, "response_format": "b64_json", "num_inference_steps": 2000})
        while not is_busy(ranks):
            pass
        worker.kill()
        assert running.result(30) == (500, "Internal Server Error")
    said = "Scheduler worker exited; restart the server."
    assert ranks.request("/health") == (503, {"status": "unhealthy", "error": said})
    end, refused = time.time() + 10, (0, None)
    while refused[0] != 503 and time.time() < end:  # it looks once a second
        refused = ranks.request("/v1/images/generations", {})
    assert refused == (503, {"error": said})
    assert ranks.request("/liveness")[0] == 200 and ranks.process.poll() is None
    words = failed(comfy, picture("cat", miniature_folder, "ranks"))
    assert "its workers died" in words and said in words and ranks.url in words
