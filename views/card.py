"""What a node, the badge on it, or the checkpoint browser shows of a reference: a plain JSON-able value.

`card` reads headers and configurations only, through the same code as a load, and needs neither torch nor ComfyUI;
`judged` adds what depends on this machine's device. Nothing here opens a connection.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from .. import host
from ..host.texts import Text, joined
from ..loaders.architectures import Dims, by_name
from ..loaders.architectures.base import tensor_name
from ..loaders.containers.checkpoint import Checkpoint
from ..loaders.describe import config_title, describe, describe_config, is_derived
from ..loaders.description import CheckpointDescription
from ..loaders.errors import CheckpointError, MissingFiles
from ..loaders.families import choices_of, families, named
from ..loaders.families.names import PICTURES, TEXTS, beside, whole
from ..loaders.files import hubs
from ..loaders.files.places import downloadable
from ..loaders.files.source import Source
from ..loaders.queries import TEXT_ENCODER, VAE, Query, locate_parts
from ..quant.stored import PLAIN_DTYPES
from . import verdict
from .confine import check_headers
from .footprint import expected_bytes, format_bytes, most_common_dtype, weights_of
from .known import known

DEFERRED = "deferred"  # the badge of a base without weights
SHOWN = 20  # problems and notes
OF_ONE_FAMILY = {"QT_NunchakuSVDQLoader": "nunchaku", "QT_ModelSlimLoader": "modelslim"}


def card(query: Query) -> dict[str, Any]:
    """What the files say of a reference; with `judged`, the keys are those of the route `describe` (routes).

    A repo id that is not on this machine gives a card with "on_disk" false and what is known of it without a network.
    Raises CheckpointError when the files cannot be interpreted, or there is nothing of that name.
    """
    try:
        sources = locate_parts(query)
    except MissingFiles as error:
        if not downloadable(query.reference):
            raise
        return _absent(query, error)
    check_headers(path for source in sources for path in source.files)
    if query.node in (TEXT_ENCODER, VAE):
        return _parts(query, sources)
    checkpoint = Checkpoint(sources[0])
    if query.weights != "load":
        return _deferred(query, checkpoint)
    description = describe(checkpoint)
    out = _blank(query) | {"on_disk": True} | of_description(description, checkpoint)
    if query.node in OF_ONE_FAMILY:
        try:
            named(OF_ONE_FAMILY[query.node]).require(checkpoint, description, choices_of(vars(query)))
        except CheckpointError as error:
            out["problems"] = [error.what, *out["problems"]]
    out["mismatch"] = _mismatch(query, checkpoint, description)
    if query.layers:
        out["layer_map"] = layer_map(description)
    return out


def of_description(description: CheckpointDescription, checkpoint: Checkpoint) -> dict[str, Any]:
    """The part of a card that comes from the tensors."""
    sizes = format_bytes(description, checkpoint.tensors)
    precision = description.family.removeprefix("svdquant-")
    return {
        "family": family_words(description, checkpoint), "architecture": description.architecture,
        "formats": [{"format": name, "layers": count, "bytes": sizes.get(name, 0)}
                    for name, count in description.formats.items()],
        "size": description.bytes_on_disk, "weights": weights_of(checkpoint.tensors, description),
        "precision": precision if description.family.startswith("svdquant-") else None,
        "rank": description.ranks[0] if description.ranks else None, "ranks": description.ranks,
        "hint": next((note for note in description.notes if "KSampler" in note), None),
        "problems": _first(description.problems), "notes": _first(description.notes)}


def _first(lines: list[str]) -> list[str]:
    """The first SHOWN lines, and how many more there are."""
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], Text("and {count} more", count=len(lines) - SHOWN)]


def family_words(description: CheckpointDescription, checkpoint: Checkpoint) -> str:
    """The badge's text: "ModelOpt FP8", "SVDQuant INT4", "ModelSlim W8A8", or the dtype of plain weights."""
    if description.family == "none":
        return most_common_dtype(checkpoint.tensors)
    for family in families():
        if description.family in family.words:
            return family.words[description.family]
    title = next((f.title for f in families() if f.title and description.family.startswith(f.name)), "")
    if not title:
        return description.family
    kinds = {name: count for name, count in description.formats.items() if name not in PLAIN_DTYPES}
    return title + (f" {max(kinds, key=lambda name: kinds[name])}" if kinds else "")


def judged(card: dict[str, Any]) -> dict[str, Any]:
    """A card with what depends on this machine: "vram", "verdict" and "verdict_text" instead of "weights"."""
    out = dict(card)
    weights = out.pop("weights")
    out["vram"] = 0 if host.lacking("memory estimates") else expected_bytes(weights)
    out["verdict"], out["verdict_text"] = _verdict(card)
    return out


def _verdict(card: dict[str, Any]) -> verdict.Verdict:
    if card["problems"]:
        problem, others = card["problems"][0], len(card["problems"]) - 1
        return verdict.Verdict(verdict.RED, Text("cannot be loaded: {problem} (and {count} more)", problem=problem,
                                                 count=others) if others else
                               Text("cannot be loaded: {problem}", problem=problem))
    if not card["on_disk"]:
        there = known(card["reference"])
        if there is None:
            return verdict.Verdict(verdict.AMBER,
                                   Text("not on this machine: what it holds is known after the download"))
        return there.verdict() if card["family"] else verdict.Verdict(
            verdict.GREEN, Text("not on this machine; runs as ComfyUI runs it"))
    if card["family"] == DEFERRED:
        return verdict.Verdict(verdict.GREEN, Text("no weights are loaded: they come from Apply Transformer Override"))
    return verdict.of_formats([row["format"] for row in card["formats"]])


def layer_map(description: CheckpointDescription) -> dict[str, Any]:
    """Rows are blocks, columns modules, cells stored formats (None where a block has no such module)."""
    from .layer_map import css_colours, panels_of

    panels = panels_of(description)
    colours = css_colours()
    columns = list(dict.fromkeys(module for rows in panels.values() for row in rows.values() for module in row))
    rows = [(f"{kind}.{number}" if number else kind, row) for kind, blocks in panels.items()
            for number, row in blocks.items()]
    return {"rows": [name for name, _ in rows], "columns": columns,
            "cells": [[row.get(module) for module in columns] for _, row in rows],
            "colours": {name: colours.get(name, colours[""]) for name in description.formats}}


def _blank(query: Query) -> dict[str, Any]:
    return {"reference": query.reference, "on_disk": False, "title": title(query.reference), "family": "",
            "architecture": "", "formats": [], "size": 0, "weights": [], "precision": None, "rank": None,
            "ranks": [], "hint": None, "problems": [], "notes": [], "mismatch": None, "download": None}


def title(reference: str) -> str:
    """The last part of a reference, without the suffix of a file."""
    return re.sub(r"\.(safetensors|sft|gguf)$", "", reference.strip().replace("\\", "/").rstrip("/").rpartition("/")[2])


def _absent(query: Query, error: MissingFiles) -> dict[str, Any]:
    """A repo that is not on this machine: what the support matrix knows of it, and how to get it."""
    address = downloadable(query.reference)
    _, text = hubs.split(address)
    out = _blank(query)
    there = known(query.reference)
    if there is not None:
        out |= {"architecture": there.architecture,
                "family": "" if query.node in (TEXT_ENCODER, VAE) else there.family}
    out["notes"] = [error.what]
    command = error.do.partition("or run: ")[2] or hubs.command(address, query.revision, ())
    return out | {"download": {"repo": "/".join(text.split("/")[:2]), "hubs": list(hubs.known(address)),
                               "files": None, "bytes": None, "gated": "unknown", "command": command}}


def _deferred(query: Query, checkpoint: Checkpoint) -> dict[str, Any]:
    return _blank(query) | {
        "on_disk": True, "architecture": config_title(checkpoint), "family": DEFERRED,
        "size": os.path.getsize(checkpoint.source.config or "")}


def _parts(query: Query, sources: Iterable[Source]) -> dict[str, Any]:
    """Text encoders or a VAE: sizes and dtypes; their classes as the architecture."""
    out = _blank(query) | {"on_disk": True}
    counts: dict[str, list[int]] = {}
    names: list[str] = []
    for source in sources:
        if not source.files:
            continue
        checkpoint = Checkpoint(source)
        config = checkpoint.config or {}
        tensors = checkpoint.tensors
        if whole(tensors):
            what = TEXTS if query.node == TEXT_ENCODER else PICTURES
            tensors = {name: tensors[name] for name in beside(tensors).get(what, ())}
            if not tensors:
                out["problems"] = [Text("there is no part of this checkpoint that is called as {what} are", what=what)]
            names.append(Text("whole checkpoint"))
        else:
            names.append(str(config.get("_class_name") or next(iter(config.get("architectures") or ()), "")
                             or os.path.basename(source.folder if source.config else source.files[0])))
        out["size"] += sum(info.end - info.start for info in tensors.values())
        out["weights"] += weights_of(tensors)
        for name, info in tensors.items():
            if tensor_name(name.rpartition(".")[0], "weight") == name and len(info.shape) >= 2:
                count = counts.setdefault(info.dtype, [0, 0])
                count[0] += 1
                count[1] += info.end - info.start
    out["architecture"] = joined(", ", names)
    out["family"] = max(counts, key=lambda dtype: counts[dtype][1], default="")
    out["formats"] = [{"format": dtype, "layers": n, "bytes": b} for dtype, (n, b) in counts.items()]
    return out


def _mismatch(query: Query, checkpoint: Checkpoint, description: CheckpointDescription) -> str | None:
    """Why the checkpoint does not fit `query.base`; None when it does, or the base is not on this machine."""
    if not query.base.strip():
        return None
    from ..loaders.model import refuse_other_model

    try:
        name, dims = base_dims(query)
    except CheckpointError:  # its own node says what is wrong with it
        return None
    try:
        if checkpoint.source.config is None:
            new = describe(checkpoint, (by_name(name), dims)).problems
            return next((problem for problem in new if problem not in description.problems), None)
        refuse_other_model(description, name, dims)
    except CheckpointError as error:
        return error.what
    return None


def base_dims(query: Query) -> tuple[str, Dims]:
    """Architecture and sizes of the base of an override, from its configuration where it has one."""
    asked = replace(query, reference=query.base, component=query.base_component, weights_name="", revision="",
                    node="QT_LoadBaseModel", base="", precision="auto", rank=0)
    try:
        source, = locate_parts(replace(asked, weights="defer to override"))
    except CheckpointError:  # no folder with a config.json
        source, = locate_parts(replace(asked, weights="load"))
    else:
        config = Checkpoint(source)
        with suppress(CheckpointError):  # sizes that only diffusers tells of a configuration are quicker from weights
            source, = locate_parts(replace(asked, weights="load")) if is_derived(config) else (source,)
        if not source.files:
            architecture, dims = describe_config(config)
            return architecture.name, dims
    check_headers(source.files)
    description = describe(Checkpoint(source))
    return description.architecture, description.dims
