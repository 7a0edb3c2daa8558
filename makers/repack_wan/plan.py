"""What a repack writes: every file of the new folder, worked out from headers, JSON and scales before a byte is
copied."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...host.texts import Text, joined
from ...loaders.containers.safetensors import Header
from ...loaders.errors import CheckpointError, MissingFiles
from ...loaders.files.frozen import Frozen
from ...loaders.files.selection import COMPONENTS, INDEX, PIPELINE
from ...loaders.files.source import read_json
from ...loaders.words import first_ten, size
from .expert import DESCRIPTION, WEIGHTS, Expert, check_file, descriptions, named, read_expert
from .files import File
from .names import DIRECTIONS, name_map
from .scales import refuse_damaged

EXPERTS = ("high_noise_model", "low_noise_model")  # = transformer, transformer_2
KEPT = "original"  # in a repacked transformer: the files that lay beside the export's weights


@dataclass
class Plan:
    """The files to write, the lines of the report, and the files that either is read from as they were before that."""

    files: list[File] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    sources: Frozen = field(default_factory=Frozen)

    def add(self, name: str, head: bytes = b"", source: Path | None = None, start: int = 0, link: bool = False) -> None:
        """A file: `head`, then `source` from byte `start` on. What is behind a link is not read, and may change."""
        sources = Frozen() if link else self.sources
        data = sources.add(source) - start if source else 0
        self.files.append(File(name, head, source, start, data, link))


def make_plan(source: Path, base: Path | None, direction: str, link: bool) -> Plan:
    """Work out a repack of the export at `source`. Raises CheckpointError for anything that does not fit together.

    `base` is the diffusers pipeline (needed), or the vendor's original repo (where it is known) going back.
    """
    to_diffusers = direction == DIRECTIONS[0]
    pairs = _experts(source, to_diffusers)
    plan = Plan()
    if to_diffusers and (base is None or not (base / PIPELINE).is_file()):
        raise CheckpointError(Text("the base is no diffusers pipeline: it has no {file}", file=PIPELINE), base or "",
                              Text("give the diffusers repo of this Wan, such as Wan-AI/Wan2.2-T2V-A14B-Diffusers"))
    if to_diffusers:
        assert base is not None
        plan.sources.add(base / PIPELINE)
        index = read_json(str(base / PIPELINE))
        there = [name for name in COMPONENTS if isinstance(index.get(name), list) and index[name][0]]
        if there != [new for _, new in pairs]:
            raise CheckpointError(Text("the export has {count} transformer(s), the base {expected}", count=len(pairs),
                                       expected=len(there)), source,
                                  Text("give the export's root folder with all its experts, and the base of the same "
                                       "model"))
        absent = [name for name, part in index.items() if isinstance(part, list) and part[0] and name not in COMPONENTS
                  and not (base / name).is_dir()]
        if absent:
            plan.lines.append(Text("note: the base lacks {components} on disk, so the new folder does, too",
                                   components=", ".join(absent)))
    for old, new in pairs:
        _add_expert(plan, read_expert(source / old), new, base, direction)
    if base is not None:
        _add_rest(plan, base, [new for _, new in pairs], link)
    return plan


def _experts(source: Path, to_diffusers: bool) -> list[tuple[str, str]]:
    """(folder in the source, folder in the target) of each transformer; "" is the root itself."""
    old, new = (EXPERTS, COMPONENTS) if to_diffusers else (COMPONENTS, EXPERTS)
    there = [name for name in old if (source / name).is_dir()]
    if not there or any(descriptions(source)):
        return [("", new[0] if to_diffusers else "")]
    two = to_diffusers or (source / old[1]).is_dir() or _is_listed(source, old[1])
    if two and len(there) < 2:
        raise CheckpointError(Text("half of the model is missing: there is {folder} only", folder=there[0]), source,
                              Text("finish the download or the export of this folder"))
    return list(zip(old, new, strict=True)) if two else [(old[0], "")]


def _is_listed(folder: Path, component: str) -> bool:
    part = read_json(str(folder / PIPELINE)).get(component) if (folder / PIPELINE).is_file() else None
    return bool(part and part[0])


def _add_expert(plan: Plan, expert: Expert, to: str, base: Path | None, direction: str) -> None:
    to_diffusers = direction == DIRECTIONS[0]
    refuse_damaged(expert)
    tensors = expert.checkpoint.tensors
    plan.sources |= expert.frozen
    renamed = name_map(tensors.keys(), direction, expert.folder)
    keys = set(named(expert.entries, expert.checkpoint))
    strange = [key for key in keys if key not in renamed]
    if strange:
        raise CheckpointError(Text("the description has keys of no known meaning: {names}", names=first_ten(strange)),
                              expert.description, Text("report this, with the first ten"))
    entries = {renamed[key] if key in keys else key: value for key, value in expert.entries.items()}
    if len(entries) != len(expert.entries):
        raise CheckpointError(Text("two keys of the description would get one name"), expert.description,
                              Text("export again"))
    weights, index, description = _file_names(expert, to_diffusers)
    prefix = f"{to}/" if to else ""
    for header, name in zip(expert.checkpoint.headers, weights, strict=True):
        data = max((info.end for info in header.tensors.values()), default=0)
        plan.add(prefix + name, header_bytes(header, renamed), Path(os.path.realpath(header.path)), header.size - data)
    if index:
        plan.add(prefix + index, _index(expert, renamed, weights))
    plan.add(prefix + description, restyle(expert.description, entries))
    layers = Counter(value for key, value in expert.entries.items() if key.endswith(".weight") and value != "FLOAT")
    plan.lines.append(
        Text("{component} from {folder}: {count} tensors, {renamed} renamed, in {files} file(s), {size}; layers: "
             "{layers}", component=to or "transformer", folder=expert.folder.name, count=len(tensors),
             files=len(weights), renamed=sum(renamed[name] != name for name in tensors),
             size=size(expert.checkpoint.bytes_on_disk),
             layers=", ".join(f"{count} {kind}" for kind, count in sorted(layers.items())) or Text("none quantized")))
    _add_config(plan, expert, prefix, base, to_diffusers, renamed)


def _add_config(plan: Plan, expert: Expert, prefix: str, base: Path | None, to_diffusers: bool,
                renamed: dict[str, str]) -> None:
    """config.json: diffusers' layout gets the base's, and the export's own files beside it for the way back."""
    if to_diffusers:
        assert base is not None
        config = base / prefix / "config.json"
        if not config.is_file():
            raise MissingFiles(Text("the base has no config.json there"), config,
                               Text("finish the download of the base"))
        for name in expert.others:
            plan.add(f"{prefix}{KEPT}/{name}", source=check_file(expert.folder / name, expert.folder))
    else:
        kept = expert.folder / KEPT
        names = sorted(path.name for path in kept.iterdir()) if kept.is_dir() else []
        for name in names:
            plan.add(prefix + name, source=check_file(kept / name, expert.folder))
        left = [name for name in expert.others if name != "config.json"]
        if left:
            plan.lines.append(Text("note: left behind: {names}", names=first_ten(left)))
        if "config.json" in names:
            return
        config = base / prefix / "config.json" if base else Path()
        if base is None or not config.is_file():
            plan.lines.append(Text("note: no config.json for {folder}: no base has one",
                                   folder=prefix or Text("the model")))
            return
    assert base is not None
    plan.add(f"{prefix}config.json", source=check_file(config, base))
    _refuse_other_sizes(read_json(str(config)), expert, renamed, to_diffusers, config)


def _refuse_other_sizes(config: dict[str, Any], expert: Expert, renamed: dict[str, str], to_diffusers: bool,
                        where: Path) -> None:
    """Raise CheckpointError unless config.json is a plain Wan's of the export's sizes (biases are never packed)."""
    if to_diffusers and (config.get("_class_name") != "WanTransformer3DModel" or "quantization_config" in config):
        what = Text("the base's transformer is {name}, quantized, expected a plain WanTransformer3DModel",
                    name=config.get("_class_name")) if "quantization_config" in config else \
            Text("the base's transformer is {name}, expected a plain WanTransformer3DModel",
                 name=config.get("_class_name"))
        raise CheckpointError(what, where, Text("give the diffusers repo of this Wan"))
    tensors = {renamed[name] if to_diffusers else name: info for name, info in expert.checkpoint.tensors.items()}

    def rows(module: str) -> int:
        return next((tensors[f"{module}.{leaf}"].shape[0] for leaf in ("bias", "quant_bias")
                     if f"{module}.{leaf}" in tensors), 0)

    patch = tensors["patch_embedding.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    sizes = (patch[0], patch[1], rows("proj_out") // 4, rows("blocks.0.ffn.net.0.proj"), layers)
    if to_diffusers:
        told: tuple[Any, ...] = (config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0),
                                 *(config.get(k) for k in ("in_channels", "out_channels", "ffn_dim", "num_layers")))
    else:
        told = tuple(config.get(key) for key in ("dim", "in_dim", "out_dim", "ffn_dim", "num_layers"))
    wrong = [Text("{name} {mine} (config.json {its})", name=name, mine=mine, its=its) for name, mine, its in zip(
        (Text("width"), Text("input channels"), Text("output channels"), Text("feed-forward width"), Text("blocks")),
        sizes, told, strict=True) if its != mine]
    if wrong:
        raise CheckpointError(Text("the export is another Wan than the base: {differences}",
                                   differences=joined(", ", wrong)), where,
                              Text("give the base that the export was made from"))


def _file_names(expert: Expert, to_diffusers: bool) -> tuple[list[str], str, str]:
    """(weight files, index or "", description) by the writers' rules (docs/sources/ascend.md, "File names")."""
    count, kind = len(expert.checkpoint.headers), str(expert.entries.get("model_quant_type", "")).lower()
    sharded = bool(expert.checkpoint.source.index_file) or count > 1
    suffix = ""
    if to_diffusers:
        stem, description = WEIGHTS, f"{DESCRIPTION}.json"
    elif "version" in expert.entries or not kind:  # AscendV1Saver; or nothing is quantized
        stem = "quant_model_weights" if "version" in expert.entries else "quant_model_weight"
        description = f"{DESCRIPTION}.json"
    else:  # MindIEFormatSaver
        stem, suffix, description = "quant_model_weight", f"_{kind}", f"{DESCRIPTION}_{kind}.json"
    if not sharded:
        return [f"{stem}{suffix}.safetensors"], "", description
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)], f"{stem}{INDEX}", description


def header_bytes(header: Header, renamed: dict[str, str]) -> bytes:
    """A safetensors header with new names in the old order: every byte range behind it stays as it is."""
    entries: dict[str, Any] = {"__metadata__": header.metadata} if header.metadata else {}
    entries |= {renamed[name]: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.end]}
                for name, info in header.tensors.items()}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(expert: Expert, renamed: dict[str, str], weights: list[str]) -> bytes:
    """The index with new tensor and file names; one is made for shards that had none."""
    headers = expert.checkpoint.headers
    if not expert.checkpoint.source.index_file:
        total = sum(info.end - info.start for info in expert.checkpoint.tensors.values())
        made = {renamed[name]: file for header, file in zip(headers, weights, strict=True) for name in header.tensors}
        return json.dumps({"metadata": {"total_size": total}, "weight_map": made}, indent=2).encode()
    path = Path(expert.checkpoint.source.index_file)
    index, files = read_json(str(path)), {Path(h.path).name: file for h, file in zip(headers, weights, strict=True)}
    return restyle(path, index | {"weight_map": {renamed[k]: files[v] for k, v in index["weight_map"].items()}})


def restyle(path: Path, value: dict[str, Any]) -> bytes:
    """`value` as JSON, spaced as the file at `path` is."""
    text = path.read_text(encoding="utf-8")
    old = json.loads(text)
    for indent in (4, 2, None):
        for ascii_only in (True, False):
            for end in ("", "\n"):
                if json.dumps(old, indent=indent, ensure_ascii=ascii_only) + end == text:
                    return (json.dumps(value, indent=indent, ensure_ascii=ascii_only) + end).encode()
    return json.dumps(value, indent=4).encode()


def _add_rest(plan: Plan, base: Path, transformers: list[str], link: bool) -> None:
    """Everything of the base but its transformers (top level only: a nested folder of that name is someone else's)."""
    count, total = 0, 0
    for name in _rest(base, base):
        top = name.split("/")[0]
        weights = transformers == [""] and "/" not in name and (name.endswith((".safetensors", INDEX))
                                                                or name == "config.json")
        if top not in (transformers if "/" in name else ()) and not weights:
            plan.add(name, source=check_file(base / name, base), link=link)
            count, total = count + 1, total + plan.files[-1].data
    plan.lines.append(Text("rest of the base: {count} files {done}, {size}", count=count,
                           done=Text("linked") if link else Text("copied"), size=size(total)))


def _rest(folder: Path, base: Path) -> Iterator[str]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            if entry.is_symlink():
                raise CheckpointError(Text("the base has a link to a folder"), entry.path,
                                      Text("put the folder itself there"))
            if not entry.name.startswith("."):  # .git, .cache
                yield from _rest(Path(entry.path), base)
        else:
            yield Path(entry.path).relative_to(base).as_posix()
