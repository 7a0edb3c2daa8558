"""Our own Triton kernels for NVIDIA GPUs: weights stay as they are stored and are multiplied in full precision, where
no kernel multiplies their codes natively.

Few rows of activations (triton_code/shapes.py): one kernel decodes the weight on its way into the product. More rows:
one decodes it into memory, then torch multiplies. Either way the weight is bit by bit the codec's definition in F32,
rounded once to the dtype of the activation (triton_code/decode.py); only the order of sums differs.

No GPU was at hand when this was written: the kernels ran in Triton's interpreter, and were compiled for GPUs without
one. So each proves itself when it is first used: what it gives is held against the definition on that very device, and
where it differs, or does not compile, layers are dequantized by plain torch as before, and a line in the log says so.

`compute: dequantize` means plain torch, which this is held against. Not for codecs whose bias depends on the weight
(unsigned SVDQ INT4), rotated INT8, and some of ggml's types (triton_code/plan.py).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...host.texts import Text
from ..ascend.kinds import KINDS
from ..codecs import codec
from ..exact import or_exact
from ..tile import Place, Tile
from .base import HALF, SLOW, USABLE, Activation, Kernel, Speed, add_low_rank, dense
from .triton_code.plan import CODECS, Plan, plan
from .triton_code.shapes import shape_for

if TYPE_CHECKING:
    from ...host import Machine

MINIMUM, LEAST = (8, 0), (3, 3)  # of the GPU, and of Triton
SOME = 128  # rows of a weight, from either end, whose product is proven
STEP = 1024  # rows of a weight that are compared at once
_proven: dict[Any, str] = {}  # what was compiled -> what is wrong with it


class TritonKernel(Kernel):
    """See the module. `Machine.found` has the version of Triton, () where there is none. `way`: "fused" or "memory" for
    activations of any number of rows, which only measurements ask for."""

    name, title, takes_host_layouts, full_precision = "triton", "Triton", True, True
    codecs = CODECS

    def __init__(self, way: str = "") -> None:
        self.way = way
        self.name = f"triton:{way}" if way else "triton"

    def probe(self, machine: Machine) -> tuple[int, ...]:
        return version()

    def runs(self, name: str, machine: Machine) -> str:
        if machine.kind != "cuda" or machine.capability is None:
            return Text("the Triton kernels are for NVIDIA GPUs")
        if machine.capability < MINIMUM:
            return Text("the Triton kernels need SM {wanted}, and this is {found}",
                        wanted=".".join(map(str, MINIMUM)), found=machine.sm)
        found = machine.found.get("triton") or ()
        if not found:
            return Text("Triton is not installed")
        return "" if found >= LEAST else Text("the Triton kernels need Triton {wanted} or newer, and this is {found}",
                                              wanted=".".join(map(str, LEAST)), found=".".join(map(str, found)))

    def speed(self, name: str, machine: Machine) -> Speed:
        words = Text("decoded in one pass by Triton and multiplied in full precision: speed unknown, as nobody has "
                     "measured it")
        # Integer activations are theirs who multiply integers.
        return Speed(SLOW if name in KINDS and KINDS[name].integer else USABLE, words)

    def quantizes(self, name: str, machine: Machine) -> str:
        return Text("nothing multiplies {format} layers quantized", format=codec(name).title)

    def decodes(self, name: str, like: Tensor) -> bool:
        """Not for few rows of activations: decoding on the way into the product reads less than a decoded weight."""
        return like.dtype not in HALF or shape_for(len(like), self.way) is None

    def decoded(self, tile: Tile, like: Tensor) -> Tensor:
        """By the definition, which is what the kernel has proven that it gives."""
        if like.dtype not in (*HALF, torch.float32):
            return super().decoded(tile, like)
        tile = codec(tile.place.codec).natural(tile)
        weight = torch.empty(tile.place.rows, tile.place.columns, dtype=like.dtype, device=tile["codes"].device)
        for first, last, part in _defined(tile, like.dtype):
            weight[first:last] = part
        return weight

    def linear(self, act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
        x = act.x
        tile = codec(tile.place.codec).natural(tile)
        learns = x.requires_grad or bias is not None and bias.requires_grad and torch.is_grad_enabled()
        if learns or x.dtype not in (*HALF, torch.float32) or not len(x) or x.device != tile["codes"].device:
            return dense(x, tile, bias)
        bare = tile.having(down=None, up=None)
        if type(x) is Tensor and not torch.compiler.is_compiling():
            out = product(x, bare, bias, self.way)
        else:
            place, names = tile.place, ",".join(bare.fields)
            out = torch.ops.quantized_transformers.times_tile(
                x, list(bare.fields.values()), bias, f"{place.codec};{names}", place.rows, place.columns)
        return add_low_rank(out, x, tile)


def product(x: Tensor, tile: Tile, bias: Tensor | None, way: str = "") -> Tensor:
    """x [M, K] times a tile without low-rank branch, plus bias. Raises RuntimeError where that does not work here."""
    launch = _launch()
    made, x = plan(tile), x if x.stride(1) == 1 else x.contiguous()
    bias = bias if bias is None else bias.to(x.dtype).contiguous()
    shape = shape_for(len(x), way) if x.dtype in HALF else None
    key = launch.compiled_for(made, x, bias, shape)
    if key not in _proven:
        if launch.capturing(x.device):
            return dense(x, tile, bias)
        _proven[key] = _tried(x, tile, made, bias, shape)
    if _proven[key]:
        raise RuntimeError(_proven[key])
    return launch.through_memory(made, x, bias) if shape is None else launch.fused(made, x, bias, shape)


def _tried(x: Tensor, tile: Tile, made: Plan, bias: Tensor | None, shape: Any) -> str:
    """What is wrong with what the kernel for these arguments gives, or how it fails; empty where it is right.

    Memory that ran out goes to the host, which makes room and tries again.
    """
    from ... import host

    launch = _launch()
    try:
        weight = launch.decoded(made, x.dtype)
        if not is_defined(weight, tile):
            return Text("the decoded weight differs from the definition")
        if shape is None:
            return ""
        out = launch.fused(made, x, bias, shape)
        return "" if close(out, x, weight, bias) else Text("the product is wrong")
    except Exception as error:  # compilers raise anything
        if host.is_out_of_memory(error):
            raise
        return Text("{kind}: {error}", kind=type(error).__name__, error=error)


def _launch() -> Any:
    """The module that imports Triton. Raises RuntimeError where that does not import."""
    try:
        from .triton_code import launch
    except Exception as error:  # a broken install raises anything
        raise RuntimeError(Text("Triton does not import: {error}", error=error)) from error
    return launch


def is_defined(weight: Tensor, tile: Tile) -> bool:
    """Whether a decoded weight is the definition."""
    return all(same(weight[first:last], part) for first, last, part in _defined(tile, weight.dtype))


def _defined(tile: Tile, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """First and last row, and those rows by the definition: some at a time, of codecs that have some rows alone."""
    kind, rows = codec(tile.place.codec), tile.place.rows
    for first in range(0, rows, STEP):
        last = min(first + STEP, rows)
        try:
            part = kind.cut(tile, first, last - first)
        except ValueError:
            yield 0, rows, definition(tile, dtype)
            return
        yield first, last, definition(part, dtype)


def definition(tile: Tile, dtype: torch.dtype) -> Tensor:
    """The weight by its codec in F32, rounded once; comfy-kitchen's part of it in plain torch."""
    import comfy_kitchen

    with comfy_kitchen.use_backend("eager"):
        return codec(tile.place.codec).residual(tile, torch.float32).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are equal, NaN among them."""
    return bool(((a == b) | a.isnan() & b.isnan()).all())


def close(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether x @ weight.T + bias is right but for the order of sums in F32 and the last rounding: for some rows of
    the weight, by F64, where that is finite."""
    rows = torch.arange(len(weight), device=x.device)
    rows = torch.cat([rows[:SOME], rows[-SOME:]])
    part, wide = weight[rows].double(), x.double()
    added: Any = 0 if bias is None else bias[rows].double()
    wanted, size = wide @ part.t() + added, wide.abs() @ part.abs().t() + abs(added)
    bound = torch.finfo(out.dtype).eps * wanted.abs() + (x.shape[1] + 2) * 2.0 ** -23 * size
    bound += torch.finfo(out.dtype).smallest_normal
    right = ((out[:, rows].double() - wanted).abs() <= bound) | ~wanted.isfinite()
    return bool((right | (wanted.abs() > torch.finfo(out.dtype).max)).all())


def _of_tensors(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, what: str, rows: int,
                columns: int) -> Tensor:
    """`product`, or what is exact where that fails, as an operation that torch.compile leaves whole."""
    name, _, fields = what.partition(";")
    tile = Tile(Place(name, rows, columns), dict(zip(fields.split(","), tensors, strict=True)))
    return or_exact(lambda: product(x, tile, bias), lambda: dense(x, tile, bias),
                    f"{codec(name).title} by {TritonKernel.title}")


def _register() -> None:
    if not hasattr(torch.ops.quantized_transformers, "times_tile"):
        made = torch.library.custom_op("quantized_transformers::times_tile", _of_tensors, mutates_args=())
        made.register_fake(lambda x, tensors, bias, what, rows, columns: x.new_empty(x.shape[0], rows))


@cache
def version() -> tuple[int, ...]:
    """Triton's, without importing it; () where it is not installed."""
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.origin:
        return ()
    text = Path(spec.origin).read_text(encoding="utf-8")
    found = re.search(r"__version__\s*=\s*[\"'](\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else ()


_register()


def get(variant: str) -> Kernel:
    """The kernel, or one that always goes this way (`TritonKernel`)."""
    return TritonKernel(variant)
