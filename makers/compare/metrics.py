"""Measures of the difference of two tensors of the same shape. Accumulated in F64, a slice at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ...host.texts import Text

if TYPE_CHECKING:
    import torch

SLICE = 1 << 22  # elements
WINDOW = 11  # taps of SSIM's Gaussian window (sigma 1.5), those of the paper (Wang et al. 2004)


class Sums(NamedTuple):
    """Sums over all elements of a reference a and a candidate b: a², b², ab and (a - b)²; the largest |a - b|."""

    aa: float
    bb: float
    ab: float
    noise: float
    largest: float

    @property
    def cosine(self) -> float:
        """The cosine of the angle between the two, -1..1; 1 for two of zeros, 0 where only one is."""
        if not self.noise:
            return 1.0
        return max(-1.0, min(1.0, self.ab / math.sqrt(self.aa * self.bb))) if self.aa and self.bb else 0.0

    @property
    def relative(self) -> float:
        """||a - b|| / ||a||; infinite where a is zero and b is not."""
        return 0.0 if not self.noise else math.sqrt(self.noise / self.aa) if self.aa else math.inf

    @property
    def snr(self) -> float:
        """Signal to noise in dB, 10 log10(sum a² / sum (a - b)²); infinite for two that are equal."""
        return decibels(self.aa, self.noise)

    def __add__(self, other: object) -> Sums:
        assert isinstance(other, Sums)
        return Sums(self.aa + other.aa, self.bb + other.bb, self.ab + other.ab, self.noise + other.noise,
                    max(self.largest, other.largest))


NOTHING = Sums(0.0, 0.0, 0.0, 0.0, 0.0)


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise, minus infinite without signal."""
    return math.inf if not noise else 10 * math.log10(signal / noise) if signal else -math.inf


def sums(a: torch.Tensor, b: torch.Tensor) -> Sums:
    """See Sums. Raises ValueError for two shapes."""
    if a.shape != b.shape:
        raise ValueError(Text("{first} and {second} are no pair", first=list(a.shape), second=list(b.shape)))
    total = NOTHING
    for x, y in _slices(a, b):
        difference = x - y
        total += Sums(float(x @ x), float(y @ y), float(x @ y), float(difference @ difference),
                      float(difference.abs().max()))
    return total


def _slices(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for x, y in zip(a.reshape(-1).split(SLICE), b.reshape(-1).split(SLICE), strict=True):
        if x.numel():
            yield x.double(), y.double()


def psnr(found: Sums, count: int, peak: float) -> float:
    """Peak signal to noise in dB, 10 log10(peak² / mean squared error), of `count` elements; infinite for two equal."""
    return decibels(peak * peak * count, found.noise)


def ssim(a: torch.Tensor, b: torch.Tensor, peak: float) -> float | None:
    """Mean structural similarity of pictures [N, C, H, W] whose values span `peak`; 1 for two equal.

    kornia's, with the paper's constants and window, over the pixels whose window lies within the picture. None for
    pictures smaller than 3 x 3; those below 11 x 11 get a smaller window.
    """
    from kornia.metrics import ssim as index

    side = min(*a.shape[-2:], WINDOW)
    window = side if side % 2 else side - 1
    if window < 3:
        return None
    if not peak > 0:
        return 1.0 if bool((a == b).all()) else None
    values = [float(index(x[None], y[None], window, peak, padding="valid").double().mean())
              for x, y in zip(a.float(), b.float(), strict=True)]
    return sum(values) / len(values)


def lpips(a: torch.Tensor, b: torch.Tensor) -> tuple[float | None, str]:
    """(LPIPS (AlexNet) of pictures [N, 3, H, W] in 0..1, or None; why not). Nothing is downloaded."""
    import importlib.util

    import torch

    if importlib.util.find_spec("lpips") is None:
        return None, Text("the package lpips is not installed")
    from torchvision.models import AlexNet_Weights

    weights = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(AlexNet_Weights.IMAGENET1K_V1.url))
    if not os.path.isfile(weights):
        return None, Text("AlexNet's weights are not in {weights}, and nothing is downloaded", weights=weights)
    if min(a.shape[-2:]) < 64 or a.shape[1] != 3:
        return None, Text("the pictures are smaller than 64 x 64, or not RGB")
    from lpips import LPIPS

    network = LPIPS(net="alex", verbose=False).eval()
    with torch.inference_mode():
        values = [float(network(x[None] * 2 - 1, y[None] * 2 - 1)) for x, y in zip(a, b, strict=True)]
    return sum(values) / len(values), ""
