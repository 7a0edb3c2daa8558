"""`serve` on SGLang itself: its arguments as SGLang reads them, and a server that it starts, asked by `doctor`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.engines.sglang import flags, report
from quantized_transformers.engines.sglang.flags import Request, command
from quantized_transformers.engines.sglang.identity import parse
from quantized_transformers.engines.sglang.installed import find
from quantized_transformers.engines.sglang.layout import Layout
from support import miniature, sglang
from support.pack import PACK

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def other(miniature_folder, tmp_path_factory):
    """A BF16 transformer that is another than the miniature's: an override that this CPU runs."""
    folder = tmp_path_factory.mktemp("override") / "other"
    shutil.copytree(miniature_folder / "transformer", folder)
    file, = folder.glob("*.safetensors")
    save_file({name: tensor + 0.05 * tensor.abs().mean() * torch.sign(tensor) for name, tensor in load_file(file).items()}, str(file))
    return folder


def test_the_installation_of_the_tests_is_found(server_environment):
    found = find(str(sglang.program("sglang")))
    assert found is not None and found.sglang == "0.5.23" and found.torch and found.gpus == () and not found.engine


@pytest.mark.parametrize("layout, read", [
    (Layout(), {"num_gpus": 1}), (Layout(4, ulysses=2, ring=2), {"num_gpus": 4, "ulysses_degree": 2, "ring_degree": 2}),
    (Layout(2, data=2), {"num_gpus": 2, "dp_size": 2}), (Layout(8), {"num_gpus": 8, "ulysses_degree": 8})])
def test_what_it_writes_is_what_sglang_reads(server_args, miniature_folder, other, layout, read, monkeypatch):
    monkeypatch.setattr(flags, "find", lambda given: None)
    made = command(Request(str(miniature_folder), str(other), layout=layout, port=31000))
    assert made.argv[:2] == ["sglang", "serve"] and not made.refused
    found = server_args(made.argv[2:])
    assert found.get("error") is None
    assert found["model_path"] == str(miniature_folder) and found["component_paths"] == {"transformer": str(other)}
    assert found["served_model_name"] == str(made.identity) and found["pipeline_config"] == "FluxPipelineConfig"
    assert (found["host"], found["port"], found["scheduler_port"]) == ("127.0.0.1", 31000, 31100)
    assert found["output_path"] in ("", None) and found["strict_ports"] is True and found["backend"] == "sglang"
    assert {name: found[name] for name in read} == read


def test_a_server_that_it_starts_says_what_it_serves(server_environment, miniature_folder, other, server, tmp_path):
    """The command, run as a user runs it, with an override; `server` draws with the base alone."""
    port = sglang.free_ports(2)
    start = [sys.executable, str(PACK), "serve", str(miniature_folder), "--override", str(other), "--port", str(port), "--sglang",
             str(sglang.program("sglang")), "--run", "--", "--warmup-mode", "off"]
    with sglang.Server(tmp_path, port, start) as running:
        found = report.of_server(f"http://127.0.0.1:{port}")
        assert found["healthy"] and found["num_gpus"] == 1 and found["tasks"] == ["T2I"] and found["checks"] == []
        expected = command(Request(str(miniature_folder), str(other))).identity
        assert parse(found["identity"]) == expected and expected.overrides[0][1].name == "other"
        done = subprocess.run([sys.executable, str(PACK), "doctor", "--server", f"http://127.0.0.1:{port}", "--json"],
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0 and json.loads(done.stdout) == found
        drawn = {"prompt": "a cat", "size": f"{miniature.SIZE}x{miniature.SIZE}", "num_inference_steps": 2, "seed": 7,
                 "guidance_scale": 1.0, "generator_device": "cpu", "output_format": "png"}
        assert running.picture(**drawn) != server.picture(**drawn), "the override draws"
