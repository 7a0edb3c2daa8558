"""SGLang's server of a tiny Wan pipeline, which on a CPU diffusers runs for it: a video, and a job that fails."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import av
import numpy
import pytest
import requests

from quantized_transformers.engines.sglang.references import base_of
from support import sglang, wan_pipeline
from support.server import error_of, outputs
from support.server_graphs import TIMEOUT, failed, report, video

pytestmark = pytest.mark.server

FILM: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "", "size": "64x64", "num_frames": wan_pipeline.FRAMES, "fps": 8,
                        "num_inference_steps": 4, "guidance_scale": 5.0, "seed": 7, "generator_device": "cpu"}


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    return wan_pipeline.complete(tmp_path_factory.mktemp("served") / "tiny-wan")


@pytest.fixture(scope="module")
def wan_server(server_environment, wan_folder, ports, tmp_path_factory) -> Iterator[sglang.Server]:
    """Named as `serve` would; which never leaves the drawing to diffusers, as Wan on a CPU needs it."""
    folder = tmp_path_factory.mktemp("wan")
    port, command = sglang.command(wan_folder, "--model-id", "Wan2.1-T2V-1.3B-Diffusers", "--backend", "diffusers",
                                   "--served-model-name", f"qt:{base_of(str(wan_folder)).part}", "--output-path",
                                   str(folder / "output"), "--input-save-path", "", port=ports["wan"])
    with sglang.Server(folder, port, command) as running:
        yield running


def film(server: sglang.Server, **changed: Any) -> dict[str, Any]:
    """The record of a job that is over."""
    status, job = server.request("/v1/videos", {**FILM, **changed})
    assert status == 200
    while job["status"] in ("queued", "in_progress"):
        job = server.request(f"/v1/videos/{job['id']}")[1]
    return job


def content(server: sglang.Server, **changed: Any) -> bytes:
    """The file of a video."""
    job = film(server, **changed)
    assert (job["status"], job["progress"], job["error"], job["num_outputs"]) == ("completed", 100, None, 1)
    return requests.get(f"{server.url}/v1/videos/{job['id']}/content", timeout=30).content


def frames(file: Any) -> numpy.ndarray:
    """uint8 [T, H, W, 3] of a video with 8 frames a second."""
    with av.open(file) as opened:
        stream = opened.streams.video[0]
        assert stream.average_rate == 8
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(stream)])


def test_a_video(wan_server):
    """Each seed has its own, and the same one again."""
    made = [content(wan_server, seed=seed) for seed in (7, 7, 8)]
    assert made[0] == made[1] != made[2]
    assert frames(io.BytesIO(made[0])).shape == (wan_pipeline.FRAMES, 64, 64, 3)


def test_a_job_that_fails_says_why(wan_server):
    job = film(wan_server, size="60x60")
    assert job["status"] == "failed" and "have to be divisible by 16 but are 60 and 60" in job["error"]["message"]
    assert film(wan_server)["status"] == "completed", "and the next is made"


def graph(folder, **changed: Any) -> dict[str, Any]:
    return video("film", folder, "wan", **{"width": 64, "height": 64, "length": wan_pipeline.FRAMES, "fps": 8, "steps": 4,
                                           "cfg": 5.0, "seed": 7, **changed})


def test_a_node_makes_it(comfy, wan_server, wan_folder):
    """Frame by frame what the server made; an empty negative prompt is one."""
    history = comfy.run(graph(wan_folder), TIMEOUT)
    assert not error_of(history), error_of(history)
    saved, = (path for path in outputs(comfy, history, "images") if path.suffix == ".mp4")
    assert numpy.array_equal(frames(saved), frames(io.BytesIO(content(wan_server))))
    assert str(base_of(str(wan_folder)).part) in report(history, "film")


def test_a_node_says_why_a_job_failed(comfy, wan_server, wan_folder):
    said = failed(comfy, graph(wan_folder, width=72))
    assert "have to be divisible by 16 but are 64 and 72" in said and wan_server.url in said
