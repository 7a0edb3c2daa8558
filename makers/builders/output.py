"""From a plan to a published folder: what both builders do once they know what becomes of every tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ...host.texts import Text, joined
from ...loaders.containers.checkpoint import Checkpoint
from ...loaders.containers.writing import Declared, Parts, Piece, Put
from ...loaders.errors import CheckpointError
from ...loaders.files.frozen import Frozen
from ...loaders.locate import locate
from ...loaders.words import first_ten, size
from ...quant.stored import PLAIN_DTYPES
from ..publish import Step
from .component import Component
from .writer import write_model

VERSION = 1  # of what the builders write; unfinished work of another version is not gone on with
Write = Callable[[Put], Parts]


@dataclass(frozen=True)
class Built:
    """A folder that was written, what to tell the user, and the numbers behind it."""

    report: str
    statistics: dict[str, int | bool]
    folder: Path


@dataclass
class Plan:
    """What becomes of every tensor: `layers` are parts that are written together, by module; `fallback` names what is
    kept in full precision because a preset or the user says so; `notes` are for the report."""

    layers: dict[str, list[tuple[tuple[Declared, ...], Callable[[], Write]]]] = field(default_factory=dict)
    fallback: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, module: str, tensors: Sequence[Declared], begin: Callable[[], Write]) -> None:
        """Tensors of a module. `begin` does what must be known before the first of them can be written (their scale),
        and returns what writes them."""
        self.layers.setdefault(module, []).append((tuple(tensors), begin))

    def copy(self, component: Component, name: str) -> None:
        """A tensor as it is stored."""
        info = component.tensors[name]
        self.add(module_of(name), [Declared(name, info.dtype, info.shape)], lambda: partial(component.copy, name))

    def pieces(self) -> list[Piece]:
        """The layers for `write_model`. While one is written, what the next one needs is found out."""
        layers = list(self.layers.values())
        begun: dict[int, Future[list[Write]]] = {}

        def begin(index: int) -> None:
            if index < len(layers) and index not in begun:
                begun[index] = _ahead().submit(lambda: [part() for _, part in layers[index]])

        def write(index: int, put: Put) -> Parts:
            begin(index)
            ready = begun.pop(index).result()
            begin(index + 1)
            for part in ready:
                yield from part(put)

        return [Piece(tuple(tensor for tensors, _ in parts for tensor in tensors), partial(write, index))
                for index, parts in enumerate(layers)]


@lru_cache(maxsize=1)
def _ahead() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "qt-build-ahead")


def module_of(name: str) -> str:
    """The module that a tensor belongs to."""
    return name.rpartition(".")[0]


def check_base(base: Component, export: Component) -> None:
    """Raise CheckpointError unless `base` is unquantized and the model of `export`: class, names and shapes."""
    if base.class_name and export.class_name and base.class_name != export.class_name:
        raise CheckpointError(Text("the base is {base_class}, but the export is {export_class}",
                                   base_class=base.class_name, export_class=export.class_name), base.folder,
                              Text("give the base that the export was made from"))
    wrong = []
    for name, info in export.tensors.items():
        if not name.endswith((".weight", ".bias")):
            continue
        there = base.tensors.get(name)
        shape = (*info.shape[:-1], info.shape[-1] * 2) if info.dtype == "U8" else info.shape
        if there is None:
            wrong.append(Text("{name} is not in the base", name=name))
        elif there.dtype not in PLAIN_DTYPES:
            wrong.append(Text("{name} is {dtype} in the base", name=name, dtype=there.dtype))
        elif there.shape != shape:
            wrong.append(Text("{name} is {base_shape} in the base, {export_shape} in the export", name=name,
                              base_shape=list(there.shape), export_shape=list(shape)))
    if wrong:
        raise CheckpointError(Text("the base is another model than the export: {problems}", problems=first_ten(wrong)),
                              base.folder, Text("give the base that the export was made from, with diffusers' names"))


def quantization_of(export: Component, algorithm: str) -> dict[str, Any]:
    """A copy of a ModelOpt export's quantization_config, with `quant_type` and an upper-case `quant_algo`.

    Only what SGLang-Diffusion loads passes (docs/sources/sglang.md, "Accepted declarations"): quant_method
    "modelopt" and exactly this algorithm, which may be missing for FP8. Raises CheckpointError for anything else.
    """
    config = export.config.get("quantization_config")
    where = export.checkpoint.source.config
    do = Text("give a diffusers export of nvidia-modelopt {algorithm} (config.json with a flat quantization_config)",
              algorithm=algorithm)
    if not isinstance(config, dict):
        raise CheckpointError(Text("config.json has no quantization_config"), where, do)
    config = json.loads(json.dumps(config))
    method, algo = config.get("quant_method"), str(config.get("quant_algo") or "")
    if method != "modelopt":
        raise CheckpointError(Text("quant_method is {method!r}, not 'modelopt'", method=method), where, do)
    if algo.upper() != algorithm and (algo or algorithm != "FP8"):
        what = Text("quant_algo is {algo!r}, not {algorithm!r}", algo=algo, algorithm=algorithm) if algo else \
            Text("quant_algo is 'missing', not {algorithm!r}", algorithm=algorithm)
        raise CheckpointError(what, where, do)
    ignore = config.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise CheckpointError(Text("the list of layers left alone (ignore) is no list of names"), where, do)
    return {**config, "ignore": ignore, "quant_algo": algorithm, "quant_type": algorithm}


def publish(plan: Plan, target: Path, source: Component, quantization: Mapping[str, Any], inputs: Frozen,
            options: Sequence[Any], shard_bytes: int, overwrite: bool,
            progress: Callable[[int], Step] | None) -> tuple[Checkpoint, list[str]]:
    """Write the folder: config.json and every header say `quantization`. Returns it, read back, and report lines.

    `source` gives the config and the texts beside it, `inputs` are all files read, `options` what else decides the
    bytes. Raises CheckpointError.
    """
    config = {**source.config, "quantization_config": dict(quantization)}
    text = json.dumps(quantization, sort_keys=True)
    header = {"format": "pt", "_class_name": source.class_name, "config": json.dumps(config, sort_keys=True),
              "quantization_config": text, "_quantization_metadata": text}
    pieces = plan.pieces()
    facts = json.dumps([VERSION, options, quantization], sort_keys=True, default=str)
    written = write_model(target, pieces, config=config, header=header, copies=source.texts(), sources=inputs,
                          shard_bytes=shard_bytes, overwrite=overwrite,
                          fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
                          step=progress(sum(piece.bytes for piece in pieces)) if progress else None)
    before = sum(state.size for path, state in inputs.states.items() if path.endswith(".safetensors"))
    lines: list[str] = [
        Text("{count} shard{s}, {written} (read: {read})", count=written.shards, s="s" if written.shards > 1 else "",
             written=size(written.total_size), read=size(before))]
    if written.reused:
        lines.append(Text("taken over from an interrupted run: {size}", size=size(written.reused)))
    return Checkpoint(locate(str(target))), lines


def refuse_difference(found: Mapping[str, int], told: Mapping[str, int | bool], target: Path) -> None:
    """Raise CheckpointError when numbers counted in the written folder are not those that were planned."""
    wrong = [Text("{key} is {found} in the files, {planned} was planned", key=key, found=found[key], planned=told[key])
             for key in found if found[key] != told[key]]
    if wrong:
        raise CheckpointError(Text("what was written is not what was planned: {differences}",
                                   differences=joined("; ", wrong)), target,
                              Text("do not use this folder; report this, it is an error in this pack"))


def linear_weights(component: Component) -> list[str]:
    """The weights that can be quantized straight from a base: two dimensions and float numbers."""
    found = [name for name in component.names if name.endswith(".weight")
             and len(component.tensors[name].shape) == 2 and component.tensors[name].dtype in PLAIN_DTYPES]
    quantized = [name for name in component.tensors if name.endswith((".weight_scale", ".comfy_quant"))]
    if quantized:
        raise CheckpointError(Text("the base is quantized already: {names}", names=first_ten(quantized)),
                              component.folder, Text("give the BF16 model; a ModelOpt export is an input of its own"))
    return found


def statistics_line(statistics: Mapping[str, int | bool]) -> str:
    """The statistics in one line."""
    return ", ".join(f"{key} {str(value).lower()}" for key, value in statistics.items())
