"""Files of packed weights: real exports layer by layer, and a tiny FLUX.1 whose Linears are packed in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from quantized_transformers.loaders import model, plan
from quantized_transformers.loaders.assemble import Layers
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.families import named, packed
from quantized_transformers.loaders.files.source import Source
from quantized_transformers.quant.stored import ByteOrder
from quantized_transformers.quant.tile import Tile

from . import common, flux

EXPORTS = Path(__file__).parents[1] / "data" / "exports"


def layers_of(folder: Path, family: str) -> Iterator[tuple[str, packed.Packed, Tile]]:
    """(name, what the family says of it, its tile) of every packed layer of an export that is no transformer's, read as
    a load does it."""
    checkpoint = Checkpoint(Source(str(folder), str(folder), (str(folder / "model.safetensors"),), str(folder / "config.json")))
    one = named(family)
    packed._rename(checkpoint, one.leaves)
    layers = one.layers(checkpoint, one.claims(checkpoint)[0], plan.by_layer(checkpoint.tensors), [])
    for name, said in layers.items():
        assert not said.problem, said.problem
        part = {leaf.removeprefix(f"{name}."): tensor for leaf, tensor in checkpoint.load_tensors().items()
                if leaf.startswith(f"{name}.")}
        leaves = {leaf: checkpoint.tensors[f"{name}.{leaf}"] for leaf in part}
        one = plan.Layer(name, said.format.name, ("weight", *(leaf for leaf in part if leaf != "weight")),
                         lambda layer, part, said=said: [said.format.coded(layer.name, part, ByteOrder())])
        tile, = Layers(SimpleNamespace(take=lambda layer, part=part: part, in_file=checkpoint.in_file)).take(one).tiles
        assert said.shape == (tile.place.rows, tile.place.columns)
        assert leaves.keys() - {"weight", "bias"} <= said.format.companions
        assert not said.format.problem(leaves, *said.shape)
        yield name, said, tile


def of_kinds(packers: Mapping[str, Callable[[torch.Tensor], Any]]) -> tuple[Any, dict[str, torch.Tensor], dict[str, list[str]]]:
    """(a tiny FLUX.1 in F32 with the weights meant, its tensors with the blocks' Linears packed in turn, kind -> names)."""
    reference, made, kinds = flux.make().float(), {}, {kind: list[str]() for kind in packers}
    turn = 0
    with torch.no_grad():
        for name, module in reference.named_modules():
            if isinstance(module, torch.nn.Linear) and "blocks" in name:
                kind = list(packers)[turn % len(packers)]
                tensors, meant = packers[kind](module.weight)
                turn += 1
                module.weight.copy_(meant)
                made |= {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}
                kinds[kind].append(name)
    gone = {f"{name}.weight" for names in kinds.values() for name in names}
    return reference, {name: t for name, t in reference.state_dict().items() if name not in gone} | made, kinds


def load(folder: Path, **options: Any) -> Any:
    return model.load(model.Request(str(folder), dtype="fp32", **options), quiet=True)


def rel(loaded: Any, reference: Any) -> float:
    """How far a loaded model's forward is from diffusers' on the weights meant."""
    return common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), flux.diffusers_velocity(reference, **flux.inputs()))
