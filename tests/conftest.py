"""Shared fixtures: the real host in this process, and tiny FLUX.1 checkpoints by diffusers and nvidia-modelopt."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import pytest

from support.pack import start_comfy

start_comfy()

from support import flux

# Modules keep half a million objects for good. By Python's own numbers (700, 10, 10) the collector looks through all of
# them often enough to take a twelfth of the time; with these, models still go, and the most memory held is the same.
gc.set_threshold(10_000, 10, 10)

MARKS = ("host", "browser", "parity", "unit")


@pytest.hookimpl(tryfirst=True)  # before pytest takes out what -m does not want
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of servers first, those of small tests last: where files are shared out, no worker is left with a long one.

    Of a test marked part(n) about one case of n is for every run, by its name, so that other cases change nothing."""
    for item in items:
        part = item.get_closest_marker("part")
        if part and crc32(item.name.encode()) % part.args[0]:
            item.add_marker("full")

    def place(item: pytest.Item) -> int:
        module = item.getparent(pytest.Module)
        return next((at for at, mark in enumerate(MARKS) if module and module.get_closest_marker(mark)), len(MARKS))
    items.sort(key=place)


_setting_up: list[pytest.FixtureDef] = []
_mktemp = pytest.TempPathFactory.mktemp


def _mktemp_of_fixture(factory: pytest.TempPathFactory, basename: str, numbered: bool = True) -> Path:
    folder = _mktemp(factory, basename, numbered)
    if _setting_up and _setting_up[-1].argname != "tmp_path":  # pytest clears that one itself, kept where the test failed
        _setting_up[-1].addfinalizer(lambda: shutil.rmtree(folder, ignore_errors=True))
    return folder


pytest.TempPathFactory.mktemp = _mktemp_of_fixture  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef):
    """A fixture's folders go with it: pytest keeps them to the end, when a run's models are more than many disks have."""
    _setting_up.append(fixturedef)
    try:
        return (yield)
    finally:
        _setting_up.pop()


@dataclass(frozen=True)
class Tiny:
    """Folders of one seeded tiny FLUX.1 (2 heads, 2 + 2 blocks): a BF16 pipeline and its real ModelOpt exports."""

    pipeline: Path
    bf16: Path
    fp8: Path  # everything FP8 but proj_out, each of q, k, v with its own scale
    mixed: Path  # modulation, feed-forward and embedders left in BF16, as published FLUX.1 checkpoints have it
    sharded: Path  # as fp8, in several files with an index
    nvfp4: Path  # everything NVFP4 but proj_out; proj_mlp has another tensor scale than q, k, v
    nvfp4_mixed: Path  # as published: modulation, feed-forward, embedders and proj_mlp left in BF16


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    model = flux.make()
    made = Tiny(root / "pipeline", root / "pipeline" / "transformer", root / "fp8", root / "mixed", root / "sharded",
                root / "nvfp4", root / "nvfp4_mixed")
    model.save_pretrained(made.bf16)
    (made.pipeline / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    flux.export_fp8(model, made.fp8)
    flux.export_fp8(model, made.mixed, keep=flux.FALLBACK)
    flux.export_fp8(model, made.sharded, max_shard_size="3MB")
    flux.export_nvfp4(model, made.nvfp4)
    flux.export_nvfp4(model, made.nvfp4_mixed, keep=[*flux.FALLBACK, r"single_transformer_blocks\.\d+\.proj_mlp"])
    assert len(list(made.sharded.glob("*.safetensors"))) > 1
    return made


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
    from support import text_encoders_llm as llm

    folder = tmp_path_factory.mktemp("qwen")
    llm.qwen_tokenizer().save_pretrained(folder)
    return folder
