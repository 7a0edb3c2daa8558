"""Which tensors a saved file holds, and in what format each layer is.

"exact": every layer as the MODEL has it, LoRAs beside quantized weights in their low-rank branches. "stock": what the
host has no format for becomes something that it has. "baked": a quantized layer with patches is quantized again, to the
nearest; others as in "exact".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ... import host
from ...host.texts import Text
from ...loaders.containers.writing import Piece, declared, whole
from ...loaders.errors import CheckpointError
from ...loaders.files.frozen import Frozen
from ...loaders.files.mapped import Mapped
from ...quant.codecs import codec
from ...quant.layouts.join import join
from ...quant.layouts.stored import FORMAT, described, read
from ...quant.layouts.tiled import is_tiled
from ...quant.patches.stand_ins import Lazy
from ..decode import Decode, decoder
from ..sources import sources_of
from .check import not_finite

if TYPE_CHECKING:
    import torch

FORMATS = ("exact", "stock", "baked")
METADATA = "_quantization_metadata"  # where readers other than the host look; the host takes it or `comfy_quant`
Part = dict[str, "torch.Tensor"]


@dataclass
class Plan:
    """What is going to be written.

    `formats`: Linear -> its format in the file ("BF16" and the like where not quantized). `own`: those in a format of
    this pack -> its codecs, `why`: those -> why the host has no layout for them. `changed`: what "stock" did, in words
    -> the layers. `baked`: those that were quantized again. `sources`: the files behind the MODEL.
    """

    layers: list[Piece] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    changed: dict[str, list[str]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    baked: set[str] = field(default_factory=set)
    sources: Frozen = field(default_factory=Frozen)

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)


@dataclass(frozen=True)
class _Group:
    """The tensors of one layer by leaf. Those of `pending` have sizes but no values yet; `values` has all."""

    model: Any
    name: str
    mapped: Mapped
    leaves: Part = field(default_factory=dict)
    pending: dict[str, str] = field(default_factory=dict)  # leaf -> the weight that it comes with

    @property
    def unmade(self) -> set[str]:
        """Leaves whose values are made when they are written."""
        return {leaf for leaf, tensor in self.leaves.items() if leaf in self.pending or isinstance(tensor, Lazy)}

    def there(self) -> Part:
        """The leaves; those that are views of a file, read from it."""
        return {leaf: self.mapped.own(tensor) for leaf, tensor in self.leaves.items()}

    def values(self) -> Part:
        """Every tensor of the layer, on the CPU."""
        made: Part = {}
        for weight in dict.fromkeys(self.pending.values()):
            made |= host.patched_tensors(self.model, weight)
        return {leaf: made[_join(self.name, leaf)] if leaf in self.pending else self.mapped.own(tensor).to("cpu")
                for leaf, tensor in self.leaves.items()}


def plan(model: Any, form: str) -> Plan:
    """The file of a MODEL, which is loaded for it as ComfyUI's save nodes do; `form` is one of FORMATS.

    Raises CheckpointError for a file behind the MODEL that was written to, a marker that neither the host nor this pack
    knows, and for a dtype that safetensors does not have.
    """
    tensors, pending = host.tensors_for_saving(model)
    sources, mapped = sources_of(model, tensors.values())
    groups: dict[str, _Group] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        group = groups.setdefault(module, _Group(model, module, mapped))
        group.leaves[leaf] = tensor
        if name in pending:
            group.pending[leaf] = pending[name]
    made, formats, metadata = Plan(sources=sources), host.quantized_formats(), {}
    modules = dict(model.model.diffusion_model.named_modules())
    half = "float16" if str(model.model.get_dtype_inference()) == "torch.float16" else "bfloat16"
    decode: Decode | None = None
    for name, group in groups.items():
        linear: Any = modules.get(name)
        conf = marker_of(group.leaves)
        word = str(conf.get("format", ""))
        if word and word not in formats and word != FORMAT:
            raise CheckpointError(Text("{name} is in the format {format!r}, which neither this ComfyUI nor this pack "
                                       "knows", name=name, format=word), "",
                                  Text("save the MODEL with a node of the pack that made it"))
        shape = (linear.out_features, linear.in_features) if word else (0, 0)
        coded = host.quantized_weight(model, name) if form == "baked" else None
        held = _in_host_format(group, conf, shape, form == "stock") if word == FORMAT and coded is None else None
        if coded is not None and _codes_again(coded):
            decode = decode or decoder()
            layer, conf = _baked(group, linear, coded, decode)
            made.baked.add(name)
        elif held is not None:
            layer, conf = held
            made.changed.setdefault(_held(conf), []).append(name)
        elif word and word not in formats and form == "stock":
            decode = decode or decoder()
            layer, conf = _dequantized(group, shape, half, decode), {}
            made.changed.setdefault(_rounded(half), []).append(name)
        else:
            layer = _as_it_is(group, _widened(model))
        made.layers.append(layer)
        word = str(conf.get("format", ""))
        if word in formats:
            metadata[name] = conf
        elif word:
            kinds = [codec(place.codec) for place, _ in described(conf)]
            word = " + ".join(dict.fromkeys(kind.title for kind in kinds))
            made.own[name], made.why[word] = word, next(kind.why for kind in kinds if kind.why)
        if hasattr(linear, "in_features") and "weight" in group.leaves:
            made.formats[name] = word or next(t.dtype for t in layer.tensors if t.name == f"{name}.weight")
    made.metadata = {"format": "pt"} | ({} if host.lacking("native passthrough") else host.header_of(model.model))
    if metadata:
        made.metadata[METADATA] = json.dumps({"format_version": "1.0", "layers": metadata})
    return made


def marker_of(group: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the `comfy_quant` tensor of a layer says; nothing for a layer that is not quantized."""
    stored = group.get("comfy_quant")
    return json.loads(bytes(stored.tolist())) if stored is not None else {}


def _join(layer: str, leaf: str) -> str:
    return f"{layer}.{leaf}" if layer else leaf


def _widened(model: Any) -> bool:
    """Whether the F32 of a MODEL may be that of the device: on a CPU the host computes in F32 and holds BF16 files so.
    Where the user asked for F32, F32 is kept."""
    made_by = model.get_attachment(host.ATTACHMENT)
    return host.is_cpu() and getattr(made_by, "dtype", "default") != "fp32"


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    """An F32 tensor in BF16 or F16 where that holds every one of its values; others as they are."""
    import torch

    if tensor.dtype != torch.float32 or not tensor.numel():
        return tensor
    for dtype in (torch.bfloat16, torch.float16):
        small = tensor.to(dtype)
        if torch.equal(small.float(), tensor):
            return small
    return tensor


def _as_it_is(group: _Group, widened: bool) -> Piece:
    """The tensors of a layer as they are, but widened ones that are no part of a quantization in 16 bits again."""
    def fitting(part: Part) -> Part:
        if not widened:
            return part
        return {leaf: _narrow(t.detach()) if leaf not in group.unmade and (leaf == "bias" or "comfy_quant" not in part)
                else t for leaf, t in part.items()}

    return _layer(group, fitting(group.there()), lambda: fitting(group.values()))


def _layer(group: _Group, expected: Part, make: Callable[[], Part]) -> Piece:
    return whole([declared(_join(group.name, leaf), tensor) for leaf, tensor in expected.items()],
                 lambda: {_join(group.name, leaf): tensor for leaf, tensor in make().items()})


def _in_host_format(group: _Group, conf: Mapping[str, Any], shape: tuple[int, int],
                    stock: bool) -> tuple[Piece, dict[str, Any]] | None:
    """Tiles in the host's own layout where that has the same bytes, and their marker; else None.

    For FP8 without an activation scale the host takes 1.0, so there only where the matmul is full precision, or for
    `stock`, which makes it so.
    """
    if group.unmade:
        return None  # it has a low-rank branch, or something on top

    def convert(part: Part) -> Part:
        left = dict(part)
        tiles = read(left, "", conf, shape)
        dynamic = stock and any("input_scale" not in tile.fields for tile in tiles)
        full = dynamic or bool(conf.get("full_precision_matrix_mult"))
        made = join(tiles, [group.name], shape, full_precision=full).tensors
        return made | ({"bias": left["bias"]} if "bias" in left else {})

    expected = convert(group.there())
    own = marker_of(expected)
    return None if own["format"] == FORMAT else (_layer(group, expected, lambda: convert(group.values())), own)


def _dequantized(group: _Group, shape: tuple[int, int], half: str, decode: Decode) -> Piece:
    """A layer as a plain one: the effective weight, computed in F32 and rounded once; the bias in F32."""
    import torch

    dtype = getattr(torch, half)

    def make() -> Part:
        weight, bias = decode(group.name, group.values(), *shape)
        if not bool(weight.isfinite().all()):
            raise not_finite(group.name)
        made = {"weight": weight.to(dtype)}
        return made if bias is None else made | {"bias": bias}

    expected = {"weight": torch.empty(shape, dtype=dtype, device="meta")}
    if "bias" in group.leaves:
        expected["bias"] = torch.empty(shape[:1], device="meta")
    return _layer(group, expected, make)


def _codes_again(weight: Any) -> bool:
    return not is_tiled(weight) or all(codec(place.codec).requantizes for place in weight._params.tiles)


def _baked(group: _Group, linear: Any, base: Any, decode: Decode) -> tuple[Piece, dict[str, Any]]:
    """A layer with patches, quantized as `base` (its weight without them) is; and its marker."""
    expected = {leaf: tensor for leaf, tensor in linear.bare_state(base).items() if leaf != "bias"}
    expected |= {"bias": group.leaves["bias"]} if "bias" in group.leaves else {}

    def make() -> Part:
        part = group.values()
        weight, _ = decode(group.name, part, *linear.weight.shape)
        if not bool(weight.isfinite().all()):
            raise not_finite(group.name)
        again = base.to("cpu").requantize_from_float(weight.to(base.dtype), scale="recalculate", stochastic_rounding=0)
        return expected | again.state_dict("weight") | ({"bias": part["bias"]} if "bias" in part else {})

    return _layer(group, expected, make), marker_of(expected)


def _held(conf: Mapping[str, Any]) -> str:
    if conf.get("full_precision_matrix_mult"):
        return Text("stored as ComfyUI's {format}, byte for byte, with activations in full precision",
                    format=conf["format"])
    return Text("stored as ComfyUI's {format}, byte for byte", format=conf["format"])


def _rounded(half: str) -> str:
    name, error = ("BF16", 2 ** -8) if half == "bfloat16" else ("F16", 2 ** -11)
    return Text("dequantized and rounded once to {dtype} (a weight changes by at most {error:.2%} of itself), with "
                "activations in full precision", dtype=name, error=error)
