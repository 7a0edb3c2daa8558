"""The text encoders of a base -> the host's CLIP. The only caller of the host's CLIP loader.

The host decides from tensor names and shapes which encoders it is given, and only logs what is missing or unknown. So
sizes go in by its own model options, and afterwards its choice and every tensor are checked here.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ... import host
from ..containers.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..files.places import Fetch
from ..files.source import Source
from ..locate import locate
from ..words import first_ten, size
from . import whole_text_encoders
from .pipeline import Pipeline, locate_parts
from .text_encoders import classes, family_of
from .text_encoders.base import Encoder, set_dtype
from .whole import find

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Request:
    """What to load and how; plain values, so that the host can keep it and load again."""

    reference: str
    revision: str = ""
    dtype: str = "default"
    download: bool | Fetch = False


@dataclass(frozen=True)
class Loaded:
    """A CLIP and the report for the user."""

    clip: Any
    report: str


@dataclass
class _Part:
    """One encoder on its way to the host."""

    folder: str
    encoder: Encoder
    checkpoint: Checkpoint
    tensors: dict[str, torch.Tensor]
    tokenizer: dict[str, torch.Tensor]
    tokenizer_source: Source


def locate_encoders(request: Request) -> Pipeline:
    """The folders of a base's text encoders and tokenizers. Raises CheckpointError for a base of no known family."""
    def wanted(index: dict[str, Any]) -> list[str]:
        return [folder for encoder in family_of(index).encoders for folder in encoder[:2]]

    return locate_parts(request.reference, wanted, revision=request.revision, download=request.download,
                        patterns=("text_encoder*/*", "tokenizer*/*"))


def sources(request: Request) -> list[Source]:
    """The files that a load depends on: encoders and tokenizers of a base, or one whole checkpoint.

    Raises CheckpointError as `load` does.
    """
    whole = _one_file(request)
    return [whole] if whole else list(locate_encoders(request).parts.values())


def load(request: Request, disable_dynamic: bool = False) -> Loaded:
    """Load all text encoders of a base, or of a whole checkpoint, as one CLIP.

    Raises CheckpointError for anything not certain to be right.
    """
    whole = _one_file(request)
    if whole:
        clip, report = whole_text_encoders.load(Checkpoint(whole), request.dtype, disable_dynamic)
        clip.patcher.cached_patcher_init = (rebuild, (request,))
        return Loaded(clip, report)
    pipeline = locate_encoders(request)
    family = family_of(pipeline.index)
    parts = [_part(pipeline, *entry) for entry in family.encoders]
    configs = {part.encoder.host_name: part.encoder.host_config(part.checkpoint.config or {}) for part in parts}
    given = [{**part.tensors, **part.tokenizer, **part.encoder.marks(part.checkpoint.config or {})} for part in parts]
    chosen = set_dtype(given, request.dtype)
    try:
        with ExitStack() as during:
            for part in parts:
                during.enter_context(part.encoder.during())
            clip = host.load_text_encoders(given, family.clip_type, configs, chosen, disable_dynamic)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise CheckpointError(f"tensors have other shapes than config.json says: {str(error)[:400]}", pipeline.folder,
                              "config.json and weights come from different models; download both again") from error
    if not host.is_instance_of(clip.cond_stage_model, family.host_class):
        raise CheckpointError(f"ComfyUI {host.version()} takes these text encoders for "
                              f"{type(clip.cond_stage_model).__name__}, not for those of {family.name}",
                              pipeline.folder, "the text encoders have other sizes than the base's own; use those")
    notes = [family.note]
    for part in parts:
        _check_names(clip, part)
        notes.append(part.encoder.repair(host.tokenizer_of(clip, part.encoder.host_name), part.tokenizer_source))
    for name, value in family.tokenizer_options:
        clip.set_tokenizer_option(name, value)
    clip.patcher.cached_patcher_init = (rebuild, (request,))
    return Loaded(clip, _report(pipeline, family.name, notes, parts, clip))


def rebuild(request: Request, disable_dynamic: bool = False) -> Any:
    """Load `request` again, from disk; the factory behind `cached_patcher_init`, which returns a ModelPatcher."""
    return load(replace(request, download=False), disable_dynamic).clip.patcher


def _one_file(request: Request) -> Source | None:
    """A reference that is a file or an index of shards."""
    path = find(request.reference, request.revision)
    return locate(str(path)) if path is not None and path.is_file() else None


def _part(pipeline: Pipeline, folder: str, tokenizer: str, encoder: Encoder) -> _Part:
    """Read and convert one encoder. Raises CheckpointError for another class than model_index.json names."""
    source = pipeline.parts[folder]
    if not source.files:
        raise CheckpointError("there is no .safetensors file", source.folder, "finish the download of this folder")
    checkpoint = Checkpoint(source)
    config = checkpoint.config
    if config is None:
        raise CheckpointError("there is no config.json", source.folder, "finish the download of this folder")
    named = (config.get("architectures") or [""])[0]
    if named not in encoder.classes:
        raise CheckpointError(f"{folder} is {named or 'of no named class'}, but model_index.json says "
                              f"{classes(pipeline.index)[folder]}", source.folder, "download this folder again")
    _refuse_quantized(checkpoint, config)
    encoder = encoder.other(config) or encoder
    tensors = encoder.convert(checkpoint.load_tensors(), config)
    texts = pipeline.parts[tokenizer]
    return _Part(folder, encoder, checkpoint, tensors, encoder.tokenizer(texts), texts)


def _refuse_quantized(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """transformers' quantized checkpoints have no counterpart in the host's text encoders: it would read the codes as
    weights and drop the scales."""
    declared = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    dtypes = sorted({info.dtype for info in checkpoint.tensors.values()} - {"F32", "F16", "BF16", "I64"})
    if declared or dtypes:
        how = declared.get("quant_method", "quantized") if isinstance(declared, dict) else " and ".join(dtypes)
        raise CheckpointError(f"this text encoder is quantized ({how})", checkpoint.source.folder,
                              "use the base with its BF16 or F16 text encoder")


def _check_names(clip: Any, part: _Part) -> None:
    """The host only logs missing and unexpected tensors; here they are errors."""
    there = host.text_encoder_shapes(clip, part.encoder.host_name)
    where = part.checkpoint.source.folder
    missing, unused = sorted(there.keys() - part.tensors), sorted(part.tensors.keys() - there)
    if missing or unused:
        raise CheckpointError(f"the tensors of {part.folder} are not those of its config.json: "
                              f"missing {first_ten(missing) or '-'}; unused {first_ten(unused) or '-'}", where,
                              "download this folder again; if it is complete, report this")
    wrong = [f"{name} {list(tensor.shape)} instead of {list(there[name])}" for name, tensor in part.tensors.items()
             if tuple(tensor.shape) != there[name]]
    if wrong:
        raise CheckpointError(f"tensors of {part.folder} have other shapes than config.json says: {first_ten(wrong)}",
                              where, "config.json and weights come from different models; download both again")


def _report(pipeline: Pipeline, family: str, notes: list[str], parts: list[_Part], clip: Any) -> str:
    lines = [f"{family} text encoders", f"source: {pipeline.reference}"]
    for part in parts:
        config, files = part.checkpoint.config or {}, part.checkpoint.source.files
        names = files[0].replace("\\", "/").rsplit("/", 1)[-1] if len(files) == 1 else f"{len(files)} shards"
        text = config.get("text_config") or config
        width = text.get("d_model", text.get("hidden_size"))
        layers = text.get("num_layers", text.get("num_hidden_layers"))
        lines.append(f"{part.folder}: {(config.get('architectures') or [''])[0]}, {names}, "
                     f"{size(part.checkpoint.bytes_on_disk)}, width {width}, {layers} layers, "
                     f"kept in {host.text_encoder_dtype(clip, part.encoder.host_name)}")
        whose = "the base's own" if part.tokenizer else "ComfyUI's, compared with the base's"
        lines.append(f"  tokenizer: {whose}")
        notes += [part.checkpoint.source.choice, part.encoder.note(config)]
    return "\n".join(lines + [f"note: {text}" for text in notes if text])
