"""GGUF files of diffusion transformers, as ComfyUI-GGUF's converter, llama.cpp's quantizer and stable-diffusion.cpp
write them: the model's own names or diffusers', each tensor in a type of its own (quant/ggml).

Linear weights stay as they are stored; anything else in blocks (convolutions of SDXL, embeddings) is decoded when it is
loaded. `general.architecture` and `general.file_type` are what a converter was told, and tensors decide: files of
FLUX.2 and Chroma say flux, those of Z-Image lumina2. Dimensions of 1 that llama.cpp's tools cut off are put back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from ...host.texts import Text
from ...quant.ggml import QUANTIZED, TYPES
from ...quant.scales import FINITE, refusal
from .. import plan as plans
from ..architectures import Architecture, Dims, Module
from ..architectures.base import tensor_name
from ..assemble import Tensors
from ..containers.checkpoint import Checkpoint
from ..containers.gguf import GGUFHeader
from ..containers.safetensors import TensorInfo
from ..errors import CheckpointError
from ..files.selection import SPLIT, Selection, component_folder, parts, select_component
from ..plan import Group, Layer, LoadPlan
from ..words import first_ten
from . import repos
from .base import Family
from .names import adopt
from .reading import described

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from ...quant.tile import Coded
    from ..files.selection import Folder

SUFFIX = ".gguf"
_BLOCKS = frozenset(kind.name for kind in QUANTIZED.values())
# The last parts of parameters whose first dimension is 1, which a file may lack: Wan's modulations and image positions,
# SD3's positions.
_FIRST_IS_ONE = ("modulation", "emb_pos", "pos_embed")


class GGUF(Family):
    """See base.Family and the module."""

    name = "gguf"
    title = "GGUF"
    words = {"gguf": "GGUF"}
    published = repos.GGUF

    def colours(self) -> Mapping[str, tuple[int, int, int]]:
        """From few bits a value (red) to many (blue); of those with as many, each next one is greener."""
        shades: dict[str, tuple[int, int, int]] = {}
        for kind in QUANTIZED.values():
            full = min(kind.size * 8 / kind.block / 8.5, 1.0)
            red, green, blue = round(230 - 170 * full), round(90 + 40 * full), round(70 + 150 * full)
            while (red, green, blue) in shades.values():
                green += 25
            shades[_format(kind.name)] = red, green, blue
        return shades

    def usual_formats(self, reference: str) -> tuple[str, ...]:
        return (_format("Q4_K"),)

    def recognise(self, checkpoint: Checkpoint) -> bool:
        return any(isinstance(header, GGUFHeader) for header in checkpoint.headers)

    def read(self, checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> LoadPlan:
        _check_parts(checkpoint)
        names = adopt(checkpoint)
        tensors = _whole(checkpoint)
        architecture, description = described(checkpoint, self.name, base, tensors)
        description.notes += names.notes
        plan = plans.make(LoadPlan(description, architecture), tensors, _layer)
        decoded = sorted(piece.layer.name for planned in plan.modules for piece in planned.pieces
                         if piece.layer.read is None and piece.layer.format.startswith(self.title))
        if decoded:
            description.notes.append(Text("{count} tensors in blocks are no weights of Linear layers; they are decoded "
                                          "when they are loaded: {names}", count=len(decoded),
                                          names=first_ten(decoded)))
        return plan

    def tensors(self, checkpoint: Checkpoint, plan: LoadPlan) -> Tensors:
        return _Tensors(checkpoint, plan)

    def select(self, folder: Folder, component: str, weights_name: str, choices: Any) -> Selection | None:
        """The one GGUF file of a folder that has no other weights, or the one that is named, with all its parts."""
        if weights_name and not weights_name.lower().endswith(SUFFIX):
            return None
        names = folder.names()
        if not weights_name and (not any(name.endswith(SUFFIX) for name in names)
                                 or any(name.endswith(".safetensors") for name in names)):
            return None
        if weights_name:
            name = component_folder(folder, component)
            chosen = select_component(folder, name if weights_name.replace("\\", "/") in folder.names(name) else "",
                                      weights_name)
            return chosen._replace(files=parts(chosen.files[0], names, folder.place))
        found = sorted(name for name in names if name.endswith(SUFFIX))
        first = [name for name in found if (split := re.search(SPLIT, name)) is None or int(split[1]) == 1]
        if len(first) != 1:
            raise CheckpointError(Text("there are {count} GGUF files: {names}", count=len(first),
                                       names=first_ten(first)), folder.place,
                                  Text("name the one to use in weights_name"))
        beside = str(PurePosixPath(first[0]).with_name("config.json"))
        return Selection("", parts(first[0], found, folder.place), beside if beside in names else None)


FAMILY = GGUF()


def _format(kind: str) -> str:
    """A type in reports: ggml's MXFP4 and NVFP4 are not those of others."""
    return f"GGUF {kind}"


def _check_parts(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the files are all parts of one model."""
    for header in checkpoint.headers:
        count = header.metadata.get("split.count", "0")
        if count not in ("0", str(len(checkpoint.headers))):
            raise CheckpointError(Text("this is a part of a model in {all} files, and {here} are here", all=count,
                                       here=len(checkpoint.headers)), header.path,
                                  Text("keep all parts in one folder, under their own names"))


def _whole(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The headers with dimensions of 1 as ComfyUI's detection looks for them: a first one that the file may lack, and
    no last ones of SDXL's Linear weights, where stable-diffusion.cpp has two."""
    found, sdxl = dict(checkpoint.tensors), any("label_emb." in name for name in checkpoint.tensors)
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 2 and name.endswith(_FIRST_IS_ONE) and name.rpartition(".")[2] in _FIRST_IS_ONE:
            found[name] = info._replace(shape=(1, *info.shape))
        elif sdxl and info.shape[2:] == (1, 1) and name.endswith(("proj_in.weight", "proj_out.weight")):
            found[name] = info._replace(shape=info.shape[:2])
    return found


def _layer(module: Module, name: str, rows: int, group: Group, problems: list[str]) -> Layer | None:
    """plan.ReadLayer."""
    weight = plans.take_weight(module, name, group, problems)
    if weight is None:
        return None
    plans.take_bias(module, name, rows, group, problems)
    wanted = (rows, *module.inner)
    if weight.shape != wanted and module.kind not in ("any", "cut") \
            and [s for s in weight.shape if s > 1] == [s for s in wanted if s > 1]:
        weight = weight._replace(shape=wanted)
    if weight.dtype not in _BLOCKS:
        return plans.plain(module, name, rows, weight, group, problems)
    if module.kind not in ("any", "cut") and tuple(weight.shape) != wanted:
        problems.append(Text("{name} is {shape}, expected {expected}", name=tensor_name(name, module.stored_leaf),
                             shape=list(weight.shape), expected=list(wanted)))
    leaves, kind = plans.leaves(module.stored_leaf, *plans.bias_of(module)), TYPES[weight.dtype]
    if not module.linear or module.inner[0] % kind.block:
        return Layer(name, _format(weight.dtype), leaves)
    return Layer(name, _format(weight.dtype), leaves, partial(_read, weight.dtype, rows, module.inner[0]),
                 codecs=_codecs(weight.dtype))


@cache
def _codecs(kind: str) -> tuple[str, ...]:
    from ...quant.codecs.ggml import codec_name

    return (codec_name(kind),)


def _read(kind: str, rows: int, columns: int, layer: Layer, part: dict[str, Tensor]) -> list[Coded]:
    from ...quant.codecs.ggml import codec_name
    from ...quant.tile import Coded, Place, Tile

    codes = part["weight"].view(rows, columns // TYPES[kind].block * TYPES[kind].size)
    return [Coded((Tile(Place(codec_name(kind), rows, columns), {"codes": codes}),), part.get("bias"))]


def _weight(layer: Layer) -> str:
    return tensor_name(layer.name, layer.leaves[0])


class _Tensors(Tensors):
    """Those of a file: what is no Linear weight is decoded, and comes in the shape that its module wants."""

    def __init__(self, checkpoint: Checkpoint, plan: LoadPlan) -> None:
        super().__init__(checkpoint, plan)
        self.infos = _whole(checkpoint)
        self.shapes = {_weight(piece.layer): (piece.rows, *planned.module.inner) for planned in plan.modules
                       for piece in planned.pieces if planned.module.kind not in ("any", "cut")}

    def take(self, layer: Layer) -> dict[str, Tensor]:
        part = super().take(layer)
        if layer.read is None:
            info = self.infos[_weight(layer)]
            shape = self.shapes.get(_weight(layer), info.shape)
            part["weight"] = self._decoded(self.in_file(_weight(layer)), part["weight"], info).view(shape)
        return part

    def _decoded(self, name: str, data: Tensor, info: TensorInfo) -> Tensor:
        import torch

        from ...quant.codecs.ggml import decode
        from ...quant.ggml.damage import damage

        if info.dtype not in _BLOCKS:
            return data
        kind = TYPES[info.dtype]
        if found := damage(data, kind):
            raise ValueError(refusal(name, found, FINITE))
        return decode(data.view(-1, kind.size), kind, kind.block, torch.float32)
