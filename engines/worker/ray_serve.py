"""A fleet on Ray Serve: its workers as deployments, one for each pool, and its door. All that knows Ray is here, and
Ray is imported when a fleet starts."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import secrets
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from .pools import ANY, Pool
from .replica import Settings, Worker

if TYPE_CHECKING:
    from .dispatcher import Dispatcher

# Before it, each worker of Ray Serve listens to the network, asks nobody for a password, and unpickles (2.54 to 2.57).
OLDEST = (2, 58)
PACK = Path(__file__).resolve().parents[2]
APP, DOOR = "fleet", "door"
_COMMANDS = "quantized_transformers_commands"  # __main__.py in Ray's processes
# Ray's own ports stay on loopback (as it has it on Windows and macOS), and ask for a token; nobody is told of its use.
_ALONE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}


def need_ray() -> None:
    """Import Ray, told to keep to this machine unless RAY_ADDRESS names a cluster. Raises CheckpointError where there
    is none, or one that is too old."""
    for name, value in {} if _joined() else {**_ALONE, "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
        os.environ.setdefault(name, value)
    try:
        found = version("ray")
        importlib.import_module("ray.serve")
    except (PackageNotFoundError, ImportError) as error:
        found, why = "", str(error)
    else:
        why = found
    if not found or tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST:
        raise CheckpointError(Text("Ray Serve is not installed in this environment ({why})", why=why), "",
                              Text('run: {python} -m pip install "ray[serve]>={version}"', python=sys.executable,
                                   version=".".join(map(str, OLDEST))))


def start(settings: Settings, pools: Sequence[Pool], gpus: float, host: str, port: int) -> Callable[[], None]:
    """Start a fleet and return when all its workers answer; what is returned ends it. From now on SIGTERM and SIGINT
    raise SystemExit in this thread, the main one.

    `gpus`: of each worker. With RAY_ADDRESS the fleet is on that cluster, else on this machine alone.
    """
    need_ray()
    import ray
    from ray import serve

    count = sum(pool.count for pool in pools)
    alone: dict[str, Any] = {} if _joined() else {
        "address": "local", "include_dashboard": False, "object_store_memory": 200 << 20,
        "num_cpus": max(count, os.cpu_count() or 1)}  # places for workers; what they take of the machine is theirs
    ray.init(**alone, runtime_env={"worker_process_setup_hook": _enter(str(PACK)),
                                   "env_vars": {"COMFYUI_PATH": settings.comfyui}})

    for number in (signal.SIGTERM, signal.SIGINT):  # Ray's handler would leave everything where it lies
        signal.signal(number, lambda *_: sys.exit(0))

    if serve.status().applications:
        ray.shutdown()
        raise CheckpointError(Text("Ray Serve has other applications on this cluster"), "",
                              Text("end them, or start the fleet without RAY_ADDRESS"))

    def end() -> None:
        serve.shutdown()
        ray.shutdown()

    try:
        there = ray.cluster_resources().get("GPU", 0)
        if gpus * count > there and not _joined():
            raise CheckpointError(
                Text("Ray sees {there:g} GPUs, and {wanted:g} are asked for", there=there, wanted=gpus * count), "",
                Text("ask for fewer, or give --gpus-per-worker 0 for the CPU"))
        serve.start(http_options={"host": host, "port": port})
        try:
            serve.run(_application(serve, settings, pools, gpus), name=APP, route_prefix="/")
        except RuntimeError as error:
            raise CheckpointError(Text("the workers do not start ({error})", error=error), "",
                                  Text("what ComfyUI says is in the lines above")) from error
    except BaseException:
        end()
        raise
    return end


def _joined() -> bool:
    return bool(os.environ.get("RAY_ADDRESS"))


def _enter(pack: str) -> Callable[[], None]:
    """What makes this pack importable in each of Ray's processes; it carries all that it needs."""
    name = _COMMANDS

    def hook() -> None:
        import importlib.util
        import os
        import sys

        spec = importlib.util.spec_from_file_location(name, os.path.join(pack, "__main__.py"))
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        module.import_pack()

    return hook


def _application(serve: Any, settings: Settings, pools: Sequence[Pool], gpus: float) -> Any:
    class Replica(Worker):
        def __init__(self, settings: Settings) -> None:
            super().__init__(settings, serve.get_replica_context().replica_id.unique_id)

        async def run(self, job: str, prompt: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
            if serve.get_multiplexed_model_id():
                await self.models(serve.get_multiplexed_model_id())
            async for change in super().run(job, prompt):
                yield change

        @serve.multiplexed(max_num_models_per_replica=1)
        async def models(self, key: str) -> str:
            """Tells Ray Serve whose models are in memory here; ComfyUI loads them itself."""
            return key

    class Door:
        def __init__(self, settings: Settings, pools: Sequence[Pool], workers: Mapping[str, Any]) -> None:
            self.dispatcher = _dispatcher(settings, pools, workers)

        async def __call__(self, request: Any) -> Any:
            from starlette.responses import FileResponse, Response

            status, answer = await self.dispatcher.answer(request.method, request.scope["path"], request.headers,
                                                          await request.body())
            if isinstance(answer, Path):  # to be saved: a page that a node made is no page of this address
                return FileResponse(answer, filename=answer.name)
            return Response(json.dumps(answer), status, media_type="application/json")  # with ComfyUI's Infinity

    workers = {pool.name: serve.deployment(Replica).options(
        name=pool.name, num_replicas=pool.count, max_ongoing_requests=1, health_check_period_s=5,
        health_check_timeout_s=60, graceful_shutdown_timeout_s=30,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus}).bind(settings) for pool in pools}
    return serve.deployment(Door).options(name=DOOR, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}).bind(
        settings, pools, workers)


def _dispatcher(settings: Settings, pools: Sequence[Pool], workers: Mapping[str, Any]) -> Dispatcher:
    """In the door's process, in which ComfyUI's folders are known, and which asks no hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.modules[_COMMANDS].start_host("folders", argparse.Namespace(
        base_directory=settings.shared, extra_model_paths_config=settings.config))
    from ray import serve
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    from .dispatcher import Dispatcher, Lost

    async def send(pool: Pool, key: str, job: str, prompt: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        models = {"multiplexed_model_id": key} if key and pool.name == ANY else {}
        answer = workers[pool.name].options(stream=True, **models).run.remote(job, prompt)
        try:
            async for change in answer:
                yield change
        except RayTaskError:  # what the worker raised itself
            raise
        except (RayError, RayServeException) as error:
            raise Lost(str(error)) from error
        finally:
            answer.cancel()  # does nothing when it is done

    def running() -> dict[str, int]:
        found = serve.status().applications[APP].deployments
        return {name: one.replica_states.get("RUNNING", 0) for name, one in found.items()}

    return Dispatcher(settings, pools, send, running)
