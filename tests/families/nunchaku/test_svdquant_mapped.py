"""Pages of mapped files that are let go: out of the process's memory, and still what the file holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from quantized_transformers import host
from quantized_transformers.loaders.containers.safetensors import read_header
from quantized_transformers.loaders.families.nunchaku.mapped import letting_go

pytestmark = [pytest.mark.unit, pytest.mark.skipif(sys.platform != "linux", reason="pages are let go on Linux alone")]


def resident(path: Path) -> int:
    """Bytes of a file's mappings that are in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if not line.split(maxsplit=1)[0].endswith(":"):
            inside = line.endswith(f" {path}")
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.fixture()
def path(tmp_path) -> Path:
    from safetensors.torch import save_file

    path = tmp_path / "a file, with a blank.safetensors"
    save_file({name: torch.arange(1 << 20, dtype=torch.int32) + i for i, name in enumerate("abc")}, path)
    return path


def test_mapped_pages_are_let_go_and_come_back(path):
    tensors = host.load_file(str(path))
    let_go = letting_go(tensors, [read_header(str(path))])
    for _ in range(2):
        for i, name in enumerate("abc"):
            assert torch.equal(tensors[name], torch.arange(1 << 20, dtype=torch.int32) + i)
        assert resident(path) > 12e6
        let_go()
        assert resident(path) < 1e5  # the header's page, and where a tensor begins and ends


def test_a_link_to_the_file(path, tmp_path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    tensors = host.load_file(str(link))
    assert int(tensors["a"].sum()) and resident(path) > 4e6
    letting_go(tensors, [read_header(str(link))])()
    assert resident(path) < 1e5


def test_what_is_no_mapping_of_the_file_is_left_alone(path, tmp_path):
    """As with ComfyUI's --disable-mmap: letting these pages go would zero them."""
    mapped = host.load_file(str(path))
    other = tmp_path / "other.safetensors"
    other.write_bytes(path.read_bytes())
    copies = {name: tensor.clone() for name, tensor in mapped.items()}
    mixed = {**mapped, "b": copies["b"]}
    for tensors, file in ((copies, path), (mixed, path), (mapped, other)):
        sums = {name: int(tensor.sum()) for name, tensor in tensors.items()}
        before = resident(path)
        letting_go(tensors, [read_header(str(file))])()
        assert resident(path) == before > 12e6
        assert sums == {name: int(tensor.sum()) for name, tensor in tensors.items()} and sums["b"]
