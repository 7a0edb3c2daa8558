"""One server for the tests that only open graphs."""

from __future__ import annotations

import shutil

import pytest
from browser.definitions import place_models

from support.browser import Frontend, require
from support.pack import COMFYUI
from support.server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    require()
    base = tmp_path_factory.mktemp("browser")
    (base / "input").mkdir()
    shutil.copy(COMFYUI / "input" / "example.png", base / "input")  # every ComfyUI has it
    place_models(base)
    with Server(base) as running:
        yield running


@pytest.fixture(scope="module")  # a process has one Playwright at a time
def frontend(server):
    with Frontend(server.port) as running:
        yield running
