"""One server for the tests that only open graphs."""

from __future__ import annotations

import os
import shutil

import pytest
from browser.definitions import place_models

from support.browser import Frontend, missing
from support.pack import COMFYUI
from support.server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    reason = missing()
    if reason and (os.environ.get("CI") or os.environ.get("QT_REQUIRE_BROWSER")):
        pytest.fail(f"the browser tests must run here, but {reason}")
    if reason:
        pytest.skip(reason)
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
