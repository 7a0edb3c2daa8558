"""The pictures of a comparison. matplotlib is optional and imported here only; its pyplot, which keeps global state,
never is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from .metrics import Sums
from .weights import WeightComparison

if TYPE_CHECKING:
    import numpy

DPI = 100
TALL = 480  # pixels of the plot below the pictures
BACKGROUND, TEXT = "#1e2024", "#ebebeb"


def missing() -> str:
    """Why there are no plots and what to do, as one sentence; empty where matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        return Text("plots need matplotlib ({error}): `python -m pip install matplotlib` with the Python that runs "
                    "ComfyUI", error=error)
    return ""


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor=BACKGROUND, layout="constrained")


def _axes(figure: Any, rows: int, columns: int, index: int, title: str, x: str, y: str) -> Any:
    axes = figure.add_subplot(rows, columns, index, facecolor=BACKGROUND)
    axes.set_title(title, color=TEXT, fontsize=11)
    axes.set_xlabel(x, color=TEXT)
    axes.set_ylabel(y, color=TEXT)
    axes.tick_params(colors=TEXT)
    axes.grid(alpha=0.2)
    for spine in axes.spines.values():
        spine.set_color("#666a72")
    return axes


def weights_figure(comparison: WeightComparison) -> Any:
    """A matplotlib Figure: the signal-to-noise ratio of every Linear layer in the order of the model, a colour for each
    format, and the total. Layers that are identical have none; they are counted."""
    figure = _figure(13, 6)
    total = comparison.total
    name = comparison.reference.architecture
    axes = _axes(figure, 1, 1, 1, f"{name}: signal to noise of the weights, "
                 + ("identical" if not total.noise else f"{total.snr:.1f} dB in all"), "layer, in the model's order",
                 "dB")
    for kind in dict.fromkeys(layer.after or "stored" for layer in comparison.layers):
        points = [(i, layer.sums.snr) for i, layer in enumerate(comparison.layers)
                  if (layer.after or "stored") == kind and math.isfinite(layer.sums.snr)]
        same = sum(not layer.sums.noise for layer in comparison.layers if (layer.after or "stored") == kind)
        axes.scatter(*(zip(*points, strict=True) if points else ([], [])), s=14,
                     label=kind + (f" ({same} identical)" if same else ""))
    if math.isfinite(total.snr):
        axes.axhline(total.snr, color=TEXT, linewidth=0.8, linestyle="--")
    place = {id(layer): i for i, layer in enumerate(comparison.layers)}
    for layer in comparison.worst_first[:3]:
        if math.isfinite(layer.sums.snr):
            right = place[id(layer)] > len(comparison.layers) / 2
            axes.annotate(layer.name, (place[id(layer)], layer.sums.snr), color=TEXT, fontsize=8,
                          xytext=(-6 if right else 6, 4), textcoords="offset points", ha="right" if right else "left")
    axes.margins(y=0.12)
    axes.legend(facecolor=BACKGROUND, labelcolor=TEXT)
    return figure


def trajectory_picture(steps: Sequence[Sums], final: Sums, width: int) -> numpy.ndarray:
    """The curves of a sampled pair as a picture, F32 [TALL, width, 3] in 0..1: cosine and relative L2 of the denoised
    prediction at each step, and of the final latents. Without matplotlib a line of text that says so."""
    import numpy

    if missing():
        said = "No plot: matplotlib is missing. The report says how to get it."
        return beside([(said, numpy.zeros((0, width, 3), numpy.float32))], width)
    figure = _figure(width / DPI, TALL / DPI)
    numbers = range(1, len(steps) + 1)
    curves = (("cosine of x0", [s.cosine for s in steps], final.cosine),
              ("relative L2 of x0", [s.relative for s in steps], final.relative))
    for i, (title, values, last) in enumerate(curves, 1):
        axes = _axes(figure, 1, 2, i, title, "step", "")
        axes.plot(numbers, values, marker="o", markersize=3, color="#56b25c")
        axes.axhline(last, color="#3484cc", linewidth=0.9, linestyle="--", label=f"final latents {last:.6g}")
        if i == 2:
            axes.set_ylim(bottom=0)
        axes.legend(facecolor=BACKGROUND, labelcolor=TEXT, fontsize=8)
        axes.ticklabel_format(useOffset=False)
    return _pixels(figure, width)


def _pixels(figure: Any, width: int) -> numpy.ndarray:
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = numpy.asarray(canvas.buffer_rgba(), dtype=numpy.float32)[..., :3] / 255
    out = numpy.zeros((TALL, width, 3), dtype=numpy.float32)  # a canvas may be a pixel smaller than asked for
    height, there = min(TALL, pixels.shape[0]), min(width, pixels.shape[1])
    out[:height, :there] = pixels[:height, :there]
    return out


def beside(pictures: Sequence[tuple[str, numpy.ndarray]], least: int) -> numpy.ndarray:
    """Pictures F32 [H, W, 3] in 0..1 with their titles, side by side, pixel for pixel; at least `least` wide in all."""
    import numpy
    from PIL import Image, ImageDraw, ImageFont

    head, gap = 24, 8
    height, each = pictures[0][1].shape[0], pictures[0][1].shape[1]
    wide = max(len(pictures) * (each + gap) - gap, least)
    canvas = Image.new("RGB", (wide, head + height + gap), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    for i, (title, picture) in enumerate(pictures):
        at = i * (each + gap)
        draw.text((at + 4, 4), title, fill=TEXT, font=font)
        if picture.size:  # older Pillows take no empty one
            pixels = (picture.clip(0, 1) * 255).round().astype(numpy.uint8)
            canvas.paste(Image.fromarray(pixels), (at, head))
    return numpy.asarray(canvas, dtype=numpy.float32) / 255
