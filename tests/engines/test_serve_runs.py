"""`serve` on SGLang itself: its arguments as SGLang reads them, and a server that it starts, asked by `doctor`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from quantized_transformers.engines.sglang import flags, report
from quantized_transformers.engines.sglang.flags import Request, command
from quantized_transformers.engines.sglang.identity import parse
from quantized_transformers.engines.sglang.installed import find
from quantized_transformers.engines.sglang.layout import Layout
from support import sglang
from support.miniature import psnr
from support.pack import PACK
from support.sglang_real import DRAWN, by_diffusers, pixels

pytestmark = pytest.mark.server


def test_the_installation_of_the_tests_is_found(server_environment):
    found = find(str(sglang.program("sglang")))
    assert found is not None and found.sglang == "0.5.23" and found.torch and found.gpus == () and not found.engine


@pytest.mark.parametrize("layout, read", [
    (Layout(), {"num_gpus": 1}), (Layout(4, ulysses=2, ring=2), {"num_gpus": 4, "ulysses_degree": 2, "ring_degree": 2}),
    (Layout(2, data=2), {"num_gpus": 2, "dp_size": 2}), (Layout(8), {"num_gpus": 8, "ulysses_degree": 8})])
def test_what_it_writes_is_what_sglang_reads(server_args, miniature_folder, override_folder, layout, read, monkeypatch):
    monkeypatch.setattr(flags, "find", lambda given: None)
    made = command(Request(str(miniature_folder), str(override_folder), layout=layout, port=31000))
    assert made.argv[:2] == ["sglang", "serve"] and not made.refused
    found = server_args(made.argv[2:])
    assert found.get("error") is None
    assert found["model_path"] == str(miniature_folder) and found["component_paths"] == {"transformer": str(override_folder)}
    assert found["served_model_name"] == str(made.identity) and found["pipeline_config"] == "FluxPipelineConfig"
    assert (found["host"], found["port"], found["scheduler_port"]) == ("127.0.0.1", 31000, 31100)
    assert found["output_path"] in ("", None) and found["strict_ports"] is True and found["backend"] == "sglang"
    assert {name: found[name] for name in read} == read


def test_a_server_that_it_starts_says_what_it_serves(server_override, server, miniature_folder, override_folder):
    """The command, run as a user runs it, with an override; `server` draws with the base alone."""
    found = report.of_server(server_override.url)
    assert found["healthy"] and found["num_gpus"] == 1 and found["tasks"] == ["T2I"] and found["checks"] == []
    expected = command(Request(str(miniature_folder), str(override_folder))).identity
    assert parse(found["identity"]) == expected and expected.overrides[0][1].name == "other"
    assert parse(report.of_server(server.url)["identity"]) == command(Request(str(miniature_folder))).identity
    done = subprocess.run([sys.executable, str(PACK), "doctor", "--server", server_override.url, "--json"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout) == found


def test_the_override_draws(server_override, server, miniature_folder, override_folder):
    """As diffusers does with it, and not as the base does."""
    from diffusers import FluxTransformer2DModel

    drawn = pixels(server_override.picture(**DRAWN, seed=7))
    other = FluxTransformer2DModel.from_pretrained(override_folder, torch_dtype=torch.bfloat16)
    assert psnr(drawn, by_diffusers(miniature_folder, 7, other), 255) >= 45
    assert psnr(drawn, pixels(server.picture(**DRAWN, seed=7)), 255) < 35
