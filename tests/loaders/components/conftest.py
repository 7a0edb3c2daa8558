"""What the tests of text encoders share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

READ = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "spiece.model")
KEPT = 8  # vocabularies; each takes some tens of megabytes


@pytest.fixture(scope="package", autouse=True)
def vocabularies_are_read_once():
    """The pack reads the folder's and the host's vocabulary at each load, and the tests load the same six some hundred
    times. A folder whose files have the same bytes gives what the real reader gave before; errors are raised anew."""
    from quantized_transformers.loaders.components.text_encoders import vocabulary

    read, kept = vocabulary.read, {}

    def by_content(folder: Path) -> Any:
        files = [folder / name for name in READ if (folder / name).is_file()]
        key = tuple((file.name, hashlib.sha256(file.read_bytes()).digest()) for file in files)
        if key not in kept:
            kept[key] = read(folder)
            if len(kept) > KEPT:
                del kept[next(iter(kept))]
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "read", by_content)
        yield
