"""What is known of a checkpoint, as a plain value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..host.texts import Text, joined
from ..quant.stored import ByteOrder
from .architectures import Dims, Naming
from .errors import CheckpointError
from .words import grouped


@dataclass
class CheckpointDescription:
    """A plain value: printable and JSON-able.

    `formats` counts stored Linear layers by format, `layers` gives each one's format by stored module name; `problems`
    is empty when the checkpoint can be loaded. `full_precision` are the layers whose metadata ask for full-precision
    matmul, `ranks` the low ranks of SVDQuant layers. Sizes are bytes.
    """

    reference: str
    files: list[str]
    bytes_on_disk: int
    architecture: str
    naming: Naming
    dims: Dims
    family: str
    byte_order: ByteOrder = ByteOrder()
    producer: str = ""
    declared_in: list[str] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    full_precision: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    static_activations: int = 0
    dynamic_activations: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def require_loadable(self) -> None:
        """Raise CheckpointError naming the first ten problems, if there are any."""
        if self.problems:
            problems = grouped(self.problems)
            shown = problems[:10]
            if len(problems) > 10:
                shown.append(Text("and {count} more", count=len(problems) - 10))
            lost = any(problem.startswith("missing tensor") for problem in problems)
            raise CheckpointError(Text("this {architecture} checkpoint cannot be loaded:\n  - {problems}",
                                       architecture=self.architecture, problems=joined("\n  - ", shown)),
                                  self.reference, Text("download it again, or report it to its publisher") if lost else
                                  Text("take another checkpoint of this model, or report it to its publisher"))

    def to_json(self) -> dict[str, Any]:
        """The description as JSON-able values."""
        return {**vars(self), "naming": self.naming.style, "byte_order": self.byte_order._asdict()}
