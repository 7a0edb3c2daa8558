"""What lies in ComfyUI's model folders that a node could load, and as what: by its folder, its name and, for folders,
by model_index.json and config.json. Headers are not read: a list is asked for with every page.

What nothing is said of may still load, and stays in every list that it could be of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from .files.scan import CONFIG, Folder, Root, of_roots
from .files.selection import DENOISERS, INDEX, PIPELINE, SPLIT, WEIGHTS
from .files.unfinished import MARKER
from .names import is_known, text_folders

# What something is loaded as: a transformer; all text encoders of a base; one in the place of one of these; a VAE
TRANSFORMER, TEXTS, ENCODER, VAE = "transformer", "texts", "encoder", "vae"
# How well it fits: as far as can be told; most likely; it is not known. A new node starts with one of the first two.
SURE, LIKELY, MAYBE = range(3)
Fits = dict[str, int]
# Of a single file, by the folder of ComfyUI's that it lies in. One of checkpoints can have all in it.
_BY_FOLDER: dict[str, Fits] = {
    "diffusion_models": {TRANSFORMER: SURE}, "checkpoints": {TRANSFORMER: SURE, TEXTS: LIKELY, VAE: LIKELY},
    "text_encoders": {ENCODER: SURE}, "vae": {VAE: SURE}}
_ANY: Fits = {TRANSFORMER: LIKELY, TEXTS: MAYBE, ENCODER: MAYBE, VAE: MAYBE}
# Patterns are compiled when they are first used: ComfyUI imports this module at every start.
_FOREIGN = (r"LoRA|LoKr|(?<![A-Za-z])(?i:lora|lokr|loha|locon|lycoris)s?(?![a-z])"
            r"|(?i:control[-_ ]?net|ip[-_ ]?adapter)")
_MERGED = r"(?i)merged|fused|baked"
_QUANTIZED = (r"(?i)\.gguf$|(?<![a-z\d])(nv|mx)?fp[468](?!\d)|(?<![a-z])f8|e[45]m[23]|(?<![a-z])u?int[2-8](?!\d)|w\da\d"
              r"|(?<![a-z\d])i?q\d(_|\b)|nf4|(?<![a-z])bnb|[48]-?bit|svdq|gptq|(?<![a-z])awq|sdnq|quanto|modelopt|nunchaku|modelslim|quant_model")


class Local(NamedTuple):
    """A reference in a model folder. `fits`: what it can be loaded as -> how well. `files`: names of those in it, from
    its own folder; of a file none. `quantized`: a name or its config says so; `method`: the config's quant_method."""

    reference: str
    fits: Mapping[str, int]
    files: tuple[str, ...] = ()
    pipeline: bool = False
    quantized: bool = False
    method: str = ""

    def called(self, named: Callable[[str], bool]) -> bool:
        """Whether it, or a file in it, is called so."""
        return named(self.reference) or any(map(named, self.files))


def references() -> tuple[Local, ...]:
    """All of them, sorted as people sort: folders with what is in them, numbers by their value. References are relative
    to their model folder, with forward slashes. The same object for as long as nothing changes."""
    return of_roots(_references)


def _references(roots: tuple[Root, ...]) -> tuple[Local, ...]:
    found: dict[str, Local] = {}
    for root in roots:
        for one in _of(root):
            twin = found.get(one.reference)  # in another model folder; each is read where it can be
            found[one.reference] = one if twin is None else twin._replace(fits=_both(twin.fits, one.fits))
    return tuple(sorted(found.values(), key=lambda one: _order(one.reference)))


def _of(root: Root) -> Iterator[Local]:
    """What one model folder holds."""
    alone: Fits = {}
    for kind in root.kinds:
        alone = _both(alone, _BY_FOLDER.get(kind, _ANY))
    alone = alone or _ANY
    whole: set[str] = set()
    for path, folder in root.folders.items():
        above = path.split("/")
        if any("/".join(above[:i]) in whole for i in range(len(above))):
            continue
        if MARKER in folder.files:
            whole.add(path)
        elif path and ({PIPELINE, CONFIG} & {*folder.files} or any(name.endswith(INDEX) for name in folder.files)):
            whole.add(path)
            yield from _of_folder(root, path, folder, alone)
        else:
            for name in folder.files:
                reference = f"{path}/{name}" if path else name
                part = re.search(SPLIT, name) if "-of-" in name else None
                if name.endswith(WEIGHTS) and name[0] != "." and (part is None or int(part[1]) == 1) \
                        and not _foreign(reference):
                    yield Local(reference, alone, quantized=re.search(_QUANTIZED, reference) is not None)


def _of_folder(root: Root, path: str, folder: Folder, alone: Fits) -> Iterator[Local]:
    inner = dict(root.below(path))
    files = (*folder.files, *(f"{name}/{file}" for name, one in inner.items() for file in one.files))
    config = folder.said.get(CONFIG, {})
    pipeline = PIPELINE in folder.files
    fits = _of_pipeline(folder.said[PIPELINE], inner) if pipeline else _of_component(config, alone)
    said = config.get("quantization_config")
    quantized = bool(said) or re.search(_QUANTIZED, path) is not None
    method = str(said.get("quant_method") or "") if isinstance(said, dict) else ""
    if "adapter_config.json" not in folder.files and (pipeline or not _foreign(path)):
        yield Local(path, fits, files, pipeline, quantized, method)


def _of_pipeline(index: Mapping[str, Any], inner: Mapping[str, Folder]) -> Fits:
    """By the classes that model_index.json names and the folders that are there."""
    def is_there(name: str) -> bool:
        return bool(inner.get(name, Folder((), (), {})).files)

    def named(name: str) -> str:
        entry = index.get(name)
        return str(entry[1] or "") if isinstance(entry, list) and len(entry) == 2 else ""

    fits: Fits = {}
    for part in DENOISERS:
        if is_there(part) or named(part):
            known = is_there(part) and (not named(part) or is_known("transformers", named(part)))
            fits[TRANSFORMER] = min(SURE if known else MAYBE, fits.get(TRANSFORMER, MAYBE))
    if (is_there("vae") or named("vae")) and (not named("vae") or is_known("vaes", named("vae"))):
        fits[VAE] = SURE if is_there("vae") else MAYBE
    if any(name.startswith("text_encoder") and is_there(name) for name in inner):
        fits[ENCODER] = LIKELY
    wanted = text_folders(index)
    return fits if wanted is None else fits | {TEXTS: SURE if all(map(is_there, wanted)) else MAYBE}


def _of_component(config: Mapping[str, Any], alone: Fits) -> Fits:
    """By its class; one without a class is what lies in its model folder. Text encoders and VAEs of a base are those of
    a pipeline or of a single file."""
    kind, classes = str(config.get("_class_name") or ""), config.get("architectures")
    if "Autoencoder" in kind:
        return {VAE: SURE}
    if kind:
        known = is_known("transformers", kind)
        return {} if re.search("ControlNet|Adapter", kind) else {TRANSFORMER: SURE if known else MAYBE}
    if isinstance(classes, list) and classes:
        known = is_known("encoders", classes[0])
        others = {TRANSFORMER: MAYBE} if TRANSFORMER in alone else {}
        return {ENCODER: SURE} if known else {ENCODER: MAYBE, **others}
    return {kind: fit for kind, fit in alone.items() if kind in (TRANSFORMER, ENCODER)}


def _both(one: Mapping[str, int], other: Mapping[str, int]) -> Fits:
    """The better of two fits of each kind."""
    return {kind: min(one.get(kind, MAYBE), other.get(kind, MAYBE)) for kind in {**one, **other}}


def _foreign(reference: str) -> bool:
    """Whether a name is that of what other nodes are for: LoRAs and what goes beside a transformer."""
    return re.search(_FOREIGN, reference) is not None and re.search(_MERGED, reference) is None


def _order(reference: str) -> list[Any]:
    """Letters of either case alike, numbers by their value, a folder with what is in it: "b/a", "b9", "b10", "ba"."""
    pieces: list[Any] = re.split(r"(\d+)", reference.casefold().replace("/", "\0"))
    pieces[1::2] = map(int, pieces[1::2])
    pieces[:-1:2] = [f"{text}0" for text in pieces[:-1:2]]  # numbers stand where digits do
    return pieces
