"""SGLang for the tests of engines: its server of the miniature, which takes half a minute to start, once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from support import miniature, sglang
from support.sglang_stub import Stub

# All that a name on the server's command line and in JSON might not survive: what an identity is made of, and more.
NAME = ("qt:black-forest-labs/FLUX.1-dev@0123456789ab+transformer=a_b/c-d~e.safetensors@ba9876543210"
        "+transformer_2=F:/ü (1)%20+lora=a/b@00112233445*-0.5 \"'\\{}[]$,;")


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
def server(server_environment, miniature_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sglang.Server]:
    """SGLang's server of the miniature, called NAME. Who changes its LoRAs takes them away again."""
    port, command = sglang.command(miniature_folder, "--model-id", "FLUX.1-dev", "--served-model-name", NAME,
                                   "--output-path", "", "--input-save-path", "")
    with sglang.Server(tmp_path_factory.mktemp("sglang"), port, command) as running:
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
