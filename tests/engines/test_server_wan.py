"""SGLang's server of a tiny Wan pipeline, which on a CPU diffusers runs for it: a video, and a job that fails."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import av
import pytest
import requests

from quantized_transformers.engines.sglang.references import base_of
from support import sglang, wan_pipeline

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


def test_a_video(wan_server):
    """Each seed has its own, and the same one again."""
    made = []
    for seed in (7, 7, 8):
        job = film(wan_server, seed=seed)
        assert (job["status"], job["progress"], job["error"], job["num_outputs"]) == ("completed", 100, None, 1)
        made.append(requests.get(f"{wan_server.url}/v1/videos/{job['id']}/content", timeout=30).content)
    assert made[0] == made[1] != made[2]
    with av.open(io.BytesIO(made[0])) as opened:
        stream = opened.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in opened.decode(stream)]
        assert stream.average_rate == 8 and [frame.shape for frame in frames] == wan_pipeline.FRAMES * [(64, 64, 3)]


def test_a_job_that_fails_says_why(wan_server):
    job = film(wan_server, size="60x60")
    assert job["status"] == "failed" and "have to be divisible by 16 but are 60 and 60" in job["error"]["message"]
    assert film(wan_server)["status"] == "completed", "and the next is made"
