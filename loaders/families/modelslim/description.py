"""quant_model_description*.json: a flat map from tensor names to quantization types, and a few facts beside it.

`model_quant_type` and the other facts are not used to decide anything: one writer puts the last type there, the other
the "highest" (docs/sources/ascend.md, "Description"). Types count layer by layer.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field

from ....host.texts import Text
from ...errors import CheckpointError
from ...files.source import Source, read_json
from ...words import first_ten
from .files import is_description
from .names import JSON_ONLY

FLOAT = "FLOAT"


@dataclass(frozen=True)
class Claims:
    """What a description says. `types`: stored tensor name -> type; `writer` names the program that wrote it."""

    file: str
    types: dict[str, str] = field(default_factory=dict)
    writer: str = ""
    quantized_attention: int = 0  # layers whose attention an NPU would quantize


def description_path(source: Source) -> str | None:
    """The description among the files of a source, or None for another kind of checkpoint."""
    return next((path for path in source.texts if is_description(path)), None)


def read_claims(path: str) -> Claims:
    """Read a description. Raises CheckpointError when it is unreadable or holds no types."""
    entries = read_json(path)
    types = {name: value for name, value in entries.items() if isinstance(value, str) and "." in name}
    attention = [name for name in types if JSON_ONLY.search(name)]
    for name in attention:
        del types[name]
    # a tensor at the top of a model has no dot; the facts beside the types are these
    facts = {"version", "model_quant_type", "kv_cache_type", "kv_quant_type", "fa_quant_type", "reduce_quant_type"}
    types |= {name: value for name, value in entries.items()
              if isinstance(value, str) and "." not in name and name not in facts}
    if not types:
        raise CheckpointError(Text("this description names no tensors"), path, Text("copy it from the export again"))
    version = entries.get("version")
    writer = Text("msmodelslim, AscendV1 writer {version}", version=version) if version else \
        Text("msmodelslim, MindIE writer")
    return Claims(os.path.basename(path), types, writer, len(attention))


def check_names(claims: Claims, stored: Collection[str], path: str) -> None:
    """Raise CheckpointError when the description names tensors that the files do not hold."""
    absent = [name for name in claims.types if name not in stored]
    if absent:
        raise CheckpointError(Text("the description names {count} tensors that are not in the weights: {names}",
                                   count=len(absent), names=first_ten(absent)), path,
                              Text("description and weights belong to different exports, or a shard is missing; copy "
                                   "both from one export"))
