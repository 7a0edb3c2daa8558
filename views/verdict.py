"""How a checkpoint's layers will run on this machine, in one word and one line: for badges, the catalog and doctor.

The decisions are those that a load makes (report.how_it_runs, running.svdquant_backend, backends.choose_backend); this
only puts a colour to them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from .. import host
from ..loaders.errors import CheckpointError
from ..quant import host_formats

if TYPE_CHECKING:
    from ..quant.ascend.backends import DeviceFacts

GREEN, AMBER, RED = "green", "amber", "red"
HOST_KINDS = ("FP8", "NVFP4")  # formats that the host multiplies
_ORDER = (GREEN, AMBER, RED)


class Verdict(NamedTuple):
    """`level` is green (native kernels), amber (right but emulated) or red (cannot be loaded); `text` is one line."""

    level: str
    text: str


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of several, with the words of all of its level."""
    found = list(dict.fromkeys(verdicts))
    level = max((verdict.level for verdict in found), key=_ORDER.index)
    return Verdict(level, "; ".join(verdict.text for verdict in found if verdict.level == level))


def of_formats(formats: Collection[str]) -> Verdict:
    """How layers of these formats run: names of quant.formats, of SVDQuant's parts, or ModelSlim's in capitals."""
    from ..loaders.families.comfy import HOST_KIND_OF
    from ..loaders.families.nunchaku.plan import AWQ, W4A4
    from ..quant.ascend.kinds import KINDS
    from ..quant.saved import SAVED
    from ..quant.svdquant.saved import SAVED_PARTS

    parts = {kind for kind, name in {**W4A4, "awq": AWQ}.items() if name in formats}
    verdicts = [of_svdquant(frozenset(parts))] if parts else []
    if SAVED_PARTS.name in formats:  # the name tells neither of the two
        verdicts.append(worst(of_svdquant(frozenset((kind,))) for kind in W4A4))
    if SAVED.name in formats:
        verdicts.append(worst(map(_of_host, HOST_KINDS)))
    verdicts += [_of_host(kind) for kind in HOST_KINDS if kind in formats]
    verdicts += [of_ascend(kind.lower()) for kind in sorted(formats) if kind.lower() in KINDS]
    verdicts += [of_ascend(HOST_KIND_OF[name]) for name in sorted(formats) if name in HOST_KIND_OF]
    verdicts += [_of_handed(name) for name in sorted(formats) if name in host_formats.NAMES]
    return worst(verdicts) if verdicts else Verdict(GREEN, "not quantized: runs as ComfyUI runs it")


def _of_host(kind: str) -> Verdict:
    from ..loaders.report import how_it_runs

    return Verdict(GREEN if host.has_matmul(kind) else AMBER, how_it_runs(kind, "auto"))


def _of_handed(name: str) -> Verdict:
    """How a format that only the host makes sense of runs here."""
    word = host_formats.NAMES[name]
    if word not in host.quantized_formats():
        return Verdict(RED, f"ComfyUI {host.version()} does not have the format {word!r} ({name}): update ComfyUI")
    return Verdict(AMBER if host.is_cpu() else GREEN, f"{name} is multiplied by ComfyUI itself on {host.device_name()}")


@lru_cache
def of_svdquant(kinds: frozenset[str]) -> Verdict:
    """How an SVDQuant file of these kinds ("int4" or "nvfp4", and "awq") runs here with backend auto."""
    from ..loaders.families.base import How
    from ..loaders.families.running import svdquant_backend

    try:
        backend, line = svdquant_backend(How(), kinds, "")
    except CheckpointError as error:
        return Verdict(RED, error.what)
    return Verdict(AMBER if backend == "dequantize" else GREEN, line.partition("\n")[0])


@lru_cache
def of_ascend(kind: str) -> Verdict:
    """How ModelSlim's layers of one kind (quant.ascend.kinds.KINDS) run here with compute auto."""
    from ..quant.ascend.backends import choose_backend
    from ..quant.ascend.kinds import HOST_FORMAT, KINDS

    name = kind.upper()
    backend, words = choose_backend("auto", kind, ascend_facts())
    if backend == "torch_npu":
        return Verdict(GREEN, f"{name} runs on {words}")
    if backend == "reference":
        return Verdict(AMBER, f"{name}: {words}")
    how = KINDS[kind]
    if HOST_FORMAT.get(kind) == "mxfp8" and host.has_matmul("MXFP8") or how.codec == "int8" and how.integer \
            and not host.is_cpu() and host.has_matmul("INT8"):
        return Verdict(GREEN, f"{name} native on {host.device_name()}: {words}")
    off = HOST_FORMAT.get(kind) == "int8_tensorwise" and not host.has_matmul("INT8")
    runs = "in INT8 arithmetic without fast kernels" if how.integer and not off else "emulated (weights dequantized)"
    return Verdict(AMBER, f"{name} {runs} on {host.device_name()}: {words}")


@lru_cache(maxsize=1)
def ascend_facts() -> DeviceFacts:
    """What torch_npu says of this machine; asked once."""
    from ..quant.ascend.backends.torch_npu import device_facts

    return device_facts(host.device_type())


def families() -> list[tuple[str, Verdict]]:
    """One line for each family of the support matrix: what happens to it on this machine."""
    from ..quant.ascend.kinds import KINDS

    lines = [(kind, _of_host(kind)) for kind in HOST_KINDS]
    lines += [(f"SVDQuant {kind}", of_svdquant(frozenset((kind, "awq")))) for kind in ("int4", "nvfp4")]
    lines += [(f"ModelSlim {kind.upper()}", of_ascend(kind)) for kind in KINDS]
    lines.append(("MXFP8 (online)", of_ascend("w8a8_mxfp8")))
    return [*lines, ("BF16, F16, F32", Verdict(GREEN, "not quantized: runs as ComfyUI runs it"))]
