"""Which Nunchaku file this is, from tensor names, dtypes and shapes alone (docs/sources/nunchaku.md,
"Recognising a file")."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ....host.texts import Text, joined
from ...errors import CheckpointError
from ...files.strict import decode
from ...words import first_ten
from .table import Family
from .writers import NUNCHAKU, OFFICIAL, VLLM

if TYPE_CHECKING:
    from ....quant.svdquant.parts import Order
    from ...containers.checkpoint import Checkpoint
    from ...containers.safetensors import TensorInfo

# Leaves of legacy files (FLUX.1, SDXL) -> today's names.
_V2 = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth_orig": "smooth_factor_orig", "smooth": "smooth_factor"}
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
HALF = ("BF16", "F16")
PRECISIONS = {"F8_E4M3": "nvfp4", "BF16": "int4", "F16": "int4"}  # by the dtype of wscales
SUPPORTED = Text("supported: Nunchaku's FLUX.1, FLUX.2 [klein], Qwen-Image, SDXL and Z-Image files")
_OTHER = Text("load it with a pack made for it")

_QWEIGHT = re.compile(r"\.qweight$", re.MULTILINE)
_LEAVES = (".qweight", ".proj_down", ".weight_proj_down")
_TEXT_ENCODER = re.compile(r"^(text_model\.|text_encoders?\.)?(encoder\.block|shared|encoder\.embed_tokens)\b",
                           re.MULTILINE)
# What is recognised and refused, by its names. The first that fits counts.
_REFUSED = tuple((re.compile(pattern, re.MULTILINE), what) for pattern, what in (
    (r"^transformer_blocks\.\d+\..*(conv_inverted|inverted_conv)|^caption_norm\.|^caption_projection\.",
     Text("Sana in Nunchaku's format")),
    (r"distilled_guidance_layer", Text("Chroma in Nunchaku's format")),
))


@lru_cache(maxsize=2)
def families(writer: str = NUNCHAKU) -> tuple[Family, ...]:
    """All families of a writer that load, the most specific first."""
    from . import flux1, flux2, qwen_image, sdxl, z_image

    if writer == VLLM:
        return (z_image.VLLM,)
    return (*flux2.FAMILIES, flux1.FAMILY, qwen_image.FAMILY, sdxl.FAMILY, z_image.FAMILY)


def is_svdquant(names: Collection[str]) -> bool:
    """Whether these are the tensors of an SVDQuant or AWQ file of any writer; `recognise` says which, or refuses."""
    return any(name.endswith(_LEAVES) for name in names)


@dataclass
class Found:
    """A recognised file.

    `writer` is one of writers.py that has a table of its own, `order` that of its bytes (None: Nunchaku's); `tensors`
    are all headers under today's names without prefix, `stored` gives each one's name in the file; `precision` is
    "int4" or "nvfp4", `ranks` every low rank there is, ascending; `style` is "v2" or "legacy".
    """

    family: Family
    precision: str
    ranks: tuple[int, ...]
    style: str
    prefix: str
    tensors: Mapping[str, TensorInfo]
    stored: Mapping[str, str]
    writer: str = NUNCHAKU
    order: Order | None = None


def recognise(checkpoint: Checkpoint, writer: str = NUNCHAKU) -> Found:
    """The family, precision and ranks of an opened file of a writer. Raises CheckpointError that names any other kind
    of file."""
    where = checkpoint.source.reference
    prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in checkpoint.tensors)), "")
    style = "legacy" if any(name.endswith(".lora_down") for name in checkpoint.tensors) else "v2"
    stored: dict[str, str] = {}
    for name in checkpoint.tensors:
        module, _, leaf = name.removeprefix(prefix).rpartition(".")
        today = f"{module}.{_V2.get(leaf, leaf)}" if module else leaf
        if today in stored:
            raise CheckpointError(Text("two tensors are the same one by an old and a new name: {old}, {new}",
                                       old=stored[today], new=name), where,
                                  Text("download it again, or report it to its publisher"))
        stored[today] = name
    tensors = {today: checkpoint.tensors[name] for today, name in stored.items()}
    text = "\n".join(tensors)
    for pattern, what in _REFUSED:
        if pattern.search(text):
            raise CheckpointError(Text("this is {what}, which this version does not load", what=what), where,
                                  joined("; ", (SUPPORTED, _OTHER)))
    family = next((family for family in families(writer) if family.beside in text and family.mark.search(text)), None)
    if family is None and writer == VLLM:
        raise CheckpointError(Text("this is SVDQuant in row-major order by vLLM-Omni's converter, of another model "
                                   "than Z-Image, which this version does not load"), where, OFFICIAL)
    if family is None:
        classes = _claimed_classes(checkpoint)
        unknown = Text("this is a file of 4-bit weights (qweight) of no model that this version knows")
        if classes:
            unknown = Text("{what}; its metadata says {classes}", what=unknown, classes=", ".join(classes))
        raise CheckpointError(unknown, where, joined("; ", (SUPPORTED, _OTHER)))
    w4a4 = [name.removesuffix(".qweight") for name, info in tensors.items()
            if name.endswith(".qweight") and info.dtype in ("I8", *("U8",) * (writer == VLLM))]
    scales = {tensors[f"{name}.wscales"].dtype for name in w4a4 if f"{name}.wscales" in tensors}
    found = precision(Text("a Nunchaku file of {family}", family=family.name), scales, where)
    if writer == VLLM and found != "nvfp4":
        raise CheckpointError(Text("this is SVDQuant INT4 by vLLM-Omni's converter, whose order of bytes is right for "
                                   "NVFP4 alone"), where, OFFICIAL)
    return Found(family, found, _ranks(w4a4, tensors, where), style, prefix, tensors, stored, writer)


def precision(what: str, dtypes: Collection[str], where: str) -> str:
    """"int4" or "nvfp4", by the dtypes of the scales of W4A4 layers. Raises CheckpointError for a mixture."""
    kinds = {PRECISIONS.get(dtype, dtype) for dtype in dtypes}
    if len(kinds) != 1 or not kinds <= set(PRECISIONS.values()):
        raise CheckpointError(Text("this is {what}, but the scales (wscales) of its int8 layers are {dtypes}, and "
                                   "neither all int4 (BF16 or F16) nor all nvfp4 (F8_E4M3)", what=what,
                                   dtypes=", ".join(sorted(dtypes)) or Text("missing")), where,
                              Text("download the file again"))
    return kinds.pop()


def _ranks(layers: list[str], tensors: Mapping[str, TensorInfo], where: str) -> tuple[int, ...]:
    downs = [tensors[f"{name}.proj_down"] for name in layers if f"{name}.proj_down" in tensors]
    ranks = sorted({info.shape[1] for info in downs if len(info.shape) == 2})
    if not ranks:
        raise CheckpointError(Text("no layer has a low-rank part (proj_down or lora_down)"), where,
                              Text("download the file again"))
    return tuple(ranks)


def _claimed_classes(checkpoint: Checkpoint) -> list[str]:
    """The model classes that metadata and config.json name."""
    named = [header.metadata.get("model_class", "") for header in checkpoint.headers]
    for header in checkpoint.headers:
        try:
            config = decode(header.metadata.get("config", "{}"))
        except ValueError:
            continue
        named.append(str(config.get("_class_name") or "") if isinstance(config, dict) else "")
    named.append(str((checkpoint.config or {}).get("_class_name") or ""))
    return sorted(set(named) - {""})


def refuse_other_layouts(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for text encoders, and for SVDQuant in the layouts of kitchen, comfy-quants and GPTQ.

    Their shapes and dtypes are those of Nunchaku's own files; read in the wrong order the result is noise.
    """
    where, text = checkpoint.source.reference, "\n".join(checkpoint.tensors)
    file = ", ".join(sorted(header.path.replace("\\", "/").rpartition("/")[2] for header in checkpoint.headers))
    if _TEXT_ENCODER.search(text) or ".scaled_zeros" in text:
        raise CheckpointError(Text('"{file}" is a text-encoder file (awq T5): this is a text encoder', file=file),
                              where, Text("use a CLIP loader"))
    if not _QWEIGHT.search(text):
        what = Text("kitchen's own state dict") if ".weight_proj_down" in text else \
            Text("comfy-quants or ComfyUI's PR #13580")
        raise CheckpointError(Text("this is SVDQuant in the layout of {what} (weight_scale + proj_down), which this "
                                   "version does not read", what=what), where, OFFICIAL)
    loose = [name for name in checkpoint.tensors if name.endswith(".qweight")
             and f"{name.removesuffix('.qweight')}.wscales" not in checkpoint.tensors]
    if len(loose) == text.count(".qweight"):
        raise CheckpointError(Text("these are GPTQ or AWQ packed integers, not Nunchaku's: {names}",
                                   names=first_ten(loose[:3])), where, OFFICIAL)
