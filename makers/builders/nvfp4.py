"""build-nvfp4: a ModelOpt NVFP4 export with some layers from its BF16 base, or the base alone, as an override.

Follows SGLang-Diffusion's build_modelopt_nvfp4_transformer (docs/sources/sglang.md, "NVFP4 builder"): no
arithmetic on an export, its NVFP4 bytes stay as they are. From the base alone the bytes are those that
nvidia-modelopt's export would have: q, k and v of one attention share the tensor scale where ModelOpt shares it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...host.texts import Text, joined
from ...loaders.containers.checkpoint import Checkpoint
from ...loaders.containers.writing import Declared, Parts, Put
from ...loaders.errors import CheckpointError
from ...loaders.patterns import Globs, glob
from ...quant.scales import NOT_NEGATIVE, damage, refusal
from ...quant.stored import PLAIN_DTYPES
from ..publish import Step, target_folder
from .component import Component, scratch
from .output import (
    Built,
    Plan,
    Write,
    check_base,
    linear_weights,
    module_of,
    publish,
    quantization_of,
    refuse_difference,
    statistics_line,
)
from .presets import PATTERN_PRESETS, left_alone, preset_of, unmatched

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 16
SCALES = (".weight_scale", ".weight_scale_2", ".input_scale")
STATISTICS = ("fallback_modules", "replaced_tensors", "removed_aux_tensors", "output_shards")
# What nvidia-modelopt gives one amax (modelopt/torch/export/diffusers_utils.py, get_qkv_group_key); it does so for
# classes whose dummy forward it can run (docs/sources/modelopt.md, "Shared scales").
_SHARED = re.compile(r"^(.*\.attn)\.(?:(to_)[qkv]|(add)_[qkv]_proj)$")
_SHARED_IN = ("FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel")


def build_nvfp4(*, output_dir: str, base_transformer_dir: str, modelopt_hf_dir: str = "", pattern_preset: str = "none",
                keep_bf16_patterns: Sequence[str] = (), swap_weight_nibbles: bool = False, shard_bytes: int = 5 << 30,
                overwrite: bool = False, progress: Callable[[int], Step] | None = None) -> Built:
    """Write a mixed BF16 and NVFP4 transformer override to the folder `output_dir`.

    References are paths or repo ids on this machine. With `modelopt_hf_dir`, a diffusers export of nvidia-modelopt:
    its tensors as they are, except that layers whose module name matches `pattern_preset` or `keep_bf16_patterns`
    (globs, full match, `*` crosses dots) are the base's. Without, the base's Linear weights are quantized (amax / 2688,
    groups of 16, dynamic activation scales), except for these layers, those that ModelOpt's examples leave alone, and
    weights whose columns are no multiple of 16.

    `swap_weight_nibbles` is written into config.json: true says that even columns are in the high nibble. It does not
    change an export's bytes; what is quantized here is written accordingly. Statistics: fallback_modules,
    replaced_tensors, removed_aux_tensors, output_shards, swap_weight_nibbles; without an export quantized_weights, too.

    Raises CheckpointError, naming the tensor, for inputs that do not belong together or hold NaN, missing scales, and
    outputs that cannot be written; nothing half-written is left that would load.
    """
    if pattern_preset not in PATTERN_PRESETS:
        raise CheckpointError(Text("unknown pattern preset {preset!r}", preset=pattern_preset), "",
                              Text("choose one of: {names}", names=", ".join(PATTERN_PRESETS)))
    patterns = (*PATTERN_PRESETS[pattern_preset], *keep_bf16_patterns)
    base = Component(base_transformer_dir)
    export = Component(modelopt_hf_dir) if modelopt_hf_dir.strip() else None
    inputs = export.frozen | base.frozen if export else base.frozen
    target = target_folder(output_dir, [c.folder for c in (export, base) if c], overwrite)
    if export:
        plan, quantization, statistics = _from_export(export, base, patterns)
    else:
        plan, quantization, statistics = _from_base(base, patterns, swap_weight_nibbles)
    quantization["swap_weight_nibbles"] = swap_weight_nibbles
    written, lines = publish(plan, target, export or base, quantization, inputs, ["nvfp4"], shard_bytes, overwrite,
                             progress)
    statistics["output_shards"] = len(written.headers)
    _read_back(written, plan, statistics, target)
    how = Text("from {folder}", folder=modelopt_hf_dir) if export else \
        Text("straight from BF16: activation scales are dynamic")
    numbers: dict[str, int | bool] = {**statistics, "swap_weight_nibbles": swap_weight_nibbles}
    report = joined("\n", [
        Text("NVFP4 transformer {class_name} -> {target}", class_name=base.class_name, target=target),
        Text("{how}, pattern preset {preset}", how=how, preset=pattern_preset), statistics_line(numbers), *lines,
        *(Text("note: {note}", note=note) for note in plan.notes)])
    return Built(report, numbers, target)


def _read_back(written: Checkpoint, plan: Plan, statistics: dict[str, int], target: Path) -> None:
    """Count in the written headers what the statistics say. Raises CheckpointError."""
    kept = {name for name in plan.fallback if written.tensors[name].dtype in PLAIN_DTYPES}
    clean = {module for module in map(module_of, kept) if not any(module + leaf in written.tensors for leaf in SCALES)}
    found = {"fallback_modules": len(clean)}
    if "quantized_weights" in statistics:
        found["quantized_weights"] = sum(name.endswith(".weight") and info.dtype == "U8"
                                         for name, info in written.tensors.items())
    else:
        found["replaced_tensors"] = len(kept)
    refuse_difference(found, statistics, target)


def _from_export(export: Component, base: Component,
                 patterns: Sequence[str]) -> tuple[Plan, dict[str, Any], dict[str, int]]:
    quantization = quantization_of(export, "NVFP4")
    check_base(base, export)
    match, plan, numbers = Globs(patterns), Plan(), dict.fromkeys(STATISTICS, 0)
    modules = {module_of(name) for name in export.names if name.endswith((".weight", ".bias"))}
    fallback = {module for module in modules if match.covers(module)}
    for name in export.names:
        module, info = module_of(name), export.tensors[name]
        if "_quantizer." in name or module in fallback and name.endswith(SCALES):
            numbers["removed_aux_tensors"] += 1
        elif module in fallback and name.endswith((".weight", ".bias")):
            plan.copy(base, name)
            plan.fallback.append(name)
        else:
            if name.endswith(".weight") and info.dtype in ("U8", "F8_E4M3"):
                _check_layer(export, name)
            plan.copy(export, name)
    numbers |= {"fallback_modules": len(fallback), "replaced_tensors": len(plan.fallback)}
    quantization["ignore"] += [p for p in dict.fromkeys(patterns) if p not in quantization["ignore"]]
    plan.notes += unmatched({pattern: glob(pattern).fullmatch for pattern in patterns}, modules)
    return plan, quantization, numbers


def _check_layer(export: Component, name: str) -> None:
    """Raise CheckpointError for a quantized weight without its scales, or with others than its shape needs."""
    module, info = module_of(name), export.tensors[name]
    wanted: dict[str, tuple[int, ...] | None] = {".weight_scale": None}
    if info.dtype == "U8":
        wanted = {".weight_scale": (info.shape[0], info.shape[-1] * 2 // GROUP), ".weight_scale_2": None}
    for leaf, shape in {**wanted, ".input_scale": None}.items():
        scale = export.tensors.get(module + leaf)
        if scale is None:
            raise CheckpointError(Text("{name} is missing", name=module + leaf), export.where(name),
                                  Text("calibrate and export again with nvidia-modelopt, or take the layer from the "
                                       "base by a pattern of layers kept in BF16: {module}", module=module))
        if scale.shape != shape and (shape is not None or scale.shape not in ((), (1,))):
            raise CheckpointError(Text("{name} is {shape}, expected {expected}", name=module + leaf,
                                       shape=list(scale.shape), expected=list(shape or (1,))),
                                  export.where(name), Text("export with group size 16, without enable_swizzle_layout"))
        if shape is not None and (found := damage(export.read(module + leaf), NOT_NEGATIVE)):
            raise CheckpointError(refusal(module + leaf, found, NOT_NEGATIVE), export.where(name),
                                  Text("calibrate and export the model again"))
        if shape is None and not float(export.read(module + leaf)) > 0:
            raise CheckpointError(Text("{name} is not a positive number", name=module + leaf),
                                  export.where(name), Text("calibrate and export the model again"))


def _from_base(base: Component, patterns: Sequence[str],
               high_first: bool) -> tuple[Plan, dict[str, Any], dict[str, int]]:
    match, plan, numbers = Globs(patterns), Plan(), dict.fromkeys(STATISTICS, 0)
    leave = left_alone(preset_of("auto", base.class_name, base.folder.name), base.names)
    weights = [name for name in linear_weights(base) if not any(p.search(module_of(name)) for p in leave)]
    fallback = {module_of(name) for name in base.names if match.covers(module_of(name))}
    odd = [name for name in weights if base.tensors[name].shape[1] % GROUP and module_of(name) not in fallback]
    chosen = [name for name in weights if name not in odd and module_of(name) not in fallback]
    if not chosen:
        raise CheckpointError(Text("there is nothing to quantize: every weight is to be kept in BF16"), base.folder,
                              Text("give fewer patterns"))
    groups: dict[str, list[str]] = {}
    for name in chosen:
        groups.setdefault(_group(module_of(name), base.class_name), []).append(name)
    shared = {name: names for names in groups.values() for name in names}
    known: dict[str, float] = {}
    for name in base.names:
        if name in shared:
            _add_quantized(plan, base, name, shared[name], known, high_first)
        else:
            plan.copy(base, name)
            if module_of(name) in fallback:
                plan.fallback.append(name)
    if odd:
        plan.notes.append(Text("{count} weights stay as they are: their columns are no multiple of {group}",
                               count=len(odd), group=GROUP))
    ignore = sorted({module_of(name) for name in base.names if name.endswith(".weight")} - set(map(module_of, chosen)))
    numbers |= {"fallback_modules": len({*map(module_of, plan.fallback)}), "quantized_weights": len(chosen)}
    group: dict[str, Any] = {"num_bits": 4, "type": "float", "group_size": GROUP}
    return plan, {"quant_method": "modelopt", "quant_algo": "NVFP4", "quant_type": "NVFP4", "ignore": ignore,
                  "config_groups": {"group_0": {"weights": {**group, "dynamic": False}, "targets": ["Linear"],
                                                "input_activations": {**group, "dynamic": True}}},
                  "dynamic_input_scale": True}, numbers


def _group(module: str, class_name: str) -> str:
    """What the tensor scale of a layer is shared within."""
    found = _SHARED.match(module) if class_name in _SHARED_IN else None
    return f"{found[1]} {found[2] or found[3]}" if found else module


def _add_quantized(plan: Plan, base: Component, name: str, shared: list[str], known: dict[str, float],
                   high_first: bool) -> None:
    rows, columns = base.tensors[name].shape
    module = module_of(name)

    def begin() -> Write:
        import torch

        from ...quant.blocks import swap_nibbles
        from ...quant.convert.nvfp4 import quantize, scale_of

        for other in shared:
            if other not in known:
                known[other] = base.amax(other)
        scale = scale_of(max(known[other] for other in shared))

        def use(put: Put, start: int, part: Tensor, _: float) -> int:
            codes = scratch("codes", part.numel() // 2, torch.uint8)
            blocks = scratch("blocks", part.numel() // GROUP, torch.float8_e4m3fn)
            quantize(part.view(-1, GROUP), scale, codes, blocks)
            return (put(name, start // 2, swap_nibbles(codes, codes) if high_first else codes)
                    + put(f"{module}.weight_scale", start // GROUP, blocks))

        def write(put: Put) -> Parts:
            yield put(f"{module}.weight_scale_2", 0, scale)
            yield from base.spans(name, partial(use, put), known[name])

        return write

    plan.add(module, [Declared(name, "U8", (rows, columns // 2)), Declared(f"{module}.weight_scale_2", "F32", ()),
                      Declared(f"{module}.weight_scale", "F8_E4M3", (rows, columns // GROUP))], begin)
