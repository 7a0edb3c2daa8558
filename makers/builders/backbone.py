"""ModelOpt's backbone.pt: calibrated amax values out of a pickle, without running anything from it.

`mto.save` writes {"modelopt_state": ..., "model_state_dict": {...}}; the values wanted are 0-d tensors called
`<layer>.weight_quantizer._amax` and `<layer>.input_quantizer._amax` (docs/sources/modelopt.md,
"backbone.pt").
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from ...loaders.files.mapped import Mapped
from ...loaders.words import first_ten

if TYPE_CHECKING:
    from torch import Tensor

# Everything that a backbone.pt of nvidia-modelopt may name; what a real one does, and the other number types.
ALLOWED = frozenset({"collections OrderedDict", "torch Size", "torch._utils _rebuild_tensor_v2",
                     "torch._utils _rebuild_parameter"}
                    | {f"torch {name}" for name in ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn")}
                    | {f"torch {name}Storage" for name in ("BFloat16", "Half", "Float", "Double", "Byte", "Char",
                                                           "Short", "Int", "Long", "Bool")})
AMAX = {".weight_quantizer._amax": "weight", ".input_quantizer._amax": "input"}
_DO = Text("give the backbone.pt that nvidia-modelopt's mto.save wrote (its example's "
           "--quantized-torch-ckpt-save-path), or an export that carries its scales")


def find_backbone(reference: str) -> Path:
    """The file that `reference` names, or the backbone.pt in that folder. Raises CheckpointError."""
    from ...loaders.files.places import find_path

    path = find_path(reference)
    if path.is_dir():
        path = path / "backbone.pt"
    if not path.is_file():
        raise CheckpointError(Text("there is no backbone.pt"), path.parent, _DO)
    return path


def read_amax(path: Path) -> dict[str, dict[str, Tensor]]:
    """Layer -> {"weight": amax, "input": amax} of a backbone.pt, as stored.

    The pickle is looked through before it is read: it is refused when it names anything but ALLOWED, so what other code
    has told torch to trust does not count. Then torch reads it with weights_only, tensors memory-mapped; those that are
    wanted come by plain reads. Raises CheckpointError for any other file.
    """
    import pickle

    import torch

    _refuse_code(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        raise CheckpointError(Text("this backbone checkpoint cannot be read: {error}",
                                   error=str(error).splitlines()[0]), path, _DO) from error
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(Text("this file holds no model_state_dict"), path, _DO)
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        for ending, kind in AMAX.items():
            if name.endswith(ending) and isinstance(value, torch.Tensor):
                found.setdefault(name.removesuffix(ending), {})[kind] = value
    if not found:
        raise CheckpointError(Text("this file holds no calibrated amax (weight_quantizer._amax, "
                                   "input_quantizer._amax)"), path, _DO)
    mapped = Mapped(value for both in found.values() for value in both.values())
    return {layer: {kind: mapped.own(value) for kind, value in both.items()} for layer, both in found.items()}


def _refuse_code(path: Path) -> None:
    """Raise CheckpointError unless this is torch's zip whose one pickle names only what is ALLOWED."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
            data = archive.read(pickles[0]) if len(pickles) == 1 else b""
        named = {str(argument) if code.name == "GLOBAL" else f"({code.name})"
                 for code, argument, _ in pickletools.genops(data)
                 if code.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")}
    except (zipfile.BadZipFile, ValueError, IndexError, OSError, EOFError) as error:
        raise CheckpointError(Text("this is no checkpoint that torch.save wrote"), path, _DO) from error
    foreign = sorted(named - ALLOWED)
    if foreign:
        raise CheckpointError(Text("this pickle names code that a ModelOpt checkpoint does not need, so it is not "
                                   "read: {names}", names=first_ten(foreign)), path, _DO)
