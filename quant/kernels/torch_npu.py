"""Ascend's NPU, through the operators of torch_npu.

Signatures and limits of the operators are those that torch_npu 2.14 documents and checks; calls follow how SGLang and
vLLM-Ascend make them. torch_npu is imported when a function here first needs it.

Weights go to the operators as they are stored; the layouts that an NPU prefers (FRACTAL_NZ) change speed, not numbers,
and are made only for the two operators that take nothing else. Activations other than FP16 and BF16 become BF16.
Shapes that an operator does not take are multiplied by the reference.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from glob import glob
from typing import TYPE_CHECKING, Any

import torch

from ...host.texts import Text, either, joined
from ..ascend import groups
from ..ascend.kinds import DUAL_BLOCK, KINDS
from ..ascend.weights import integer_codes
from ..codecs import codec
from ..codecs.groups import Groups
from ..tile import Tile
from .base import NATIVE, Activation, Speed, add_low_rank
from .reference import Reference, patched_bias, smooth

if TYPE_CHECKING:
    from ...host import Machine
    from .base import Kernel

@dataclass(frozen=True)
class DeviceFacts:
    """What is there of torch_npu and its NPU.

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
    # CANN 8.0.RC2 is the first whose operator takes int4 (its documentation before has int8 alone); it names no A5
    **dict.fromkeys(groups.BITS, Needs(("A2", "A3"), "8.0.RC2", (groups.OP,))),
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


FRACTAL_NZ = 29
OPS = tuple(sorted({op for needs in NEEDS.values() for op in needs.ops}))
# First SoC number of each generation, as torch_npu.npu.get_soc_version() counts them
GENERATIONS = ((260, "A5"), (250, "A3"), (220, "A2"), (200, "310P"), (100, "910"))


def generation(soc: int) -> str:
    """The product generation of a SoC number: 220.. are Ascend 910B (A2), 250.. 910C (A3), 260.. 950 (A5)."""
    return next((name for first, name in GENERATIONS if soc >= first), "")


def device_facts(device_type: str) -> DeviceFacts:
    """What NEEDS is held against. `device_type` is that of the host's device ("npu", "cuda", "cpu")."""
    try:
        import torch_npu
    except ModuleNotFoundError:
        return DeviceFacts()
    except Exception as error:  # a broken install raises anything, from ImportError to OSError
        return DeviceFacts(import_error=f"{type(error).__name__}: {error}")
    npu = device_type == "npu"
    return DeviceFacts(npu, generation(int(torch_npu.npu.get_soc_version())) if npu else "", cann_version(),
                       str(torch_npu.__version__), "", frozenset(op for op in OPS if hasattr(torch_npu, op)))


def cann_version() -> str:
    """CANN's version from torch_npu, or from its install folder (ASCEND_HOME_PATH); "" when neither tells."""
    try:
        from torch_npu.npu.utils import get_cann_version

        return str(get_cann_version("CANN"))
    except (ImportError, RuntimeError):  # torch_npu before 2.6, or no CANN to ask
        pass
    home = os.environ.get("ASCEND_HOME_PATH", "")
    for path in sorted(glob(os.path.join(home, "**", "ascend_*_install.info"), recursive=True) if home else []):
        with open(path, encoding="utf-8") as file:
            found = re.search(r"^version=(\S+)", file.read(), re.MULTILINE)
        if found:
            return found[1]
    return ""


def problem(kind: str, facts: DeviceFacts) -> str:
    """What keeps torch_npu from running a kind here, and what to do about it; empty when nothing does."""
    if not facts.torch_npu:
        return Text("torch_npu does not import ({error}): install torch_npu and CANN for this machine",
                    error=facts.import_error) if facts.import_error else \
            Text("torch_npu is not installed: install torch_npu and CANN for this machine")
    if not facts.npu:
        return Text("ComfyUI does not run models on an Ascend NPU here")
    needs = NEEDS.get(kind)
    title = codec(kind).title
    if needs is None:
        return Text("torch_npu has no matmul for {format}", format=title)
    if facts.generation not in needs.generations:
        return Text("{format} needs an Ascend {generations}, this NPU is {generation}", format=title,
                    generations=either(needs.generations),
                    generation=facts.generation or Text("of an unknown generation"))
    if not cann_at_least(facts.cann, needs.cann):
        return Text("{format} needs CANN {cann} or newer, this is {version}: update CANN", format=title,
                    cann=needs.cann, version=f"CANN {facts.cann}" if facts.cann else Text("an unknown version"))
    missing = [op for op in needs.ops if op not in facts.ops]
    if missing:
        return Text("torch_npu {version} has no {names}: update torch_npu", version=facts.torch_npu,
                    names=", ".join(missing))
    return ""


def paired(scale: torch.Tensor) -> torch.Tensor:
    """U8 E8M0 [N, blocks] -> [ceil(blocks / 2), N, 2], a transposed view; a missing last block gets byte 0."""
    if scale.shape[1] % 2:
        scale = torch.nn.functional.pad(scale, (0, 1))
    return scale.reshape(scale.shape[0], -1, 2).transpose(0, 1)


class TorchNPU(Reference):
    """See the module."""

    name = title = "torch_npu"
    device = "npu"
    codecs = frozenset({*KINDS, *groups.BITS})

    def probe(self, machine: Machine) -> DeviceFacts:
        return device_facts(machine.kind)

    def runs(self, name: str, machine: Machine) -> str:
        return problem(name, machine.found.get(self.name) or DeviceFacts())

    def speed(self, name: str, machine: Machine) -> Speed:
        facts: DeviceFacts = machine.found[self.name]
        words = Text("torch_npu {version} on Ascend {generation}, CANN {cann}", version=facts.torch_npu,
                     generation=facts.generation, cann=facts.cann)
        alone = [Text("activations stay whole, scales are rounded to 16 bits")] if name in groups.BITS else []
        return Speed(NATIVE, joined("; ", [words, *alone]))

    def quantizes(self, name: str, machine: Machine) -> str:
        if name in groups.BITS:
            return Text("nothing multiplies {format} layers quantized", format=codec(name).title)
        return self.runs(name, machine)

    def refuses(self, tile: Tile) -> str:
        takes = tile.place.codec not in groups.BITS or tile.place.order
        return "" if takes else groups.refusal(tile)

    def ordered(self, tile: Tile) -> Tile:
        kind = codec(tile.place.codec)
        if not isinstance(kind, Groups):
            return super().ordered(tile)
        return tile if tile.place.order or groups.refusal(tile) else groups.ordered(kind.grouped(tile))

    def linear(self, act: Activation, tile: Tile, bias: torch.Tensor | None) -> torch.Tensor:
        x, kind = act.x, KINDS.get(tile.place.codec)
        if not x.shape[0]:  # an expert that got no token: the operators take no empty tensors
            return x.new_empty(0, tile.place.rows)
        run = {"static": self.static, "int8": self.token, "int4": self.token, "mxfp8": self.microscaling,
               "mxfp4": self.microscaling, "mxfp4_dual": self.dual}.get(kind.activation) if kind else \
            groups.multiply if tile.place.order else None
        if run is None or kind and not _fits(tile):
            return super().linear(act, tile, bias)
        seen = x if x.dtype in (torch.float16, torch.bfloat16) else x.to(torch.bfloat16)
        return add_low_rank(run(smooth(seen, tile), tile, bias).to(x.dtype), x, tile)

    @staticmethod
    def static(x: torch.Tensor, t: Tile, bias: torch.Tensor | None) -> torch.Tensor:
        """W8A8: npu_quantize with 1 / input_scale and the offset in F32 (so in x's F32 values), then I8 matmul."""
        import torch_npu

        scales = (1 / t["input_scale"]).reshape(1).repeat(x.shape[1])
        offsets = t["input_offset"].reshape(1).repeat(x.shape[1])
        q = torch_npu.npu_quantize(x.float(), scales, offsets, torch.qint8, -1, False)
        out = torch_npu.npu_quant_matmul(q, t["codes"].t(), t["scale"].reshape(-1).contiguous(), bias=t["quant_bias"],
                                         output_dtype=x.dtype)
        return out if bias is None else out + patched_bias(t, bias)

    @staticmethod
    def token(x: torch.Tensor, t: Tile, bias: torch.Tensor | None) -> torch.Tensor:
        """INT8 and INT4, one scale a token. The INT4 matmul takes no float bias, so that is added after it."""
        import torch_npu

        weight, scale = integer_codes(t), t["scale"].float().reshape(-1).contiguous()
        if KINDS[t.place.codec].activation == "int8":
            q, token = torch_npu.npu_dynamic_quant(x)
            return torch_npu.npu_quant_matmul(q, weight.t(), scale, pertoken_scale=token, output_dtype=x.dtype,
                                              bias=None if bias is None else bias.float())
        q, token = torch_npu.npu_dynamic_quant(x, dst_type=torch.quint4x2)
        packed = torch_npu.npu_convert_weight_to_int4pack(weight.to(torch.int32).contiguous())
        out = torch_npu.npu_quant_matmul(q, packed.t(), scale, pertoken_scale=token, output_dtype=x.dtype)
        return out if bias is None else out + bias.float()

    @staticmethod
    def microscaling(x: torch.Tensor, t: Tile, bias: torch.Tensor | None) -> torch.Tensor:
        """MXFP8 and MXFP4: activations by npu_dynamic_mx_quant (floor rule), scales in pairs, F32 bias."""
        import torch_npu

        weight, activation = KINDS[t.place.codec]
        codes = t["codes"]
        fp4, groups = torch_npu.float4_e2m1fn_x2, [1, 1, 32]
        kind: dict[str, Any] = {}
        wide = None if bias is None else bias.float()
        if activation == "mxfp4":
            q, token = torch_npu.npu_dynamic_mx_quant(x, axis=-1, round_mode="round", dst_type=fp4, block_size=32)
            kind = {"x1_dtype": fp4, "x2_dtype": fp4}
        else:
            q, token = torch_npu.npu_dynamic_mx_quant(x, axis=-1, round_mode="rint", block_size=32,
                                                      dst_type=torch_npu.float8_e4m3fn)
        if weight == "mxfp4" and activation == "mxfp8":
            codes = torch_npu.npu_format_cast(codes, FRACTAL_NZ, customize_dtype=torch_npu.float8_e4m3fn,
                                              input_dtype=fp4)
            kind, groups = {"x2_dtype": fp4}, [0, 0, 32]
            wide = None if wide is None else wide[None]
        return torch_npu.npu_quant_matmul(
            q, codes.t(), paired(t["scale"]), scale_dtype=torch_npu.float8_e8m0fnu, pertoken_scale=token,
            pertoken_scale_dtype=torch_npu.float8_e8m0fnu, bias=wide, output_dtype=x.dtype, group_sizes=groups, **kind)

    @staticmethod
    def dual(x: torch.Tensor, t: Tile, bias: torch.Tensor | None) -> torch.Tensor:
        """Dual-scale MXFP4. The operator takes the weight in FRACTAL_NZ only."""
        import torch_npu

        q, level0, level1 = torch_npu.npu_dynamic_dual_level_mx_quant(x, smooth_scale=None)
        weight = torch_npu.npu_format_cast(t["codes"].view(torch.int8), FRACTAL_NZ, customize_dtype=torch.int8)
        return torch_npu.npu_dual_level_quant_matmul(
            q, weight, level0, t["dual"].t().contiguous(), level1, t["scale"].reshape(t["scale"].shape[0], -1, 2),
            bias=None if bias is None else bias.float(), output_dtype=x.dtype)


def _fits(t: Tile) -> bool:
    """Whether the operators take this layer's sizes."""
    rows, columns = t.place.rows, t.place.columns
    if "offset" in t.fields:
        return False
    weight, activation = KINDS[t.place.codec]
    if activation in ("int8", "int4") and t["scale"].shape[1] > 1:
        return False  # a scale for each group of columns
    if activation == "int4":
        return rows % 8 == 0 and columns % 8 == 0
    if weight == "mxfp4":
        return columns % 64 == 0
    return weight != "mxfp4_dual" or columns % DUAL_BLOCK == 0


KERNEL = TorchNPU()


def get(variant: str) -> Kernel:
    """The kernel; it has no variants."""
    return KERNEL
