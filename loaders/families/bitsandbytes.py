"""bitsandbytes: NF4 and FP4 (with double quantization or without), and LLM.int8, as diffusers and others save them.

Stored per Linear P, n = rows * columns of it (bitsandbytes' functional.py, `QuantState.as_dict(packed=True)`, and
nn/modules.py, `Linear8bitLt._save_to_state_dict`):

    P.weight                                 U8 [ceil(n / 2), 1]: flattened codes, the first in the high nibble; with
                                             `bnb_4bit_quant_storage` the same bytes in another dtype
    P.weight.absmax                          F32 [ceil(n / blocksize)], or U8 where it is quantized once more
    P.weight.nested_absmax, .nested_quant_map  F32 [ceil(absmax / nested_blocksize)], F32 [256]
    P.weight.quant_map                       F32 [16]
    P.weight.quant_state.bitsandbytes__nf4   U8: JSON (quant_type, blocksize, shape, nested_blocksize, nested_offset)

    absmax = nested_quant_map[absmax] * nested_absmax + nested_offset;  W = quant_map[code] * absmax

    P.weight, P.SCB, P.weight_format         I8 [rows, columns], F32 [rows], U8 [] (0: rows);  W = weight * SCB / 127

4-bit layers are tiles of the codec "codebook", LLM.int8 is weight-only INT8 ("w8a16"): the activations' outliers, which
it multiplies in 16 bits, are told by values at run time. What a folder skips is as StoredLayers reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from math import gcd, isfinite
from typing import TYPE_CHECKING, Any

from ...host.texts import Text, both
from ...quant.scales import FINITE, NOT_NEGATIVE, checked
from ...quant.stored import PLAIN_DTYPES, wrong_shape
from .. import plan as plans
from ..architectures import Architecture, Dims, Module
from ..containers.checkpoint import Checkpoint
from ..containers.safetensors import DTYPE_BITS, TensorInfo
from ..errors import CheckpointError
from ..files.strict import decode
from ..plan import Group, Layer, LoadPlan
from . import repos
from .base import Family
from .modelopt import StoredLayers
from .names import adopt
from .reading import described

if TYPE_CHECKING:
    from torch import Tensor

    from ...quant.tile import Coded

STATE, MAPS, NESTED = "quant_state", ("absmax", "quant_map"), ("nested_absmax", "nested_quant_map")
INT8 = ("SCB", "weight_format")
OWN = (STATE, *MAPS, *NESTED, *INT8)
TITLES = {"nf4": "NF4", "fp4": "FP4"}
LLM_INT8 = "INT8 (LLM.int8)"
SMALLEST = 8  # values with one scale in a tile; with fewer the scales are larger than the codes
_LEAF = re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state)(\.bitsandbytes__\w+)?$")


class BitsAndBytes(Family):
    """See base.Family."""

    name = "bitsandbytes"
    words = {"bitsandbytes": "bitsandbytes"}
    published = repos.BITSANDBYTES

    def colours(self) -> Mapping[str, tuple[int, int, int]]:
        return {"NF4": (190, 120, 70), "FP4": (205, 140, 85), LLM_INT8: (130, 175, 225)}

    def badge(self, reference: str) -> str:
        return self.words[self.name]

    def usual_formats(self, reference: str) -> tuple[str, ...]:
        return ("NF4",)

    def recognise(self, checkpoint: Checkpoint) -> bool:
        return any(name.endswith(".SCB") or ".weight." in name and _LEAF.search(name) for name in checkpoint.tensors)

    def read(self, checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> LoadPlan:
        names = adopt(checkpoint)
        states = _by_leaf(checkpoint)
        whole = {name: info for name, info in checkpoint.tensors.items() if name.rpartition(".")[2] not in OWN}
        whole |= {f"{layer}.weight": TensorInfo("BF16", tuple(state["shape"]), 0, 0) for layer, state in states.items()}
        architecture, description = described(checkpoint, self.name, base, whole, producer="bitsandbytes")
        description.notes += names.notes
        stored = StoredLayers(description, names, scaled=False)
        plan = LoadPlan(description, architecture, hint=Text("download it again, or report it to its publisher"))
        plans.make(plan, checkpoint.tensors, partial(read_layer, states, stored))
        description.notes += stored.notes()
        if LLM_INT8 in description.formats:
            description.notes.append(Text("{format}: activations are not quantized, weights are multiplied dequantized",
                                          format=LLM_INT8))
        return plan


FAMILY = BitsAndBytes()


def _by_leaf(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Let what belongs to a weight go by names of its layer ("P.absmax"), and read each layer's state.

    Returns layer -> what its JSON says. Raises CheckpointError for one that is none, and for two.
    """
    called: dict[str, str] = {}
    states: dict[str, str] = {}
    for name in checkpoint.tensors:
        found = _LEAF.search(name)
        short = f"{name[:found.start()]}.{found[1]}" if found else name
        if short in called:
            raise CheckpointError(Text("{name} and {other} say the same twice", name=called[short],
                                       other=checkpoint.stored(name)), checkpoint.source.reference,
                                  Text("download it again, or report it to its publisher"))
        called[short] = checkpoint.stored(name)
        if found and found[1] == STATE:
            states[name[:found.start()]] = short
    checkpoint.call(called)
    return {layer: _state(checkpoint, name) for layer, name in states.items()}


def _state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """A layer's JSON, its numbers checked. Raises CheckpointError."""
    try:
        state = decode(checkpoint.read(name))
    except ValueError:
        state = None
    if not isinstance(state, dict):
        problem: str = Text("is no JSON object")
    elif state.get("quant_type") not in TITLES:
        problem = Text("says quant_type {kind!r}; supported: {kinds}", kind=state.get("quant_type"),
                       kinds=", ".join(TITLES))
    else:
        shape, sizes = state.get("shape"), {key: state.get(key) for key in ("blocksize", "nested_blocksize")
                                            if key == "blocksize" or key in state}
        offset = state.get("nested_offset", 0.0)
        problem = next((Text("says {key} {size!r}, expected a number of values", key=key, size=size)
                        for key, size in sizes.items() if type(size) is not int or size < 1), "")
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
            problem = Text("says shape {shape!r}, expected rows and columns", shape=shape)
        if type(offset) not in (int, float) or not isfinite(offset):
            problem = Text("says nested_offset {offset!r}, expected a finite number", offset=offset)
    if problem:
        raise CheckpointError(Text("{name} {problem}", name=checkpoint.stored(name), problem=problem),
                              checkpoint.source.reference,
                              Text("download it again, or report it to its publisher"))
    assert isinstance(state, dict)
    return state


def read_layer(states: Mapping[str, dict[str, Any]], stored: StoredLayers, module: Module, name: str, rows: int,
               group: Group, problems: list[str]) -> Layer | None:
    """plan.ReadLayer. `states` are the 4-bit layers' (_state), `stored` reads what is neither 4-bit nor LLM.int8."""
    own = {leaf: group.pop(leaf) for leaf in OWN if leaf in group}
    if not own:
        return stored(module, name, rows, group, problems)
    weight = plans.take_weight(module, name, group, problems)
    if weight is None:
        return None
    plans.take_bias(module, name, rows, group, problems)
    if not module.linear:
        problems.append(Text("{name}: it is stored as bitsandbytes' codes, and is no Linear layer", name=name))
        return None
    several = own.keys() & set(INT8) and own.keys() - set(INT8)
    problem = Text("tensors of 4-bit codes and of LLM.int8") if several else \
        _int8_problem(weight, own, rows, module.inner[0]) if own.keys() <= set(INT8) else \
        _problem(states.get(name), weight, own, rows, module.inner[0])
    if problem:
        problems.append(Text("{name}: {problem}", name=name, problem=problem))
        return None
    leaves = plans.leaves(module.stored_leaf, *own, *plans.bias_of(module))
    if "SCB" in own:
        return Layer(name, LLM_INT8, leaves, _rows, codecs=("w8a16",))
    state = states[name]
    return Layer(name, TITLES[state["quant_type"]], leaves, partial(_codes, state), codecs=("codebook",))


def _problem(state: dict[str, Any] | None, weight: TensorInfo, own: Group, rows: int, columns: int) -> str:
    """What is wrong with the headers of a 4-bit layer; empty when nothing is."""
    missing = [leaf for leaf in (STATE, *MAPS) if leaf not in own]
    nested = [leaf for leaf in NESTED if leaf in own]
    if missing or state is None:
        return Text("{names} missing beside 4-bit codes", names=both(f"weight.{leaf}" for leaf in missing))
    if len(nested) == 1:
        return Text("one of {names}, and they belong together", names=both(NESTED))
    if nested and not {"nested_blocksize", "nested_offset"} <= state.keys():
        return Text("the absmax is quantized, and weight.quant_state does not say its nested_blocksize and "
                    "nested_offset")
    if state["shape"] != [rows, columns]:
        return Text("weight.quant_state says shape {shape}, expected {expected}", shape=state["shape"],
                    expected=[rows, columns])
    count = -(-rows * columns // state["blocksize"])
    size = -(-rows * columns // 2)
    if len(weight.shape) != 2 or weight.shape[1] != 1 or weight.shape[0] * DTYPE_BITS[weight.dtype] != 8 * size:
        return Text("weight is {dtype} {shape}, expected {size} bytes in one column", dtype=weight.dtype,
                    shape=list(weight.shape), size=size)
    floats = {"absmax": (count,), "quant_map": (16,)}
    if nested:
        floats |= {"nested_absmax": (-(-count // state["nested_blocksize"]),), "nested_quant_map": (256,)}
        if (own["absmax"].dtype, tuple(own["absmax"].shape)) != ("U8", floats.pop("absmax")):
            return Text("weight.absmax is {dtype} {shape}, expected U8 [{count}]", dtype=own["absmax"].dtype,
                        shape=list(own["absmax"].shape), count=count)
    return next((Text("weight.{leaf} is {dtype} {shape}, expected floats {expected}", leaf=leaf,
                      dtype=own[leaf].dtype, shape=list(own[leaf].shape), expected=list(shape))
                 for leaf, shape in floats.items()
                 if own[leaf].dtype not in PLAIN_DTYPES or tuple(own[leaf].shape) != shape), "")


def _int8_problem(weight: TensorInfo, own: Group, rows: int, columns: int) -> str:
    """What is wrong with the headers of an LLM.int8 layer; empty when nothing is."""
    if "SCB" not in own:
        return Text("SCB missing beside {dtype} weights", dtype=weight.dtype)
    if weight.dtype != "I8":
        return Text("weight is {dtype}, expected I8", dtype=weight.dtype)
    scale = own["SCB"]
    if scale.dtype not in PLAIN_DTYPES or tuple(scale.shape) not in ((rows,), (rows, 1)):
        return Text("SCB is {dtype} {shape}, expected floats {expected}", dtype=scale.dtype, shape=list(scale.shape),
                    expected=[rows])
    form = own.get("weight_format")
    if form is not None and (form.dtype != "U8" or tuple(form.shape) not in ((), (1,))):
        return Text("weight_format is {dtype} {shape}, expected one byte", dtype=form.dtype, shape=list(form.shape))
    return wrong_shape({"weight": weight}, rows, columns)


def _checked(name: str, part: Mapping[str, Tensor], leaf: str, rule: str = FINITE) -> Tensor:
    """A layer's tensor in F32. Raises ValueError for values that a rule (quant/scales.py) forbids."""
    return checked(f"{name}.{leaf if leaf in INT8 else f'weight.{leaf}'}", part[leaf].float(), rule)


def _rows(layer: Layer, part: dict[str, Tensor]) -> list[Coded]:
    """plan.ReadTensors of LLM.int8."""
    from ...quant.tile import Coded, Place, Tile

    if "weight_format" in part and int(part["weight_format"]):  # of old GPUs' kernels; bitsandbytes reads none of these
        raise ValueError(Text("{layer}.weight_format is {number}: the codes are in an order of kernels, expected 0 "
                              "(row by row)", layer=layer.name, number=int(part["weight_format"])))
    codes = part["weight"]
    scale = _checked(layer.name, part, "SCB", NOT_NEGATIVE).reshape(-1, 1) / 127
    return [Coded((Tile(Place("w8a16", *codes.shape), {"codes": codes, "scale": scale}),), part.get("bias"))]


def _codes(state: Mapping[str, Any], layer: Layer, part: dict[str, Tensor]) -> list[Coded]:
    """plan.ReadTensors of 4-bit codes."""
    import torch

    from ...quant.stored import plain_tile
    from ...quant.tile import Coded, Place, Tile

    (rows, columns), block = state["shape"], state["blocksize"]
    table, scale = _checked(layer.name, part, "quant_map"), part["absmax"]
    if NESTED[0] in part:  # of a difference to the mean, which is coded: what is decoded may fall below 0
        levels = _checked(layer.name, part, "nested_quant_map")
        outer = _checked(layer.name, part, "nested_absmax", NOT_NEGATIVE)
        scale = levels[scale.int()] * outer.repeat_interleave(state["nested_blocksize"])[:len(scale)] \
            + state["nested_offset"]
    else:
        scale = _checked(layer.name, part, "absmax", NOT_NEGATIVE)
    codes, notes = part["weight"].view(torch.uint8).flatten(), tuple[str, ...]()
    size = gcd(columns, block)  # of the parts of blocks that no row cuts
    if size % 2 or size < min(SMALLEST, block):
        values = table[torch.stack((codes >> 4, codes & 15), -1).flatten()[:rows * columns].int()]
        weight = values * scale.repeat_interleave(block)[:rows * columns]
        tile = plain_tile(weight.view(rows, columns))
        notes = (Text("{layer}: dequantized, as its blocks of {block} values cross rows of {columns}", layer=layer.name,
                      block=block, columns=columns),)
    else:
        if size < block:
            scale = scale.repeat_interleave(block // size)[:rows * columns // size]
        tile = Tile(Place("codebook", rows, columns), {"codes": codes.view(rows, columns // 2), "scale": scale.view(
            rows, columns // size), "table": table})
    return [Coded((tile,), part.get("bias"), notes=notes)]
