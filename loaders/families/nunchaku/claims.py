"""What file names, metadata and widgets say of an SVDQuant file, held against its tensors: tensors are right.

Widgets are what the user asks for, so one that contradicts is an error; the rest are claims, and become notes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...architectures import Dims
from ...containers.checkpoint import Checkpoint
from ...errors import CheckpointError
from .files import NAME, STEPS
from .plan import Plan
from .recognise import Found

if TYPE_CHECKING:
    from ...description import CheckpointDescription

LEGACY_NAME = r"svdq-(int4|fp4)\b"  # folders of two files say no rank
WORDS = {"int4": "int4", "fp4": "nvfp4", "fp4_e2m1_all": "nvfp4", "nvfp4": "nvfp4"}
_SHOWN = {"int4": ("INT4", "bfloat16 or float16"), "nvfp4": ("NVFP4", "float8_e4m3fn")}


def check_widgets(description: CheckpointDescription, precision: str, rank: int) -> None:
    """Raise CheckpointError when a described file is no SVDQuant file, or `precision` (auto, int4, nvfp4) or `rank`
    (0: any; stored ranks are padded to 16) contradicts its tensors."""
    where, held = description.reference, description.family.removeprefix("svdquant-")
    if not description.family.startswith("svdquant-"):
        raise CheckpointError(f"this is no SVDQuant file but {description.architecture}"
                              + (f" in {description.family}" if description.family != "none" else ""), where,
                              "load it with Load Base Model or Apply Transformer Override")
    if precision not in ("auto", held):
        raise CheckpointError(f"precision is set to {precision}, but this file holds {_holds(held)}", where,
                              f"set precision to 'auto' or {held!r}, or choose the {precision} file")
    if rank and -(-rank // 16) * 16 not in description.ranks:
        raise CheckpointError(f"rank is set to {rank}, but this file's low-rank parts have rank "
                              f"{_text(description.ranks)}", where, f"set rank to 0, or choose the r{rank} file")


def _text(ranks: Sequence[int]) -> str:
    """Ranks as text: "32", or "32 and 64 (mixed)"."""
    text = " and ".join(map(str, ranks))
    return f"{text} (mixed)" if len(ranks) > 1 else text


def _holds(precision: str) -> str:
    word, dtype = _SHOWN[precision]
    return f"{word} weights (wscales are {dtype})"


def claim_notes(checkpoint: Checkpoint, found: Found, plan: Plan, dims: Dims) -> Iterator[str]:
    """One line for every claim that the tensors contradict, for a missing claim, and for a hint in the name."""
    files = [os.path.basename(header.path) for header in checkpoint.headers]
    # a legacy folder carries the name, its two files do not; a cache's folder is called by its commit
    named = [*files, os.path.basename(os.path.normpath(checkpoint.source.folder)), checkpoint.source.reference]
    name = next((name for name in named if re.search(NAME, name) or re.search(LEGACY_NAME, name)), files[0])
    yield from _name_notes(name, found)
    steps = re.search(STEPS, name)
    if steps:
        yield f"file name asks for {steps[1]} steps; set KSampler steps={steps[1]}, cfg=1.0"
    for header in checkpoint.headers:
        yield from _metadata_notes(header.metadata, found, plan, dims)
    if not any({"config", "quantization_config", "model_class", "comfy_config"} & header.metadata.keys()
               for header in checkpoint.headers):
        yield "no metadata in the file: everything is taken from the tensors"
    if checkpoint.config:
        yield from _config_notes(checkpoint.config, "config.json", found, dims)


def _name_notes(name: str, found: Found) -> Iterator[str]:
    claim = re.search(NAME, name) or re.search(LEGACY_NAME, name)
    if claim and WORDS[claim[1]] != found.precision:
        yield f'"{name}" holds {_holds(found.precision)} but its name says {claim[1]}. Loading as ' \
              f"{_SHOWN[found.precision][0]}."
    if claim and claim.lastindex == 2 and int(claim[2]) not in found.ranks:
        ranks = _text(found.ranks)
        yield f'"{name}" holds low-rank parts of rank {ranks} but its name says r{claim[2]}. Loading with rank {ranks}.'


def _metadata_notes(metadata: Mapping[str, str], found: Found, plan: Plan, dims: Dims) -> Iterator[str]:
    claims: dict[str, dict[str, Any]] = {}
    for key in ("config", "quantization_config", "comfy_config"):
        claims[key] = {}
        if key in metadata:
            try:
                value = json.loads(metadata[key])
            except ValueError:
                value = None
            if isinstance(value, dict):
                claims[key] = value
            else:
                yield f"the metadata's {key} is no JSON object; passed over"
    model_class = metadata.get("model_class") or ""
    if model_class and model_class not in found.family.class_names:
        yield f"the metadata says {model_class}, but the tensors are {found.family.name}; the tensors are right"
    yield from _config_notes(claims["config"], "the metadata", found, dims)
    spec = claims["quantization_config"]
    weight = spec.get("weight")
    dtype = str(weight.get("dtype") or "") if isinstance(weight, dict) else ""
    if dtype and WORDS.get(dtype) != found.precision:
        yield f"the metadata says {dtype}, but the file holds {_holds(found.precision)}; the tensors are right"
    rank = spec.get("rank")
    if isinstance(rank, int) and rank not in found.ranks:
        yield f"the metadata says rank {rank}, but the tensors have {_text(found.ranks)}; the tensors are right"
    skipped = spec.get("skip_refiners")
    refiners = any("_refiner." in name for name in plan.layers)
    if isinstance(skipped, bool) and found.family.name == "Z-Image" and skipped == refiners:
        yield f"the metadata says skip_refiners {str(skipped).lower()}, but the refiners are " \
              f"{'quantized' if refiners else 'not quantized'}; the tensors are right"


def _config_notes(config: dict[str, Any], whose: str, found: Found, dims: Dims) -> Iterator[str]:
    claim = str(config.get("_class_name") or "")
    if not claim:
        return
    if claim not in found.family.class_names:
        yield f"{whose} says {claim}, but the tensors are {found.family.name}; the tensors are right"
        return
    try:
        said = found.family.architecture.dims_from_config(config)
    except ValueError as error:
        yield f"{whose} describes another model ({error}); the tensors are right"
        return
    other = [f"{key} {said[key]} (tensors: {dims[key]})" for key in said if key in dims and dims[key] != said[key]]
    if other:
        yield f"{whose} says {', '.join(other)}; the tensors are right"


def config_only(checkpoint: Checkpoint, found: Found) -> Dims:
    """The sizes that no tensor tells, from config.json or the metadata's config where one is of this family."""
    configs = [checkpoint.config or {}]
    for header in checkpoint.headers:
        try:
            configs.append(json.loads(header.metadata.get("config", "{}")))
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
