"""The text encoders of a base -> the host's CLIP. The only caller of the host's CLIP loader.

Each encoder may come from elsewhere than the base (an override), as it is stored there; tokenizers are always the
base's. The host decides from tensor names and shapes which encoders it is given, and only logs what is missing or
unknown. So sizes go in by its own model options, and afterwards its choice and every tensor are checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ... import host
from ...host.texts import Text, joined
from .. import damage
from ..containers.checkpoint import Checkpoint
from ..errors import CheckpointError, MissingFiles
from ..files.places import Fetch
from ..files.source import Source, read_json
from ..locate import locate
from ..model import attach_lora
from ..names import text_classes
from ..words import first_ten, size
from . import whole_text_encoders
from .pipeline import Pipeline, locate_each, locate_parts
from .text_encoders import family_of
from .text_encoders.base import Encoder, Family, set_dtype
from .text_part import EYES, Part, assemble_part, fits, formats_of, unknown
from .whole import find

EDITS = "Edit"  # in the names of pipelines that look at pictures
_DIFFERENT = Text("config.json and weights come from different models; download both again")


@dataclass(frozen=True)
class Request:
    """What to load and how; plain values, so that the host can keep it and load again. `overrides` are references to
    what replaces the base's encoders."""

    reference: str
    revision: str = ""
    dtype: str = "default"
    download: bool | Fetch = False
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A CLIP and the report for the user."""

    clip: Any
    report: str


@dataclass
class _Override:
    """What takes an encoder's place: all of it, or its eyes alone, or both in two files."""

    whole: Checkpoint | None = None
    eyes: Checkpoint | None = None


PATTERNS = ("text_encoder*/*", "tokenizer*/*", "connectors/*")


def locate_encoders(request: Request) -> tuple[Pipeline, dict[str, _Override]]:
    """The folders of a base's text encoders and tokenizers, and what takes the place of which; of those that are
    replaced the base's own weights need not be there.

    Raises CheckpointError for a base of no known family, and for an override that is none of its encoders.
    """
    def wanted(index: dict[str, Any]) -> list[str]:
        return [folder for encoder in family_of(index).encoders for folder in encoder[:2] if folder]

    def located(wanted: Callable[[dict[str, Any]], list[str]], **how: Any) -> Pipeline:
        return locate_parts(request.reference, wanted, **{"revision": request.revision, "download": request.download,
                                                          "patterns": PATTERNS, **how})

    if not request.overrides:
        return located(wanted), {}
    pipeline = located(wanted, unloaded=True, patterns=("text_encoder*/config.json", "tokenizer*/*",
                                                      "connectors/config.json"))
    replaced = dict[str, _Override]()
    for reference in request.overrides:
        _place(pipeline, reference, [Checkpoint(source) for source in locate_each(
            reference, download=request.download)], replaced)
    for folder, _, encoder in family_of(pipeline.index).encoders:
        one = replaced.get(folder, _Override())
        if one.whole is not None and (one.eyes is not None or not encoder.apart or _sees(one.whole, encoder)):
            continue
        try:  # a file without eyes has the base's, if they are on disk
            own = located(partial(_only, folder), **({} if one.whole is None else {"download": False}))
        except MissingFiles:
            if one.whole is None:
                raise
            continue
        pipeline = replace(pipeline, parts=pipeline.parts | own.parts)
    return pipeline, replaced


def _only(folder: str, index: dict[str, Any]) -> list[str]:
    return [folder]


def _sees(checkpoint: Checkpoint, encoder: Encoder) -> bool:
    """Whether a file has the eyes of an encoder, too."""
    return any((encoder.called(name, {}) or "").startswith(encoder.apart) for name in checkpoint.tensors)


def _place(pipeline: Pipeline, reference: str, found: list[Checkpoint], replaced: dict[str, _Override]) -> None:
    """Say which encoder each checkpoint of an override is, by what is in it. Those of a pipeline that are others than
    the base's are left aside, as long as one is not."""
    encoders, used = family_of(pipeline.index).encoders, False
    config = {folder: read_json(pipeline.parts[folder].config or "") for folder, _, _ in encoders}
    for checkpoint in found:
        why = {folder: fits(checkpoint, encoder, config[folder]) for folder, _, encoder in encoders}
        folder = next((folder for folder, reason in why.items() if reason in ("", EYES)), None)
        if folder is None:
            if len(found) == 1:
                raise unknown(checkpoint, [encoder.title for _, _, encoder in encoders], list(why.values()))
            continue
        used, one = True, replaced.setdefault(folder, _Override())
        taken = one.eyes if why[folder] == EYES else one.whole
        if taken is not None:
            raise CheckpointError(Text("two overrides are the {folder} of the base: {one} and {other}", folder=folder,
                                       one=taken.source.reference, other=reference),
                                  "", Text("clear one of them"))
        if why[folder] == EYES:
            one.eyes = checkpoint
        else:
            one.whole = checkpoint
    if not used:
        raise unknown(found[0], [encoder.title for _, _, encoder in encoders], [])


def sources(request: Request) -> list[Source]:
    """The files that a load depends on: encoders and tokenizers of a base, or one whole checkpoint.

    Raises CheckpointError as `load` does.
    """
    whole = _one_file(request)
    if whole:
        return [whole]
    pipeline, replaced = locate_encoders(request)
    return [*pipeline.parts.values(), *(one.source for found in replaced.values()
                                        for one in (found.whole, found.eyes) if one is not None)]


def load(request: Request, disable_dynamic: bool = False) -> Loaded:
    """Load all text encoders of a base, or of a whole checkpoint, as one CLIP.

    Raises CheckpointError for anything not certain to be right.
    """
    whole = _one_file(request)
    if whole:
        if request.overrides:
            raise CheckpointError(Text("the base is one file with everything in it, whose text encoders nothing "
                                       "replaces"), whole.files[0],
                                  Text("give the base model's folder or repo id, or clear the override"))
        clip, report = whole_text_encoders.load(Checkpoint(whole), request.dtype, disable_dynamic)
        clip.patcher.cached_patcher_init = (rebuild, (request,))
        return Loaded(clip, report)
    pipeline, replaced = locate_encoders(request)
    family = family_of(pipeline.index)
    other = [key for key, value in family.fixed.items() if pipeline.index.get(key) not in (None, value)]
    if other:
        raise CheckpointError(Text("model_index.json says {key} {said}; ComfyUI has {fixed}", key=other[0],
                                   said=pipeline.index[other[0]], fixed=family.fixed[other[0]]), pipeline.folder,
                              Text("use a base of the published kind"))
    parts = [_part(pipeline, *entry, replaced.get(entry[0], _Override())) for entry in family.encoders]
    given = [{**part.encoder.handed(part.given), **part.tokenizer, **part.encoder.marks(part.config)} for part in parts]
    clip = _to_host(pipeline, family, parts, given, request.dtype, disable_dynamic)
    notes = [family.note]
    for part in parts:
        _check_names(clip, part)
        if part.tokenizer_source is not pipeline.parts[part.folder]:
            notes.append(part.encoder.repair(host.tokenizer_of(clip, part.encoder.host_name), part.tokenizer_source))
        if part.blind:
            note = _blind(clip, part)
            notes.append("" if (part.config.get("architectures") or [""])[0] in part.encoder.eyeless else note)
    for name in family.normed:
        host.read_normed(clip, name)
    for name, value in family.tokenizer_options:
        clip.set_tokenizer_option(name, value)
    if any(part.quantized for part in parts):
        attach_lora(clip.patcher)
    unread = {f"{part.encoder.host_name}.transformer.{name}": stored for part in parts for native in part.native
              for name, stored in native.unread.items()}
    if unread:
        damage.watch(clip.patcher, unread, pipeline.folder, Text("download the text encoder again, or report it"))
    clip.patcher.cached_patcher_init = (rebuild, (request,))
    return Loaded(clip, _report(pipeline, family.name, notes, parts, clip))


def rebuild(request: Request, disable_dynamic: bool = False) -> Any:
    """Load `request` again, from disk; the factory behind `cached_patcher_init`, which returns a ModelPatcher."""
    return load(replace(request, download=False), disable_dynamic).clip.patcher


def family_name(reference: str, revision: str = "") -> str:
    """What a base's text encoders belong to, by its model_index.json alone; empty for one file with everything in it.

    Raises CheckpointError as `load` does.
    """
    if _one_file(Request(reference, revision)):
        return ""
    return family_of(locate_parts(reference, lambda _: (), revision=revision, unloaded=True).index).name


def _one_file(request: Request) -> Source | None:
    """A reference that is a file or an index of shards."""
    path = find(request.reference, request.revision)
    return locate(str(path)) if path is not None and path.is_file() else None


def _part(pipeline: Pipeline, folder: str, tokenizer: str, encoder: Encoder, override: _Override) -> Part:
    """Read and convert one encoder. Raises CheckpointError for another class than model_index.json names."""
    source, texts = pipeline.parts[folder], pipeline.parts[tokenizer or folder]
    config = read_json(source.config) if source.config else None
    if config is None:
        raise CheckpointError(Text("there is no config.json"), source.folder,
                              Text("finish the download of this folder"))
    named = (config.get("architectures") or [config.get("_class_name", "")])[0]
    if named not in encoder.classes:
        said = text_classes(pipeline.index).get(folder, encoder.classes[0])
        raise CheckpointError(Text("{folder} is {name}, but model_index.json says {said}", folder=folder,
                                   name=named or Text("of no named class"), said=said),
                              source.folder, Text("download this folder again"))
    own = Checkpoint(source) if source.files else None
    first = override.whole or own
    if first is None:
        raise CheckpointError(Text("there is no .safetensors file"), source.folder,
                              Text("finish the download of this folder"))
    theirs = first.config or {}
    if override.whole and (theirs.get("architectures") or [""])[0] in encoder.classes:
        config = theirs
    encoder = encoder.other(config) or encoder
    blind, beside = False, [override.eyes] if override.eyes else []
    eyeless = named in encoder.eyeless
    if encoder.apart and not beside and (override.whole or eyeless) and not _sees(first, encoder):
        beside = [own] if override.whole and own and not eyeless else []
        blind = not beside
    if blind and EDITS in str(pipeline.index.get("_class_name")):
        raise CheckpointError(Text("this text encoder has no eyes, and the base edits pictures"),
                              first.source.reference,
                              Text("give the mmproj file that is published beside it as the other override, or "
                                   "download the base's {folder}", folder=folder))
    part = Part(folder, encoder, config, texts, [first, *beside], override.whole is not None, blind)
    assemble_part(part)
    part.tokenizer = encoder.tokenizer(texts)
    return part


def _to_host(pipeline: Pipeline, family: Family, parts: list[Part], given: list[dict[str, Any]], dtype: str,
             disable_dynamic: bool) -> Any:
    """The one call into the host's loader, and the check of its choice."""
    configs = {part.encoder.host_name if part.encoder.set_by is None else part.encoder.set_by: part.sizes
               for part in parts}
    chosen = set_dtype(given, dtype)
    # Norms may be of another dtype than matrices (GGUF), and the host would bring all to that.
    own = any(part.quantized or part.replaced for part in parts)
    operations = operations_for(parts, chosen) if own else None
    try:
        with ExitStack() as during:
            for part in parts:
                during.enter_context(part.encoder.during())
            clip = host.load_text_encoders(given, family.clip_type, configs, chosen, disable_dynamic, operations)
    except ValueError as error:  # our layers check what they are given
        raise CheckpointError(error, pipeline.folder,
                              Text("download the text encoder again, or report it")) from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise CheckpointError(Text("tensors have other shapes than config.json says: {error}", error=str(error)[:400]),
                              pipeline.folder, _DIFFERENT) from error
    if not host.is_instance_of(clip.cond_stage_model, family.host_class):
        raise CheckpointError(Text("ComfyUI {version} takes these text encoders for {kind}, not for those of {family}",
                                   version=host.version(), kind=type(clip.cond_stage_model).__name__,
                                   family=family.name), pipeline.folder,
                              Text("the text encoders have other sizes than the base's own; use those"))
    return clip


def operations_for(parts: list[Part], chosen: Any) -> Any:
    """The host's operations for quantized text encoders, which are dequantized for every matmul, as the host does it;
    layers that are not quantized come in the dtype `chosen`, or as they are stored."""
    host.require("quantized layers", "quantized text encoders")
    from ...quant.embedding import for_texts
    from ...quant.linear import with_tiles_of

    def copied() -> None:
        for part in parts:
            part.copied()

    return for_texts(with_tiles_of(host.text_operations(), loaded=copied), chosen)


def _check_names(clip: Any, part: Part) -> None:
    """The host only logs missing and unexpected tensors; here they are errors."""
    there = host.text_encoder_shapes(clip, part.encoder.host_name)
    if part.blind:
        there = {name: shape for name, shape in there.items() if not name.startswith(part.encoder.apart)}
    where = part.checkpoints[0].source.folder
    if part.quantized and not host.has_quantized_layers(clip, part.encoder.host_name):
        raise CheckpointError(Text("ComfyUI {version} does not load this text encoder with the layers of this pack",
                                   version=host.version()),
                              where, Text("report this; a text encoder that is not quantized loads"))
    quantized = {name.removesuffix(".comfy_quant") for name in part.given if name.endswith(".comfy_quant")}

    def plain(names: Iterable[str]) -> set[str]:
        return {name for name in names
                if name.rpartition(".")[0] not in quantized or name.endswith((".weight", ".bias"))}

    missing, unused = sorted(plain(there) - part.given.keys()), sorted(plain(part.given) - there.keys())
    if missing or unused:
        raise CheckpointError(Text("the tensors of {folder} are not those of its config.json: missing {missing}; "
                                   "unused {unused}", folder=part.folder, missing=first_ten(missing) or "-",
                                   unused=first_ten(unused) or "-"), where,
                              Text("download this folder again; if it is complete, report this"))
    wrong = [Text("{name} {shape}, expected {expected}", name=name, shape=list(tensor.shape),
                  expected=list(there[name])) for name, tensor in part.given.items()
             if name.rpartition(".")[0] not in quantized and tuple(tensor.shape) != there[name]]
    if wrong:
        raise CheckpointError(Text("tensors of {folder} have other shapes than config.json says: {wrong}",
                                   folder=part.folder, wrong=first_ten(wrong)),
                              where, _DIFFERENT)


def _blind(clip: Any, part: Part) -> str:
    """Leave an encoder without its eyes, which nobody has stored, and say so."""
    what = Text("this {encoder} sees no pictures: its file has the language model alone. The mmproj file that is "
                "published beside it, as the other override, gives it eyes", encoder=part.encoder.title)
    eyes = part.encoder.apart
    for module in (eyes,) if isinstance(eyes, str) else eyes:
        host.take_away(clip, part.encoder.host_name, module.rstrip("."), lambda: CheckpointError(
            Text("this text encoder sees no pictures: its file has the language model alone"),
            part.checkpoints[0].source.reference, Text("give the mmproj file beside it as the other override")))
    return what


def _report(pipeline: Pipeline, family: str, notes: list[str], parts: list[Part], clip: Any) -> str:
    lines: list[str] = [Text("{family} text encoders", family=family),
                        Text("source: {reference}", reference=pipeline.reference)]
    for part in parts:
        config, checkpoint = part.config, part.checkpoints[0]
        files = checkpoint.source.files
        names = files[0].replace("\\", "/").rsplit("/", 1)[-1] if len(files) == 1 else \
            Text("{count} shards", count=len(files))
        text = config.get("text_config") or config
        width = text.get("d_model", text.get("hidden_size"))
        layers = text.get("num_layers", text.get("num_hidden_layers"))
        kind = (config.get("architectures") or [config.get("_class_name", "")])[0]
        dtype = host.text_encoder_dtype(clip, part.encoder.host_name)
        lines.append(Text("{folder}: {kind}, {names}, {size}, width {width}, {layers} layers, kept in {dtype}",
                          folder=part.folder, kind=kind, names=names, size=size(checkpoint.bytes_on_disk), width=width,
                          layers=layers, dtype=dtype) if layers else
                     Text("{folder}: {kind}, {names}, {size}, kept in {dtype}", folder=part.folder, kind=kind,
                          names=names, size=size(checkpoint.bytes_on_disk), dtype=dtype))
        below = [Text("eyes: {reference}", reference=eyes.source.reference) for eyes in part.checkpoints[1:]]
        if part.replaced:
            below.insert(0, Text("override: {reference}", reference=checkpoint.source.reference))
        formats = formats_of(part.described)
        if formats:
            below.append(Text("layers: {formats}; dequantized for every matmul, as ComfyUI does it in text encoders",
                              formats=formats))
        if part.tokenizer_source is not pipeline.parts[part.folder]:
            below.append(Text("tokenizer: the base's own") if part.tokenizer else
                         Text("tokenizer: ComfyUI's, compared with the base's"))
        lines += [Text("  {line}", line=line) for line in below]
        notes += [*(note for one in part.described for note in one.notes),
                  *(note for native in part.native for note in native.notes), part.encoder.note(config)]
    return joined("\n", lines + [Text("note: {note}", note=note) for note in dict.fromkeys(notes) if note])
