"""What a graph wants of a server: by what is on this machine, by repo ids where nothing is, and as strict as any file."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest

from quantized_transformers.engines.sglang import jobs
from quantized_transformers.engines.sglang.client import State
from quantized_transformers.engines.sglang.flags import Request, command
from quantized_transformers.engines.sglang.identity import parse
from quantized_transformers.engines.sglang.loras import LoRA
from quantized_transformers.engines.sglang.requests import Drawing
from quantized_transformers.engines.sglang.wanted import Server, wanted
from quantized_transformers.loaders.errors import CheckpointError

pytestmark = pytest.mark.unit
BASE, OVERRIDE = "somebody/base", "somebody/quantized"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
URL = "http://127.0.0.1:30000"


def state(name: str, path: str = "") -> State:
    return State(name, parse(name), "0.5.23", 1, ("T2I",), path)


def served(one: Server, name: str, path: str = "") -> list[str]:
    return one.verify(state(name, path), URL)


@pytest.mark.parametrize("name", [
    f"qt:{BASE}@{COMMIT[:12]}+transformer={OVERRIDE}@{COMMIT[:12]}", f"qt:{BASE}+transformer={OVERRIDE}",
    f"qt:{BASE}+transformer={OVERRIDE}/model.safetensors@{COMMIT[:12]}"])
def test_what_is_not_here_goes_by_its_repo_ids(name):
    lines = served(wanted("", BASE, OVERRIDE), name)
    assert name in lines[0] and "of any version" in lines[1] and BASE in lines[1] and OVERRIDE in lines[1]


@pytest.mark.parametrize("name", [
    f"qt:{BASE}", f"qt:{OVERRIDE}+transformer={OVERRIDE}", f"qt:{BASE}+transformer=somebody/other", f"qt:{BASE}+transformer={OVERRIDE}-2",
    f"qt:{BASE}+transformer_2={OVERRIDE}", f"qt:{BASE}+transformer={OVERRIDE}+transformer_2=x/y"])
def test_another_is_refused_with_both_names_and_the_command(name):
    with pytest.raises(CheckpointError) as refused:
        served(wanted("", BASE, OVERRIDE, revision="main"), name)
    text = str(refused.value)
    assert name in text and f"qt:{BASE}+transformer={OVERRIDE}" in text and URL in text
    assert f"serve {BASE} --override {OVERRIDE} --revision main" in text


def test_a_commit_counts():
    one = wanted("", BASE, revision=COMMIT)
    assert served(one, f"qt:{BASE}@{COMMIT[:12]}") == [f"serves what is wanted: qt:{BASE}@{COMMIT[:12]}"]
    assert "of any version" in served(one, f"qt:{BASE}")[1]
    with pytest.raises(CheckpointError, match="the server serves"):
        served(one, f"qt:{BASE}@{'f' * 12}")


def test_a_file_inside_the_repo_counts():
    one = wanted("", BASE, OVERRIDE, weights_name="b.safetensors")
    assert served(one, f"qt:{BASE}+transformer={OVERRIDE}/b.safetensors")
    with pytest.raises(CheckpointError, match="the server serves"):
        served(one, f"qt:{BASE}+transformer={OVERRIDE}/a.safetensors")


def test_two_transformers():
    one = wanted("", BASE, OVERRIDE, "somebody/low")
    assert served(one, f"qt:{BASE}+transformer={OVERRIDE}+transformer_2=somebody/low")
    with pytest.raises(CheckpointError, match="the server serves"):
        served(one, f"qt:{BASE}+transformer=somebody/low+transformer_2={OVERRIDE}")
    assert "--override-2 somebody/low" in one.command


def test_a_lora_that_a_server_starts_with_is_not_another_model():
    assert served(wanted("", BASE), f"qt:{BASE}+lora=style@{COMMIT[:12]}*0.8")


def test_a_server_without_such_a_name():
    with pytest.raises(CheckpointError, match="cannot be verified") as refused:
        served(wanted("", BASE), "FLUX.1-dev")
    assert "set check to base only" in str(refused.value) and f"serve {BASE}" in str(refused.value)
    assert "not checked" in served(wanted("", BASE, check="none"), "FLUX.1-dev")[0]


@pytest.mark.parametrize("path", [f"/hub/models--somebody--base/snapshots/{COMMIT}", "/srv/models/base", BASE])
def test_the_base_alone(path):
    one = wanted("", BASE, OVERRIDE, check="base only")
    assert "was not checked" in served(one, "FLUX.1-dev", path)[0]
    assert "was not checked" in served(one, f"qt:{BASE}+transformer=other")[0]
    for name, place in (("x", f"/hub/models--somebody--other/snapshots/{COMMIT}"), ("x", "/srv/other"), ("x", ""), ("qt:other", "/srv/base")):
        with pytest.raises(CheckpointError, match="serves the base"):
            served(one, name, place)


def test_files_of_this_machine(tmp_path, host_pipeline, monkeypatch):
    """By the same mark as `serve` gives them: content decides, and not the place."""
    from quantized_transformers.engines.sglang import flags

    monkeypatch.setattr(flags, "find", lambda given: None)
    override = tmp_path / "over"
    shutil.copytree(host_pipeline / "transformer", override)
    name = str(command(Request(str(host_pipeline), str(override))).identity)
    assert served(wanted("", str(host_pipeline), str(override)), name) == [f"serves what is wanted: {name}"]
    (override / "config.json").write_text((override / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="the server serves"):
        served(wanted("", str(host_pipeline), str(override)), name)
    shutil.rmtree(host_pipeline / "vae")  # as where only this machine's part of a base is kept
    assert "of any version" in served(wanted("", str(host_pipeline)), name.partition("+")[0])[1]


@pytest.fixture
def host_pipeline(tmp_path):
    from support import miniature

    return miniature.complete(tmp_path / "pipeline")


@pytest.mark.parametrize("reference", ["/nowhere/at/all", "../x", "x.safetensors"])
def test_a_reference_that_can_mean_nothing(reference):
    with pytest.raises(CheckpointError):
        wanted("", BASE, reference)
    with pytest.raises(CheckpointError):
        wanted("", reference)


def test_a_base_is_a_whole_pipeline(host_pipeline):
    for part in ("transformer", "transformer/diffusion_pytorch_model.safetensors"):
        with pytest.raises(CheckpointError, match="a whole pipeline"):
            wanted("", str(host_pipeline / part))


def test_it_travels_as_plain_json():
    one = wanted("flux", BASE, OVERRIDE).with_lora(LoRA("a/b", 0.5, "transformer", "merge", 8))
    assert Server.of_json(json.loads(json.dumps(one.to_json()))) == one


GOOD = wanted("", BASE).to_json()


@pytest.mark.parametrize("value", [
    None, "x", [], {}, {**GOOD, "base": []}, {**GOOD, "base": [3]}, {**GOOD, "check": "no"}, {**GOOD, "overrides": {"vae": ["x"]}},
    {**GOOD, "overrides": []}, {**GOOD, "loras": [{"path": ""}]}, {**GOOD, "server": 3}, {**GOOD, "overrides": {"transformer": [None]}}])
def test_what_no_server_model_made(value):
    with pytest.raises(CheckpointError, match="no server of Server Model"):
        Server.of_json(value)


def test_an_address_that_a_workflow_writes_is_judged_where_it_is_used(monkeypatch):
    """A prompt may hold the value itself instead of a link to Server Model."""
    monkeypatch.delenv("QT_SERVERS", raising=False)
    evil = Server.of_json({**GOOD, "server": "http://10.0.0.5:30000"})
    with pytest.raises(CheckpointError, match="calls no server that a workflow names"):
        asyncio.run(jobs.draw(evil, Drawing("a cat")))
    with pytest.raises(CheckpointError, match="calls no server that a workflow names"):
        asyncio.run(jobs.film(evil, Drawing("a cat", frames=5, fps=16)))
