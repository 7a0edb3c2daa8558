"""Nunchaku's SVDQuant files: `svdq-int4_r*` and `svdq-fp4_r*`, and the older folders of two files (docs/formats), and
those of other writers: diffusers' nunchaku_lite and vLLM-Omni.

files.py finds them, writers.py tells whose they are, recognise.py and table.py read them, plan.py says what makes each
native module, convert.py makes it; lite.py is all of that for nunchaku_lite, whose names are diffusers'. Nothing heavy
is imported before it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ...files.selection import Folder, Selection, component_folder
from ..base import Family
from .files import KNOWN, PRECISIONS, Choice, choose_file, download_pattern, named_file

if TYPE_CHECKING:
    from ...architectures import Architecture, Dims
    from ...assemble import Tensors
    from ...containers.checkpoint import Checkpoint
    from ...description import CheckpointDescription
    from ...plan import LoadPlan


class Nunchaku(Family):
    """See base.Family."""

    name = "nunchaku"
    kind = "svdq"
    title = "SVDQuant"
    words = {"svdquant-int4": "SVDQuant INT4", "svdquant-nvfp4": "SVDQuant NVFP4"}
    published = KNOWN
    options = {"precision": PRECISIONS}

    def colours(self) -> Mapping[str, tuple[int, int, int]]:
        from .plan import COLOURS

        return COLOURS

    def is_named(self, reference: str) -> bool:
        return named_file(reference)

    def usual_formats(self, reference: str) -> tuple[str, ...]:
        from .plan import AWQ, W4A4

        return W4A4["nvfp4" if "fp4" in download_pattern() else "int4"], AWQ

    def choices(self, inputs: Mapping[str, Any]) -> Choice | None:
        """`precision` and `rank` of the Nunchaku SVDQ Loader."""
        if "precision" not in inputs and "rank" not in inputs:
            return None
        return Choice(inputs.get("precision", "auto"), inputs.get("rank", 0))

    def select(self, folder: Folder, component: str, weights_name: str, choices: Any) -> Selection | None:
        if weights_name or not any(map(named_file, folder.names())):
            return None
        name = component_folder(folder, component)
        inside = folder.names(name)
        chosen = choose_file(inside, f"{folder.place}/{name}" if name else folder.place, *_choice(choices))
        if chosen is None:
            return None
        files, why = ([f"{name}/{file}" if name else file for file in chosen[0]], chosen[1])
        config = (f"{name}/config.json" if name else "config.json") if "config.json" in inside else None
        return Selection(name, tuple(files), config, choice=why)

    def pattern(self, reference: str, weights_name: str, choices: Any) -> str:
        return (weights_name or download_pattern(*_choice(choices))) if reference in KNOWN else ""

    def recognise(self, checkpoint: Checkpoint) -> bool:
        from .recognise import is_svdquant

        return is_svdquant(checkpoint.tensors)

    def require(self, checkpoint: Checkpoint, description: CheckpointDescription, choices: Any) -> None:
        from .claims import check_widgets

        check_widgets(description, *_choice(choices))

    def read(self, checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> LoadPlan:
        from .describe import read_svdquant

        return read_svdquant(checkpoint, base)

    def settle(self, checkpoint: Checkpoint, plan: LoadPlan, byte_order: str) -> None:
        super().settle(checkpoint, plan, byte_order)
        from .convert import FilePlan, settle_order
        from .writers import NUNCHAKU

        if isinstance(plan, FilePlan) and plan.found is not None and plan.found.writer != NUNCHAKU:
            settle_order(checkpoint, plan)

    def tensors(self, checkpoint: Checkpoint, plan: LoadPlan) -> Tensors:
        from .convert import FileTensors

        return FileTensors(checkpoint, plan)

    def runs(self, plan: LoadPlan, compute: str) -> list[str]:
        pieces = [[piece.layer.name for piece in planned.pieces if piece.layer.read] for planned in plan.modules]
        made = [names for names in pieces if names]
        several = [len(set(names)) for names in made if len(set(names)) > 1]
        parts = Text("two") if set(several) <= {2} else Text("several")
        return [Text("{count} quantized layers of the file are {modules} modules in ComfyUI, {split} of them in "
                     "{parts} parts", count=len({name for names in made for name in names}), modules=len(made),
                     split=len(several), parts=parts)]


def _choice(choices: Any) -> Choice:
    return choices if isinstance(choices, Choice) else Choice()


FAMILY = Nunchaku()
