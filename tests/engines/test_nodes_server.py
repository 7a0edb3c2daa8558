"""The server nodes in a real ComfyUI, on SGLang's real servers: pictures, identities, LoRAs, Cancel, two servers at once."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from typing import Any

import numpy
import pytest

from quantized_transformers.engines.sglang.flags import Request, command
from support.miniature import psnr
from support.server_graphs import TIMEOUT, all_busy, drawn, failed, is_busy, picture, pictures, queued, report
from support.sglang_real import DRAWN, by_diffusers, pixels, with_loras

pytestmark = pytest.mark.server


def raw(server, **changed: Any) -> numpy.ndarray:
    """What the server draws for a client that sends no more than DRAWN and these."""
    return pixels(server.picture(**{**DRAWN, "seed": 7, **changed}))


def active(server) -> dict:
    return server.request("/v1/list_loras")[1]["active"]


def test_a_picture(comfy, server, miniature_folder):
    """What diffusers draws from that noise; each seed its own."""
    history = comfy.run(picture("cat", miniature_folder, count=2), TIMEOUT)
    first, second = pictures(comfy, history, "cat")
    assert psnr(first, by_diffusers(miniature_folder, 7), 255) >= 45
    assert numpy.array_equal(first, raw(server)) and numpy.array_equal(second, raw(server, seed=8))
    assert str(command(Request(str(miniature_folder))).identity) in report(history) and "0.5.23" in report(history)


def test_negative_prompts_of_a_model_with_distilled_guidance(comfy, server, miniature_folder):
    """An empty one is none: sent, it would turn true CFG on. One that is typed does, and the report says so."""
    plain = drawn(comfy, picture("cat", miniature_folder, cfg=3.5))
    assert numpy.array_equal(plain, raw(server, guidance_scale=3.5))
    history = comfy.run(picture("cat", miniature_folder, cfg=3.5, negative_prompt="a rocket"), TIMEOUT)
    typed, = pictures(comfy, history, "cat")
    assert numpy.array_equal(typed, raw(server, guidance_scale=3.5, negative_prompt="a rocket"))
    assert not numpy.array_equal(typed, plain) and "true CFG" in report(history)


def test_a_server_of_something_else_is_refused(comfy, server, server_override, miniature_folder, override_folder):
    """With both names, and the command that starts the right one."""
    plain, other = (str(command(Request(str(miniature_folder), override)).identity) for override in ("", str(override_folder)))
    for graph, found, wanted in ((picture("cat", miniature_folder, "override"), other, plain),
                                 (picture("cat", miniature_folder, "base", override_folder), plain, other)):
        said = failed(comfy, graph)
        assert f"the server serves {found}, and wanted is {wanted}\n" in said
        line, = re.findall(r"python \S+ serve .*", said)
        start = shlex.split(line)
        shown = subprocess.run([sys.executable, *start[1:], "--json"], capture_output=True, text=True, check=False)
        assert json.loads(shown.stdout)["identity"] == wanted


def test_two_servers_in_one_graph(comfy, server, server_override, miniature_folder, override_folder):
    """At the same time; the override's picture is its own."""
    graph = {**picture("cat", miniature_folder, "base"), **picture("other", miniature_folder, "override", override_folder)}
    history = comfy.run(graph, TIMEOUT)
    (plain,), (other,) = pictures(comfy, history, "cat"), pictures(comfy, history, "other")
    assert numpy.array_equal(plain, raw(server)) and numpy.array_equal(other, raw(server_override))
    assert psnr(plain, other, 255) < 35
    prompt = queued(comfy, {**picture("cat", miniature_folder, "base", steps=200),
                            **picture("other", miniature_folder, "override", override_folder, steps=200)})
    both, end = False, time.time() + TIMEOUT
    while not both and time.time() < end and prompt not in comfy.get(f"/history/{prompt}"):
        both = all_busy(server, server_override)
    assert both
    pictures(comfy, comfy.wait_for(prompt, TIMEOUT), "other")


class TestLoras:
    @pytest.fixture(autouse=True)
    def without(self, server):
        yield
        assert server.request("/v1/unmerge_lora_weights", {"target": "all"})[0] == 200

    def test_one_on_and_off(self, comfy, server, miniature_folder, loras):
        before = drawn(comfy, picture("cat", miniature_folder))
        found = drawn(comfy, picture("cat", miniature_folder, loras=[(loras[0], 0.8)]))
        assert psnr(found, by_diffusers(miniature_folder, 7, with_loras(miniature_folder, (loras[0], 0.8))), 255) >= 40
        assert psnr(found, before, 255) < 25 and active(server)["transformer"][0]["strengths"] == [0.8]
        assert numpy.array_equal(drawn(comfy, picture("cat", miniature_folder)), before) and active(server) == {}

    def test_two_together(self, comfy, server, miniature_folder, loras):
        pair = [(loras[0], 0.5), (loras[1], -0.25)]
        found = drawn(comfy, picture("cat", miniature_folder, loras=pair))
        assert psnr(found, by_diffusers(miniature_folder, 7, with_loras(miniature_folder, *pair)), 255) >= 40

    def test_a_transformer_that_the_model_has_not(self, comfy, server, miniature_folder, loras):
        """The server says ok to it, and does nothing."""
        said = failed(comfy, picture("cat", miniature_folder, loras=[(loras[0], 1.0, "transformer_2")]))
        assert "the server said yes to the LoRAs, and transformer_2 has none on" in said

    def test_a_file_that_is_not_there(self, comfy, server, miniature_folder, tmp_path):
        said = failed(comfy, picture("cat", miniature_folder, loras=[(tmp_path / "no.safetensors", 1.0)]))
        assert str(tmp_path / "no.safetensors") in said and "server's machine" in said

    def test_another_client_changes_them(self, comfy, server, miniature_folder, loras):
        """While a picture is drawn: nobody can tell with which it was."""
        prompt = queued(comfy, picture("cat", miniature_folder, steps=150))
        end = time.time() + 60
        while not is_busy(server) and time.time() < end:
            pass
        assert server.request("/v1/set_lora", {"lora_nickname": "theirs", "lora_path": str(loras[1]), "strength": 0.5})[0] == 200
        said = str(comfy.wait_for(prompt, TIMEOUT)["status"])
        assert "another client changed the LoRAs" in said and "theirs" in said
        assert numpy.array_equal(drawn(comfy, picture("cat", miniature_folder)), raw(server)), "the next one takes them away"


def test_cancel(comfy, server, miniature_folder):
    """Is heard at once, while the server goes on; what comes next is drawn after that, and is right."""
    prompt = queued(comfy, picture("cat", miniature_folder, steps=200))
    end = time.time() + 60
    while not is_busy(server) and time.time() < end:
        pass
    start = time.time()
    comfy.post("/interrupt", {})
    history = comfy.wait_for(prompt, TIMEOUT)
    spent = time.time() - start  # 0.2 s where nothing else runs
    assert is_busy(server) and spent < 1
    assert any(kind == "execution_interrupted" for kind, _ in history["status"]["messages"])
    assert numpy.array_equal(drawn(comfy, picture("cat", miniature_folder)), raw(server))
