"""What several of these tests save into."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """ComfyUI's output folder for the time of a file's tests."""
    import folder_paths

    before, folder = folder_paths.get_output_directory(), tmp_path_factory.mktemp("output")
    folder_paths.set_output_directory(str(folder))
    yield folder
    folder_paths.set_output_directory(before)
