"""What this machine can do with each family, and what it is made of: for `doctor`, the web page, and bug reports."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from .. import host
from ..host.texts import Text, joined
from ..loaders.errors import CheckpointError
from ..loaders.files import hubs

PACKAGES = ("torch", "safetensors", "comfy-kitchen", "huggingface_hub", "diffusers")


def facts() -> dict[str, Any]:
    """JSON-able facts. Without ComfyUI only versions and the environment; never raises for what is not installed.

    With it: "device", "capability" (CUDA's, or None), "cuda", "hip", "npu", "kitchen" (back end -> "available" or why
    not), "nunchaku", "flashinfer", "triton", "<kind> matmul", and "families": [{"family", "verdict", "text"}].
    """
    out: dict[str, Any] = {"this pack": _pack(), "python": sys.version.split()[0], "ComfyUI": host.version()}
    out |= {package: _version(package) for package in PACKAGES}
    out |= {"nunchaku": _nunchaku(), "flashinfer": _flashinfer(), "triton": _triton(), "matplotlib": _matplotlib()}
    if out["ComfyUI"] != "not found":
        out |= _device()
    return out | host.environment()


def lines(found: dict[str, Any]) -> list[str]:
    """The facts as text, one a line; the families last."""
    out: list[str] = []
    for key, value in found.items():
        if key == "families":
            continue
        if isinstance(value, dict):
            value = joined("; ", (Text("{name}: {words}", name=name, words=words) for name, words in value.items()))
        elif isinstance(value, list):
            value = joined(", ", value)
        out.append(Text("{key}: {value}", key=key, value=Text("none") if value in (None, "") else value))
    width = max((len(row["family"]) for row in found.get("families", ())), default=0)
    return out + [Text("{verdict:5}  {family}  {text}", verdict=row["verdict"], family=row["family"].ljust(width),
                       text=row["text"]) for row in found.get("families", ())]


def _pack() -> str:
    """The version in pyproject.toml, for which Python 3.10 has no reader."""
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return found[1] if found else Text("unknown")


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return Text("not installed")


def _nunchaku() -> str:
    """The engine's version, or what is wrong: the package of that name on PyPI is another one."""
    from ..quant.kernels.nunchaku_wheel import find

    wheel = find()
    return wheel.problem or Text("{version} (the SVDQuant engine)", version=wheel.version)


def _flashinfer() -> str:
    if importlib.util.find_spec("flashinfer") is None:
        return Text("not installed")
    version = _version("flashinfer-python")
    return version if version != "not installed" else Text("installed, version unknown")


def _triton() -> str:
    """Its version, by either name: torch has it on Linux, on Windows it is a package of others."""
    return next((found for package in ("triton", "triton-windows") if (found := _version(package)) != "not installed"),
                Text("not installed"))


def _matplotlib() -> str:
    if importlib.util.find_spec("matplotlib") is None:
        return Text("not installed (optional: it draws the plots of comparisons)")
    return _version("matplotlib")


def _device() -> dict[str, Any]:
    from ..quant.kernels.choose import here
    from .verdict import families

    machine = here()
    npu, capability = machine.found["torch_npu"], machine.capability
    out: dict[str, Any] = {
        "device": machine.name, "device type": machine.kind,
        "capability": machine.sm if capability else None, **host.torch_builds(),
        "torch_npu": npu.torch_npu or (Text("does not import: {error}", error=npu.import_error) if npu.import_error
                                       else Text("not installed")),
        "CANN": npu.cann, "Ascend generation": npu.generation, "kitchen": host.kitchen_backends()}
    count = len(host.all_devices())
    if count > 1:
        out["several GPUs"] = Text(
            "{count}: ComfyUI's MultiGPU CFG Split evaluates both halves of a step at once, at a CFG above 1; Select "
            "CLIP Device puts text encoders on another", count=count)
    native = Text("native")
    out |= {f"{kind} matmul": native if kind in machine.matmuls else
            Text("emulated (needs NVIDIA {needs} or newer)", needs=needs)
            for kind, needs in host.MATMULS.items() if needs}
    out["INT8 matmul"] = native if "INT8" in machine.matmuls else Text("off: ComfyUI dequantizes INT8 on this device")
    out["ComfyUI's parts"] = list(host.all_lacks().values()) or Text("all that this pack uses are there")
    out["families"] = [{"family": name, "verdict": judged.level, "text": judged.text} for name, judged in families()]
    return out | {"model folders": host.model_folders(), **_downloads()}


def _downloads() -> dict[str, str]:
    """The hub that repos are downloaded from, and the folder: its cache."""
    try:
        hub, = hubs.named(hubs.preferred())
        return {"hub": hub.KEY, "download folder": str(hub.root())}
    except ImportError:
        return {"download folder": Text("none: huggingface_hub is not installed")}
    except CheckpointError as error:
        return {"hub": error.what, "download folder": Text("none")}
