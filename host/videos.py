"""The host's VIDEO: made of a file's bytes or of frames, and written as a file."""

from __future__ import annotations

from fractions import Fraction
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from .check import needs

if TYPE_CHECKING:
    import torch


class Size(NamedTuple):
    """Of a video: pixels, frames, frames a second."""

    width: int
    height: int
    frames: int
    fps: float


@needs("videos")
def video_of_file(data: bytes) -> tuple[Any, Size]:
    """A VIDEO of an .mp4's bytes, and its size. Raises ValueError where they are no video."""
    from comfy_api.latest import InputImpl

    video = InputImpl.VideoFromFile(BytesIO(data))
    try:
        width, height = video.get_dimensions()
        return video, Size(width, height, video.get_frame_count(), float(video.get_frame_rate()))
    except (OSError, ValueError) as error:  # av's own errors are both
        raise ValueError(str(error)) from error


@needs("videos")
def video_of_frames(frames: torch.Tensor, fps: float) -> Any:
    """A VIDEO of frames: float [T, H, W, 3] of 0 to 1."""
    from comfy_api.latest import InputImpl, Types

    rate = Fraction(fps).limit_denominator(1001)
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, frame_rate=rate))


@needs("videos")
def file_of_video(video: Any) -> bytes:
    """The bytes of an .mp4 of a VIDEO."""
    file = BytesIO()
    video.save_to(file)
    return file.getvalue()
