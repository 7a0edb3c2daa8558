"""build-fp8: a ModelOpt FP8 export and its base, or the base alone, as a transformer override.

Follows SGLang-Diffusion's build_modelopt_fp8_transformer (docs/sources/sglang.md, "FP8 builder"), but: a
fallback layer's bias comes from the base, too; only weights of two dimensions are quantized; they are clamped before
the cast; scales that the export carries are used; and what SGLang would load with wrong numbers is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...host.texts import Text, joined
from ...loaders.containers.checkpoint import Checkpoint
from ...loaders.errors import CheckpointError
from ...loaders.files.frozen import Frozen
from ...loaders.patterns import Expression, Globs
from ...quant.stored import PLAIN_DTYPES
from ..publish import Step, target_folder
from .backbone import AMAX, find_backbone, read_amax
from .component import Component
from .fp8_layers import Scales, add_measured, add_scaled
from .output import (
    Built,
    Plan,
    check_base,
    linear_weights,
    module_of,
    publish,
    quantization_of,
    refuse_difference,
    statistics_line,
)
from .presets import Preset, compiled, left_alone, preset_of, unmatched, variants

if TYPE_CHECKING:
    from torch import Tensor

E4M3_MAX = 448.0
SCALES = (".weight_scale", ".input_scale")
STATISTICS = ("quantized_weights", "bf16_fallback_weights", "preserved_ignored_weights", "added_scale_tensors",
              "output_shards")


def build_fp8(*, output_dir: str, base_transformer_dir: str = "", modelopt_hf_dir: str = "",
              modelopt_backbone_ckpt: str = "", model_type: str = "auto", keep_bf16_patterns: Sequence[str] = (),
              maxbound: float = E4M3_MAX, shard_bytes: int = 5 << 30, overwrite: bool = False,
              progress: Callable[[int], Step] | None = None) -> Built:
    """Write an FP8 transformer override to the folder `output_dir`.

    References are paths or repo ids on this machine. With `modelopt_hf_dir`, a diffusers export of nvidia-modelopt:
    its quantized layers, with scales from the export or, where it has none, from `modelopt_backbone_ckpt`; layers that
    the preset of `model_type` or `keep_bf16_patterns` (re.search on module names) match come from the base. Without,
    the base's Linear weights are quantized: scale amax / `maxbound`, activation scales dynamic.

    `maxbound` (0 to 448) is what an amax is divided by. `progress(total bytes)` returns the function that is told how
    many bytes were written (default: the node's progress bar and Cancel). Statistics: quantized_weights,
    bf16_fallback_weights, preserved_ignored_weights (all `.weight` tensors), added_scale_tensors, output_shards.

    Raises CheckpointError, naming the tensor, for inputs that do not belong together or hold NaN, missing scales and
    fallback layers, and outputs that cannot be written; nothing half-written is left that would load.
    """
    if not 0 < maxbound <= E4M3_MAX:
        raise CheckpointError(Text("maxbound is {maxbound:g}", maxbound=maxbound), "",
                              Text("give a number above 0, up to 448 (E4M3's largest)"))
    if not modelopt_hf_dir.strip() and not base_transformer_dir.strip():
        raise CheckpointError(Text("neither a ModelOpt export nor a base is given"), "",
                              Text("give an export of nvidia-modelopt, or a base to quantize its BF16 model, or both"))
    if modelopt_backbone_ckpt.strip() and not modelopt_hf_dir.strip():
        raise CheckpointError(Text("a backbone checkpoint is given without its export"), modelopt_backbone_ckpt,
                              Text("give the export it was saved with, too, or leave the backbone out to quantize a "
                                   "base"))
    user = compiled(keep_bf16_patterns)
    backbone = find_backbone(modelopt_backbone_ckpt) if modelopt_backbone_ckpt.strip() else None
    inputs = Frozen([backbone] if backbone else ())
    base = Component(base_transformer_dir) if base_transformer_dir.strip() else None
    export = Component(modelopt_hf_dir) if modelopt_hf_dir.strip() else None
    source = export or base
    assert source is not None
    preset = preset_of(model_type, source.class_name, (base or source).folder.name)
    for component in (export, base):
        inputs |= component.frozen if component else Frozen()
    target = target_folder(output_dir, [c.folder for c in (export, base) if c] + ([backbone] if backbone else []),
                           overwrite)
    if export:
        plan, quantization, statistics = _from_export(export, base, backbone, preset, user, maxbound)
    else:
        plan, quantization, statistics = _from_base(source, preset, user, maxbound)
    statistics["bf16_fallback_weights"] = len(plan.fallback)
    written, lines = publish(plan, target, source, quantization, inputs, ["fp8", maxbound], shard_bytes, overwrite,
                             progress)
    statistics["output_shards"] = len(written.headers)
    _read_back(written, plan, statistics, target)
    how = Text("from {folder}", folder=modelopt_hf_dir) if export else \
        Text("straight from BF16: activation scales are dynamic")
    report = joined("\n", [
        Text("FP8 transformer {class_name} -> {target}", class_name=source.class_name, target=target),
        Text("{how}, preset {preset}", how=how, preset=preset.name), statistics_line(statistics), *lines,
        *(Text("note: {note}", note=note) for note in plan.notes)])
    return Built(report, dict(statistics), target)


def _read_back(written: Checkpoint, plan: Plan, statistics: dict[str, int], target: Path) -> None:
    """Count in the written headers what the statistics say. Raises CheckpointError."""
    weights = {name: info for name, info in written.tensors.items() if name.endswith(".weight")}
    codes = [name for name, info in weights.items() if info.dtype == "F8_E4M3" and len(info.shape) == 2
             and f"{name}_scale" in written.tensors]
    plain = [name for name, info in weights.items() if info.dtype in PLAIN_DTYPES]
    kept = set(plain) & set(plan.fallback)
    refuse_difference({"quantized_weights": len(codes), "bf16_fallback_weights": len(kept),
                       "preserved_ignored_weights": len(weights) - len(codes) - len(kept),
                       "added_scale_tensors": sum(name.endswith(SCALES) for name in written.tensors)},
                      statistics, target)


def _from_export(export: Component, base: Component | None, backbone: Path | None, preset: Preset,
                 user: list[Expression], maxbound: float) -> tuple[Plan, dict[str, Any], dict[str, int]]:
    quantization = quantization_of(export, "FP8")
    patterns = [*compiled(preset.keep), *user]
    if base is not None:
        check_base(base, export)
    weights = [name for name in export.names if name.endswith(".weight") and "_quantizer." not in name]
    names = {name: variants(module_of(name), export.class_name) for name in weights}
    fallback = {module_of(name) for name in weights
                if any(pattern.search(variant) for pattern in patterns for variant in names[name])}
    if fallback and base is None:
        raise CheckpointError(Text("{count} layers are to be kept in BF16, which only the base has",
                                   count=len(fallback)), export.folder,
                              Text("give the base, or model type none and no patterns"))
    scales = _scales(export, backbone, maxbound, fallback)
    ignored = Globs(quantization["ignore"])
    plan, numbers = Plan(), dict.fromkeys(STATISTICS, 0)
    kept: set[str] = set()
    for name in export.names:
        module, info = module_of(name), export.tensors[name]
        if "_quantizer." in name or name.endswith(SCALES):
            continue
        if name.endswith(".pre_quant_scale"):
            raise CheckpointError(Text("{name}: smoothed activations are not FP8 as SGLang and this pack run it",
                                       name=name), export.where(name),
                                  Text("export with the plain FP8 configuration"))
        if module in fallback and name.endswith((".weight", ".bias")):
            assert base is not None
            plan.copy(base, name)
            if name.endswith(".weight"):
                plan.fallback.append(name)
            continue
        pair = scales.get(module) if name.endswith(".weight") else None
        left = any(map(ignored.covers, names.get(name, ())))
        if pair is None or left or len(info.shape) != 2:
            _refuse_codes(export, name, left)
            plan.copy(export, name)
            if name.endswith(".weight"):
                numbers["preserved_ignored_weights"] += 1
                if pair is None or not left:
                    kept.add(names[name][-1])
                if pair is not None and not left:
                    plan.notes.append(Text("{name} has {dimensions} dimensions and stays {dtype}: only weights of two "
                                           "are quantized", name=name, dimensions=len(info.shape), dtype=info.dtype))
            continue
        if info.dtype == "F8_E4M3" and maxbound != E4M3_MAX and not pair.own:
            raise CheckpointError(Text("{name} is FP8 already, made with 448, so maxbound {maxbound:g} would be wrong",
                                       name=name, maxbound=maxbound), export.where(name),
                                  Text("leave maxbound at 448"))
        add_scaled(plan, export, name, pair)
        numbers["quantized_weights"] += 1
        numbers["added_scale_tensors"] += 2
    ignore = {*quantization["ignore"], *kept, *(names[f"{module}.weight"][-1] for module in fallback)}
    plan.notes += unmatched({p.pattern: p.search for p in user}, [*chain.from_iterable(names.values())])
    return plan, {**quantization, "ignore": sorted(ignore)}, numbers


def _refuse_codes(export: Component, name: str, left: bool) -> None:
    """Raise CheckpointError for FP8 codes that would be copied where full precision is expected."""
    if export.tensors[name].dtype != "F8_E4M3":
        return
    what = Text("{name} is on the list of layers left alone, but stored as FP8", name=name) if left else \
        Text("{name} is FP8, but its weight_scale or input_scale is missing", name=name)
    raise CheckpointError(what, export.where(name),
                          Text("give the export's backbone.pt, or take the layer from the base by a pattern of what is "
                               "kept in BF16: ^{pattern}$", pattern=re.escape(module_of(name))))


def _scales(export: Component, backbone: Path | None, maxbound: float, fallback: set[str]) -> dict[str, Scales]:
    """Layer -> scales: the export's own, else from calibrated amax (of the backbone, or left in the export).

    Layers with one scale of the two are left out; layers in `fallback` are not looked at.
    """
    amax = read_amax(backbone) if backbone else {}
    place = str(backbone or export.folder)
    if backbone is None:
        for name in export.names:
            ending = next((e for e in AMAX if name.endswith(e)), None)
            if ending:
                amax.setdefault(name.removesuffix(ending), {})[AMAX[ending]] = export.read(name)
    found = {}
    for module, both in amax.items():
        if module not in fallback and both.keys() == {"weight", "input"} and f"{module}.weight" in export.tensors:
            weight, inner = (_from_amax(f"{module}.{kind}_quantizer._amax", both[kind], maxbound, place)
                             for kind in ("weight", "input"))
            found[module] = Scales(weight, inner, False)
    for name in export.names:
        module = name.removesuffix(".weight_scale")
        if module == name or module in fallback:
            continue
        own, static = _scalar(export, name), f"{module}.input_scale"
        given = found.get(module)
        if given is not None and export.tensors[f"{module}.weight"].dtype == "F8_E4M3" and maxbound == E4M3_MAX \
                and not math.isclose(float(given.weight), float(own), rel_tol=2 ** -8):
            raise CheckpointError(Text("{name} is {exported:g} in the export, {calibrated:g} by the backbone",
                                       name=name, exported=float(own), calibrated=float(given.weight)), place,
                                  Text("give the backbone.pt of this very export, or none"))
        if static in export.tensors:
            found[module] = Scales(own, _scalar(export, static))
        elif given is not None:
            found[module] = Scales(own, given.input)
    if not found and export.names:
        raise CheckpointError(Text("the backbone has no scales for this export") if backbone else
                              Text("the export carries no scales"), place,
                              Text("give the backbone.pt of this export, too"))
    return found


def _from_amax(name: str, amax: Tensor, maxbound: float, where: str) -> Tensor:
    from ...quant.convert.fp8 import scale_of

    if amax.numel() != 1:
        raise CheckpointError(Text("{name} is {shape}: only one scale a tensor is supported", name=name,
                                   shape=list(amax.shape)), where,
                              Text("calibrate with per-tensor FP8 (FP8_DEFAULT_CFG)"))
    value = float(amax.float())
    if not math.isfinite(value) or value < 0:
        raise CheckpointError(Text("{name} is {value:g}", name=name, value=value), where,
                              Text("calibrate again; an amax is finite and not negative"))
    return scale_of(value, maxbound)


def _scalar(export: Component, name: str) -> Tensor:
    """A stored scale as F32 [1]."""
    scale = export.read(name).float()
    if scale.numel() != 1 or not bool((scale > 0).all()):
        raise CheckpointError(Text("{name} is {values} {shape}, expected one positive number", name=name,
                                   values=scale.flatten().tolist()[:4], shape=list(scale.shape)), export.where(name),
                              Text("export with per-tensor FP8 (FP8_DEFAULT_CFG)"))
    return scale.reshape(1)


def _from_base(base: Component, preset: Preset, user: list[Expression],
               maxbound: float) -> tuple[Plan, dict[str, Any], dict[str, int]]:
    """Quantize what ModelOpt's examples would, except for the preset's fallback set."""
    weights = linear_weights(base)
    names = {name: variants(module_of(name), base.class_name) for name in base.names if name.endswith(".weight")}
    keep = [*compiled(preset.keep), *user]
    leave = left_alone(preset, names)
    plan, numbers = Plan(), dict.fromkeys(STATISTICS, 0)
    listed: set[str] = set()
    for name in base.names:
        module = module_of(name)
        if name not in names:
            plan.copy(base, name)
        elif any(pattern.search(variant) for pattern in keep for variant in names[name]):
            plan.copy(base, name)
            plan.fallback.append(name)
            listed.update(names[name])
        elif name not in weights or any(pattern.search(module) for pattern in leave):
            plan.copy(base, name)
            numbers["preserved_ignored_weights"] += 1
            listed.update(names[name])
        else:
            add_measured(plan, base, name, maxbound)
            numbers["quantized_weights"] += 1
            numbers["added_scale_tensors"] += 1
    if not numbers["quantized_weights"]:
        raise CheckpointError(Text("there is nothing to quantize: every weight is to be kept in BF16"), base.folder,
                              Text("give fewer patterns, or another model type"))
    plan.notes += unmatched({p.pattern: p.search for p in user}, [*chain.from_iterable(names.values())])
    # ModelOpt's FP8 has static activation scales only; the generic method says that they are dynamic
    return plan, {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": sorted(listed),
                  "quant_type": "FP8"}, numbers
