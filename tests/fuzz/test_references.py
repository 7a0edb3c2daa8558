"""What is typed, pasted or sent as a reference: a card, or one sentence; no file of the system is read as a checkpoint."""

from __future__ import annotations

import os

import pytest

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.queries import NODES, Query
from quantized_transformers.views.card import card

pytestmark = pytest.mark.unit

REFERENCES = (
    "a" * 300, "a/" + "b" * 300, "owner/" + "x" * 5000, "/" + "a/" * 3000, "\0", "a\0b", "a/b\0", "../x", "~nobody/x", "~", ".", "..",
    "/", "//", "C:\\x", "\\\\server\\share", "hf:", "hf:a", "hf:a/b/c/../f", "a/b@", "https://", "http://[::1", "https://huggingface.co",
    "\ud800", "a/\ud800", "é/猫", "'a'", '""', "*", "a/*", "a/b.gguf", "{x}", "%s", "%00", "a/b/" + "c/" * 200, "/dev/zero", "/dev/stdin",
    "/proc/self/mem", "/proc/self/environ", "/etc/passwd", "{tmp}/pipe.safetensors", "{tmp}/loop", "{tmp}/loop/x", "{tmp}/empty",
    "{tmp}/nothing.safetensors", "{tmp}/nothing.safetensors/x")
BESIDE = ({"revision": "x" * 300}, {"revision": "../../x"}, {"weights_name": "y" * 300}, {"weights_name": "../x"},
          {"weights_name": "\0"}, {"weights": "defer to override"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    os.mkfifo(folder / "pipe.safetensors")
    os.symlink(folder / "loop", folder / "loop")
    (folder / "empty").mkdir()
    (folder / "nothing.safetensors").touch()
    return folder


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda text: ascii(text)[:40])
def test_one_sentence(reference, folder):
    reference = reference.replace("{tmp}", str(folder))
    asked = [(node, {}) for node in NODES] + [(NODES[0], {**one, "base": reference}) for one in BESIDE]
    for node, beside in asked:
        try:
            found = card(Query(reference, node=node, **beside))
        except CheckpointError as error:
            assert error.what and len(str(error)) < 20_000
        else:
            assert found["on_disk"] is False  # a repo id that is not here
