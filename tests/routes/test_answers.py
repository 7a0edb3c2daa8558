"""The process that reads files for the web routes, what cards say against the host's own numbers, and download jobs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from quantized_transformers import host
from quantized_transformers.loaders import model
from quantized_transformers.loaders.download_plans import Asked
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.queries import Query
from quantized_transformers.routes import downloads
from quantized_transformers.views import catalog, helper
from quantized_transformers.views.card import card, judged
from quantized_transformers.views.confine import OutsideError, TooLargeError, check_headers, confined
from support import common, host_models, svdquant_models, text_gguf
from support import text_encoders as tiny_texts
from support.pack import PACK

pytestmark = pytest.mark.unit

STORED = ("bf16", "mixed", "fp8", "nvfp4")


@pytest.mark.parametrize("name", STORED)
def test_expected_memory_is_what_the_host_counts(tiny, name):
    """Within what re-layout adds: NVFP4's scales in 128 x 4 tiles, fused modules' scales; 3 % at these tiny sizes."""
    folder = str(getattr(tiny, name))
    counted = model.load(model.Request(folder)).patcher.model_size()
    assert judged(card(Query(folder)))["vram"] == pytest.approx(counted, rel=0.03)


def test_expected_memory_of_svdquant(tmp_path):
    path = str(svdquant_models.make_flux().write(tmp_path))
    counted = model.load(model.Request(path, backend="auto")).patcher.model_size()
    assert judged(card(Query(path)))["vram"] == pytest.approx(counted, rel=0.05)


def test_the_process_needs_no_torch_and_survives(monkeypatch, tiny):
    """It answers without torch and ComfyUI; when it is killed or hangs the next question starts another."""
    monkeypatch.setattr(helper, "_START", f"import sys; sys.modules['torch'] = None; {helper._START}")
    monkeypatch.setattr(host, "model_folders", lambda: [str(tiny.fp8.parent)])
    asker = helper.Helper()
    try:
        query = vars(Query("fp8", "QT_ApplyTransformerOverride", base="pipeline"))
        first = asker.ask("describe", query)
        assert first["architecture"] == "FLUX.1" and first["mismatch"] is None
        process = asker._process
        process.kill()
        process.wait()
        assert asker.ask("describe", query) == first and asker._process.pid != process.pid
        if os.name == "posix":
            monkeypatch.setattr(helper, "SECONDS", 0.3)
            os.kill(asker._process.pid, signal.SIGSTOP)
            with pytest.raises(helper.HelperError, match="could not be read within"):
                asker.ask("describe", query)
            monkeypatch.undo()
    finally:
        asker.close()


def test_text_encoders_with_an_override(monkeypatch, tmp_path):
    """By the same process without torch: the base has no weights of what is replaced, the file is in ComfyUI's folder of
    text encoders; what lies elsewhere is not looked at."""
    base = tiny_texts.base("wan", tmp_path / "models" / "base")
    next((base / "text_encoder").glob("*.safetensors")).unlink()
    for folder in ("texts", "else"):
        (tmp_path / folder).mkdir()
    file = text_gguf.write(tiny_texts.umt5(128, d_ff=64), tmp_path / "texts" / "umt5.gguf", "t5encoder", "Q8_0")
    outside = shutil.copy(file, tmp_path / "else")
    monkeypatch.setattr(helper, "_START", f"import sys; sys.modules['torch'] = None; {helper._START}")
    monkeypatch.setattr(host, "model_folders", lambda: [str(tmp_path / "models")])
    monkeypatch.setattr(host, "text_folders", lambda: [str(tmp_path / "texts")])
    monkeypatch.setattr(host, "folder_kinds", lambda: {str(tmp_path / "texts"): ["text_encoders"]})
    asker = helper.Helper()
    try:
        there = [entry.reference for entry in catalog.entries() if not entry.known]
        assert there == [], "a pipeline without a transformer, and text encoders, are nothing for the catalog"
        query = Query("base", "QT_LoadBaseTextEncoder", override="umt5.gguf", override_2="none")
        found = asker.ask("describe", vars(query))
        assert found["on_disk"] and {one["format"] for one in found["formats"]} >= {"Q8_0"}
        assert found["architecture"] == "umt5.gguf" and found["size"] < 1.01 * file.stat().st_size
        with pytest.raises(helper.HelperError, match="no .safetensors file"):
            asker.ask("describe", vars(replace(query, override="none")))
        with pytest.raises(helper.HelperError) as refused:
            asker.ask("describe", vars(replace(query, override_reference=str(outside))))
        assert refused.value.kind == "outside"
    finally:
        asker.close()


def test_models_that_only_comfyui_knows(monkeypatch, tmp_path, capfd):
    """The process starts a ComfyUI for the first of them, which looks for no device."""
    common.save(tmp_path, host_models.make("Wan VACE"), None, name="model.safetensors")
    monkeypatch.setattr(host, "model_folders", lambda: [str(tmp_path)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # of which there is none: whoever looks for it fails
    asker = helper.Helper()
    try:
        found = asker.ask("describe", vars(Query("model.safetensors", "QT_LoadBaseModel", layers=True)))
    finally:
        asker.close()
    assert found["architecture"] == "WAN21_Vace" and not found["problems"]
    assert any(row.startswith("vace_blocks") for row in found["layer_map"]["rows"])
    said = capfd.readouterr().err
    assert "lacks" not in said and "Traceback" not in said and "Device:" not in said, said


def test_the_process_ends_with_its_server():
    process = subprocess.Popen([sys.executable, "-c", helper._START, str(PACK / "__main__.py"), ""],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.close()
    assert process.wait(20) == 0
    process.stdout.close()


def test_limits(monkeypatch, tmp_path):
    from quantized_transformers.views import confine

    monkeypatch.setattr(host, "model_folders", lambda: [str(tmp_path)])
    (tmp_path / "many").mkdir()
    for i in range(12):
        (tmp_path / "many" / f"{i}.safetensors").write_bytes((40).to_bytes(8, "little") + b" " * 40)
    monkeypatch.setattr(confine, "MAX_ENTRIES", 12)
    assert len(confined("many").paths) == 1
    monkeypatch.setattr(confine, "MAX_ENTRIES", 11)
    with pytest.raises(TooLargeError):
        confined("many")
    files = sorted(map(str, (tmp_path / "many").iterdir()))
    monkeypatch.setattr(confine, "MAX_HEADERS", 480)
    check_headers(files)
    monkeypatch.setattr(confine, "MAX_HEADERS", 479)  # together, though each is short
    with pytest.raises(TooLargeError):
        check_headers(files)


def test_a_large_gguf_file_is_no_large_header(tmp_path):
    """Its first eight bytes, as safetensors has them, would be a header of 14 GB."""
    with open(tmp_path / "large.gguf", "wb") as file:
        file.write(b"GGUF\x03\0\0\0")
        file.truncate(16 << 30)
    check_headers([str(tmp_path / "large.gguf")])


def test_stamps_follow_the_files(monkeypatch, tmp_path):
    """Any file that a reader could open changes the stamp, and a link's target does."""
    monkeypatch.setattr(host, "model_folders", lambda: [str(tmp_path / "models")])
    folder = tmp_path / "models" / "it" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    seen = [confined("it").stamp]
    assert confined("it").stamp == seen[0]
    (folder / "config.json").write_text("{ }", encoding="utf-8")
    seen.append(confined("it").stamp)
    os.utime(folder / "config.json", ns=(1, 1))
    seen.append(confined("it").stamp)
    (folder / "x.safetensors").write_bytes(b"")
    seen.append(confined("it").stamp)
    assert len(set(seen)) == 4
    (tmp_path / "models2").mkdir()
    (folder / "out").symlink_to(tmp_path / "models2")  # a name that only begins as the folder's does
    with pytest.raises(OutsideError):
        confined("it")


def test_too_many_downloads(monkeypatch):
    """Those that wait can be cancelled before their turn, and one more than the line holds is refused."""
    monkeypatch.setattr(downloads, "locate_parts", lambda *_: pytest.fail("it was not its turn"))
    line = downloads.Downloads()
    for _ in range(downloads.AT_ONCE):
        line._turns.acquire()

    def start(reference: str, hub: str = "") -> downloads.Job:
        return line.start(Asked((Query(reference),), "cache", hub, frozenset()))

    jobs = [start(f"owner/name{i}") for i in range(downloads.WAITING)]
    assert start("owner/name0") is jobs[0]
    for other in (("owner/more",), ("owner/name0", "modelscope")):
        with pytest.raises(downloads.TooManyError):
            start(*other)
    with pytest.raises(CheckpointError, match="only a repo id"):
        start("file.safetensors")
    for job in jobs:
        line.cancel(job.id)
    deadline = time.time() + 10
    while any(job.state != "cancelled" for job in jobs) and time.time() < deadline:
        time.sleep(0.02)
    assert {job.state for job in jobs} == {"cancelled"}


# A card that never ends, takes all memory, waits for a disk, says more than anybody reads, or ends the process.
HARMFUL = """
from quantized_transformers.routes import answers
from quantized_transformers.views import queue_check
real = answers.card
def card(query):
    import os, time
    name = query.reference
    if name.startswith("slow"):
        while True:
            pass
    if name == "fat":
        kept = []
        while True:
            kept.append(bytearray(10_000_000))
    if name == "asleep":
        time.sleep(60)
    if name == "long":
        return {"x": ["y" * 1_000_000] * 40}
    if name == "dead":
        os._exit(3)
    return real(query)
answers.card = queue_check.card = card
parse = answers.strict.parse
answers.strict.parse = lambda text, *more, **options: (
    card(answers.Query("slow")) if text == '"slow"' else parse(text, *more, **options))
"""


@pytest.fixture()
def harmed(monkeypatch, tiny, tmp_path):
    for name in ("slow", "slower", "fat", "asleep", "long", "dead", "good"):
        shutil.copytree(tiny.fp8, tmp_path / name)
    (tmp_path / "harmful.py").write_text(HARMFUL, encoding="utf-8")
    answers = "from quantized_transformers.routes.answers"
    monkeypatch.setattr(helper, "_START", helper._START.replace(
        answers, f"exec(open({str(tmp_path / 'harmful.py')!r}).read()); {answers}"))
    monkeypatch.setattr(host, "model_folders", lambda: [str(tmp_path)])
    monkeypatch.setattr(helper, "PROCESSOR", 0.5)
    asker = helper.Helper()
    asker.ask("nothing")
    yield asker
    asker.close()


def said(asker: helper.Helper, name: str, **more) -> str:
    """The refusal of a folder."""
    with pytest.raises(helper.HelperError) as error:
        asker.ask("describe", vars(Query(name, **more)))
    assert error.value.kind == "bad"
    return error.value.what


@pytest.mark.parametrize(("name", "words"), [
    ("slow", "takes the processor more than 0.5 s"), ("fat", "more than 200,000,000 bytes of memory"),
    ("asleep", "not be read within 3 s"), ("long", "longer than 24,000,000 bytes")])
def test_what_ends_the_process_is_not_read_again(harmed, monkeypatch, tmp_path, name, words):
    """Whatever else is asked of it; until its files change, or for a time. All others are answered meanwhile."""
    monkeypatch.setattr(helper, "SECONDS", 3)
    monkeypatch.setattr(helper, "MEMORY", 200_000_000)
    monkeypatch.setattr(helper, "PROCESSOR", 30 if name == "fat" else 0.5)
    first = said(harmed, name)
    assert words in first
    assert harmed.ask("describe", vars(Query("good")))["architecture"] == "FLUX.1"
    process = harmed._process.pid
    for node in ("QT_LoadBaseModel", "QT_InspectCheckpoint", "QT_ApplyTransformerOverride"):
        assert said(harmed, name, node=node, layers=True) == first
    assert harmed._process.pid == process, "no process was ended for it again"
    os.utime(tmp_path / name / "config.json", (1, 1))
    said(harmed, name)
    assert harmed._process is None
    monkeypatch.setattr(helper, "AGAIN", 0.0)
    said(harmed, name)
    assert harmed._process is None


def test_a_process_that_ends_by_itself_is_replaced(harmed):
    with pytest.raises(helper.HelperError, match="ends at once"):
        harmed.ask("describe", vars(Query("dead")))
    assert harmed.ask("describe", vars(Query("good")))["architecture"] == "FLUX.1"


def test_a_workflow_or_prompt_that_ends_the_process(harmed):
    """Of a workflow there are no files that could change; a prompt's check reads those of a badge."""
    for _ in range(2):
        with pytest.raises(helper.HelperError, match="more than 0.5 s") as error:
            harmed.ask("migrate", '"slow"')
        assert error.value.kind == "bad" and harmed._process is None
    prompt = {"1": {"class_type": "QT_LoadBaseModel", "inputs": {"base_model": "slower"}}}
    of = {"prompt": prompt, "node": "1", "outputs": {},
          "refers": {"QT_LoadBaseModel": {"input": "base_model", "others": [], "kind": None}}}
    for ended in (True, False):
        with pytest.raises(helper.HelperError, match="more than 0.5 s"):
            harmed.ask("check", of)
        assert (harmed._process is None) is ended
