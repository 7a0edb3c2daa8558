"""Descriptions as text and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import host
from ..quant.formats import formats
from .describe import CheckpointDescription

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
        lines.append(f"runs: {_how_it_runs(compute)}")
    lines += [f"note: {note}" for note in (*description.notes, *(native.notes if native else ()))]
    return "\n".join(lines)


def _how_it_runs(compute: str) -> str:
    device = host.device_name()
    if compute == "dequantize":
        return f"dequantized (as chosen) on {device}: weights stay FP8 in memory, every matmul is full precision"
    if host.has_fp8_matmul():
        return f"native FP8 matmul on {device}"
    if compute == "native":
        return f"FP8 matmul (as chosen) on {device}, slower there than dequantized"
    return (f"emulated on {device}: it has no FP8 matmul, weights stay FP8 in memory and are dequantized for every "
            "matmul (costs about 6-13 % of the linear layers' time on a GPU)")


def layer_map(description: CheckpointDescription) -> Any:
    """The layers as a picture (PIL image): rows are blocks, columns modules, the colour is the stored format."""
    from PIL import Image, ImageDraw

    rows: dict[str, dict[str, str]] = {}
    for name, fmt in description.layers.items():
        block, module = _block(name)
        rows.setdefault(block, {})[module] = fmt
    kinds: dict[str, list[str]] = {}
    for block, modules in rows.items():
        kind = block.rsplit(".", 1)[0]
        columns = kinds.setdefault(kind, [])
        columns += [m for m in modules if m not in columns]
    colours = {fmt.name: fmt.colour for fmt in formats()}
    cell, left, top, line = 18, 150, 46, 13
    label = max((len(m) for columns in kinds.values() for m in columns), default=1) * 6 + 10
    height = top + 30 + sum(cell * sum(b.rsplit(".", 1)[0] == k for b in rows) + label + 14 for k in kinds)
    width = max(left + 20 + cell * max((len(c) for c in kinds.values()), default=1), 420)
    image = Image.new("RGB", (width, height), (30, 32, 36))
    draw = ImageDraw.Draw(image)
    counts = ", ".join(f"{count} {name}" for name, count in description.formats.items())
    draw.text((10, 8), f"{description.architecture}  {description.family}", fill=(235, 235, 235))
    draw.text((10, 8 + line), counts, fill=(170, 174, 182))
    y = top
    for kind, columns in kinds.items():
        for i, module in enumerate(columns):
            text = Image.new("RGB", (label, line), (30, 32, 36))
            ImageDraw.Draw(text).text((0, 0), module, fill=(170, 174, 182))
            image.paste(text.rotate(90, expand=True), (left + i * cell + 2, y))
        y += label
        for block, modules in rows.items():
            if block.rsplit(".", 1)[0] != kind:
                continue
            draw.text((10, y + 3), block[-22:], fill=(200, 203, 210))
            for i, module in enumerate(columns):
                if module in modules:
                    box = (left + i * cell, y, left + (i + 1) * cell - 2, y + cell - 2)
                    draw.rectangle(box, fill=colours.get(modules[module], PROBLEM_COLOUR))
            y += cell
        y += 14
    x = 10
    for name in description.formats:
        draw.rectangle((x, y, x + 12, y + 12), fill=colours.get(name, PROBLEM_COLOUR))
        draw.text((x + 18, y + 1), name, fill=(235, 235, 235))
        x += 30 + 7 * len(name)
    return image


def _block(name: str) -> tuple[str, str]:
    """Split a stored module name into its block ("transformer_blocks.3") and the rest; "(top).0" for the others."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit() and i and parts[i - 1].endswith("blocks"):
            return ".".join(parts[:i + 1]), ".".join(parts[i + 1:])
    return "(top).0", name
