"""What is asked of the host while it starts: as little as there is, and without the rest of this folder, which is for
what comes later, and says what is wrong where something is."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .server import server

OWN_FOLDER_KEY = "diffusers_components"


def register_model_folder() -> None:
    """Add models/diffusers_components to ComfyUI's folders, beside what extra_model_paths.yaml says of that key."""
    import folder_paths

    try:
        folder_paths.add_model_folder_path(OWN_FOLDER_KEY, os.path.join(folder_paths.models_dir, OWN_FOLDER_KEY))
    except (AttributeError, TypeError):
        from .check import lacking

        if not lacking("folders"):  # which says so
            raise


def routes() -> Any | None:
    """The route table that the server adds to itself after all packs are loaded; None where no server runs.

    What is put into it is served with and without the prefix /api.
    """
    return getattr(server(), "routes", None)


def on_prompt(handler: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Have `handler` see every prompt that is posted, and return it, before the server checks it in the same task.
    Where no server runs there are none."""
    try:
        there = server()
        if there is not None:
            there.add_on_prompt_handler(handler)
    except (AttributeError, TypeError):
        from .check import lacking

        if not lacking("checks before the queue"):  # which says so
            raise


def sampler_names() -> list[str]:
    """The samplers of the host's KSampler node."""
    return _names("SAMPLERS")


def scheduler_names() -> list[str]:
    """The schedulers of the host's KSampler node."""
    return _names("SCHEDULERS")


def _names(kind: str) -> list[str]:
    try:
        import comfy.samplers

        return list(getattr(comfy.samplers.KSampler, kind))
    except (ImportError, AttributeError):
        from .check import require

        require("comparing")  # says so
        raise
