"""What a server sends back, read as a file of somebody else: another size, number or kind is refused with both."""

from __future__ import annotations

import base64
import sys
from io import BytesIO

import numpy
import pytest
import torch
from PIL import Image

from quantized_transformers import host
from quantized_transformers.engines.sglang import results
from quantized_transformers.engines.sglang.requests import Drawing
from quantized_transformers.loaders.errors import CheckpointError

pytestmark = pytest.mark.unit
ASKED = Drawing("a", width=32, height=16)
URL = "http://127.0.0.1:30000"


def answer(*files: bytes) -> dict:
    return {"data": [{"b64_json": base64.b64encode(file).decode()} for file in files]}


def file(width: int, height: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    out = BytesIO()
    values = numpy.arange(width * height * len(mode)).reshape(height, width, len(mode)) % 256
    Image.fromarray(values.astype("uint8"), mode).save(out, kind)
    return out.getvalue()


def test_pixels_come_as_they_are():
    made = results.tensor([results.picture(answer(file(32, 16)), ASKED, URL)])
    assert made.shape == (1, 16, 32, 3) and made.dtype == torch.float32
    assert torch.equal((made * 255).round().long().flatten(), torch.arange(32 * 16 * 3) % 256)
    again = Image.open(BytesIO(results.png(made[0])))
    assert again.format == "PNG" and again.tobytes() == Image.open(BytesIO(file(32, 16))).tobytes()
    clear = results.tensor([results.picture(answer(file(32, 16, mode="RGBA")), ASKED, URL)])
    assert clear.shape[-1] == 4


@pytest.mark.parametrize("body, word", [
    (answer(file(16, 16)), "drew 16 x 16, and 32 x 16 was asked for"), (answer(file(32, 16), file(32, 16)), "2 pictures for one"),
    (answer(), "0 pictures for one"), (None, "0 pictures"), ("x", "0 pictures"), (answer(file(32, 16, "JPEG")), "no PNG"),
    (answer(file(32, 16)[:60]), "no PNG"), (answer(b""), "no PNG"), ({"data": [{"b64_json": "!!"}]}, "no PNG"), ({"data": [{"b64_json": None}]}, "no PNG")])
def test_what_is_not_what_was_asked_for(body, word):
    with pytest.raises(CheckpointError, match=word) as refused:
        results.picture(body, ASKED, URL)
    assert URL in str(refused.value)


def test_another_size_where_it_is_accepted():
    accepting = Drawing("a", width=40, height=16, extra='{"accept_size": true}')
    assert results.picture(answer(file(32, 16)), accepting, URL).size == (32, 16)
    with pytest.raises(CheckpointError, match="ask for 48 x 16|ask for 32 x 16"):
        results.picture(answer(file(32, 16)), Drawing("a", width=40, height=16), URL)
    with pytest.raises(CheckpointError, match="several sizes"):
        results.tensor([Image.new("RGB", (16, 16)), Image.new("RGB", (32, 16))])


FILM = Drawing("a", width=32, height=16, frames=5, fps=8)


@pytest.fixture(scope="module")
def film() -> bytes:
    frames = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 16, 32, 3).contiguous()
    return host.file_of_video(host.video_of_frames(frames, 8))


def test_a_video(film):
    video = results.video(film, FILM, URL)
    frames = video.get_components().images
    assert frames.shape == (5, 16, 32, 3)
    levels = frames.mean((1, 2, 3))
    assert torch.allclose(levels, torch.linspace(0, 1, 5), atol=0.03), "8 bit, limited range, one chroma plane"


@pytest.mark.parametrize("drawing, word", [
    (Drawing("a", width=16, height=16, frames=5, fps=8), "drew 32 x 16"), (Drawing("a", width=32, height=16, frames=9, fps=8), "5 frames, and 9"),
    (Drawing("a", width=32, height=16, frames=5, fps=16), "8 frames a second, and 16")])
def test_another_video(film, drawing, word):
    with pytest.raises(CheckpointError, match=word):
        results.video(film, drawing, URL)
    accepting = Drawing("a", width=drawing.width, height=16, frames=drawing.frames, fps=drawing.fps, extra='{"accept_size": true}')
    assert results.video(film, accepting, URL).get_frame_count() == 5


@pytest.mark.parametrize("data", [b"", b"no video", b"\x00" * 4096])
def test_what_is_no_video(data):
    with pytest.raises(CheckpointError, match="no video"):
        results.video(data, FILM, URL)


def test_decoded_frames(monkeypatch):
    """As /rollout/generate has them: msgpack of safetensors. The package is what a user installs for it; pip has it, too."""
    from pip._vendor import msgpack
    from safetensors.torch import save

    monkeypatch.setitem(sys.modules, "msgpack", msgpack)

    frames = torch.rand(3, 5, 16, 32)

    def sent(tensor):
        return msgpack.packb([{"generated_output": {"__tensor__": True, "data": save({"t": tensor}), "dtype": "x", "shape": []}}])

    video = results.lossless(sent(frames), FILM, URL)
    assert torch.equal(video.get_components().images, frames.permute(1, 2, 3, 0)) and video.get_components().frame_rate == 8
    for wrong, word in ((torch.rand(3, 4, 16, 32), "4 frames, and 5"), (torch.rand(3, 5, 16, 16), "drew 16 x 16"),
                        (torch.rand(4, 5, 16, 32), "no frames"), (torch.rand(3, 16, 32), "no frames")):
        with pytest.raises(CheckpointError, match=word):
            results.lossless(sent(wrong), FILM, URL)
    with pytest.raises(CheckpointError, match="no frames"):
        results.lossless(b"\xc1", FILM, URL)
