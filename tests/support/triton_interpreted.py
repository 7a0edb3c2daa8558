"""The Triton kernels in Triton's interpreter, on a CPU: a process of its own, as they are imported for that or for a GPU.
Prints one line of JSON: what was checked -> "", or what is wrong.

    TRITON_INTERPRET=1 python tests/support/triton_interpreted.py

The interpreter cuts F32 to BF16 instead of rounding it, and multiplies the bits of BF16: F16 and F32 are checked here.
"""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.pack import start_comfy

start_comfy()

import comfy.ops
from torch._dynamo.backends.common import aot_autograd

from quantized_transformers.quant.blocks import swizzle
from quantized_transformers.quant.codecs import codec
from quantized_transformers.quant.kernels import kernel
from quantized_transformers.quant.kernels import triton as ours
from quantized_transformers.quant.kernels.base import Activation
from quantized_transformers.quant.kernels.triton_code import launch
from quantized_transformers.quant.kernels.triton_code.plan import CODECS, plan
from quantized_transformers.quant.kernels.triton_code.shapes import CROSSOVER, SHAPES, shape_for
from quantized_transformers.quant.layouts.join import join
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.tile import Place, Tile
from support.common import E2M1
from support.tiles import any_bytes, usual

CHECKS: dict[str, Callable[[], None]] = {}
OPTIONAL = [name for name in CODECS if any(field.optional for leaf, field in codec(name).fields.items()
                                           if leaf not in ("down", "up", "input_scale"))]
ALL = torch.arange(256, dtype=torch.uint8)
SCALES = (1e-45, 3e-39, 1.0, 0.3, 2.0 ** 119, 2.0 ** 120, 3e38)  # subnormal ones, and those that overflow with codes


def check(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(work: Callable[[], None]) -> Callable[[], None]:
        assert name not in CHECKS
        CHECKS[name] = work
        return work
    return add


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def columns_of(name: str) -> int:
    """No multiple of what a program decodes, if blocks allow it."""
    if name.startswith("ggml"):
        return 3 * codec(name).kind.block
    return {"w4a4_mxfp4_dualscale": 544, "nvfp4": 48, "svdq_nvfp4": 48, "svdq_int4": 192, "awq": 192}.get(name, 96)


def decoded_right(name: str, optional: bool) -> None:
    """Bit by bit the definition, in F32 and rounded once, and nothing beyond the rows."""
    rows, columns = 24 if name in ("u4_awq", "u4_gptq", "u8_gptq") else 21, columns_of(name)
    tile = any_bytes(name, rows, columns, groups=3, optional=optional)
    wanted = codec(name).residual(tile, torch.float32)
    assert wanted.isfinite().any()
    for dtype in (torch.float32, torch.float16):
        memory = torch.full((rows + 1, columns), 7.0, dtype=dtype)
        same(launch.decoded(plan(tile), dtype, memory[:rows]), wanted.to(dtype))
        assert (memory[rows:] == 7).all()


for each in sorted(CODECS):
    CHECKS[f"decode {each}"] = lambda name=each: decoded_right(name, False)
for each in OPTIONAL:
    CHECKS[f"decode {each} with all it may have"] = lambda name=each: decoded_right(name, True)


def of(name: str, rows: int, columns: int, **fields: torch.Tensor) -> torch.Tensor:
    return launch.decoded(plan(Tile(Place(name, rows, columns), fields)), torch.float32)


@check("all codes of E4M3, E5M2, INT8 and UINT8, scales of any size")
def bytes_right() -> None:
    whole = ALL.expand(len(SCALES), 256).contiguous()
    scale = torch.tensor(SCALES)[:, None]
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = whole.view(dtype)
        same(of("fp8_blocks", len(SCALES), 256, codes=codes, scale=scale), codes.float() * scale)
    same(of("w8a16", len(SCALES), 256, codes=whole.view(torch.int8), scale=scale), whole.view(torch.int8).float() * scale)
    same(of("u8_groups", len(SCALES), 256, codes=whole, scale=scale), whole.float() * scale)
    for one in SCALES:
        codes = ALL.view(1, 256).view(torch.float8_e4m3fn)
        same(of("fp8", 1, 256, codes=codes, scale=torch.tensor(one)), codes.float() * torch.tensor(one))


@check("all pairs of 4-bit codes, scales of any size")
def pairs_right() -> None:
    whole, scale = ALL.expand(len(SCALES), 256).contiguous(), torch.tensor(SCALES)[:, None]
    low_first = torch.stack([ALL & 15, ALL >> 4], -1).flatten().long()
    high_first = torch.stack([ALL >> 4, ALL & 15], -1).flatten().long()
    same(of("u4_groups", len(SCALES), 512, codes=whole, scale=scale), low_first.float() * scale)
    signed = torch.where(low_first > 7, low_first - 16, low_first).float()
    same(of("w4a8_dynamic", len(SCALES), 512, codes=whole, scale=scale), signed * scale)
    table = torch.randn(16)
    same(of("codebook", len(SCALES), 512, codes=whole, scale=scale, table=table), table[high_first] * scale)
    block = torch.full((1, 16), 127, dtype=torch.uint8)
    same(of("w4a4_mxfp4", 1, 512, codes=ALL[None], scale=block), E2M1[low_first][None])


@check("all block scales of NVFP4 and MX")
def blocks_right() -> None:
    codes = torch.randint(0, 256, (16, 128), dtype=torch.uint8)
    values = E2M1[torch.stack([codes >> 4, codes & 15], -1).flatten(1).long()]
    block, scale = ALL.view(16, 16).view(torch.float8_e4m3fn), torch.tensor(0.37)
    wanted = values.view(16, 16, 16) * (scale * block.float())[..., None]
    same(of("nvfp4", 16, 256, codes=codes, block=swizzle(block), scale=scale), wanted.flatten(1))
    codes = torch.randint(0, 127, (16, 512), dtype=torch.uint8).view(torch.float8_e4m3fn)
    byte = ALL.view(16, 16)
    wanted = codes.float().view(16, 16, 32) * byte.view(torch.float8_e8m0fnu).float()[..., None]
    same(of("w8a8_mxfp8", 16, 512, codes=codes, scale=byte), wanted.flatten(1))


@check("NVFP4's tiles of scales, several down and across")
def swizzled_right() -> None:
    rows, columns = 140, 80
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    block = torch.rand(rows, columns // 16).to(torch.float8_e4m3fn)
    values = E2M1[torch.stack([codes >> 4, codes & 15], -1).flatten(1).long()]
    wanted = values.view(rows, -1, 16) * block.float()[..., None]
    same(of("nvfp4", rows, columns, codes=codes, block=swizzle(block), scale=torch.tensor(1.0)), wanted.flatten(1))


@check("ggml's blocks by gguf-py")
def ggml_right() -> None:
    import gguf

    for name in sorted(one for one in CODECS if one.startswith("ggml")):
        tile = any_bytes(name, 2, 256, seed=1)
        kind = gguf.GGMLQuantizationType[codec(name).kind.name]
        wanted = torch.from_numpy(gguf.quants.dequantize(tile["codes"].numpy(), kind).reshape(2, 256).copy())
        same(launch.decoded(plan(tile), torch.float32), wanted)


@check("bytes that begin anywhere, and rows that lie apart")
def views_right() -> None:
    tile, apart = any_bytes("ggml_q8_0", 3, 64), any_bytes("w8a8_mxfp8", 3, 64)
    memory = torch.zeros(1 + tile["codes"].numel(), dtype=torch.uint8)
    memory[1:] = tile["codes"].flatten()
    moved = tile.having(codes=memory[1:].view(tile["codes"].shape))
    same(launch.decoded(plan(moved), torch.float32), codec("ggml_q8_0").residual(tile, torch.float32))
    wide = torch.zeros(3, 96, dtype=torch.uint8)
    wide[:, :64] = apart["codes"].view(torch.uint8)
    same(launch.decoded(plan(apart.having(codes=wide.view(torch.float8_e4m3fn)[:, :64])), torch.float32),
         codec("w8a8_mxfp8").residual(apart, torch.float32))


def product_right(name: str, count: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Against F64: a rounding of F32 for each product and its sum, and one of the dtype."""
    tile = usual(name, rows, columns, groups=columns // 16, seed=count)
    x, bias = torch.randn(count, columns).to(dtype), torch.randn(rows)
    weight, own = codec(name).residual(tile, torch.float32).to(dtype).double(), bias.to(dtype).double()
    exact, size = x.double() @ weight.t() + own, x.double().abs() @ weight.abs().t() + own.abs()
    found = ours.product(x, tile, bias)
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + (columns + 2) * 2.0 ** -24 * size + 2.0 ** -25
    assert found.dtype == dtype and found.shape == exact.shape and ((found - exact).abs() <= bound).all()


for each in sorted(name for name in CODECS if not name.startswith("ggml")):  # whose random bytes are any F16
    CHECKS[f"product {each}"] = lambda name=each: product_right(name, 3, 21 if "awq" not in name else 24, 192, torch.float16)
for least, (_, form) in zip((1, 17, 65), SHAPES, strict=True):  # of 8 steps, so cut into parts
    CHECKS[f"product of {least} rows"] = lambda least=least, form=form: product_right(
        "nvfp4", least, 40, 7 * form.columns + 16, torch.float16)
CHECKS["product in F32"] = lambda: product_right("u4_groups", 3, 40, 96, torch.float32)
CHECKS["product of many rows"] = lambda: product_right("fp8", CROSSOVER + 1, 40, 96, torch.float16)


@check("a low-rank branch, and no bias")
def low_rank_right() -> None:
    tile, x = usual("u4_groups", 24, 96, groups=3), torch.randn(2, 96).half()
    down, up = torch.randn(96, 2).half(), torch.randn(24, 2).half()
    found = kernel("triton").linear(Activation(x), tile.having(down=down, up=up), None)
    weight = codec("u4_groups").residual(tile, torch.float32).double() + up.double() @ down.double().t()
    assert (found - x.double() @ weight.t()).norm() <= 2 * torch.finfo(torch.float16).eps * found.norm()


@check("columns of activations, and bias in another dtype")
def columns_right() -> None:
    tile, x = usual("fp8", 24, 64), torch.randn(4, 160).half()
    some = Activation(x).columns(32, 64).x
    assert some.stride(0) == 160
    torch.testing.assert_close(ours.product(some, tile, torch.ones(24)), ours.product(some.contiguous(), tile, torch.ones(24)))


@check("memory that is used again")
def scratch_right() -> None:
    """Of one weight after the other, in inference mode and out of it; other threads have their own."""
    tiles = [usual("u4_groups", 24, 96, groups=3, seed=seed) for seed in range(2)]
    x = torch.randn(2, 96)
    with torch.inference_mode():
        ours.product(x.clone(), tiles[0], None)
    first, held = ours.product(x, tiles[0], None), []
    ours.product(x, tiles[1], None)
    torch.testing.assert_close(first, x @ codec("u4_groups").residual(tiles[0], torch.float32).t())

    def hold() -> None:
        memory = launch._weight(plan(tiles[0]), x)
        assert memory is not None and memory.shape == (24, 96)
        held.append((memory.data_ptr(), memory))

    hold()
    hold()
    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert held[0][0] == held[1][0] != held[2][0]


@check("what is wrong does not pass")
def wrong_ones_refused() -> None:
    """The interpreter's BF16 is not the definition's; nor are other bytes, or products with something wrong in them."""
    tile, x = usual("u4_groups", 24, 96, groups=3), torch.randn(2, 96)
    for _ in range(2):
        try:
            ours.product(x.bfloat16(), tile, None)
        except RuntimeError as error:
            assert "differs from the definition" in str(error)
        else:
            raise AssertionError("BF16 passed")
    made = plan(tile)
    assert made.scale is not None
    shape = shape_for(2)
    assert not ours._tried(x.half(), tile, made, None, shape)
    for name in ("nvfp4", "svdq_int4", "u4_awq", "w8a16"):  # piece by piece, and whole where rows are not alone
        many = usual(name, 1100 if name != "u4_awq" else 1096, 64, groups=2)
        weight = codec(name).residual(many, torch.float32)
        assert ours.is_defined(weight, many)
        weight[-1, -1] += 1
        assert not ours.is_defined(weight, many)
    assert "definition" in ours._tried(x.half(), tile, made._replace(scale=made.scale * 1.001), None, shape)
    true = launch.fused
    for fault in (lambda out: out.roll(1, 1), lambda out: out * 1.004, lambda out: torch.cat([out[:-1], out[:1]])):
        launch.fused = lambda *args, fault=fault: fault(true(*args))
        try:
            assert ours._tried(x.half(), tile, made, None, shape) == "the product is wrong"
        finally:
            launch.fused = true
    launch.fused = lambda *args: 1 / 0
    try:
        assert "ZeroDivisionError" in ours._tried(x.half(), tile, made, None, shape)
    finally:
        launch.fused = true


def layer(name: str, own: tuple[str, ...], tile: Tile) -> torch.nn.Module:
    """A Linear [32, 96] multiplied by the kernel, in F16."""
    operations = with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float16), {name: "triton"})
    module = operations.Linear(96, 32, device="cpu", dtype=torch.float16)
    state = {**join([tile], ["x"], (32, 96), own=own).tensors, "bias": torch.randn(32).half()}
    assert not any(module.load_state_dict(state, strict=False))
    return module.eval()


@check("torch.compile leaves the product whole")
def compiled_right() -> None:
    """One operation, which is this kernel when it runs, and plain torch where the kernel fails."""
    tile = usual("u4_groups", 32, 96, groups=3).having(down=torch.randn(96, 2).half(), up=torch.randn(32, 2).half())
    module, seen, true = layer("u4_groups", ("u4_groups",), tile), [], ours.product

    def note(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        compiled = torch.compile(module, backend=aot_autograd(fw_compiler=note), dynamic=True)
        for count in (2, 3):
            x = torch.randn(count, 96).half()
            wanted = module(x)
            torch.testing.assert_close(compiled(x), wanted, rtol=2e-3, atol=2e-3)
        assert torch.ops.quantized_transformers.times_tile.default in seen
        ours.product = lambda *args: torch.ones(2).view(3)  # raises a RuntimeError
        try:
            torch.testing.assert_close(compiled(x), wanted, rtol=2e-3, atol=2e-3)
        finally:
            ours.product = true


@check("a layer in ComfyUI's own layout")
def host_layout_right() -> None:
    """Multiplied here where the kernel was chosen for it, and then exactly: ComfyUI's own rounds the scale."""
    tile = usual("nvfp4", 32, 96)
    module, calls, true = layer("nvfp4", (), tile), [], ours.product
    assert module.weight._layout_cls == "TensorCoreNVFP4Layout"
    ours.product = lambda *args: calls.append(args) or true(*args)
    x = torch.randn(2, 3, 96).half()
    try:
        with torch.inference_mode():
            out = module(x)
    finally:
        ours.product = true
    weight = codec("nvfp4").residual(tile, torch.float32).half()
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, module.bias), rtol=2e-3, atol=2e-3)
    assert len(calls) == 1 and out.shape == (2, 3, 32)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {}
    for name, work in CHECKS.items():
        try:
            work()
            found[name] = ""
        except Exception:  # the next one is another matter
            found[name] = traceback.format_exc()[-1500:]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
