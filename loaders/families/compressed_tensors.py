"""compressed-tensors: what vLLM's llm-compressor, and AutoRound's llm_compressor export, write.

config.json says in `config_groups` which layers are how (targets: "Linear", names, or "re:" and a pattern; `ignore`
likewise); what a layer is, its tensors decide (quant/packed/compressed.py). Targets are looked up as compressed-tensors
does: names before patterns before classes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from ...host.texts import Text
from ...quant.packed import compressed
from ...quant.packed.compressed import Integers, Weights
from ...quant.stored import PLAIN_DTYPES
from ..containers.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..patterns import Expressions, refuse_many
from ..plan import Group
from ..words import first_ten
from .declarations import claims
from .packed import Packed, PackedFamily
from .reading import spellings

METHOD = "compressed-tensors"
_SCALES = frozenset({"weight_scale", "weight_global_scale", "weight_packed", "weight_shape"})


class CompressedTensors(PackedFamily):
    """See base.Family and packed.PackedFamily."""

    name = METHOD
    title = "compressed-tensors"
    words = {METHOD: "compressed-tensors"}
    leaves = {"weight_packed": "weight"}

    def recognise(self, checkpoint: Checkpoint) -> bool:
        return any(name.endswith((".weight_packed", ".weight_global_scale")) for name in checkpoint.tensors) \
            or claims(checkpoint)[0].get("quant_method") == METHOD

    def layers(self, checkpoint: Checkpoint, claimed: Mapping[str, Any], groups: Mapping[str, Group],
               notes: list[str]) -> dict[str, Packed]:
        found: dict[str, Packed] = {}
        quantized = {name: leaves for name, leaves in groups.items()
                     if "weight" in leaves and not _SCALES.isdisjoint(leaves)}
        scheme = _Scheme(claimed, len(quantized), checkpoint.source.reference) if quantized else None
        for name, leaves in quantized.items():
            assert scheme is not None
            weights = scheme.of(name, checkpoint.in_file(f"{name}.weight").rpartition(".")[0])
            if weights is None:
                found[name] = Packed(None, problem=Text("no group of config_groups covers it, and its tensors are "
                                                        "quantized"))
                continue
            fmt = compressed.format_of(leaves, weights)
            if fmt is None:
                dtype = leaves["weight"].dtype
                found[name] = Packed(None, problem=Text("its weight is not compressed, but has a weight_scale "
                                                        "(quantization_status frozen)") if dtype in PLAIN_DTYPES else
                                     Text("{dtype} weights of {bits} bits {kind} are not known", dtype=dtype,
                                          bits=weights.bits, kind=weights.kind))
            else:
                shape = _shape(checkpoint, name, leaves)
                packed = isinstance(fmt, Integers) and fmt.packed
                if packed and (shape is None or tuple(leaves["weight"].shape) != compressed.words_of(shape, weights)):
                    found[name] = Packed(None, problem=Text("weight_shape is missing or no shape") if shape is None else
                                         Text("weight is {shape}, expected {expected} for the {said} of its "
                                              "weight_shape in {bits} bits", shape=list(leaves["weight"].shape),
                                              expected=list(compressed.words_of(shape, weights)), said=list(shape),
                                              bits=weights.bits))
                else:
                    full = not weights.quantized_input and not isinstance(fmt, Integers)  # those never quantize it
                    found[name] = Packed(fmt, shape, full_precision=full)
        if scheme is not None and scheme.ignored:
            notes.append(Text("{count} layers are declared as left alone but stored quantized; the tensors are right: "
                              "{names}", count=len(scheme.ignored), names=first_ten(scheme.ignored)))
        if any(one.format is not None and isinstance(one.format, Integers) and one.format.weights.quantized_input
               for one in found.values()):
            notes.append(Text("activations are declared as quantized beside integers in groups; here they are not"))
        return found


def _shape(checkpoint: Checkpoint, name: str, leaves: Group) -> tuple[int, int] | None:
    """[rows, columns] of a weight by its header, or by the weight_shape beside it."""
    weight, told = leaves["weight"], leaves.get("weight_shape")
    if weight.dtype == "I32":
        if told is None or told.dtype != "I64" or tuple(told.shape) != (2,):
            return None
        rows, columns = struct.unpack("<2q", checkpoint.read(f"{name}.weight_shape"))
        return (rows, columns) if rows > 0 and columns > 0 else None
    if len(weight.shape) != 2:
        return None
    return weight.shape[0], weight.shape[1] * (2 if weight.dtype == "U8" else 1)


class _Scheme:
    """config_groups and ignore, for so many layers; `ignored` are those asked for that were declared as left alone.

    Raises CheckpointError for claims that this version does not load.
    """

    def __init__(self, claimed: Mapping[str, Any], layers: int, where: str) -> None:
        def refuse(what: str) -> CheckpointError:
            return CheckpointError(Text("compressed-tensors: {what}", what=what), where,
                                   Text('take another checkpoint of this model (README, "Which node for which file")'))

        sparsity, transforms = claimed.get("sparsity_config") or {}, claimed.get("transform_config") or {}
        if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
            raise refuse(Text("the weights are sparse ({format}), which this version does not load",
                              format=sparsity["format"]))
        if transforms and (not isinstance(transforms, dict) or transforms.get("config_groups")):
            raise refuse(Text("activations are transformed (transform_config), which this version does not load"))
        groups = claimed.get("config_groups")
        if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
            raise refuse(Text("there are quantized layers, and no config_groups in config.json or the files' metadata "
                              "say how; put the config.json of the same export beside them"))
        self.targets: list[tuple[str, Weights]] = []
        for key, group in groups.items():
            try:
                weights, targets = compressed.weights_of(group), group.get("targets")
            except ValueError as error:
                raise refuse(Text("{group} of config_groups {error}", group=key, error=error)) from error
            if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
                raise refuse(Text("{group} of config_groups has no list of targets", group=key))
            self.targets += [(target, weights) for target in targets]
        ignore = claimed.get("ignore") or ()
        if not isinstance(ignore, (list, tuple)) or not all(isinstance(name, str) for name in ignore):
            raise refuse(Text("the list of layers left alone (ignore) is no list of names"))
        refuse_many(len(ignore) + len(self.targets), layers, where)
        written = Expressions(where)
        try:
            self.patterns = {one: written.compile(one.removeprefix("re:")) for one in
                             (*ignore, *(target for target, _ in self.targets)) if one.startswith("re:")}
        except re.error as error:
            raise refuse(Text("a pattern of ignore or targets is none: {error}", error=error)) from error
        self.left_alone, self.ignored = tuple(ignore), list[str]()

    def of(self, name: str, in_file: str) -> Weights | None:
        """What is declared of a quantized layer, which the file calls `in_file`; None for nothing."""
        names = tuple(dict.fromkeys((*spellings(name), *spellings(in_file))))
        if any(self._is(names, one) for one in self.left_alone):
            self.ignored.append(name)
        ranked: Iterable[tuple[int, Weights]] = (
            (0 if target in names else 1 if target.startswith("re:") else 2, weights)
            for target, weights in self.targets if target == "Linear" or self._is(names, target))
        return min(ranked, key=lambda one: one[0], default=(0, None))[1]

    def _is(self, names: tuple[str, ...], target: str) -> bool:
        pattern = self.patterns.get(target)
        return target in names if pattern is None else any(map(pattern.match, names))


FAMILY = CompressedTensors()
