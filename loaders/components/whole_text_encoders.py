"""The text encoders of a whole checkpoint -> the host's CLIP, as its own checkpoint loader makes them.

That only logs what is missing or left over. Here a missing tensor is an error, and so is one of a layer that is used:
a scale that nobody multiplies by makes noise. Parts that ComfyUI's text encoder does not have are left out and said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ... import host
from ...host.texts import Text, joined
from ..containers.checkpoint import Checkpoint
from ..containers.safetensors import dtype_name
from ..errors import CheckpointError
from ..families.names import LEAVES, MARK
from ..words import first_ten, size
from .text_encoders import mistral3
from .text_encoders.base import set_dtype
from .whole import APART, attempt, open_whole

if TYPE_CHECKING:
    import torch

# Of a network: counted positions, the temperature of CLIP's training, and CLIP-L's projection, which no model reads.
# Of its quantization: what the host leaves out again, or writes beside every quantized layer.
_UNNEEDED = re.compile(r"(^|\.)(position_ids|logit_scale)$|^clip_l\.transformer\.text_projection\.weight$")
_QUANTIZER = re.compile(rf"\.(comfy_quant|input_scale|{MARK})$")
_TOKENIZER = re.compile(r"(^|\.)(spiece_model|tekken_model|tokenizer_json)$")


def load(checkpoint: Checkpoint, dtype: str, disable_dynamic: bool = False) -> tuple[Any, str]:
    """A CLIP and the report for the user. `dtype` is a choice of the node.

    Raises CheckpointError where there are no text encoders, or they are not certain to be right.
    """
    where = checkpoint.source.files[0]
    whole = open_whole(checkpoint)
    if whole is None:
        raise CheckpointError(Text("this is a single file, not a diffusers pipeline folder, and no whole checkpoint "
                                   "with text encoders in it"),
                              where, Text("give the base model's folder or repo id, or use ComfyUI's CLIP loaders for "
                                          "a text encoder's file"))
    chosen = set_dtype([whole.others], dtype)
    tekken = any(name.endswith("tekken_model") for name in whole.others)
    with mistral3.MISTRAL3.during() if tekken else nullcontext():
        clip = attempt(lambda: host.load_text_encoders_of(whole.shapes, whole.others, checkpoint.metadata, chosen,
                                                          disable_dynamic), Text("load these text encoders"),
                       where, APART)
    if clip is None:
        raise CheckpointError(Text("there are no text encoders in this checkpoint of {model}", model=whole.parts.model),
                              where, Text("use text encoders from files of their own, or from a base folder"))
    given = _by_name(whole.parts.text_encoders)
    left = _check(given.keys(), set(_by_name(clip.cond_stage_model.state_dict())), where)
    return clip, _report(checkpoint, whole.parts.model, given, left, clip)


def _by_name(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of networks under the host's names, without what is no matter of theirs."""
    found = {}
    for name, tensor in tensors.items():
        module, dot, leaf = name.rpartition(".")
        if not any(pattern.search(name) for pattern in (_UNNEEDED, _QUANTIZER, _TOKENIZER)) and leaf != "scale_input":
            found[f"{module}{dot}{LEAVES.get(leaf, leaf)}"] = tensor
    return found


def _check(given: Any, there: set[str], where: object) -> list[str]:
    """What is left over, of parts that the host's text encoders do not have.

    Raises CheckpointError for what is missing, and for what is left over of a layer that is used.
    """
    missing, over = sorted(there - given), sorted(given - there)
    used = {name.rpartition(".")[0] for name in there}
    lost = [name for name in over if name.rpartition(".")[0] in used]
    if missing or lost:
        raise CheckpointError(Text("ComfyUI {version} has other tensors in these text encoders: missing {missing}; "
                                   "unused {unused}", version=host.version(), missing=first_ten(missing) or "-",
                                   unused=first_ten(lost) or "-"), where, APART)
    return over


def _report(checkpoint: Checkpoint, model: str, given: Mapping[str, torch.Tensor], left: list[str], clip: Any) -> str:
    files = checkpoint.source.files
    names = files[0].replace("\\", "/").rpartition("/")[2] if len(files) == 1 else \
        Text("{count} shards", count=len(files))
    lines = [Text("text encoders of a whole checkpoint of {model}", model=model),
             Text("source: {reference}", reference=checkpoint.source.reference), Text("files: {names}", names=names)]
    for encoder in sorted({key.partition(".")[0] for key in given.keys() - set(left)}):
        tensors = [tensor for key, tensor in given.items() if key.startswith(f"{encoder}.")]
        stored = sorted({dtype_name(tensor.dtype) for tensor in tensors})
        lines.append(Text("{encoder}: {count} tensors, {size}, stored as {dtypes}, kept in {dtype}",
                          encoder=encoder, count=len(tensors), size=size(sum(tensor.nbytes for tensor in tensors)),
                          dtypes=", ".join(stored), dtype=host.text_encoder_dtype(clip, encoder)))
    lines.append(Text("  {line}", line=Text("tokenizers: ComfyUI's, or those in the file")))
    if left:
        lines.append(Text("note: left out, as ComfyUI's text encoder has no use for them: {count} tensors ({names})",
                          count=len(left), names=first_ten(left)))
    return joined("\n", lines)
