"""The 23 miniature checkpoints that are laid out as in public bug reports."""

from . import others  # noqa: F401  # which registers its cases
from .cases import CASES, Case

__all__ = ["CASES", "Case"]
