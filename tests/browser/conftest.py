"""One server for the tests that only open graphs."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from browser.definitions import place_models
from filelock import FileLock

from support.browser import Frontend, problems_of_the_host, require
from support.pack import COMFYUI
from support.server import Server


@pytest.fixture(scope="session")
def known(tmp_path_factory):
    """What this host's page complains of without the pack: looked at once, for all processes of a run."""
    require()
    base = tmp_path_factory.getbasetemp()
    file = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "problems_of_the_host.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(json.dumps(problems_of_the_host(tmp_path_factory.mktemp("host"))), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


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
def frontend(known, server):
    with Frontend(server.port, known=known) as running:
        yield running
