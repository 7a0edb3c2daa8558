"""The Triton kernels without a GPU: in Triton's interpreter against definitions and F64, compiled for GPUs that are not
there, and when they are chosen. What they give on a GPU is for stage 2 of `gpu-table`, and for their own proof there."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from gpu import layer_times, layers, machine
from gpu.layers import Arm

from quantized_transformers.host import Machine
from quantized_transformers.quant.codecs import codecs
from quantized_transformers.quant.kernels import kernel
from quantized_transformers.quant.kernels.base import Activation, dense
from quantized_transformers.quant.kernels.choose import Wanted, choose
from quantized_transformers.quant.kernels.nunchaku_wheel import Wheel
from quantized_transformers.quant.kernels.triton import version
from quantized_transformers.quant.kernels.triton_code.plan import CODECS, plan
from quantized_transformers.quant.kernels.triton_code.shapes import (
    COLUMNS,
    CROSSOVER,
    ROWS,
    SHAPES,
    WARPS,
    parts_of,
    shape_for,
)
from support.pack import PACK
from support.tiles import usual

pytestmark = pytest.mark.unit
WHERE_CPU = machine.Where(torch.device("cpu"), machine.TINY, "")

SCRIPT = PACK / "tests" / "support" / "triton_interpreted.py"
LEFT = {"plain", "svdq_int4_unsigned", "int8_convrot16", "int8_convrot64", "int8_convrot256", "ggml_iq2_xxs", "ggml_iq2_xs",
        "ggml_iq3_xxs", "ggml_iq1_s", "ggml_iq3_s", "ggml_iq2_s", "ggml_iq1_m", "ggml_tq1_0", "ggml_tq2_0", "ggml_mxfp4",
        "ggml_nvfp4"}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="torch comes with Triton on Linux alone")


def names() -> list[str]:
    """Of the script's checks, by its text: those in a loop come from the same tables."""
    text = SCRIPT.read_text(encoding="utf-8")
    own = [ast.literal_eval(found) for found in re.findall(r"^@check\((.+)\)$", text, re.MULTILINE)]
    return own + ["product in F32", "product of many rows", *(f"product of {least} rows" for least in (1, 17, 65)),
                  *(f"decode {name}" for name in sorted(CODECS)),
                  *(f"product {name}" for name in sorted(CODECS) if not name.startswith("ggml"))]


@cache
def interpreted() -> dict[str, str]:
    """All checks in one process: what was checked -> what is wrong."""
    done = subprocess.run([sys.executable, str(SCRIPT)], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_triton
@pytest.mark.parametrize("name", names())
def test_interpreted(name):
    found = interpreted()
    assert name in found and not found[name], found.get(name)


@needs_triton
def test_nothing_else_is_wrong():
    found = interpreted()
    assert set(found) > set(names()) and not {name: wrong for name, wrong in found.items() if wrong}


def test_codecs_that_are_left_to_plain_torch():
    assert set(codecs()) - CODECS == LEFT  # as docs/triton.md says


@pytest.mark.parametrize(("count", "wanted"), [(1, 16), (16, 16), (17, 64), (64, 64), (65, 128), (CROSSOVER, 128), (CROSSOVER + 1, None)])
def test_shapes(count, wanted):
    shape = shape_for(count)
    assert (shape and shape.m) == wanted


@pytest.mark.parametrize("processors", [20, 132])
@pytest.mark.parametrize("columns", [32, 96, 3072, 12288, 15360])
@pytest.mark.parametrize("rows", [1, 3072, 21504])
@pytest.mark.parametrize("count", [1, 20, 60, 200])
def test_parts_cover_the_sum_once(count, rows, columns, processors):
    shape = shape_for(count)
    parts, steps = parts_of(shape, count, rows, columns, processors)
    assert 1 <= parts <= shape.most and parts * steps * shape.columns >= columns
    assert parts == 1 or steps >= 4
    assert parts == 1 or -(-count // shape.m) * -(-rows // shape.rows) * parts // 2 < shape.each * processors


FOUND = {"triton": (3, 6), "torch_npu": None, "nunchaku": Wheel("", "none")}
WHERE = {
    "H100": Machine("cuda", "H100", (9, 0), matmuls=frozenset({"FP8", "INT8"}), found=FOUND),
    "A100": Machine("cuda", "A100", (8, 0), matmuls=frozenset({"INT8"}), found=FOUND),
    "B200": Machine("cuda", "B200", (10, 0), matmuls=frozenset({"FP8", "NVFP4", "MXFP8", "INT8"}), found=FOUND)}
CHOSEN = {  # codec: the kernels on H100, A100 and B200
    "fp8": ("comfy_kitchen", "triton", "comfy_kitchen"), "fp8_blocks": ("triton", "triton", "triton"),
    "nvfp4": ("triton", "triton", "comfy_kitchen"), "svdq_nvfp4": ("triton", "triton", "comfy_kitchen"),
    "svdq_int4": ("comfy_kitchen", "comfy_kitchen", "comfy_kitchen"), "awq": ("comfy_kitchen", "comfy_kitchen", "comfy_kitchen"),
    "w8a8_mxfp8": ("triton", "triton", "comfy_kitchen"), "w4a4_mxfp4": ("triton", "triton", "triton"),
    "w8a16": ("triton", "triton", "triton"), "w8a8_dynamic": ("comfy_kitchen", "comfy_kitchen", "comfy_kitchen"),
    "w4a4_dynamic": ("comfy_kitchen", "comfy_kitchen", "comfy_kitchen"), "u4_groups": ("triton", "triton", "triton"),
    "u4_awq": ("triton", "triton", "triton"), "codebook": ("triton", "triton", "triton"), "ggml_q4_k": ("triton", "triton", "triton"),
    "ggml_iq1_s": ("", "", ""), "svdq_int4_unsigned": ("comfy_kitchen", "comfy_kitchen", "comfy_kitchen")}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", CHOSEN)
def test_choice(name, where):
    choice = choose(Wanted(), [name], WHERE[where])
    assert choice.kernels == {name: CHOSEN[name][list(WHERE).index(where)]}
    if choice.kernels[name] == "triton":
        assert not choice.native and "decoded in one pass by Triton" in choice.lines[0] and "speed unknown" in choice.lines[0]


def test_the_gpu_table_measures_it():
    """In every layout, beside what ComfyUI does itself, and each way alone where the two cross."""
    arms = list(layers.arms(WHERE["A100"]))
    assert {(arm.codec, arm.layout) for arm in arms if arm.kernel == "triton"} == {
        *((name, "tiles") for name in CODECS if not name.startswith("ggml") or name in layers.GGML),
        *((name, "shards") for name in ("fp8", "nvfp4")), *((name, "host") for name in CODECS if codecs()[name].word)}
    ways = layer_times.both_ways(arms)
    assert {(arm.codec, arm.kernel) for arm in ways} == set(itertools.product(layer_times.CROSSING, layer_times.WAYS))
    assert layers.linear(Arm("nvfp4", "host", "triton"), 32, 96, WHERE_CPU).weight._layout_cls == "TensorCoreNVFP4Layout"
    assert kernel("triton:memory").way == "memory" and kernel("triton:fused").name == "triton:fused"
    assert shape_for(1, "memory") is None and shape_for(5000, "fused") == SHAPES[-1][1] and shape_for(1, "fused") == SHAPES[0][1]


def test_dequantize_is_plain_torch():
    """What the kernels are held against, and a way around them."""
    assert choose(Wanted("dequantize"), ["u4_groups", "nvfp4"], WHERE["H100"]).kernels == {"u4_groups": "", "nvfp4": ""}
    with pytest.raises(ValueError, match="nothing multiplies UINT4"):
        choose(Wanted("native"), ["u4_groups"], WHERE["H100"])
    with pytest.raises(ValueError, match="has no NVFP4 matrix multiplication"):
        choose(Wanted("native"), ["nvfp4"], WHERE["A100"])


@pytest.mark.parametrize(("machine", "why"), [
    (Machine(found=FOUND), "NVIDIA"), (Machine("cuda", "gfx1100", None, "gfx1100", found=FOUND), "NVIDIA"),
    (Machine("npu", "Ascend", found=FOUND), "NVIDIA"), (Machine("cuda", "T4", (7, 5), found=FOUND), "need SM 8.0, and this is SM 7.5"),
    (Machine("cuda", "H100", (9, 0), found={**FOUND, "triton": ()}), "not installed"),
    (Machine("cuda", "H100", (9, 0), found={"triton": (3, 2)}), "3.3 or newer, and this is 3.2"),
    (Machine("cuda", "H100", (9, 0)), "not installed")])
def test_machines_that_it_is_not_for(machine, why):
    assert why in kernel("triton").runs("u4_groups", machine)


@needs_triton
def test_the_version_is_found_in_its_files():
    import triton

    assert version() == tuple(map(int, triton.__version__.split(".")[:2]))


@pytest.mark.parametrize("x", [torch.randn(2, 96, requires_grad=True), torch.randn(2, 96).double(), torch.randn(0, 96)],
                         ids=["differentiated", "F64", "nothing"])
def test_what_is_left_to_plain_torch(x):
    """Without Triton's help: it would refuse a tensor on a CPU."""
    tile = usual("u4_groups", 32, 96, groups=3)
    torch.testing.assert_close(kernel("triton").linear(Activation(x), tile, None), dense(x, tile, None))


@needs_triton
@pytest.mark.parametrize("sm", [80, pytest.param(90, marks=pytest.mark.full), pytest.param(100, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "nvfp4" else pytest.mark.full) for name in sorted(CODECS)])
def test_compiled_for_a_gpu(name, sm, tmp_path, monkeypatch):
    """Products and sums are rounded apart, subnormal numbers are kept, BF16 is rounded to even, divisions are right to
    the last bit, and 99 KiB of shared memory are enough."""
    from quantized_transformers.quant.kernels.triton_code.products import multiply, store

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile, out = usual(name, 256, 768, groups=12), torch.empty(1, dtype=torch.bfloat16)
    made = plan(tile)
    kernels = [compiled(store, sm, [*made.tensors, out, 3072, 3072, *made.strides, *made.constants, True, ROWS, COLUMNS], WARPS, 3)]
    kernels += [compiled(multiply, sm, [*made.tensors, out, None, out, 48, 3072, 3072, *made.strides, 3072, *made.constants, True, shape.m,
                                        shape.rows, shape.columns, 24], shape.warps, shape.stages) for _, shape in SHAPES]
    for one in kernels:
        ptx = one.asm["ptx"]
        assert "mul.f32" in ptx or "mul.rn.f32" in ptx
        assert not re.findall(r"fma\.rn\.f32|\.ftz|div\.(full|approx)", ptx)
        assert "cvt.rn.bf16" in ptx and one.metadata.shared <= 99 * 1024
    if made.divide:
        assert "div.rn.f32" in kernels[0].asm["ptx"]


def compiled(function, sm: int, values: list, warps: int, stages: int):
    """A kernel for a GPU, without one; integers that are multiples of 16 and addresses count as such."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int8: "*i8",
             torch.int32: "*i32"}
    signature, constants, attributes = {}, {}, {}
    for at, (parameter, value) in enumerate(zip(function.params, values, strict=True)):
        if parameter.is_constexpr or value is None or isinstance(value, int) and value == 1:
            signature[parameter.name], constants[(at,)] = "constexpr", value
            continue
        signature[parameter.name] = "i32" if isinstance(value, int) else types[value.dtype]
        if not isinstance(value, int) or value % 16 == 0:
            attributes[(at,)] = [["tt.divisibility", 16]]
    return compile(ASTSource(function, signature, constants, attributes), target=GPUTarget("cuda", sm, 32),
                   options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False})
