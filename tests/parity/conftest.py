"""What several of these tests save into, and a tokenizer that two files read."""

from __future__ import annotations

import pytest

from support import text_encoders_llm as llm


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """ComfyUI's output folder for the time of a file's tests."""
    import folder_paths

    before, folder = folder_paths.get_output_directory(), tmp_path_factory.mktemp("output")
    folder_paths.set_output_directory(str(folder))
    yield folder
    folder_paths.set_output_directory(before)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    """Qwen's tokenizer as transformers saves it; nobody writes into it."""
    folder = tmp_path_factory.mktemp("qwen")
    llm.qwen_tokenizer().save_pretrained(folder)
    return folder
