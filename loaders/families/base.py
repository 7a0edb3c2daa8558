"""What a family is: who wrote a file, and so which files of a folder count, what they hold, and how that is loaded.

A new family is one module with a `FAMILY` and one line in the registry (`FAMILIES`). Generic code asks the registry and
never for one family by name; what only one family knows of (Nunchaku's precision and rank) travels as one value,
`choices`, that everybody else hands on unread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ..files.selection import SPLIT

if TYPE_CHECKING:
    from ..architectures import Architecture, Dims
    from ..assemble import Tensors
    from ..containers.checkpoint import Checkpoint
    from ..description import CheckpointDescription
    from ..files.selection import Folder, Selection
    from ..plan import LoadPlan


class Family:
    """One publisher's way to store a transformer. The first two methods are what every family has; the rest say what
    sets it apart, and mean nothing special where they are not overridden.

    `kind`: of its entries in the catalog. `title`: what a badge calls it, before the format of its layers; `words`: the
    whole badge, by a description's `family`. `published`: known repo ids. `options`: what the
    inputs may be that only it knows of.
    """

    name: str
    kind = "override"
    title = ""
    words: Mapping[str, str] = {}
    published: tuple[str, ...] = ()
    options: Mapping[str, tuple[str, ...]] = {}

    def recognise(self, checkpoint: Checkpoint) -> bool:
        """Whether a file is this family's, by its headers and the names of the files beside it."""
        raise NotImplementedError

    def read(self, checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> LoadPlan:
        """What makes every native module of a checkpoint of this family, and its description; see describe.describe."""
        raise NotImplementedError

    def settle(self, checkpoint: Checkpoint, plan: LoadPlan, byte_order: str) -> None:
        """Decide from values what the headers of a loadable checkpoint leave open. `byte_order` is what the user says
        of NVFP4, "auto" for nothing. Raises CheckpointError where nothing tells."""
        if byte_order != "auto":
            plan.description.notes.append(Text("byte_order {byte_order} has no effect, this file tells its order",
                                               byte_order=byte_order))

    def check(self, plan: LoadPlan) -> None:
        """Raise CheckpointError for what cannot run here, before any tensor is read."""

    def tensors(self, checkpoint: Checkpoint, plan: LoadPlan) -> Tensors:
        """The tensors of a checkpoint that was read as loadable."""
        from ..assemble import Tensors

        return Tensors(checkpoint, plan)

    def runs(self, plan: LoadPlan, compute: str) -> list[str]:
        """Lines on how the layers run, for the report, that only this family has to say."""
        return []

    def choices(self, inputs: Mapping[str, Any]) -> Any | None:
        """The inputs of a node (name -> value) that only this family knows of, as a frozen value; None for none."""
        return None

    def select(self, folder: Folder, component: str, weights_name: str, choices: Any) -> Selection | None:
        """The files of one transformer of a folder on disk or in a repo, by names alone; None for no folder of this
        family. Raises MissingFiles for files that are not there, CheckpointError for an ambiguous choice."""
        return None

    def pattern(self, reference: str, weights_name: str, choices: Any) -> str:
        """The glob of what a load of this published repo needs, for the download command; empty for other repos."""
        return ""

    def side_file(self, name: str) -> bool:
        """Whether a JSON file of this name, beside weights, is part of the checkpoint."""
        return False

    def reads_beside(self, path: str) -> bool:
        """Whether a weight file on disk is read together with what lies beside it, by `select`: one of several that
        make a model, by its name."""
        return re.search(SPLIT, path) is not None

    def require(self, checkpoint: Checkpoint, description: CheckpointDescription, choices: Any) -> None:
        """Raise CheckpointError for a checkpoint of another family, and where `choices` contradicts its tensors."""

    def local_references(self) -> list[str]:
        """What ComfyUI's model folders hold for this family, where it is looked for in its own way."""
        return []

    def is_named(self, reference: str) -> bool:
        """Whether a file or folder is called as this family's are."""
        return False

    def colours(self) -> Mapping[str, tuple[int, int, int]]:
        """The colours (RGB) of formats that only this family names, for the layer map."""
        return {}

    def badge(self, reference: str) -> str:
        """The badge of a published checkpoint, before its bytes are here."""
        return self.title

    def usual_formats(self, reference: str) -> tuple[str, ...]:
        """The formats of what a load of a published checkpoint takes on this machine."""
        return ()

    def base_of(self, reference: str) -> str:
        """The repo whose configuration goes with weights that are published alone, and that users give as a base."""
        return ""
