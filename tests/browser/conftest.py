"""One server for the tests that only open graphs, and one with a local Hub for those of the pack's JavaScript."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
from browser.definitions import place_models
from browser.extension import HOSTILE, IMAGES, OUT, WEIGHTS, full_size, other_tools, strangers, whole_checkpoint
from filelock import FileLock

from support.browser import Frontend, problems_of_the_host, require
from support.hub import FakeRepo, Hub
from support.modelscope_hub import ScopeHub, ScopeRepo
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
    with Frontend(server.port, {"Comfy.VueNodes.Enabled": False}, known) as running:  # whatever a file before has set
        yield running


@pytest.fixture(scope="session")
def hub(tiny):
    """For extension_server to download from."""
    require()
    fp8 = FakeRepo.of(tiny.fp8)
    name, = (name for name in fp8.files if name.endswith(".safetensors"))
    fp8.files[WEIGHTS] = fp8.files.pop(name)
    header = json.dumps({"x": {"dtype": "U8", "shape": [24_000_000], "data_offsets": [0, 24_000_000]}}).encode()
    big = FakeRepo({"config.json": b"{}", WEIGHTS: struct.pack("<Q", len(header)) + header + bytes(24_000_000)})
    with Hub({"owner/hub-fp8": fp8, "owner/big": big, "owner/gated": FakeRepo(dict(fp8.files), gated=True),
              "owner/hub-base": FakeRepo.of(tiny.pipeline),
              "nunchaku-tech/nunchaku-flux.1-krea-dev": FakeRepo({"svdq-int4_r32-flux.1-krea-dev.safetensors": bytes(2000)}),
              "owner/licensed": FakeRepo(dict(fp8.files), gated=True, granted=True)}) as running:
        yield running


@pytest.fixture(scope="session")
def scope(tiny):
    """The other hub; it alone has owner/only-there."""
    require()
    with ScopeHub({name: ScopeRepo.of(tiny.fp8) for name in ("owner/only-there", "owner/another")}) as running:
        yield running


@pytest.fixture(scope="session")
def running_extension_server(tiny, hub, scope, tmp_path_factory):
    """Tiny models to run, and headers of full size (their bytes are holes) to look at."""
    base = tmp_path_factory.mktemp("extension")
    models = base / "models" / "diffusers"
    for name, folder in {"tiny-flux": tiny.pipeline, "tiny-fp8": tiny.fp8, "tiny-mixed": tiny.mixed,
                         "tiny-sharded": tiny.sharded, HOSTILE: tiny.fp8}.items():
        shutil.copytree(folder, models / name)
    full_size(models)
    whole_checkpoint(base / "models" / "checkpoints")
    other_tools(base / "models", tiny.pipeline / "transformer")
    strangers(base / "models" / "diffusion_models")
    env = {"HF_HOME": str(base / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
           "MODELSCOPE_ENDPOINT": scope.url, "MODELSCOPE_CACHE": str(base / "modelscope")}
    with Server(base, env=env) as running:
        yield running


@pytest.fixture(scope="module")
def extension_server(running_extension_server, hub, scope):
    """For each file as if it had just begun: nothing downloaded, nothing asked for, no settings."""
    base = running_extension_server.base
    for folder in (base / "hf", base / "modelscope", base / "models" / "diffusers_components", base / "user"):
        shutil.rmtree(folder, ignore_errors=True)
    hub.log.clear()
    scope.log.clear()
    return running_extension_server


@pytest.fixture(scope="module")
def extension_page(known, extension_server):
    OUT.mkdir(parents=True, exist_ok=True)
    with Frontend(extension_server.port, IMAGES, known) as running:
        running.at_start = list(running.problems)
        yield running


@pytest.fixture
def classic(extension_page):
    """The page with classic nodes, in English; opened anew where a test before left another, or a dialog."""
    if getattr(extension_page, "other", False) or extension_page.page.locator("dialog, [role=dialog]").count():
        extension_page.open(IMAGES)
    extension_page.other = False
    extension_page.problems.clear()
    return extension_page


@pytest.fixture
def another(extension_page):
    """For tests that open other pages."""
    extension_page.other = True
    extension_page.problems.clear()
    return extension_page
