"""What a server gives back, checked: it rounds sizes and lengths in silence (docs/sources/sglang.md, "Server: what it
leaves to its clients")."""

from __future__ import annotations

import base64
import binascii
from io import BytesIO
from typing import TYPE_CHECKING, Any

from ... import host
from ...host.texts import Text
from ...loaders.errors import CheckpointError
from .requests import ACCEPT_SIZE, Drawing

if TYPE_CHECKING:
    import torch
    from PIL import Image

MULTIPLE = 16  # pixels, of a size that every model here draws


def largest(drawing: Drawing) -> int:
    """The most bytes of a result that is what was asked for: its pixels as they are, twice over, and a megabyte."""
    return drawing.width * drawing.height * max(drawing.frames, 1) * 8 + (1 << 20)


def picture(body: Any, drawing: Drawing, where: str) -> Image.Image:
    """The one picture of an answer of /v1/images. Raises CheckpointError for another number or size, and for what is
    none."""
    from PIL import Image

    data = body.get("data") if isinstance(body, dict) else None
    if not isinstance(data, list) or len(data) != 1 or not isinstance(data[0], dict):
        raise CheckpointError(Text("the server sent {count} pictures for one", count=len(data or [])), where,
                              Text("look at its log"))
    try:
        file = BytesIO(base64.b64decode(data[0].get("b64_json") or "", validate=True))
        found = Image.open(file, formats=["PNG"])
        _right_size(found.size, drawing, where)
        found.load()
    except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise CheckpointError(Text("what the server sent is no PNG: {error}", error=error), where,
                              Text("look at its log")) from None
    return found if found.mode in ("RGB", "RGBA") else found.convert("RGB")


def tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """IMAGE: float [B, H, W, 3 or 4] of 0 to 1. Pictures of several sizes, which only `accept_size` lets through, raise
    CheckpointError."""
    import numpy
    import torch

    if len({(one.size, one.mode) for one in pictures}) > 1:
        raise CheckpointError(Text("the server sent pictures of several sizes"), "", Text("set count to 1"))
    return torch.stack([torch.from_numpy(numpy.asarray(one, dtype="float32") / 255) for one in pictures])


def png(image: torch.Tensor) -> bytes:
    """The file of one picture: float [H, W, C] of 0 to 1."""
    from PIL import Image

    values = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(dtype=_uint8()).numpy()
    file = BytesIO()
    Image.fromarray(values).save(file, "PNG", compress_level=1)
    return file.getvalue()


def video(data: bytes, drawing: Drawing, where: str) -> Any:
    """VIDEO of an .mp4. Raises CheckpointError for another size or length than was asked for, and what is no video."""
    try:
        found, size = host.video_of_file(data)
    except ValueError as error:
        raise CheckpointError(Text("what the server sent is no video: {error}", error=error), where,
                              Text("look at its log")) from None
    _right_size((size.width, size.height), drawing, where)
    _right_length(size.frames, drawing, where)
    if abs(size.fps - drawing.fps) > 0.01 and not drawing.accepts_size:
        raise CheckpointError(Text("the video has {found:g} frames a second, and {wanted} were asked for",
                                   found=size.fps, wanted=drawing.fps), where, _accept())
    return found


def lossless(data: bytes, drawing: Drawing, where: str) -> Any:
    """VIDEO of an answer of /rollout/generate: the frames that the VAE decoded, float [3, T, H, W] of 0 to 1. Raises
    CheckpointError for another size or length, and what is none."""
    import msgpack
    import safetensors.torch

    try:
        one, = msgpack.unpackb(data)
        frames = safetensors.torch.load(one["generated_output"]["data"])["t"]
        channels, count, height, width = frames.shape
    except Exception as error:  # any of three libraries' own
        raise CheckpointError(Text("what the server sent are no frames: {error}", error=error), where,
                              Text("use transport mp4")) from None
    if channels != 3:
        raise CheckpointError(Text("what the server sent are no frames: {error}", error=tuple(frames.shape)), where,
                              Text("use transport mp4"))
    _right_size((width, height), drawing, where)
    _right_length(count, drawing, where)
    return host.video_of_frames(frames.permute(1, 2, 3, 0).float().clamp(0, 1).contiguous(), drawing.fps)


def _right_size(found: tuple[int, int], drawing: Drawing, where: str) -> None:
    wanted = drawing.width, drawing.height
    if found != wanted and not drawing.accepts_size:
        near = "{} x {}".format(*(max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in wanted))
        raise CheckpointError(
            Text("the server drew {found}, and {wanted} was asked for", found="{} x {}".format(*found),
                 wanted="{} x {}".format(*wanted)), where,
            Text("ask for {near}, or {accept}", near=near, accept=_accept()))


def _right_length(found: int, drawing: Drawing, where: str) -> None:
    if found != drawing.frames and not drawing.accepts_size:
        raise CheckpointError(Text("the server made {found} frames, and {wanted} were asked for", found=found,
                                   wanted=drawing.frames), where,
                              Text("most models make 4n + 1 or 8n + 1 frames; else {accept}", accept=_accept()))


def _accept() -> str:
    return Text("take what comes with {extra} in extra", extra=f'{{"{ACCEPT_SIZE}": true}}')


def _uint8() -> Any:
    import torch

    return torch.uint8
