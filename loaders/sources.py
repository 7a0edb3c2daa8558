"""Where the bytes are: a reference (repo id, folder or file) becomes a list of local files.

Nothing here opens a weight file or the network. The order for a reference that is no existing path: ComfyUI's model
folders, then the Hugging Face cache (the snapshot that is already on disk).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .. import host
from .errors import CheckpointError, first_ten

INDEX = ".safetensors.index.json"
# The bases and the nine validated overrides of the support matrix.
KNOWN_BASES = (
    "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell", "black-forest-labs/FLUX.2-dev",
    "black-forest-labs/FLUX.2-dev-NVFP4", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "hunyuanvideo-community/HunyuanVideo", "Qwen/Qwen-Image",
    "Qwen/Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2511", "Tongyi-MAI/Z-Image-Turbo")
KNOWN_OVERRIDES = (
    "lmsys/flux1-dev-modelopt-fp8-sglang-transformer", "lmsys/flux1-dev-modelopt-nvfp4-sglang-transformer",
    "lmsys/flux2-dev-modelopt-fp8-sglang-transformer", "black-forest-labs/FLUX.2-dev-NVFP4",
    "lmsys/wan22-t2v-a14b-modelopt-fp8-sglang-transformer", "lmsys/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer",
    "lmsys/hunyuanvideo-modelopt-fp8-sglang-transformer", "lmsys/qwen-image-modelopt-fp8-sglang-transformer",
    "lmsys/qwen-image-edit-modelopt-fp8-sglang-transformer")
COMPONENTS = ("transformer", "transformer_2")


# A quantized repo that users give as the base itself: it has weights only, the rest is that of its base
# (SGLang-Diffusion's compatibility path, specs/modelopt.md section 1.5).
_NVFP4_REPO, _NVFP4_BASE = "flux.2-dev-nvfp4", "black-forest-labs/FLUX.2-dev"


@dataclass(frozen=True)
class Source:
    """Local files of one transformer. `files` is empty when only its configuration was asked for."""

    reference: str
    folder: str
    files: tuple[str, ...]
    config: str | None = None
    index: str | None = None
    choice: str = ""  # why these files, where the folder held more
    beside: str | None = None  # config.json beside a single file: read for its quantization declaration only

    @property
    def paths(self) -> list[str]:
        """Every file this source depends on, for fingerprints."""
        return [path for path in (*self.files, self.config, self.index, self.beside) if path]


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is unreadable, invalid or no object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read the file: {error.strerror}", path,
                              "check the path and its rights") from error
    except ValueError as error:
        raise CheckpointError(f"invalid JSON: {error}", path, "download the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError("this JSON file holds no object", path, "download the file again")
    return value


def find_path(reference: str, revision: str = "") -> Path:
    """The local file or folder that `reference` names.

    Raises CheckpointError when there is none; for a repo id the message carries the command that fetches it.
    """
    text = reference.strip()
    if not text:
        raise CheckpointError("no checkpoint is chosen", do="pick one in the list, or give a path or repo id")
    direct = Path(text).expanduser()
    if direct.exists():
        return direct
    if direct.is_absolute() or text.startswith((".", "~")):
        raise CheckpointError("there is no such file or folder", direct, "correct the path")
    parts = PurePosixPath(text.replace("\\", "/")).parts
    if ".." in parts:
        raise CheckpointError("a reference must not contain '..'", text, "give the full path, or a repo id")
    for root in host.model_folders():
        for name in (text, "--".join(parts[:2]), parts[1] if len(parts) > 1 else text):
            found = Path(root, name, *parts[2:]) if name != text else Path(root, name)
            if found.exists():
                return found
    if len(parts) >= 2:
        snapshot = host.cached_snapshot("/".join(parts[:2]), revision)
        if snapshot and Path(snapshot, *parts[2:]).exists():
            return Path(snapshot, *parts[2:])
        repo = "/".join(parts[:2])
        target = next(iter(host.model_folders()), "models/diffusers")
        at = f" --revision {revision}" if revision else ""
        raise CheckpointError(f"{text} is not on this machine, and this version of the pack downloads nothing", "",
                              f"run: hf download {repo}{at} --local-dir \"{Path(target, parts[1])}\"")
    raise CheckpointError(f"{text} was found neither as a path nor in ComfyUI's model folders", "",
                          f"looked in {first_ten(host.model_folders())}; give a full path, or a repo id owner/name")


def locate(reference: str, *, component: str = "transformer", weights_name: str = "", revision: str = "",
           need_weights: bool = True) -> Source:
    """Resolve a reference to the files of one transformer.

    Accepts a diffusers pipeline folder (its `component` is taken), a component folder (config.json + weights), a
    folder with one weight file or one index, an index file, or a single .safetensors file. `weights_name` picks a
    file inside the folder. With `need_weights=False` only config.json is looked up and no weight file need exist.

    Raises CheckpointError when nothing is found or the choice is ambiguous.
    """
    path = find_path(reference, revision)
    if path.is_file():
        if weights_name:
            raise CheckpointError(f"weights_name is {weights_name!r}, but the reference is already a file", path,
                                  "clear weights_name, or give the folder")
        if not need_weights:
            raise CheckpointError("a single file has no config.json to build a model without weights from", path,
                                  "set weights to 'load', or give a diffusers folder")
        if path.name.endswith(INDEX):
            return _from_index(reference, path)
        beside = path.parent / "config.json"
        return Source(reference, str(path.parent), (str(_weight_file(path)),),
                      beside=str(beside) if beside.is_file() else None)
    folder = _component_folder(path, component)
    config = folder / "config.json"
    config_path = str(config) if config.is_file() else None
    if not need_weights:
        if config_path is None and _NVFP4_REPO in path.as_posix().lower():
            return locate(_NVFP4_BASE, component=component, need_weights=False)
        if config_path is None:
            raise CheckpointError("there is no config.json to build a model without weights from", folder,
                                  "set weights to 'load', or give a diffusers folder")
        return Source(reference, str(folder), (), config_path)
    if weights_name:
        if _leaves_folder(weights_name):
            raise CheckpointError("weights_name must stay inside the folder", weights_name, "give a plain file name")
        chosen = folder / weights_name
        if not chosen.is_file():
            raise CheckpointError(f"the folder holds no {weights_name}", folder, f"it holds {_listing(folder)}")
        if chosen.name.endswith(INDEX):
            return _from_index(reference, chosen, config_path)
        return Source(reference, str(folder), (str(_weight_file(chosen)),), config_path)
    return _choose(reference, folder, config_path)


# A precision infix, as diffusers' `variant` writes it into weight and index files.
_PRECISION = re.compile(r"\.(fp16|bf16|fp32)(?=(-\d+-of-\d+)?\.safetensors|\.json$)")
_MIXED = re.compile(r"-mixed(-\d+-of-\d+)?\.safetensors$")


def _choose(reference: str, folder: Path, config: str | None) -> Source:
    """The weight files of a folder, by SGLang-Diffusion's order (specs/modelopt.md sections 1.2 and 1.3).

    Precision twins of a canonical file are set aside; an index is the authority; without one a single file is taken,
    and of several the one that is called -mixed. Anything else is ambiguous and raises CheckpointError.
    """
    indexes, _ = _without_twins(sorted((*folder.glob(f"*{INDEX}"), *folder.glob("*.safetensors.index.*.json"))))
    if len(indexes) > 1:
        raise CheckpointError(f"there are {len(indexes)} index files: {first_ten(i.name for i in indexes)}", folder,
                              "name the one to use in weights_name")
    if indexes:
        return _from_index(reference, indexes[0], config)
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.rglob("*.safetensors"))
    files, choice = _without_twins(found)
    mixed = [file for file in files if _MIXED.search(file.name)]
    if len(files) > 1 and len(mixed) == 1:
        files, choice = mixed, f"{mixed[0].name} taken of {len(found)} files: the mixed one"
    if len(files) > 1:
        raise CheckpointError(f"there are {len(files)} weight files without an index: "
                              f"{first_ten(f.relative_to(folder).as_posix() for f in files)}", folder,
                              "name the one to use in weights_name")
    if not files:
        raise CheckpointError("there is no .safetensors file", folder, f"the folder holds {_listing(folder)}")
    return Source(reference, str(folder), (str(files[0]),), config, choice=choice)


def _without_twins(files: list[Path]) -> tuple[list[Path], str]:
    """Drop files that differ from another only by a precision infix; a family that has only such files is kept."""
    names = {file.name for file in files}
    kept = [file for file in files
            if not _PRECISION.search(file.name) or _PRECISION.sub("", file.name) not in names]
    dropped = [file.name for file in files if file not in kept]
    return kept, f"precision twins left aside: {first_ten(dropped)}" if dropped else ""


def _leaves_folder(name: str) -> bool:
    """Whether a file name points out of its folder, on any system (a drive letter does on Windows)."""
    pure = PurePosixPath(name.replace("\\", "/"))
    return pure.is_absolute() or ".." in pure.parts or ":" in name


def _listing(folder: Path) -> str:
    return first_ten(sorted(entry.name for entry in folder.iterdir())) or "nothing"


def _weight_file(path: Path) -> Path:
    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise CheckpointError(f"{path.suffix or 'this kind of'} files are not read: only .safetensors", path,
                              "pick a .safetensors file")
    return path


def _component_folder(path: Path, component: str) -> Path:
    """The folder of one component: below a pipeline folder, or the folder itself."""
    if (path / "model_index.json").is_file():
        folder = path / component
        if not folder.is_dir():
            parts = [name for name in COMPONENTS if (path / name).is_dir()]
            raise CheckpointError(f"this pipeline has no {component}", path,
                                  f"its transformers on disk: {', '.join(parts) or 'none'}")
        return folder
    if component != "transformer":
        raise CheckpointError(f"{component} needs a pipeline folder (model_index.json), this is a single component",
                              path, f"give the pipeline folder, or the {component} folder with component transformer")
    nested = path / component
    if not (path / "config.json").is_file() and not any(path.glob("*.safetensors*")) and nested.is_dir():
        return nested
    return path


def _from_index(reference: str, index: Path, config: str | None = None) -> Source:
    """The shards of an index. Each must be a .safetensors file inside the index's folder, and exist."""
    weight_map = read_json(str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError("the index has no weight_map from tensor names to file names", index,
                              "download the index again")
    folder = index.parent
    names = sorted(set(weight_map.values()))
    for name in names:
        if _leaves_folder(name):
            raise CheckpointError(f"the index names a file outside its folder: {name!r}", index,
                                  "do not use this checkpoint; get it from its publisher")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"the index names {name!r}, which is no .safetensors file", index,
                                  "only safetensors shards are read")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{len(missing)} of {len(names)} shards are missing: {first_ten(missing)}", index,
                              "finish the download of this folder")
    beside = folder / "config.json"
    return Source(reference, str(folder), tuple(str(folder / name) for name in names),
                  config or (str(beside) if beside.is_file() else None), str(index))


def local_references() -> list[str]:
    """What ComfyUI's model folders hold that could be a reference: pipeline and component folders, single files.

    Names are relative to their model folder. Reads directory entries only, three levels deep.
    """
    found: set[str] = set()

    def walk(root: Path, folder: Path, depth: int) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            return
        names = {entry.name for entry in entries}
        whole = {"model_index.json", "config.json"} & names or any(name.endswith(INDEX) for name in names)
        if whole and folder != root:
            found.add(folder.relative_to(root).as_posix())
            return
        for entry in entries:
            if entry.is_dir():
                if depth and not entry.name.startswith("."):
                    walk(root, Path(entry.path), depth - 1)
            elif entry.name.endswith((".safetensors", ".sft")):
                found.add(Path(entry.path).relative_to(root).as_posix())

    for root in host.model_folders():
        walk(Path(root), Path(root), 3)
    return sorted(found)
