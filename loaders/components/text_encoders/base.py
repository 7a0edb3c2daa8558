"""What a text encoder's description consists of. One file per transformers class, one registry line per base."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ....host.texts import Text, joined
from ...architectures.base import Module
from ...errors import CheckpointError
from ...model import dtype_of

if TYPE_CHECKING:
    from torch import Tensor

    from ...files.source import Source


# The tensors by whose dtype the host decides in which one it keeps an encoder.
DTYPE_MARKS = ("encoder.final_layer_norm.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight")
Config = dict[str, Any]
# What ComfyUI puts into text encoders' files: tokenizers (the base's own is taken), and the temperature of a training.
OF_TOKENIZERS = r"(^|\.)(spiece_model|tekken_model|tokenizer_json|logit_scale)$"


class Known(NamedTuple):
    """The tensor [width] that an encoder has in every file, and the key of its config.json that says how wide it is."""

    tensor: str
    width: str


@dataclass(frozen=True)
class Encoder:
    """How a text encoder, as transformers saves it, becomes what the host reads.

    Attributes:
        title: what messages call it.
        classes: config.json `architectures` that it covers.
        host_name: the host's name of the model; its sizes are set by the model option `<host_name>_model_config`,
            or by that of `set_by`.
        known: what tells it from other encoders, by the host's names.
        called: (a stored name, config.json) -> the host's name, or None for what it has no use for.
        modules: (config.json, the host's names of the tensors there are) -> every module, by the host's names. Raises
            CheckpointError for a config.json that does not say enough.
        host_config: config.json -> the entries of the host's own model config that differ for this checkpoint (empty
            for the published models). Raises CheckpointError for a value that the host's code fixes otherwise.
        tokenizer: tokenizer folder -> the extra tensors by which the host takes a tokenizer (empty where it has its
            own). Raises CheckpointError when the folder's tokenizer is another than the one the host would use.
        twins: a name -> other names of the same tensor, of which files have one, or several.
        told: (config.json, names) -> the config.json of what is there, where the host runs less than it says.
        apart: the beginning of names that may lie in a file of their own: those of an encoder's eyes.
        eyeless: those of its classes that have no eyes.
        complete: makes of the host's tensors, in place, what is stored in pieces or nowhere.
        note: config.json -> a line for the report, or "".
        repair: after loading, (the host's tokenizer of this encoder, tokenizer folder) -> a line for the report, or "".
            Puts right where the host would split text into other tokens than the folder's tokenizer does.
        marks: config.json -> tensors that the host recognises the encoder by and does not use.
        handed: the host's tensors by the names that it looks for while it loads, where those are others.
        during: a context in which the host makes the CLIP.
        other: config.json -> the description of another size, where the host has a model of its own for it, or None.
    """

    title: str
    classes: tuple[str, ...]
    host_name: str
    known: Known
    called: Callable[[str, Config], str | None]
    modules: Callable[[Config, Collection[str]], Iterator[Module]]
    host_config: Callable[[Config], Config]
    tokenizer: Callable[[Source], dict[str, Tensor]]
    twins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    told: Callable[[Config, Collection[str]], Config] = lambda config, names: config
    apart: str | tuple[str, ...] = ""
    eyeless: tuple[str, ...] = ()
    complete: Callable[[dict[str, Tensor]], None] = lambda tensors: None
    note: Callable[[Config], str] = lambda config: ""
    repair: Callable[[Any, Source], str] = lambda tokenizer, source: ""
    marks: Callable[[Config], dict[str, Tensor]] = lambda config: {}
    handed: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
    during: Callable[[], AbstractContextManager[None]] = nullcontext
    other: Callable[[Config], Encoder | None] = lambda config: None
    set_by: str | None = None


@dataclass(frozen=True)
class Family:
    """The text encoders of one kind of base: (encoder folder, tokenizer folder, what is in them) in the host's order. A
    folder that is no text_encoder has what the host counts among them, and no tokenizer.

    `clip_type` is a member of the host's CLIPType; `host_class` the name of the class (or a base class of it) of the
    text encoder that the host must pick. `pipelines` are beginnings of the `_class_name`s in model_index.json.
    `tokenizer_options` are set on the CLIP (the host's `set_tokenizer_option`), `note` is a line for the report.
    `fixed` are the values that the host has in its code of keys in model_index.json. `normed` are the host's names of
    encoders whose last hidden state the host reads before their final norm, diffusers behind it.
    """

    name: str
    clip_type: str
    encoders: tuple[tuple[str, str, Encoder], ...]
    host_class: str
    pipelines: tuple[str, ...] = ()
    tokenizer_options: tuple[tuple[str, int], ...] = ()
    note: str = ""
    normed: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


def exchanging(prefixes: Mapping[str, str], unneeded: str) -> Callable[[str, Config], str | None]:
    """An Encoder.called: the first of `prefixes` that a name begins with becomes its value, and names that the pattern
    `unneeded` finds are left out."""
    def called(name: str, config: Config) -> str | None:
        if re.search(unneeded, name):
            return None
        if "." not in name:  # of a whole file
            return name
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        return name if old is None else prefixes[old] + name.removeprefix(old)

    return called


def embedding(name: str, rows: int, columns: int) -> Module:
    """A table of rows that is looked up."""
    return Module(name, (name,), (rows,), (columns,), False, kind="embedding")


def linear(name: str, rows: int, columns: int, bias: bool = False) -> Module:
    """A Linear [rows, columns]."""
    return Module(name, (name,), (rows,), (columns,), bias)


def plain(name: str, *shape: int, bias: bool = False) -> Module:
    """What is never quantized: a norm, a convolution, a small table."""
    return Module(name, (name,), shape[:1], shape[1:], bias, kind="plain")


def host_sizes(config: Config, sizes: Config, fixed: Config) -> Config:
    """The entries of config.json that differ from the host's own `sizes`.

    `sizes` are the host's values for the names that it can be told (a name config.json lacks keeps the host's value);
    `fixed` are values its code has no name for. Raises CheckpointError where config.json has another than a fixed one.
    """
    wrong = [Text("{key} {value} (ComfyUI's is {fixed})", key=name, value=config[name], fixed=value)
             for name, value in fixed.items() if config.get(name, value) != value]
    if wrong:
        raise CheckpointError(Text("ComfyUI's text encoder cannot be set to {wrong}", wrong=joined(", ", wrong)),
                              (config.get("architectures") or [""])[0], Text("use the base's own text encoder"))
    return {name: config[name] for name, value in sizes.items() if config.get(name, value) != value}


def set_dtype(given: Iterable[dict[str, Tensor]], dtype: str) -> Any:
    """The dtype of a choice (None for "default": the host's choice), which the host takes only where the marks do not
    say otherwise; so those are cast in `given`, in place."""
    chosen = dtype_of(dtype)
    for tensors in given if chosen is not None else ():
        tensors.update({name: tensor.to(chosen) for name, tensor in tensors.items()
                        if f".{name}".endswith(tuple(f".{mark}" for mark in DTYPE_MARKS))})
    return chosen
