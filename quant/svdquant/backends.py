"""Which back end runs SVDQuant weights on which hardware, and how fast to expect it
(docs/sources/nunchaku.md, "Back ends")."""

from __future__ import annotations

from collections.abc import Iterable

from . import nunchaku_wheel

CHOICES = ("auto", "comfy_kitchen", "nunchaku", "dequantize")
DEQUANTIZE = "each weight is dequantized for its matmul: 4-bit memory, slower than 16-bit weights"


def choose_backend(wanted: str, kinds: Iterable[str], capability: tuple[int, int] | None, *, is_cpu: bool = False,
                   gfx: str = "", nunchaku_problem: str = "nunchaku is not installed.") -> tuple[str, str]:
    """(back end, what to tell the user about it) for a file of these `kinds` ("int4" or "nvfp4", and "awq").

    `capability` is CUDA's (None elsewhere), `gfx` AMD's architecture ("gfx1100"), `nunchaku_problem` what
    nunchaku_wheel.find() said (empty: the real engine). Pure: no device is asked. Raises ValueError for a wanted back
    end that cannot run this file on this hardware, with the reason and the alternative.
    """
    found = frozenset(kinds)
    if wanted not in CHOICES:
        raise ValueError(f"backend {wanted!r}, expected one of {', '.join(CHOICES)}")
    kind = "nvfp4" if "nvfp4" in found else "int4" if "int4" in found else "awq"
    speed = _kitchen(kind, None if is_cpu else capability, "" if is_cpu else gfx)
    engine = (nunchaku_wheel.gate(found, None if is_cpu or gfx else capability) or nunchaku_problem).strip()
    if wanted == "nunchaku":
        if engine:
            raise ValueError(f"{engine} Choose backend auto, which takes {_auto(speed, engine, capability)[0]} here.")
        return "nunchaku", "nunchaku's kernels: fast" + _TURING * (capability == (7, 5))
    if wanted == "dequantize":
        return "dequantize", DEQUANTIZE
    if wanted == "comfy_kitchen":
        return "comfy_kitchen", speed or _without_kernels(kind, is_cpu)
    return _auto(speed, engine, None if is_cpu or gfx else capability)


_TURING = "; FP16 only (BF16 kernels assert on Turing)"


def _auto(speed: str, engine: str, capability: tuple[int, int] | None) -> tuple[str, str]:
    if speed:
        return "comfy_kitchen", speed
    if not engine:
        return "nunchaku", "nunchaku's kernels: fast" + _TURING * (capability == (7, 5))
    return "dequantize", DEQUANTIZE


def _kitchen(kind: str, capability: tuple[int, int] | None, gfx: str) -> str:
    """The speed of comfy-kitchen's own kernels, in words; empty where it has none."""
    if gfx:
        return "comfy-kitchen's HIP kernels: untested" if kind != "nvfp4" and gfx.startswith(("gfx11", "gfx12")) else ""
    if capability is None:
        return ""
    sm = f"SM {capability[0]}.{capability[1]}"
    if kind == "nvfp4":
        return f"ComfyUI's NVFP4 matmul with a low-rank branch: fast on {sm}" if capability >= (10, 0) else ""
    if capability < (8, 0):
        return ""
    if capability < (9, 0):
        return f"comfy-kitchen's INT4 kernels: fast on {sm}"
    if capability < (10, 0):
        return f"comfy-kitchen's INT4 kernels: speed unknown on {sm}, whose tensor cores have no INT4"
    return f"comfy-kitchen's INT4 kernels: untested on {sm}"


def _without_kernels(kind: str, is_cpu: bool) -> str:
    if kind == "int4" and is_cpu:
        return "comfy-kitchen on the CPU: slow, 2 to 6 times slower than dequantized weights"
    return f"comfy-kitchen has no {kind.upper()} kernel here: {DEQUANTIZE}"
