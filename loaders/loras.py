"""LoRAs in diffusers' names, for every class that loads by a table: as LoRAs in the host's names.

The host knows diffusers' names of some models (comfy/lora.py, model_lora_keys_unet), and leaves those of others away
with a line in the log. The tables that make the host's weights of stored ones say where a stored layer's rows are, so
the same is done to a LoRA: up [rows, rank] @ down [rank, columns] of a layer that is rows of the host's becomes rows of
its `up`; several of one layer stand beside each other, up [rows, rank + rank], down [rank + rank, columns]. That is
exact.

What scale a LoRA has is in its header, too, where diffusers saved it (lora_adapter_metadata, peft's LoraConfig), and is
nowhere else then: alpha / r, or alpha / sqrt(r) for rslora, by layer where patterns say so (peft, get_pattern_key).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import host
from ..host.texts import Text, joined
from .architectures import ARCHITECTURES, Naming
from .architectures.base import tensor_name
from .architectures.derived import Part, made_of
from .architectures.diffusers_classes import DERIVED
from .containers.safetensors import TensorInfo
from .errors import CheckpointError
from .files.places import cleaned
from .files.strict import decode
from .words import first_ten

if TYPE_CHECKING:
    from torch import Tensor

# What stands before a layer's name: dots as they are, or as underscores.
DOTTED = ("transformer.", "", "diffusion_model.", "base_model.model.", "unet.")
FLAT = ("lora_transformer_", "lora_unet_", "lycoris_")
OF_HOST = ("diffusion_model.", "lora_unet_", "lora_prior_unet_", "lycoris_")  # names that the host's may be below
TEXT = re.compile(r"^(lora_te|text_encoder|te\d?[._]|conditioner\.|cond_stage_model\.)")
METADATA = "lora_adapter_metadata"


class Made(NamedTuple):
    """A tensor of the host's, [rows, ...], as the stored layers whose rows make it: `parts`, and how many rows each
    gives where the architecture says so."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    rows: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it is one stored layer, as it is."""
        return len(self.parts) == 1 and (self.parts[0].first, self.parts[0].last) == (0, 1)


@dataclass
class Converted:
    """A LoRA for the host: `tensors`, how many layers it has and how many of them were `renamed`; and what was left
    away: tensors for `text` encoders, and `others` that this model has no layer for."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: int = 0
    renamed: int = 0
    text: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def find(lora: str | None, path: str | None) -> str:
    """The file of a name in the host's folders of LoRAs, or of a path, or such a name, that wins over it. Raises
    CheckpointError where it is not there, or no .safetensors file."""
    name = cleaned(path) or cleaned(lora)
    found = os.path.expanduser(name)
    if not os.path.isabs(found):
        found = host.lora_path(name) or found
    if not name or not os.path.isfile(found):
        raise CheckpointError(Text("this LoRA is not there"), name,
                              Text("choose a file of ComfyUI's folder loras, or give a path"))
    if not found.endswith(".safetensors"):
        raise CheckpointError(Text("this is no .safetensors file"), name,
                              Text("choose a LoRA in safetensors; others may hold code"))
    return found


def stamp(file: str) -> str:
    """What is another where a file is."""
    state = os.stat(file)
    return f"{file} {state.st_mtime_ns} {state.st_size}"


def apply(model: Any, file: str, strength: float) -> tuple[Any, str]:
    """(a MODEL with the LoRA of a .safetensors file at this strength, report). `model` is not changed.

    Raises CheckpointError where the file has nothing for this model, or is for one of other sizes.
    """
    tensors, metadata = _read(file)
    shapes = host.layer_shapes(model)
    known = host.lora_names(model)
    made = _best(list(tables(model, shapes)), tensors)
    found = convert(tensors, metadata, made, known)
    if not found.layers:
        raise CheckpointError(Text("this LoRA has nothing for a {model}: {names}", model=host.config_name(model.model),
                                   names=first_ten(found.others or found.text) or "-"), file,
                              Text("choose a LoRA that was made for this model"))
    _check(found.tensors, known, shapes)
    lines = [Text("LoRA at strength {strength}: {layers} layers, {renamed} of them by diffusers' names",
                  strength=strength, layers=found.layers, renamed=found.renamed)]
    if found.text:
        lines.append(Text("{count} tensors are for text encoders, and were left away: connect the CLIP to ComfyUI's "
                          "Load LoRA for them", count=len(found.text)))
    if found.others:
        lines.append(Text("{count} tensors are for layers that this model does not have, and were left away: {names}",
                          count=len(found.others), names=first_ten(found.others)))
    patched = host.load_lora(model, found.tensors, strength) if strength else model.clone()
    return patched, joined("\n", lines)


def _read(file: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(Text("this LoRA cannot be read: {error}", error=error), file,
                              Text("choose a .safetensors file, or download it again")) from error


def tables(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[dict[str, Made]]:
    """The host's tensors of a MODEL as what diffusers stores of it, for every class that it may be: most have one."""
    unet_config = model.model.model_config.unet_config
    infos = {name: TensorInfo("F32", shape, 0, 0) for name, shape in shapes.items()}
    for architecture in ARCHITECTURES:
        if architecture.class_names and architecture.dims_from_model(unet_config) is not None:
            dims = architecture.dims_from_tensors(infos, Naming("native"))
            yield {tensor_name(module.native, module.leaf): _made(module)
                   for module in architecture.modules(dims, Naming("diffusers"))}
    for derived in DERIVED:
        if host.config_name(model.model) not in derived.hosts:
            continue
        if derived.names is None:
            yield {name: Made(shapes[name], parts) for name, parts in made_of(derived.table, shapes).items()}
        else:
            yield {native: Made(shapes[native], (Part(stored, Fraction(0), Fraction(1)),))
                   for stored, native in host.unet_names(unet_config).items() if native in shapes}


def _made(module: Any) -> Made:
    """A module of an architecture that has a table of its own."""
    names = [tensor_name(stored, module.stored_leaf) for stored in module.stored]
    shape = (sum(module.rows), *module.inner)
    half, one = Fraction(1, 2), Fraction(1)
    if module.swap_halves:
        return Made(shape, (Part(names[0], half, one), Part(names[0], Fraction(0), half)))
    if module.ranges:
        return Made(shape, tuple(Part(name, Fraction(first, stored), Fraction(first + rows, stored)) for
                                 name, rows, (first, stored) in zip(names, module.rows, module.ranges, strict=True)),
                    module.rows)
    return Made(shape, tuple(Part(name, Fraction(0), one) for name in names), module.rows)


def _best(found: list[dict[str, Made]], names: Collection[str]) -> dict[str, Made]:
    """Of several, the one whose layers a LoRA names most of."""
    heads = _heads(names)
    return max(found, default={}, key=lambda made: len({part.name for one in made.values() for part in one.parts
                                                        if _called(part.name, heads)}))


def _beginnings(name: str) -> list[str]:
    """Every beginning of a tensor's name that may be its layer's, the longest first."""
    parts = name.split(".")
    return [".".join(parts[:count]).removesuffix("_lora") for count in range(len(parts) - 1, 0, -1)]


def _heads(names: Iterable[str]) -> set[str]:
    """Every beginning of these names that may be a layer's."""
    return {head for name in names for head in _beginnings(name)}


def _called(stored: str, heads: Collection[str]) -> str:
    """What a LoRA calls a stored tensor's layer; empty for none of its."""
    layer = stored.removesuffix(".weight")
    flat = layer.replace(".", "_")
    return next((name for name in (*(prefix + layer for prefix in DOTTED), *(prefix + flat for prefix in FLAT))
                 if name in heads), "")


class _Conversion:
    """Of one LoRA: `found` is what has been converted, `rest` are the names that have not."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], layers: Collection[str]) -> None:
        self.tensors, self.config = tensors, _config(metadata)
        self.rest, self.found = set(tensors), Converted()
        self.of: dict[str, list[str]] = {}  # layer -> its tensors: one may be called as the beginning of another is
        for name in tensors:
            layer = next((head for head in _beginnings(name) if head in layers), None)
            if layer is not None:
                self.of.setdefault(layer, []).append(name)

    def take(self, name: str, layer: str) -> bool:
        """A layer that the host has as it is, whatever kind of LoRA it is of; False where nothing is left of it."""
        own = [key for key in self.of.get(name, ()) if key in self.rest]
        for key in own:
            self.found.tensors[layer + key[len(name):]] = self.tensors[key]
        scale = _scale(name, self.config) if own and f"{name}.alpha" not in self.tensors else None
        if scale is not None and (pair := host.lora_pair(name, self.tensors)) is not None:
            import torch

            self.found.tensors[f"{layer}.alpha"] = torch.tensor(scale * pair.down.shape[0])
        self.rest.difference_update(own)
        self.found.layers += bool(own)
        return bool(own)

    def join(self, layer: str, made: Made, called: list[str]) -> bool:
        """A layer of the host's that several stored ones make, or rows of one; False where the LoRA has none of them
        as a plain product, which alone can be placed so."""
        import torch

        pairs = [host.lora_pair(name, self.tensors) if name else None for name in called]
        pairs = [pair if pair is not None and pair.plain and pair.up.ndim == 2 else None for pair in pairs]
        if not any(pairs):
            return False
        rows = _rows(layer, made, called, [0 if pair is None else len(pair.up) for pair in pairs])
        up, down = list[Any](), list[Any]()
        for at, (name, pair, part) in enumerate(zip(called, pairs, made.parts, strict=True)):
            if pair is None:
                continue
            size, rank = len(pair.up), pair.down.shape[0]
            scale = pair.alpha / rank if pair.alpha is not None else _scale(name, self.config)
            own = pair.up[int(size * part.first):int(size * part.last)].float() * (1.0 if scale is None else scale)
            if len(own) != rows[at]:
                raise _other_size(name, (size, prod(pair.down.shape[1:])), (rows[at], *made.shape[1:]))
            placed = torch.zeros(made.shape[0], rank)
            placed[sum(rows[:at]):sum(rows[:at]) + len(own)] = own
            up.append(placed)
            down.append(pair.down.float())
            self.rest.difference_update({*pair.names, f"{name}.alpha"})
        self.found.tensors[f"{layer}.lora_up.weight"] = torch.cat(up, 1)
        self.found.tensors[f"{layer}.lora_down.weight"] = torch.cat(down)
        self.found.layers += 1
        return True


def convert(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], made: Mapping[str, Made],
            known: Collection[str]) -> Converted:
    """A LoRA's tensors in the host's names. Those of `known`, which the host reads itself, stay as they are where they
    are its names, or of a layer that no table has: of diffusers' it reads some of Ovis-Image as FLUX.1's.

    Raises CheckpointError where it cannot be told which rows of the host's are a layer's.
    """
    heads = _heads(tensors)
    mine = [name for name in known if name in heads]
    called = {native: [_called(part.name, heads) for part in one.parts] for native, one in made.items()}
    it = _Conversion(tensors, metadata, {*mine, *(name for names in called.values() for name in names if name)})
    for name in mine:
        if name.startswith(OF_HOST):
            it.take(name, name)
    for native, one in made.items():
        if any(called[native]):
            layer, names = host.BELOW + native.removesuffix(".weight"), called[native]
            it.found.renamed += it.take(names[0], layer) if one.whole else it.join(layer, one, names)
    for name in mine:
        it.take(name, name)
    it.found.text = sorted(name for name in it.rest if TEXT.match(name))
    it.found.others = sorted(it.rest.difference(it.found.text))
    return it.found


def _rows(layer: str, made: Made, called: list[str], sizes: list[int]) -> tuple[int, ...]:
    """How many rows each part gives. `sizes` are those of the stored layers that the LoRA has, 0 for the others."""
    if made.rows:
        return made.rows
    names, total = [part.name for part in made.parts], made.shape[0]
    share = sum(part.last - part.first for part in made.parts)
    if len(set(names)) == 1:
        return tuple(int(total * (part.last - part.first) / share) for part in made.parts)
    rows = list(sizes)
    equal = next((size for size in sizes if size), 0)
    if equal * len(rows) == total:
        return (equal,) * len(rows)
    for at, name in enumerate(names):  # keys and values have as many heads
        twin = re.sub(r"\bto_([kv])\b", lambda letter: f"to_{'v' if letter[1] == 'k' else 'k'}", name)
        if not rows[at] and twin in names:
            rows[at] = sizes[names.index(twin)]
    if rows.count(0) == 1:
        rows[rows.index(0)] = total - sum(rows)
    last = max(at for at, size in enumerate(sizes) if size)
    if 0 in rows[:last] or sum(rows) > total:
        raise CheckpointError(Text("which rows of {layer} are those of {parts} cannot be told from this LoRA",
                                   layer=layer, parts=", ".join(name for name in called if name)), "",
                              Text("report this, with where the LoRA is from"))
    return tuple(rows)


def _config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What diffusers saved of a LoRA's configuration, for a transformer or UNet."""
    try:
        said = decode(metadata.get(METADATA) or "{}")
    except ValueError:
        return {}
    flat = said if isinstance(said, dict) else {}
    return {key.partition(".")[2]: value for key, value in flat.items() if key.startswith(("transformer.", "unet."))}


def _scale(name: str, config: Mapping[str, Any]) -> float | None:
    """What the product of a layer is multiplied by, where the configuration says so."""
    if not config:
        return None
    rank, alpha = (_of(name, config.get(f"{key}_pattern"), config.get(whole))
                   for key, whole in (("rank", "r"), ("alpha", "lora_alpha")))
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank <= 0:
        return None
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of(name: str, patterns: Any, default: Any) -> Any:
    """A setting of a layer, by the first pattern that its name ends with (peft, get_pattern_key)."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.fullmatch(rf"(?:.*\.)?(?:{re.escape(pattern)})", name):
            return value
    return default


def _check(tensors: Mapping[str, Tensor], known: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError for a LoRA of another size, which the host would leave away layer by layer."""
    for name in {key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key}:
        target = known.get(name)
        shape = shapes.get(target.removeprefix(host.BELOW)) if isinstance(target, str) else None
        pair = host.lora_pair(name, tensors)
        if shape is None or pair is None or not pair.plain:
            continue
        own = (len(pair.up), prod(pair.down.shape[1:]) * prod(pair.up.shape[2:]))
        if own[0] != shape[0] or own[1] != prod(shape[1:]):
            raise _other_size(name, own, shape)


def _other_size(layer: str, own: tuple[int, ...], shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(Text("this LoRA is for another size of the model: {layer} is {own}, and {shape} here",
                                layer=layer, own=list(own), shape=list(shape)), "",
                           Text("choose a LoRA that was made for this model"))
