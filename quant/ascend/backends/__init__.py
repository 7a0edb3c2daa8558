"""Who multiplies Ascend's quantized layers: the NPU, comfy-kitchen's kernels, or plain torch; and the choice between.

`choose_backend` is pure: what it needs to know of the machine comes in as `DeviceFacts` (torch_npu.device_facts).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from ..kinds import KINDS

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("torch_npu", "comfy_kitchen", "reference")
INSTALL = "install torch_npu and CANN for this machine, or choose the backend comfy_kitchen"


class Backend(Protocol):
    """Multiplies by Ascend weights.

    `takes_host_layouts`: whether it also takes layers in the host's own formats (as layout.as_ascend gives them).
    """

    name: str
    takes_host_layouts: bool

    def linear(self, x: Tensor, codes: Tensor, params: Any, bias: Tensor | None) -> Tensor:
        """x [M, K] times the weight [N, K] of `codes` and `params` (AscendLayout.Params), plus bias [N], in x's dtype.

        Activations are quantized by the rule of params.kind as far as the backend has it.
        """
        ...


def get_backend(name: str) -> Backend:
    """The backend of this name. Raises ValueError for a name that is none of BACKENDS."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is none of {', '.join(BACKENDS)}")
    return import_module(f".{name}", __name__).BACKEND


@dataclass(frozen=True)
class DeviceFacts:
    """What the choice depends on.

    `npu`: the host runs models on an NPU. `generation`: "A2", "A3", "A5", "310P", ..., "" when unknown. `cann`: its
    version as CANN writes it ("8.0.RC3"), "" when unknown. `torch_npu`: its version, "" when it is not installed;
    `import_error`: why it does not import. `ops`: which of torch_npu.OPS exist.
    """

    npu: bool = False
    generation: str = ""
    cann: str = ""
    torch_npu: str = ""
    import_error: str = ""
    ops: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Needs:
    """What torch_npu needs for a kind. Generations: docs/sources/ascend.md, "Platforms", and torch_npu 2.14's op docs
    (npu_dynamic_mx_quant: Ascend 950 only). CANN: 8.0.RC2 is the first whose npu_quant_matmul takes a scale a token
    (its own documentation before says "not available"), 8.0.RC3 is what SGLang documents for MXFP8."""

    generations: tuple[str, ...]
    cann: str
    ops: tuple[str, ...]


INT8 = ("A2", "A3", "A5")
NEEDS = {
    "w8a8": Needs(INT8, "8.0.RC2", ("npu_quantize", "npu_quant_matmul")),
    "w8a8_dynamic": Needs(INT8, "8.0.RC2", ("npu_dynamic_quant", "npu_quant_matmul")),
    "w4a8_dynamic": Needs(INT8, "8.0.RC2", ("npu_dynamic_quant", "npu_quant_matmul")),  # multiplied as INT8
    "w4a4_dynamic": Needs(("A2", "A3"), "8.0.RC2", ("npu_dynamic_quant", "npu_quant_matmul",
                                                    "npu_convert_weight_to_int4pack")),
    "w8a8_mxfp8": Needs(("A5",), "8.0.RC3", ("npu_dynamic_mx_quant", "npu_quant_matmul")),
    "w4a8_mxfp": Needs(("A5",), "8.0.RC3", ("npu_dynamic_mx_quant", "npu_quant_matmul", "npu_format_cast")),
    "w4a4_mxfp4": Needs(("A5",), "8.0.RC3", ("npu_dynamic_mx_quant", "npu_quant_matmul")),
    "w4a4_mxfp4_dualscale": Needs(("A5",), "8.0.RC3", ("npu_dynamic_dual_level_mx_quant",
                                                       "npu_dual_level_quant_matmul", "npu_format_cast")),
}


def cann_at_least(version: str, minimum: str) -> bool:
    """Whether a CANN version ("8.0.RC3.alpha001", "8.5.0") is at least `minimum`; unknown versions are not."""
    return _version(version) >= _version(minimum)


def _version(text: str) -> tuple[int, ...]:
    """Numbers to compare: a release candidate comes before its release."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?:\.?RC(\d+))?", text.strip(), re.IGNORECASE)
    if match is None:
        return ()
    major, minor, patch, candidate = (int(part) if part else 0 for part in match.groups())
    return major, minor, patch, candidate if match[4] else 1000


def problem(kind: str, facts: DeviceFacts) -> tuple[str, str]:
    """What keeps torch_npu from running a kind here, and what to do about it; ("", "") when nothing does."""
    if not facts.torch_npu:
        return (f"torch_npu does not import ({facts.import_error})" if facts.import_error else
                "torch_npu is not installed"), INSTALL
    if not facts.npu:
        return "ComfyUI does not run models on an Ascend NPU here", "choose the backend comfy_kitchen"
    needs = NEEDS.get(kind)
    if needs is None:
        return f"torch_npu has no matmul for {kind.upper()}", "choose the backend reference"
    if facts.generation not in needs.generations:
        return (f"{kind.upper()} needs an Ascend {' or '.join(needs.generations)}, this NPU is "
                f"{facts.generation or 'of an unknown generation'}"), "choose the backend reference"
    if not cann_at_least(facts.cann, needs.cann):
        return (f"{kind.upper()} needs CANN {needs.cann} or newer, this is "
                f"{f'CANN {facts.cann}' if facts.cann else 'an unknown version'}"), "update CANN"
    missing = [op for op in needs.ops if op not in facts.ops]
    if missing:
        return f"torch_npu {facts.torch_npu} has no {', '.join(missing)}", "update torch_npu"
    return "", ""


def choose_backend(wanted: str, kinds: str | Iterable[str], facts: DeviceFacts) -> tuple[str, str]:
    """The backend (of BACKENDS) for layers of these kinds, and a line for the report.

    "auto": torch_npu on an NPU that runs all of them, plain torch ("reference") on one that does not, comfy_kitchen
    elsewhere. A backend asked for by name is taken or refused: ValueError says what is wrong, where, and what to do.
    """
    kinds = sorted({kinds} if isinstance(kinds, str) else set(kinds))
    if wanted not in (*BACKENDS, "auto"):
        raise ValueError(f"backend {wanted!r} is none of auto, {', '.join(BACKENDS)}")
    if wanted == "auto" and not facts.npu or wanted == "comfy_kitchen":
        return "comfy_kitchen", _rules("comfy_kitchen", kinds)
    if wanted == "reference":
        return "reference", _rules("reference", kinds)
    for kind in kinds:
        what, do = problem(kind, facts)
        if what and wanted == "auto":
            return "reference", f"{what}; multiplied in plain torch with the NPU's arithmetic"
        if what:
            raise ValueError(f"the backend torch_npu cannot run this checkpoint: {what}\n"
                             f"  where: {kind.upper()} layers\n  what to do: {do}")
    return "torch_npu", f"torch_npu {facts.torch_npu} on Ascend {facts.generation}, CANN {facts.cann}"


# How comfy_kitchen differs from an NPU, for the kinds where it does.
KITCHEN_RULES = {
    "w8a8_dynamic": "activations are divided by their scale, in the model's dtype (an NPU multiplies by its "
                    "reciprocal in F32), and the bias is added after rounding to the model's dtype",
    "w8a8_mxfp8": "activations get the ceiling of the shared exponent (an NPU takes the floor: other in ~13 % of "
                  "blocks), or stay unquantized where the GPU has no MXFP8 matmul",
    **dict.fromkeys((kind for kind, (codec, _) in KINDS.items() if codec in ("e4m3", "mxfp4", "mxfp4_dual")),
                    "activations stay unquantized (comfy-kitchen has no such matmul)"),
}


def _rules(backend: str, kinds: Iterable[str]) -> str:
    if backend == "reference":
        return "plain torch with the NPU's arithmetic: exact, and slow"
    rules = [f"{kind.upper()}: {KITCHEN_RULES[kind]}" for kind in kinds if kind in KITCHEN_RULES]
    return "; ".join(["comfy-kitchen multiplies", *rules])
