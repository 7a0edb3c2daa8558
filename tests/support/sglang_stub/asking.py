"""Requests to the app, as a client writes them that knows all that is to be sent."""

from __future__ import annotations

import base64
import io
from typing import Any

import requests
from PIL import Image

ASKED: dict[str, Any] = {"prompt": "a cat", "size": "64x48", "seed": 7, "num_inference_steps": 4, "output_format": "png",
                         "response_format": "b64_json", "generator_device": "cpu"}
FILM: dict[str, Any] = {"prompt": "a cat", "size": "64x48", "seed": 7, "num_inference_steps": 4, "num_frames": 5, "fps": 8,
                        "generator_device": "cpu"}
COLOURS = ((250, 10, 20), (10, 250, 30), (20, 10, 250))


def png(rgb: tuple[int, int, int], size: tuple[int, int] = (32, 24)) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", size, rgb).save(made, "PNG")
    return made.getvalue()


def pictures(answer: requests.Response) -> list[Image.Image]:
    assert answer.status_code == 200, answer.text
    return [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))) for one in answer.json()["data"]]


def generate(stub, **changed: Any) -> requests.Response:
    return requests.post(f"{stub.url}/v1/images/generations", json={**ASKED, **changed}, timeout=30)


def edit(stub, images: list[bytes], name: str = "image", **fields: Any) -> requests.Response:
    files = [(name, (f"{at}.png", one, "image/png")) for at, one in enumerate(images)]
    return requests.post(f"{stub.url}/v1/images/edits", data={**ASKED, **fields}, files=files, timeout=30)


def film(stub, status: str = "completed", **changed: Any) -> dict[str, Any]:
    """The job of a video, once it is so far."""
    answer = requests.post(f"{stub.url}/v1/videos", json={**FILM, **changed}, timeout=30)
    assert answer.status_code == 200, answer.text
    return follow(stub, answer.json()["id"], status)


def follow(stub, job: str, status: str) -> dict[str, Any]:
    stub.until(lambda: stub.request(f"/v1/videos/{job}")[1]["status"] == status)
    return stub.request(f"/v1/videos/{job}")[1]
