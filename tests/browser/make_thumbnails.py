"""Draw workflows/*.jpg: what each template loads and makes, as a diagram (a maintainer's tool).

    python tests/browser/make_thumbnails.py      in the environment of dev.py, COMFYUI_PATH set

A result would need the real models, so there is none. Drawn is what comes from where: the base with its parts in grey,
what is quantized in its format's colour (that of badges and layer maps), and the transformer's size beside BF16. The
template browser shows them in a square of 256 pixels.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from browser.definitions import WORKFLOWS
from browser.graph import Workflow
from browser.notes import NOTES, Note

from support.pack import PACK

SIDE, FINE = 480, 3  # pixels, and how much larger it is drawn
EDGE = 28
BACK, FRAME, GREY, BLACK = (30, 31, 36), (110, 114, 124), (74, 77, 86), (16, 16, 18)
WHITE, PALE = (240, 240, 240), (160, 164, 174)
FORMATS = {"SVDQuant": ("INT4", "SVDQ INT4"), "GGUF": ("Q4_K_M", "GGUF Q4_K")}  # Note.format → short, and as reports call it, where these differ


class Pen:
    """Draws in pixels of the finished picture."""

    def __init__(self) -> None:
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (SIDE * FINE, SIDE * FINE), BACK)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, x: float, y: float, wide: float, tall: float, fill: Any = None, line: Any = None, radius: float = 8) -> None:
        self.draw.rounded_rectangle((x * FINE, y * FINE, (x + wide) * FINE, (y + tall) * FINE), radius * FINE, fill, line,
                                    2 * FINE)

    def shape(self, points: list[tuple[float, float]], fill: Any) -> None:
        self.draw.polygon([(x * FINE, y * FINE) for x, y in points], fill)

    def text(self, x: float, y: float, words: str, size: float, fill: Any = WHITE, wide: float = SIDE) -> float:
        """From the left, in the middle of `y`, smaller where it would be wider than `wide`; returns its width."""
        from PIL import ImageFont

        font = ImageFont.load_default(size * FINE)
        length = font.getlength(words) / FINE
        if length > wide:
            return self.text(x, y, words, size * wide / length * 0.99, fill)
        self.draw.text((x * FINE, y * FINE), words, fill, font, "lm")
        return length


def on(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """What is read on a colour."""
    red, green, blue = colour
    return BLACK if 0.3 * red + 0.59 * green + 0.11 * blue > 125 else WHITE


def rows(note: Note) -> list[tuple[str, str]]:
    """(name, how) of all that is loaded: "base", "own" in the format, "made" in it here, or "other"."""
    quantized = "own" if note.repo else "made"
    parts = [(part.name, quantized if part.gb < part.bf16 else "base") for part in note.parts]
    encoders = note.rest.partition(",")[0].rsplit(" ", 2)[0]  # one or several, without their size
    others = [(what.rsplit(" ", 2)[0], "other") for _, what in note.others]
    return [*parts, *others, *([(encoders, "base")] if encoders != "VAE" else []), ("VAE", "base")]


def thumbnail(workflow: Workflow, colours: dict[str, tuple[int, int, int]]) -> Any:
    """The diagram of a template (PIL image)."""
    from PIL import Image

    note, pen = NOTES[workflow.name], Pen()
    short, name = FORMATS.get(note.format, (note.format, note.format))
    colour = colours[name]
    model, what = note.title.split(" - ")
    pen.text(EDGE, 50, model, 46, wide=SIDE - 2 * EDGE)
    pen.box(EDGE, 82, SIDE - 2 * EDGE, 40, colour)
    pen.text(EDGE + 14, 102, what, 27, on(colour), SIDE - 2 * EDGE - 28)
    parts(pen, rows(note), colour, "on the server" if note.server else "base")
    pen.shape([(256, 238), (274, 238), (274, 226), (296, 246), (274, 266), (274, 254), (256, 254)], WHITE)
    result(pen, workflow.title)
    sizes(pen, note, short, colour)
    return pen.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def parts(pen: Pen, found: list[tuple[str, str]], colour: tuple[int, int, int], where: str) -> None:
    """The base as a frame, its parts in it; what comes from elsewhere is put in from the left."""
    tall, top, left, wide = 34, 156, EDGE + 18, 196
    pen.box(left, top - 8, wide, len(found) * (tall + 6) + 12, None, FRAME)
    pen.text(left + 8, top + len(found) * (tall + 6) + 20, where, 21, PALE)
    for i, (name, how) in enumerate(found):
        y = top + i * (tall + 6)
        out = 26 if how in ("own", "other") else 0
        fill = {"own": colour, "made": colour, "base": GREY, "other": WHITE}[how]
        pen.box(left + 8 - out, y, wide - 16 + out, tall, fill, radius=5)
        if how == "made":  # of what the base has in BF16
            pen.box(left + 8, y, 40, tall, GREY, radius=5)
            pen.shape([(left + 34, y), (left + 34, y + tall), (left + 60, y + tall / 2)], GREY)
        pen.text(left + (68 if how == "made" else 18 - out / 2), y + tall / 2, name, 21, on(fill),
                 wide - (84 if how == "made" else 32))


def result(pen: Pen, title: str) -> None:
    """A picture, a film, or a picture from a picture."""
    x, y, side = 316, 178, 136
    if title.startswith("Edit"):
        scene(pen, x, y, side * 0.62, GREY)
        x, y, side = x + side * 0.32, y + side * 0.32, side * 0.68
        pen.box(x - 5, y - 5, side + 10, side + 10, BACK)
    scene(pen, x, y, side, FRAME)
    if title.endswith("video"):
        for edge in (x, x + side - 20):
            pen.box(edge, y, 20, side, BLACK, radius=6)
            for hole in range(5):
                pen.box(edge + 6, y + 9 + hole * 25, 9, 14, WHITE, radius=2)
        pen.shape([(x + 52, y + 42), (x + 52, y + 94), (x + 96, y + 68)], WHITE)


def scene(pen: Pen, x: float, y: float, side: float, back: tuple[int, int, int]) -> None:
    """The sign for a picture: sun and mountains."""
    def at(u: float, v: float) -> tuple[float, float]:
        return x + u * side, y + v * side

    pen.box(x, y, side, side, back)
    pen.draw.ellipse([c * FINE for c in (*at(0.62, 0.14), *at(0.84, 0.36))], WHITE)
    pen.shape([at(0.06, 0.9), at(0.36, 0.4), at(0.66, 0.9)], BACK)
    pen.shape([at(0.44, 0.9), at(0.68, 0.56), at(0.94, 0.9)], BLACK)


def sizes(pen: Pen, note: Note, short: str, colour: tuple[int, int, int]) -> None:
    """The transformers' size as it is and in BF16, as bars."""
    whole, own = sum(part.bf16 for part in note.parts), sum(part.gb for part in note.parts)
    mixed = any(part.gb == part.bf16 for part in note.parts)
    wide = SIDE - 2 * EDGE
    for y, words, share, fill in ((374, f"transformer{'s' * (len(note.parts) > 1)} in BF16: {whole:g} GB", 1, GREY),
                                  (418, f"{'with ' * mixed}{short}: {own:g} GB", own / whole, colour)):
        pen.box(EDGE, y, wide * share, 36, fill, radius=5)
        inside = wide * share > 190
        pen.text(EDGE + (12 if inside else wide * share + 10), y + 18, words, 24, on(fill) if inside else WHITE)


def jpeg(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return out.getvalue()


def main() -> None:
    from quantized_transformers.views.layer_map import format_colours

    for workflow in WORKFLOWS:
        file = PACK / "workflows" / f"{NOTES[workflow.name].title}.jpg"
        file.write_bytes(jpeg(thumbnail(workflow, format_colours())))
        print(file.name, file.stat().st_size)


if __name__ == "__main__":
    from support.pack import start_comfy

    start_comfy()
    main()
