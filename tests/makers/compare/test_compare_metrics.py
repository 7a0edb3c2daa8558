"""Measures of a comparison against formulas that are not the pack's: numpy and scikit-image."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from quantized_transformers.makers.compare import metrics, plot
from quantized_transformers.makers.compare.metrics import lpips, psnr, ssim, sums

pytestmark = pytest.mark.unit


def pair(*shape: int, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(len(shape))
    a = torch.rand(shape, generator=g)
    return a, (a + noise * torch.randn(shape, generator=g)).clamp(0, 1)


def test_sums_over_slices(monkeypatch):
    """More than one slice, and a last one that is not full."""
    monkeypatch.setattr(metrics, "SLICE", 64)
    a, b = pair(3, 7, 11)
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    found = sums(a, b)
    assert found.cosine == pytest.approx(numpy.dot(x, y) / numpy.linalg.norm(x) / numpy.linalg.norm(y), rel=1e-12)
    assert found.relative == pytest.approx(numpy.linalg.norm(x - y) / numpy.linalg.norm(x), rel=1e-12)
    assert found.snr == pytest.approx(10 * numpy.log10(numpy.var(x) + x.mean() ** 2) - 10 * numpy.log10(((x - y) ** 2).mean()))
    assert found.largest == numpy.abs(x - y).max()
    half = sums(a[:1], b[:1]) + sums(a[1:], b[1:])
    assert half.snr == pytest.approx(found.snr, rel=1e-12) and half.largest == found.largest
    with pytest.raises(ValueError, match="are no pair"):
        sums(a, b[:1])


def test_limits():
    a, zero = torch.ones(4), torch.zeros(4)
    same = sums(a, a)
    assert (same.cosine, same.relative, same.snr) == (1.0, 0.0, math.inf) and psnr(same, 4, 1.0) == math.inf
    assert (sums(zero, zero).cosine, sums(zero, zero).snr) == (1.0, math.inf)
    lost = sums(zero, a)
    assert (lost.cosine, lost.relative, lost.snr) == (0.0, math.inf, -math.inf)
    assert sums(a, -a).cosine == -1.0
    empty = sums(torch.zeros(0), torch.zeros(0))
    assert empty.cosine == 1.0 and empty.noise == 0


def test_pictures_against_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b = pair(2, 3, 24, 30)
    found = sums(a, b)
    x, y = a.numpy(), b.numpy()
    assert psnr(found, a.numel(), 1.0) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1.0), rel=1e-6)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [structural_similarity(*(p.astype(numpy.float64) for p in (x[i], y[i])), channel_axis=0, data_range=1.0,
                                      **options) for i in range(2)]
    assert ssim(a, b, 1.0) == pytest.approx(numpy.mean(expected), abs=2e-6)  # F32 moments of numbers up to 1
    wide, peak = (torch.stack([a[:, 0], b[:, 0]]) - 0.5) * 30, 28.0  # latents: other values, another span
    expected = numpy.mean([structural_similarity(*(p.numpy().astype(numpy.float64) for p in wide[:, i]), data_range=peak,
                                                 **options) for i in range(2)])
    assert ssim(wide[0][:, None], wide[1][:, None], peak) == pytest.approx(expected, abs=2e-6)
    assert ssim(a, a, 1.0) == pytest.approx(1.0, abs=1e-6)


def test_small_and_flat_pictures():
    a, b = pair(1, 4, 5, 8)
    value = ssim(a, b, 1.0)
    assert value is not None and 0 < value < 1
    assert ssim(a[..., :2, :2], b[..., :2, :2], 1.0) is None
    flat = torch.zeros(1, 1, 16, 16)
    assert ssim(flat, flat, 0.0) == 1.0 and ssim(flat, flat + 1, 0.0) is None


def test_lpips_says_why_not():
    """The package is not among those of this environment; nothing is fetched either way."""
    value, why = lpips(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64))
    assert value is None and "not installed" in why


def test_pictures_are_pixel_for_pixel():
    red = numpy.zeros((10, 20, 3), numpy.float32)
    red[..., 0] = 1
    strip = plot.beside([("a", red), ("b", red * 0.5)], 200)
    assert strip.shape[1] == 200 and strip.dtype == numpy.float32
    assert (strip[24:34, 0:20] == red).all() and abs(strip[24:34, 28:48, 0] - 0.5).max() < 1 / 255
    a, b = pair(50)
    curves = plot.trajectory_picture([sums(a, b), sums(a, a)], sums(a, b), 640)
    assert curves.shape == (plot.TALL, 640, 3) and curves.min() >= 0 and curves.max() <= 1 and curves.std() > 0.02
