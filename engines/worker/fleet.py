"""What a fleet is asked to be, checked before anything starts, and the fleet itself."""

from __future__ import annotations

import ipaddress
import math
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...host.texts import Text, joined
from ...loaders.errors import CheckpointError
from ...loaders.files.source import read_json
from .comfyui import OWN
from .found import look
from .graphs import prompt_of
from .pools import Pool, asked, pools
from .replica import Settings
from .workflow import Workflow


@dataclass(frozen=True)
class Asked:
    """The arguments. `comfyui`: its folder; `more`: what stands behind --, for ComfyUI."""

    comfyui: str
    workers: int
    pool: Sequence[str] = ()
    gpus: float = 1
    results: str = "fleet-results"
    host: str = "127.0.0.1"
    port: int = 8000
    shared: str = ""
    config: Sequence[str] = ()
    more: Sequence[str] = ()


@dataclass(frozen=True)
class Fleet:
    settings: Settings
    pools: tuple[Pool, ...]
    gpus: float
    host: str
    port: int
    warnings: tuple[str, ...]


def prepare(given: Asked) -> Fleet:
    """Raises CheckpointError for what cannot be."""
    if not given.comfyui:
        raise CheckpointError(Text("ComfyUI was not found"), "",
                              Text("put this pack into its custom_nodes folder, or set COMFYUI_PATH"))
    if not 0 <= given.gpus < math.inf or given.gpus > 1 and given.gpus % 1:
        raise CheckpointError(Text("a worker has whole GPUs, or a part of one"), f"{given.gpus:g}",
                              Text("give --gpus-per-worker 0, a number below 1, or a whole one"))
    for word in given.more:
        flag = word.partition("=")[0]
        if len(flag) > 2 and any(own.startswith(flag) for own in OWN):  # argparse takes beginnings, too
            raise CheckpointError(Text("each worker has this of its own"), f"-- {word}", Text("leave it out"))
    named = [Pool(one.name, one.count, _key(one.file)) for one in map(asked, given.pool)]
    settings = Settings(
        given.comfyui, str(Path(given.shared or given.comfyui).absolute()), str(Path(given.results).absolute()), "",
        tuple(str(Path(file).absolute()) for file in given.config),
        (*(["--cpu"] if not given.gpus and "--cpu" not in given.more else ()), *given.more))
    return Fleet(settings, pools(given.workers, named), given.gpus, given.host, given.port, _warnings(given.host))


@contextmanager
def running(fleet: Fleet) -> Iterator[str]:
    """The fleet, from when all workers answer; what is ready, in words."""
    from dataclasses import replace

    from .ray_serve import need_ray, start

    need_ray()  # first: without it, nothing is left behind
    _free(fleet.host, fleet.port)
    Path(fleet.settings.results).mkdir(parents=True, exist_ok=True)
    work = tempfile.mkdtemp(prefix="qt-fleet-")
    try:
        end = start(replace(fleet.settings, work=work), fleet.pools, fleet.gpus, fleet.host, fleet.port)
        try:
            yield Text("jobs at http://{host}:{port}/jobs, results in {folder}; workers: {pools}",
                       host=f"[{fleet.host}]" if ":" in fleet.host else fleet.host, port=fleet.port,
                       folder=fleet.settings.results,
                       pools=joined(", ", [f"{pool.name} {pool.count}" for pool in fleet.pools]))
        finally:
            end()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _key(file: str) -> str:
    """The affinity key of a pool's workflow, all of whose references are here."""
    workflow = Workflow(prompt_of(read_json(file)))
    missing = [one.asked.reference or one.asked.input for one in look(workflow.asked()) if one.missing]
    if missing:
        raise CheckpointError(Text("not here: {names}", names=", ".join(dict.fromkeys(missing))), file,
                              Text("fetch it with the command workflow and --download"))
    return workflow.affinity()


def _warnings(host: str) -> tuple[str, ...]:
    try:
        alone = ipaddress.ip_address(host).is_loopback
    except ValueError:
        alone = host == "localhost"
    return () if alone else (Text(
        "warning: whoever reaches {host} can run any workflow on these workers and read all results; keep it behind a "
        "proxy that asks who calls", host=host),)


def _free(host: str, port: int) -> None:
    """Raises CheckpointError where nobody can listen at an address."""
    try:
        if not 0 < port < 65536:
            raise OverflowError(Text("a port is a number from 1 to 65535"))
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with closing(socket.socket(family, kind, protocol)) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
    except (OSError, OverflowError) as error:
        raise CheckpointError(Text("nobody can listen at this address ({error})", error=error), f"{host}:{port}",
                              Text("give another --host or --port")) from error
