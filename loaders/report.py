"""Descriptions as text and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import host
from ..quant import host_formats
from ..quant.formats import PLAIN, PLAIN_DTYPES, formats
from . import modelslim
from .describe import CheckpointDescription
from .svdquant.plan import COLOURS

if TYPE_CHECKING:
    from .assemble import NativeStateDict

PROBLEM_COLOUR = (214, 69, 65)


def size(count: int) -> str:
    """A number of bytes as GB, MB or kB (powers of ten)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _head(description: CheckpointDescription) -> list[str]:
    family = "not quantized" if description.family == "none" else description.family
    if description.producer:
        family += f" (by {description.producer})"
    dims = description.dims
    lines = [f"{description.architecture} · {family}", f"source: {description.reference}"]
    if description.files:
        names = description.files[0] if len(description.files) == 1 else f"{len(description.files)} shards"
        lines.append(f"files: {names}, {size(description.bytes_on_disk)}, {description.naming.style} names")
    lines.append("sizes: " + ", ".join(f"{key} {value}" for key, value in dims.items()))
    if description.ranks:
        lines.append(f"low rank: {' and '.join(map(str, description.ranks))}")
    if description.formats:
        lines.append("layers: " + ", ".join(f"{count} {name}" for name, count in description.formats.items()))
    return lines


def describe_report(description: CheckpointDescription) -> str:
    """What Inspect shows: the description, notes, and problems that would refuse a load."""
    lines = _head(description)
    if description.static_activations or description.dynamic_activations:
        lines.append(f"activation scales: {description.static_activations} static, "
                     f"{description.dynamic_activations} dynamic")
    if description.declared_in:
        lines.append(f"declared in: {', '.join(description.declared_in)}")
    lines += [f"note: {note}" for note in description.notes]
    lines += [f"PROBLEM: {problem}" for problem in description.problems]
    lines.append("this checkpoint loads" if not description.problems else "this checkpoint is refused")
    return "\n".join(lines)


def load_report(description: CheckpointDescription, native: NativeStateDict | None, compute: str) -> str:
    """What a loader node reports: the description, how the modules ended up, and how they run on this device."""
    lines = _head(description)
    if native is not None and native.layouts:
        total = sum(native.layouts.values())
        lines.append(f"quantized modules in ComfyUI: {total}, of them {native.per_shard} fused with every shard's own "
                     f"scale, {native.dynamic} with dynamic activation scales")
        lines += [f"{kind} runs: {how_it_runs(kind, compute)}" for kind in ("FP8", "NVFP4")
                  if kind in description.formats]
    lines += native.runs if native is not None else []
    lines += [f"note: {note}" for note in (*description.notes, *(native.notes if native else ()), *host.found_lacks)]
    return "\n".join(lines)


def how_it_runs(kind: str, compute: str) -> str:
    """How "FP8" or "NVFP4" layers run on this device with this choice of `compute`, in words."""
    device = host.device_name()
    if compute == "dequantize":
        return f"dequantized (as chosen) on {device}: weights stay {kind} in memory, every matmul is full precision"
    if host.has_matmul(kind):
        return f"native {kind} matmul on {device}"
    if compute == "native":
        return f"{kind} matmul (as chosen) on {device}, slower there than dequantized"
    # specs/performance.md section 3, by bytes; nobody has measured it for NVFP4
    cost = " (costs about 6-13 % of the linear layers' time on a GPU)" if kind == "FP8" else ""
    return (f"emulated on {device}: it has no {kind} matmul, weights stay {kind} in memory and are dequantized for "
            f"every matmul{cost}")


def panels_of(description: CheckpointDescription) -> dict[str, dict[str, dict[str, str]]]:
    """Kind of block -> number of the block -> module -> stored format; the layer map's panels, rows and columns."""
    panels: dict[str, dict[str, dict[str, str]]] = {}
    for name, fmt in description.layers.items():
        kind, number, module = _block(name)
        panels.setdefault(kind, {}).setdefault(number, {})[module] = fmt
    return panels


def format_colours() -> dict[str, tuple[int, int, int]]:
    """The colour (RGB) of every stored format in the layer map, and of the dtypes that plain layers have."""
    return {fmt.name: fmt.colour for fmt in formats()} | COLOURS | modelslim.COLOURS \
        | host_formats.COLOURS | dict.fromkeys(sorted(PLAIN_DTYPES), PLAIN.colour)


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
