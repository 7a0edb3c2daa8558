"""How a model lies on several GPUs: SGLang checks next to nothing of it before it has loaded
(docs/sources/sglang.md, "Server: layout").

gpus = data * tensor * cfg * sequence parallel;    sequence = ulysses * ring
"""

from __future__ import annotations

from typing import NamedTuple

from ...host.texts import Text


class Layout(NamedTuple):
    """Degrees; 0 where the server is to choose."""

    gpus: int = 1
    tensor: int = 0
    ulysses: int = 0
    ring: int = 0
    cfg: int = 0
    data: int = 0

    def flags(self) -> list[str]:
        """As SGLang's arguments. One GPU is its default."""
        named = (
            ("--num-gpus", self.gpus if self.gpus > 1 else 0),
            ("--tp-size", self.tensor),
            ("--ulysses-degree", self.ulysses),
            ("--ring-degree", self.ring),
            ("--cfg-parallel-size", self.cfg),
            ("--dp-size", self.data),
        )
        return [word for flag, value in named if value for word in (flag, str(value))]

    def problem(self) -> str:
        """Why no server can have these degrees; empty when it can."""
        degrees = {
            "--gpus": self.gpus,
            "--tp": self.tensor,
            "--ulysses": self.ulysses,
            "--ring": self.ring,
            "--cfg-parallel": self.cfg,
            "--dp": self.data,
        }
        for flag, value in degrees.items():
            if value < 0 or flag == "--gpus" and value < 1:
                return Text("{flag} is {value}, and must be a positive number", flag=flag, value=value)
        given = 1
        for value in (self.tensor, self.ulysses, self.ring, self.cfg, self.data):
            given *= value or 1
        if self.gpus % given:
            return Text(
                "{degrees} make {product}, which does not divide --gpus {gpus}",
                degrees=self._words(),
                product=given,
                gpus=self.gpus,
            )
        if given != self.gpus and (self.ulysses or self.ring):  # else what is left goes to the sequence
            return Text(
                "{degrees} make {product}, and --gpus is {gpus}",
                degrees=self._words(),
                product=given,
                gpus=self.gpus,
            )
        return ""

    def sequence_parallel(self, guided: bool) -> bool:
        """Whether weights are on each GPU once more: what is left of the GPUs goes to the sequence, after two halves of
        classifier-free guidance where the model has it (`guided`)."""
        left = self.gpus // (
            (self.tensor or 1) * (self.data or 1) * (self.cfg or (2 if guided and self.gpus % 2 == 0 else 1))
        )
        return left > 1

    def _words(self) -> str:
        named = (
            ("--tp", self.tensor),
            ("--ulysses", self.ulysses),
            ("--ring", self.ring),
            ("--cfg-parallel", self.cfg),
            ("--dp", self.data),
        )
        return ", ".join(f"{flag} {value}" for flag, value in named if value)
