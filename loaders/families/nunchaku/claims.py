"""What file names, metadata and widgets say of an SVDQuant file, held against its tensors: tensors are right.

Widgets are what the user asks for, so one that contradicts is an error; the rest are claims, and become notes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ....host.texts import Text, both, either, joined
from ...architectures import Dims
from ...containers.checkpoint import Checkpoint
from ...errors import CheckpointError
from ...files.strict import decode
from .files import NAME, STEPS
from .plan import Plan
from .recognise import Found

if TYPE_CHECKING:
    from ...description import CheckpointDescription

LEGACY_NAME = r"svdq-(int4|fp4)\b"  # folders of two files say no rank
WORDS = {"int4": "int4", "fp4": "nvfp4", "fp4_e2m1_all": "nvfp4", "nvfp4": "nvfp4"}
_SHOWN = {"int4": ("INT4", either(("bfloat16", "float16"))), "nvfp4": ("NVFP4", "float8_e4m3fn")}


def check_widgets(description: CheckpointDescription, precision: str, rank: int) -> None:
    """Raise CheckpointError when a described file is no SVDQuant file, or `precision` (auto, int4, nvfp4) or `rank`
    (0: any; stored ranks are padded to 16) contradicts its tensors."""
    where, held = description.reference, description.family.removeprefix("svdquant-")
    if not description.family.startswith("svdquant-"):
        what = Text("this is no SVDQuant file but {architecture}", architecture=description.architecture)
        if description.family != "none":
            what = Text("{what} in {family}", what=what, family=description.family)
        raise CheckpointError(what, where, Text("load it with Load Base Model or Apply Transformer Override"))
    if precision not in ("auto", held):
        raise CheckpointError(Text("precision is set to {precision}, but this file holds {holds}", precision=precision,
                                   holds=_holds(held)), where,
                              Text("set precision to 'auto' or {held!r}, or choose the {precision} file", held=held,
                                   precision=precision))
    if rank and -(-rank // 16) * 16 not in description.ranks:
        raise CheckpointError(Text("rank is set to {rank}, but this file's low-rank parts have rank {ranks}", rank=rank,
                                   ranks=_text(description.ranks)), where,
                              Text("set rank to 0, or choose the r{rank} file", rank=rank))


def _text(ranks: Sequence[int]) -> str:
    """Ranks as text: "32", or "32 and 64 (mixed)"."""
    text = both(map(str, ranks))
    return Text("{ranks} (mixed)", ranks=text) if len(ranks) > 1 else text


def _holds(precision: str) -> str:
    word, dtype = _SHOWN[precision]
    return Text("{format} weights (wscales are {dtype})", format=word, dtype=dtype)


def claim_notes(checkpoint: Checkpoint, found: Found, plan: Plan, dims: Dims) -> Iterator[str]:
    """One line for every claim that the tensors contradict, for a missing claim, and for a hint in the name."""
    files = [os.path.basename(header.path) for header in checkpoint.headers]
    # a legacy folder carries the name, its two files do not; a cache's folder is called by its commit
    named = [*files, os.path.basename(os.path.normpath(checkpoint.source.folder)), checkpoint.source.reference]
    name = next((name for name in named if re.search(NAME, name) or re.search(LEGACY_NAME, name)), files[0])
    yield from _name_notes(name, found)
    steps = re.search(STEPS, name)
    if steps:
        yield Text("file name asks for {steps} steps; set KSampler steps={steps}, cfg=1.0", steps=steps[1])
    for header in checkpoint.headers:
        yield from _metadata_notes(header.metadata, found, plan, dims)
    if not any({"config", "quantization_config", "model_class", "comfy_config"} & header.metadata.keys()
               for header in checkpoint.headers):
        yield Text("no metadata in the file: everything is taken from the tensors")
    if checkpoint.config:
        yield from _config_notes(checkpoint.config, "config.json", found, dims)


def _name_notes(name: str, found: Found) -> Iterator[str]:
    claim = re.search(NAME, name) or re.search(LEGACY_NAME, name)
    if claim and WORDS[claim[1]] != found.precision:
        yield Text('"{name}" holds {holds} but its name says {claim}. Loading as {format}.', name=name,
                   holds=_holds(found.precision), claim=claim[1], format=_SHOWN[found.precision][0])
    if claim and claim.lastindex == 2 and int(claim[2]) not in found.ranks:
        ranks = _text(found.ranks)
        yield Text('"{name}" holds low-rank parts of rank {ranks} but its name says r{claim}. Loading with rank '
                   "{ranks}.", name=name, ranks=ranks, claim=claim[2])


def _metadata_notes(metadata: Mapping[str, str], found: Found, plan: Plan, dims: Dims) -> Iterator[str]:
    claims: dict[str, dict[str, Any]] = {}
    for key in ("config", "quantization_config", "comfy_config"):
        claims[key] = {}
        if key in metadata:
            try:
                value = decode(metadata[key])
            except ValueError:
                value = None
            if isinstance(value, dict):
                claims[key] = value
            else:
                yield Text("the metadata's {key} is no JSON object; passed over", key=key)
    model_class = metadata.get("model_class") or ""
    if model_class and model_class not in found.family.class_names:
        yield Text("the metadata says {model_class}, but the tensors are {family}; the tensors are right",
                   model_class=model_class, family=found.family.name)
    yield from _config_notes(claims["config"], Text("the metadata"), found, dims)
    spec = claims["quantization_config"]
    weight = spec.get("weight")
    dtype = str(weight.get("dtype") or "") if isinstance(weight, dict) else ""
    if dtype and WORDS.get(dtype) != found.precision:
        yield Text("the metadata says {dtype}, but the file holds {holds}; the tensors are right", dtype=dtype,
                   holds=_holds(found.precision))
    rank = spec.get("rank")
    if isinstance(rank, int) and rank not in found.ranks:
        yield Text("the metadata says rank {rank}, but the tensors have {ranks}; the tensors are right", rank=rank,
                   ranks=_text(found.ranks))
    skipped = spec.get("skip_refiners")
    refiners = any("_refiner." in name for name in plan.layers)
    if isinstance(skipped, bool) and found.family.name == "Z-Image" and skipped == refiners:
        yield Text("the metadata says skip_refiners {skipped}, but the refiners are {state}; the tensors are right",
                   skipped=str(skipped).lower(), state=Text("quantized") if refiners else Text("not quantized"))


def _config_notes(config: dict[str, Any], whose: str, found: Found, dims: Dims) -> Iterator[str]:
    claim = str(config.get("_class_name") or "")
    if not claim:
        return
    if claim not in found.family.class_names:
        yield Text("{whose} says {claim}, but the tensors are {family}; the tensors are right", whose=whose,
                   claim=claim, family=found.family.name)
        return
    try:
        said = found.family.architecture.dims_from_config(config)
    except ValueError as error:
        yield Text("{whose} describes another model ({error}); the tensors are right", whose=whose, error=error)
        return
    other = [Text("{key} {said} (tensors: {stored})", key=key, said=said[key], stored=dims[key])
             for key in said if key in dims and dims[key] != said[key]]
    if other:
        yield Text("{whose} says {sizes}; the tensors are right", whose=whose, sizes=joined(", ", other))


def config_only(checkpoint: Checkpoint, found: Found) -> Dims:
    """The sizes that no tensor tells, from config.json or the metadata's config where one is of this family."""
    configs = [checkpoint.config or {}]
    for header in checkpoint.headers:
        try:
            configs.append(decode(header.metadata.get("config", "{}")))
        except ValueError:
            continue
    for config in configs:
        if isinstance(config, dict) and config.get("_class_name") in found.family.class_names:
            try:
                said = found.family.architecture.dims_from_config(config)
            except ValueError:
                continue
            return {key: said[key] for key in found.family.architecture.config_only}
    return {}
