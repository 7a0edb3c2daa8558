"""What a text encoder's description consists of. One file per transformers class, one registry line per base."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ...model import DTYPES
from ...words import first_ten

if TYPE_CHECKING:
    from torch import Tensor

    from ...files.source import Source


# The tensors by whose dtype the host decides in which one it keeps an encoder.
DTYPE_MARKS = ("encoder.final_layer_norm.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight")


@dataclass(frozen=True)
class Encoder:
    """How a text encoder folder, as transformers saves it, becomes what the host reads.

    Attributes:
        classes: config.json `architectures` that it covers.
        host_name: the host's name of the model; its sizes are set by the model option `<host_name>_model_config`.
        convert: stored tensors and config.json -> the host's state dict. Views, never copies. Every stored tensor must
            be used or known to be unneeded; raises CheckpointError otherwise.
        host_config: config.json -> the entries of the host's own model config that differ for this checkpoint (empty
            for the published models). Raises CheckpointError for a value that the host's code fixes otherwise.
        tokenizer: tokenizer folder -> the extra tensors by which the host takes a tokenizer (empty where it has its
            own). Raises CheckpointError when the folder's tokenizer is another than the one the host would use.
        note: config.json -> a line for the report, or "".
        repair: after loading, (the host's tokenizer of this encoder, tokenizer folder) -> a line for the report, or "".
            Puts right where the host would split text into other tokens than the folder's tokenizer does.
        marks: config.json -> tensors that the host recognises the encoder by and does not use.
        during: a context in which the host makes the CLIP.
        other: config.json -> the description of another size, where the host has a model of its own for it, or None.
    """

    classes: tuple[str, ...]
    host_name: str
    convert: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]
    host_config: Callable[[dict[str, Any]], dict[str, Any]]
    tokenizer: Callable[[Source], dict[str, Tensor]]
    note: Callable[[dict[str, Any]], str] = lambda config: ""
    repair: Callable[[Any, Source], str] = lambda tokenizer, source: ""
    marks: Callable[[dict[str, Any]], dict[str, Tensor]] = lambda config: {}
    during: Callable[[], AbstractContextManager[None]] = nullcontext
    other: Callable[[dict[str, Any]], Encoder | None] = lambda config: None


@dataclass(frozen=True)
class Family:
    """The text encoders of one kind of base: (encoder folder, tokenizer folder, what is in them) in the host's order.

    `clip_type` is a member of the host's CLIPType; `host_class` the name of the class (or a base class of it) of the
    text encoder that the host must pick. `pipelines` are beginnings of the `_class_name`s in model_index.json.
    `tokenizer_options` are set on the CLIP (the host's `set_tokenizer_option`), `note` is a line for the report.
    """

    name: str
    clip_type: str
    encoders: tuple[tuple[str, str, Encoder], ...]
    host_class: str
    pipelines: tuple[str, ...] = ()
    tokenizer_options: tuple[tuple[str, int], ...] = ()
    note: str = ""


def host_sizes(config: dict[str, Any], sizes: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """The entries of config.json that differ from the host's own `sizes`.

    `sizes` are the host's values for the names that it can be told (a name config.json lacks keeps the host's value);
    `fixed` are values its code has no name for. Raises CheckpointError where config.json has another than a fixed one.
    """
    wrong = [f"{name} {config[name]} (ComfyUI's is {value})" for name, value in fixed.items()
             if config.get(name, value) != value]
    if wrong:
        raise CheckpointError(f"ComfyUI's text encoder cannot be set to {', '.join(wrong)}",
                              (config.get("architectures") or [""])[0], "use the base's own text encoder")
    return {name: config[name] for name, value in sizes.items() if config.get(name, value) != value}


def tied(tensors: dict[str, Tensor], kept: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Without the duplicates `names` of the tensor `kept`; the first of them becomes `kept` where that is not stored.

    Raises CheckpointError when a duplicate has other values: one of the two would be lost.
    """
    out = dict(tensors)
    for name in names:
        twin = out.pop(name, None)
        if twin is None:
            continue
        there = out.setdefault(kept, twin)
        if there is not twin and (there.shape != twin.shape or not bool((there == twin).all())):
            raise CheckpointError(f"{kept} and {name} should be the same tensor, but differ", "",
                                  "download the text encoder again")
    return out


def nothing_left(unknown: list[str], kind: str) -> None:
    """Raises CheckpointError when stored tensors are left that have no place in this kind of encoder."""
    if unknown:
        raise CheckpointError(f"{len(unknown)} stored tensors have no place in {kind}: {first_ten(sorted(unknown))}",
                              "", "use the base's own text encoder, or report this")


def set_dtype(given: Iterable[dict[str, Tensor]], dtype: str) -> Any:
    """The dtype of a choice (None for "default": the host's choice), which the host takes only where the marks do not
    say otherwise; so those are cast in `given`, in place."""
    import torch

    chosen = getattr(torch, DTYPES[dtype] or "", None)
    for tensors in given if chosen is not None else ():
        tensors.update({name: tensor.to(chosen) for name, tensor in tensors.items()
                        if f".{name}".endswith(tuple(f".{mark}" for mark in DTYPE_MARKS))})
    return chosen
