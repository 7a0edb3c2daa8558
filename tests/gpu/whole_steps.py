"""Stage 4: whole steps of FLUX.1 at 1024 x 1024 in every format: time, the host's share, memory."""

from __future__ import annotations

from .machine import Where
from .models import ARMS, measured, step
from .rows import Rows

LIMIT = 540


def run(rows: Rows, where: Where) -> None:
    for name, arm in ARMS.items():
        measured(rows, name, "FLUX.1", arm, where, lambda patcher: step(patcher, where))
