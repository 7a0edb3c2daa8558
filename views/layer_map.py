"""A description's layers as a picture, and the colours of their formats."""

from __future__ import annotations

from typing import Any

from ..loaders.description import CheckpointDescription
from ..loaders.families import families
from ..quant.formats import formats
from ..quant.stored import PLAIN, PLAIN_DTYPES

PROBLEM_COLOUR = (214, 69, 65)


def panels_of(description: CheckpointDescription) -> dict[str, dict[str, dict[str, str]]]:
    """Kind of block -> number of the block -> module -> stored format; the layer map's panels, rows and columns."""
    panels: dict[str, dict[str, dict[str, str]]] = {}
    for name, fmt in description.layers.items():
        kind, number, module = _block(name.removeprefix(description.naming.prefix))
        panels.setdefault(kind, {}).setdefault(number, {})[module] = fmt
    return panels


def format_colours() -> dict[str, tuple[int, int, int]]:
    """The colour (RGB) of every stored format in the layer map, and of the dtypes that plain layers have."""
    colours = {fmt.name: fmt.colour for fmt in formats()} | dict.fromkeys(sorted(PLAIN_DTYPES), PLAIN.colour)
    for family in families():
        colours |= family.colours()
    return colours


def css_colours() -> dict[str, str]:
    """The same as CSS has them; "" is the colour of a format that is not among them."""
    return {name: f"#{bytes(colour).hex()}" for name, colour in {**format_colours(), "": PROBLEM_COLOUR}.items()}


def layer_map(description: CheckpointDescription) -> Any:
    """The layers as a picture (PIL image): a panel for each kind of block, rows are blocks, columns modules, the colour
    is the stored format."""
    from PIL import Image, ImageDraw, ImageFont

    panels, colours = panels_of(description), format_colours()
    font, cell, margin, numbers = ImageFont.load_default(12), 20, 16, 26
    background, text, faint = (30, 32, 36), (235, 235, 235), (170, 174, 182)
    columns = {kind: list(dict.fromkeys(m for row in rows.values() for m in row)) for kind, rows in panels.items()}
    titles = {kind: max(int(font.getlength(m)) for m in columns[kind]) + 10 for kind in panels}
    widths = {kind: max(numbers + cell * len(columns[kind]), int(font.getlength(kind))) + margin for kind in panels}
    head, labels = 64, max(titles.values(), default=0)
    tallest = max((len(rows) for rows in panels.values()), default=0)
    image = Image.new("RGB", (max(sum(widths.values()) + margin, 460), head + 24 + labels + cell * tallest + margin),
                      background)
    draw = ImageDraw.Draw(image)
    family = "not quantized" if description.family == "none" else description.family
    draw.text((margin, 12), f"{description.architecture}  {family}", fill=text, font=font)
    x = margin
    for name, count in description.formats.items():
        draw.rectangle((x, 36, x + 12, 48), fill=colours.get(name, PROBLEM_COLOUR))
        label = f"{name} {count}"
        draw.text((x + 18, 34), label, fill=text, font=font)
        x += 40 + int(font.getlength(label))
    x = margin
    for kind, rows in panels.items():
        draw.text((x, head), kind, fill=faint, font=font)
        for i, module in enumerate(columns[kind]):
            upright = Image.new("RGB", (titles[kind], 16), background)
            ImageDraw.Draw(upright).text((4, 0), module, fill=faint, font=font)
            corner = (x + numbers + i * cell + 1, head + 24 + labels - titles[kind])
            image.paste(upright.rotate(90, expand=True), corner)
        for j, (number, modules) in enumerate(rows.items()):
            y = head + 24 + labels + j * cell
            draw.text((x, y + 2), number, fill=faint, font=font)
            for i, module in enumerate(columns[kind]):
                if module in modules:
                    left = x + numbers + i * cell
                    draw.rectangle((left, y, left + cell - 3, y + cell - 3),
                                   fill=colours.get(modules[module], PROBLEM_COLOUR))
        x += widths[kind]
    return image


def _block(name: str) -> tuple[str, str, str]:
    """Split a stored module name: ("transformer_blocks", "3", "ff.net.2"), or ("top", "", name)."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit() and i:
            return parts[i - 1], part, ".".join(parts[i + 1:])
    return "top", "", name
