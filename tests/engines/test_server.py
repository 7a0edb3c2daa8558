"""SGLang's real server on this CPU, without any client of ours: what the clients and `serve` lean on."""

from __future__ import annotations

import io

import numpy
import pytest
from PIL import Image

from support import miniature

pytestmark = pytest.mark.server

DRAWN = {"prompt": "a cat", "size": f"{miniature.SIZE}x{miniature.SIZE}", "num_inference_steps": miniature.STEPS,
         "guidance_scale": 1.0, "generator_device": "cpu", "output_format": "png"}


def test_the_name_that_it_was_given_comes_back_whole(server):
    status, answer = server.request("/v1/models")
    model, = answer["data"]
    assert status == 200 and model["id"] == server.command[server.command.index("--served-model-name") + 1]
    assert (model["num_gpus"], model["task_type"], model["pipeline_name"]) == (1, "T2I", "FluxPipeline")
    assert server.request("/server_info")[1]["version"] == "0.5.23"


def test_a_seed_draws_one_picture(server):
    """Byte by byte, and the one that the prompt asks for: the nearest of the six that the miniature has learned."""
    first, again, other = (server.picture(**DRAWN, seed=seed) for seed in (7, 7, 8))
    assert first == again != other
    picture = Image.open(io.BytesIO(first))
    assert picture.format == "PNG" and picture.size == (miniature.SIZE, miniature.SIZE)
    drawn = numpy.asarray(picture, dtype=numpy.float32).transpose(2, 0, 1) / 127.5 - 1
    near = [miniature.psnr(drawn, learned, 2) for learned in miniature.pictures()[:, 0]]
    assert miniature.PROMPTS[near.index(max(near))] == "a cat" and max(near) > 20


def test_it_leaves_the_duties_to_the_client(server):
    """Without a format a JPEG, without a seed always the same one, and any model's name will do."""
    plain = {key: value for key, value in DRAWN.items() if key != "output_format"}
    assert Image.open(io.BytesIO(server.picture(**plain, seed=7))).format == "JPEG"
    assert server.picture(**DRAWN) == server.picture(**DRAWN, seed=42, model="nope", no_such_field=1)
