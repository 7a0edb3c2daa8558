"""Files with ComfyUI's `comfy_quant` markers: for every quantized layer one that names its format, as a tensor of the
layer or in the list of layers in the file's metadata.

Read layer by layer, so that any mixture loads: ComfyUI's own formats, and this pack's tiles (quant/layouts/stored.py)
and older markers (old.py). FP8 and NVFP4 alone need no markers, modelopt.py tells them from the tensors. Nothing is
converted: what the host saved, it loads; only where diffusers' names have apart what ComfyUI keeps in one, layers of
INT8 and MXFP8 become tiles. Only the host knows its padding, so a weight in these may have up to 31 more rows and
columns than the model's layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ... import host
from ...host.texts import Text, both
from ...quant import host_blocks, host_formats
from ...quant.ascend.kinds import HOST_FORMAT, KINDS
from ...quant.codecs.int8 import GROUPS
from ...quant.codecs.mxfp8 import FORMATS as MXFP8
from ...quant.formats import formats, identify, name_unsupported
from ...quant.host_formats import HOST_FORMATS
from ...quant.layouts import old
from ...quant.layouts.stored import FORMAT
from ...quant.scales import EXPONENTS, checked
from ...quant.stored import ByteOrder
from .. import plan as plans
from ..architectures import Architecture, Dims, Module
from ..containers.checkpoint import Checkpoint
from ..containers.safetensors import TORCH_DTYPES, TensorInfo
from ..errors import CheckpointError
from ..files.strict import decode
from ..plan import Group, Layer, LoadPlan
from .base import Family
from .modelopt import StoredLayers
from .names import adopt
from .reading import described, spellings

if TYPE_CHECKING:
    from torch import Tensor

    from ...quant.tile import Coded

METADATA = "_quantization_metadata"
ASCEND = "modelslim (saved)"  # a file with layers in this pack's own layout of ModelSlim's types
ORDER = ByteOrder(low_first=False, swizzled=True, why=Text("ComfyUI's markers"))
HOST_NAMES = {"int8_tensorwise": "INT8", "mxfp8": "MXFP8"}  # in reports
STORED = frozenset().union(*(fmt.words for fmt in formats()))  # formats that quant/formats.py tells from the tensors
LEAVES = frozenset({"comfy_quant", "weight_scale", *host_formats.LEAVES})
_OF_HOST = {host: kind for kind, host in HOST_FORMAT.items()}
_OWN = re.compile(r"\.(weight_t\d+_\w+|weight_shard_1|weight_down_0|weight_quant_bias|weight_mul)$")


class Comfy(Family):
    """See base.Family."""

    name = "comfy"
    title = "ComfyUI"

    def colours(self) -> Mapping[str, tuple[int, int, int]]:
        return host_formats.COLOURS

    def recognise(self, checkpoint: Checkpoint) -> bool:
        return _is_marked(checkpoint)

    def read(self, checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> LoadPlan:
        names = adopt(checkpoint)
        confs = _confs(checkpoint)
        whole = _with_whole_weights(checkpoint.tensors, confs)
        architecture, description = described(checkpoint, self.name, base, whole, byte_order=ORDER, producer="ComfyUI")
        plan = LoadPlan(description, architecture, hint=Text("save the model again"))
        description.notes += names.notes
        stored = StoredLayers(description, names, scaled=False)  # markers say which layers are more than a cast

        def read_layer(module: Module, name: str, rows: int, group: Group, problems: list[str]) -> Layer | None:
            return _layer(stored, confs.get(name, {}), module, name, rows, group, problems)

        plans.make(plan, checkpoint.tensors, read_layer)
        description.notes += stored.notes()
        if any(name.lower() in KINDS for one in description.formats for name in one.split(" + ")):
            description.family = ASCEND
        description.notes += [Text("{name} is ComfyUI's own format {word!r}, which loads where the installed ComfyUI "
                                   "has it", name=name, word=host_formats.NAMES[name])
                              for name in description.formats if name in host_formats.NAMES]
        return plan

    def check(self, plan: LoadPlan) -> None:
        """Raise CheckpointError for layers in a format that the host is to make sense of, and does not have."""
        description = plan.description
        for name in description.formats.keys() & host_formats.NAMES.keys():
            word = host_formats.NAMES[name]
            if word not in host.quantized_formats():
                raise CheckpointError(Text("ComfyUI {version} does not have the format {word!r}, which {count} layers "
                                           "are in ({name})", version=host.version(), word=word,
                                           count=description.formats[name], name=name), description.reference,
                                      Text("update ComfyUI and its comfy-kitchen"))

    def runs(self, plan: LoadPlan, compute: str) -> list[str]:
        names = [name for name in plan.description.formats if name in host_formats.NAMES]
        runs = Text("dequantized for every matmul, as chosen") if compute == "dequantize" else \
            Text("multiplied by ComfyUI itself")
        return [Text("{formats}: {runs}, on {device}", formats=both(names), runs=runs,
                     device=host.device_name())] if names else []


FAMILY = Comfy()


def _is_marked(checkpoint: Checkpoint) -> bool:
    """Whether a layer with a marker is stored as only these formats are: this pack's own leaves, integers, or scales in
    E8M0 or for every row."""
    tensors = checkpoint.tensors
    marked = {name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")}
    if marked and any(map(_OWN.search, tensors)):
        return True
    for layer in marked | _listed(checkpoint).keys():
        weight, scale = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.weight_scale")
        if weight and not scale and weight.dtype == "I8":
            return True
        one = weight and not scale and layer in marked and weight.dtype in ("U8", "F8_E4M3")
        if one and _marker(checkpoint, f"{layer}.comfy_quant").get("format") == FORMAT:  # tiles of one tensor
            return True
        if weight and scale and (
                weight.dtype == "I8" or scale.dtype in ("U8", "F8_E8M0")
                or scale.dtype == "F32" and len(scale.shape) == 2 and f"{layer}.weight_scale_2" not in tensors):
            return True
    return False


def _listed(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Layer -> what the files' metadata say of it, as a marker would; nothing where they are no such list."""
    found: dict[str, dict[str, Any]] = {}
    for header in checkpoint.headers:
        try:
            layers = decode(header.metadata.get(METADATA, "{}"))["layers"].items()
            confs = {str(name): dict(conf) for name, conf in layers}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # declarations.py says what is wrong with it
        for name, conf in confs.items():
            found |= {layer: conf for layer in spellings(name) if f"{layer}.weight" in checkpoint.tensors}
    return found


def _confs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Layer -> what its marker says, which is read from the files, a few bytes each; else what the metadata say.

    Raises CheckpointError for a format that this version does not know.
    """
    confs = dict(_listed(checkpoint))
    for name in checkpoint.tensors:
        if name.endswith(".comfy_quant"):
            confs[name.removesuffix(".comfy_quant")] = _marker(checkpoint, name)
    for layer, conf in confs.items():
        word = str(conf.get("format", ""))
        known = word.removeprefix(old.ASCEND) in KINDS if word.startswith(old.ASCEND) else old.is_old(word)
        if not (known or word == FORMAT or word in STORED or word in _OF_HOST or word in HOST_FORMATS):
            what = Text("{layer}.comfy_quant says {word!r}, which this version does not load", layer=layer,
                        word=word) if word else \
                Text("{layer}.comfy_quant names no format: {conf}", layer=layer, conf=conf)
            raise CheckpointError(what, checkpoint.source.reference, Text("update this pack, or load the original"))
    return confs


def _with_whole_weights(tensors: Mapping[str, TensorInfo],
                        confs: Mapping[str, dict[str, Any]]) -> Mapping[str, TensorInfo]:
    """The headers, with weights in tiles as large as they are together, and two codes a byte as two columns: sizes are
    read from weights."""
    found = {}
    for layer, conf in confs.items():
        weight = tensors.get(f"{layer}.weight")
        if weight is not None and conf.get("format") in host_formats.TWO_A_BYTE and len(weight.shape) == 2:
            found[f"{layer}.weight"] = TensorInfo("BF16", (weight.shape[0], 2 * weight.shape[1]), 0, 0)
        tiles = conf.get("tiles") or conf.get("parts")
        if isinstance(tiles, list) and tiles and all(isinstance(tile, dict) and all(
                isinstance(tile.get(size, 0), int) for size in ("row", "rows", "column", "columns")) for tile in tiles):
            shape = (max(tile.get("row", 0) + tile.get("rows", 0) for tile in tiles),
                     max(tile.get("column", 0) + tile.get("columns", 0) for tile in tiles))
            found[f"{layer}.weight"] = TensorInfo("BF16", shape, 0, 0)
    return {**tensors, **found}


def _marker(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    dtype = checkpoint.tensors[name].dtype
    if dtype != "U8":
        raise CheckpointError(Text("{name} is {dtype}, expected U8", name=name, dtype=dtype),
                              checkpoint.source.reference, Text("save the model again"))
    try:
        conf = decode(checkpoint.read(name))
        assert isinstance(conf, dict)
    except (ValueError, AssertionError) as error:
        raise CheckpointError(Text("{name} is no JSON object", name=name), checkpoint.source.reference,
                              Text("save the model again")) from error
    return conf


def _layer(stored: StoredLayers, conf: dict[str, Any], module: Module, name: str, rows: int, group: Group,
           problems: list[str]) -> Layer | None:
    """plan.ReadLayer for a layer of which a marker says this (nothing: it is not quantized)."""
    weight = plans.take_weight(module, name, group, problems)
    if weight is None:
        return None
    stored.beside(module, name, weight, group)
    plans.take_bias(module, name, rows, group, problems)
    word = str(conf.get("format", ""))
    if not word:
        fmt = identify({"weight": weight, **group}) if module.linear else None
        if fmt in MXFP8:  # of which it is the marker that tells the order of the block scales
            problems.append(Text("{name} has block scales and no comfy_quant marker, which others here have",
                                 name=name))
            group.clear()
            return None
        return stored.of_format(fmt, module, name, rows, weight, group, problems) if fmt else \
            plans.plain(module, name, rows, weight, group, problems)
    if not module.linear:
        problems.append(Text("{name} ({word}): it is no Linear layer", name=name, word=word))
        return None
    if word in STORED:
        fmt = identify({"weight": weight, **group})
        if fmt is None or word not in fmt.words:
            problems.append(Text("{name} ({word}): it is stored as {what}", name=name, word=word,
                                 what=fmt.name if fmt else name_unsupported({"weight": weight, **group})))
            return None
        if conf.get("full_precision_matrix_mult") and name not in stored.description.full_precision:
            stored.description.full_precision.append(name)
        return stored.of_format(fmt, module, name, rows, weight, group, problems)
    if word == FORMAT or old.is_old(word):
        return _tiles(conf, module, name, rows, weight, group, problems)
    leaves = {"weight": weight, **{leaf: group.pop(leaf) for leaf in sorted(LEAVES & group.keys())}}
    handed = HOST_FORMATS.get(word)
    apart = len(module.stored) > 1 or module.swap_halves or bool(module.ranges)
    problem = handed.problem(leaves, rows, module.inner[0]) if handed else \
        host_blocks.problem(word, conf, leaves, rows, module.inner[0])
    if apart and not handed and host_blocks.convrot(conf) not in (0, *GROUPS):
        problem = problem or Text("ConvRot in groups of {size} is only handed on as it is",
                                  size=host_blocks.convrot(conf))
    if handed and apart:
        problem = problem or Text("ComfyUI keeps {module} in one, and this format is only handed on as it is",
                                  module=module.native)
    if problem:
        problems.append(Text("{name} ({word}): {problem}", name=name, word=word, problem=problem))
    others = (*(leaf for leaf in leaves if leaf != "weight"), *plans.bias_of(module))
    read = partial(_as_tiles, conf, rows, module.inner[0]) if apart else partial(_as_it_is, conf)
    return Layer(name, handed.name(leaves, module.inner[0]) if handed else HOST_NAMES[word],
                 plans.leaves(module.stored_leaf, *others), read, codecs=() if handed else (_OF_HOST[word],))


def _as_it_is(conf: dict[str, Any], layer: Layer, part: dict[str, Tensor]) -> list[Coded]:
    import torch

    from ...quant.marker import marker
    from ...quant.tile import Coded

    word = str(conf["format"])
    rules = {leaf: field.values for leaf, field in HOST_FORMATS[word].fields.items()} if word in HOST_FORMATS else \
        {"weight_scale": host_blocks.RULES[word]}
    for leaf, rule in rules.items():
        if rule and leaf in part:
            of_bytes = part[leaf].dtype == torch.uint8 and rule != EXPONENTS
            checked(f"{layer.name}.{leaf}", part[leaf].view(torch.float8_e4m3fn) if of_bytes else part[leaf], rule)
    if word == "int8_tensorwise":
        part = {**part, "weight_scale": host_blocks.int8_scale(part["weight_scale"])}
    return [Coded(native={"comfy_quant": marker(conf), **part})]


def _as_tiles(conf: dict[str, Any], rows: int, columns: int, layer: Layer, part: dict[str, Tensor]) -> list[Coded]:
    from ...quant.tile import Coded

    tile = host_blocks.tile(layer.name, conf, part, rows, columns)
    return [Coded((tile,), part.get("bias"), full_precision=bool(conf.get("full_precision_matrix_mult")))]


def _tiles(conf: dict[str, Any], module: Module, name: str, rows: int, weight: TensorInfo, group: Group,
           problems: list[str]) -> Layer | None:
    """A layer in this pack's layout, of this version or an older one; its tensors are read when it is loaded, checked
    here by dtype and shape."""
    from ...quant.codecs import codec
    from ...quant.layouts import stored
    from ...quant.tile import Coded

    own = {leaf: info for leaf, info in group.items() if leaf.startswith("weight_") or leaf == "input_scale"}
    marked = ("comfy_quant",) if "comfy_quant" in group else ()
    for leaf in (*marked, *own):
        del group[leaf]
    delta = own.pop("weight_delta", None)
    headers = {leaf: (TORCH_DTYPES.get(info.dtype, info.dtype), tuple(info.shape))
               for leaf, info in {"weight": weight, **own}.items()}
    wide = [leaf for leaf in old.words_of_four(conf) if headers.get(leaf, ("",))[0] == "float8_e4m3fn"]
    headers |= {leaf: ("int32", (*headers[leaf][1][:-1], headers[leaf][1][-1] // 4)) for leaf in wide}
    if delta is not None:
        plans.check_plain(problems, f"{name}.weight_delta", delta, (rows, module.inner[0]))
    try:
        described = stored.described(conf) if conf["format"] == FORMAT else old.described(conf, headers)
        stored.check(described, headers, (rows, module.inner[0]))
    except ValueError as error:
        problems.append(Text("{name} ({word}): {problem}", name=name, word=conf["format"], problem=error))
        return None
    unread = own.keys() - {leaf.partition("[")[0] for _, fields in described for leaf in fields.values()}
    plans.check_extra(problems, [f"{name}.{leaf}" for leaf in sorted(unread)])

    def read(layer: Layer, part: dict[str, Tensor]) -> list[Coded]:
        import torch

        part = part | {leaf: part[leaf].view(torch.int32) for leaf in wide}
        return [Coded(tuple(stored.tiles(described, part)), part.get("bias"), delta=part.get("weight_delta"),
                      full_precision=bool(conf.get("full_precision_matrix_mult")))]

    kinds = [codec(place.codec) for place, _ in described]
    inputs = [fields for kind, (_, fields) in zip(kinds, described, strict=True) if "input_scale" in kind.fields]
    leaves = (*marked, *own, *(("weight_delta",) if delta else ()), *plans.bias_of(module))
    return Layer(name, " + ".join(dict.fromkeys(kind.title for kind in kinds)),
                 plans.leaves(module.stored_leaf, *leaves), read,
                 all("input_scale" in fields for fields in inputs) if inputs else None,
                 tuple(kind.name for kind in kinds))
