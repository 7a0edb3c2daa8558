"""SGLang for the tests of engines: its servers, each of which takes half a minute to start, and its app without a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from support import miniature, sglang, sglang_real
from support import server as comfyui
from support.sglang_stub import Stub


@pytest.fixture(scope="session")
def protocol() -> ModuleType:
    """SGLang's models of its requests (entrypoints/openai/protocol.py)."""
    if not sglang.folder():
        sglang.missing()
    return sglang.module("protocol")


@pytest.fixture(scope="session")
def server_environment() -> None:
    if not sglang.program("sglang"):
        sglang.missing()


@pytest.fixture(scope="session")
def server_args(server_environment) -> Iterator[sglang.Parser]:
    """A list of the arguments after `sglang serve` → what SGLang reads from them."""
    with sglang.Parser() as parse:
        yield parse


@pytest.fixture(scope="session")
def miniature_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's whole pipeline; nobody writes into it."""
    return miniature.complete(tmp_path_factory.mktemp("served") / "miniature")


@pytest.fixture(scope="session")
def override_folder(miniature_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 transformer that is another than the miniature's."""
    return sglang_real.another(miniature_folder, tmp_path_factory.mktemp("override") / "other")


@pytest.fixture(scope="session")
def loras(miniature_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoRAs of the miniature, as files."""
    folder = tmp_path_factory.mktemp("loras")
    first, second = (sglang_real.lora(miniature_folder, folder / f"{name}.safetensors", seed) for seed, name in enumerate("ab"))
    return first, second


@pytest.fixture(scope="session")
def ports() -> dict[str, int]:
    """Of each server that a test may start, known before it does: a ComfyUI is told all of them. `serve` takes those 100
    above, too."""
    first = sglang.free_ports(200)
    return {name: first + 10 * at for at, name in enumerate(("base", "override", "ranks", "wan"))}


@pytest.fixture(scope="session")
def server(server_environment, miniature_folder: Path, ports, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sglang.Server]:
    """`serve MINIATURE --run`. Who changes its LoRAs takes them away again."""
    with sglang_real.by_serve(tmp_path_factory.mktemp("sglang"), ports["base"], miniature_folder) as running:
        yield running


@pytest.fixture(scope="session")
def server_override(server_environment, miniature_folder: Path, override_folder: Path, ports,
                    tmp_path_factory: pytest.TempPathFactory) -> Iterator[sglang.Server]:
    """`serve MINIATURE --override OTHER --run`."""
    with sglang_real.by_serve(tmp_path_factory.mktemp("sglang"), ports["override"], miniature_folder, "--override",
                              str(override_folder)) as running:
        yield running


@pytest.fixture(scope="session")
def comfy(ports, tmp_path_factory: pytest.TempPathFactory) -> Iterator[comfyui.Server]:
    """A ComfyUI with this pack that keeps no results, and knows every server by its name in `ports`; unnamed it is "base"."""
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    environment = {"QT_SERVER_URL": urls["base"], "QT_SERVERS": ",".join(f"{name}={url}" for name, url in urls.items())}
    with comfyui.Server(tmp_path_factory.mktemp("comfyui"), "--cache-none", env=environment) as running:
        yield running


@pytest.fixture(scope="session")
def stub_started(server_environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stub]:
    with Stub(tmp_path_factory.mktemp("stub")) as running:
        yield running


@pytest.fixture
def stub(stub_started: Stub) -> Stub:
    """SGLang's HTTP app without a model, as just started: FLUX.1-dev by the name qt:stub, nothing asked yet."""
    stub_started.restart()
    return stub_started
