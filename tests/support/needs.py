"""What a test needs of the machine."""

from __future__ import annotations

import os

import pytest


def missing(reason: str, required: bool = False) -> None:
    """Skip a test that needs what is not there; in CI, and where it is `required`, fail it."""
    (pytest.fail if required or os.environ.get("CI") else pytest.skip)(reason)
