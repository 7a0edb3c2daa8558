"""The pack's command line in processes of their own, with caches in a folder of the test's and a local hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .hub import FakeRepo, Hub
from .modelscope_hub import ScopeHub, ScopeRepo
from .pack import PACK

WEIGHTS = "diffusion_pytorch_model.safetensors"


def repos(kind: type[FakeRepo | ScopeRepo], tiny: Any) -> tuple[Any, Any, Any]:
    """A base with more in it than a load takes, an override, and one in shards, as repos of a hub."""
    base, override = kind.of(tiny.pipeline), kind.of(tiny.fp8)
    base.files |= {"vae/config.json": b"{}", "flux1-dev.safetensors": b"x" * 1000, "README.md": b"hello",
                   "tokenizer/vocab.json": b"{}"}
    name, = (name for name in override.files if name.endswith(".safetensors"))
    override.files[WEIGHTS] = override.files.pop(name)
    return base, override, kind.of(tiny.sharded)


def environment(hub: Hub | None, home: Path, **variables: str) -> dict[str, str]:
    """The hub that is not given refuses connections."""
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
           "HF_HUB_DISABLE_TELEMETRY": "1", "HF_ENDPOINT": "http://127.0.0.1:9",
           "MODELSCOPE_CACHE": str(home / "modelscope"), "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_DOMAIN", "QT_HUB"):
        env.pop(name, None)
    if hub:
        env["MODELSCOPE_ENDPOINT" if isinstance(hub, ScopeHub) else "HF_ENDPOINT"] = hub.url
    return {**env, **variables}


def start(hub: Hub | None, home: Path, *arguments: str, command: str = "inspect", **variables: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(PACK), command, *arguments], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=environment(hub, home, **variables))


def run(*args, **kwargs) -> tuple[int, str]:
    """(exit code, both outputs) of the pack's command line."""
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


def refused(message: str, *args, **kwargs) -> str:
    code, text = run(*args, **kwargs)
    assert code == 1 and message in text and "what to do:" in text and "Traceback" not in text, text
    return text
