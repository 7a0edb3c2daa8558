"""The FlashInfer path without a Blackwell GPU: choosing, and what reaches mm_fp4.

The stand-in module checks every argument against the documented signature of flashinfer-python 0.7.2 (gemm_base.py
mm_fp4, quantization/fp4_quantization.py shuffle_matrix_a / shuffle_matrix_sf_a) and multiplies by the definition.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from quantized_transformers.quant.blocks import swizzle
from quantized_transformers.quant.codecs.nvfp4 import NVFP4_FORMAT
from quantized_transformers.quant.kernels.flashinfer import VARIABLE, choose
from quantized_transformers.quant.layouts.join import join
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.stored import ByteOrder
from support.common import E2M1, decode_nvfp4

pytestmark = pytest.mark.unit

BLACKWELL = (10, 0)


def unswizzle(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """128 x 4 tiles -> [rows, columns], by the offset formula of docs/formats/nvfp4.md, "Tiles"."""
    wide = -(-columns // 4) * 4
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    offset = ((r // 128) * (wide // 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    return tiles.contiguous().view(torch.uint8).flatten()[offset].view(torch.float8_e4m3fn)


PERMUTATION = torch.arange(127, -1, -1)  # a row shuffle within 128, as FlashInfer's is; which one does not matter here


@pytest.fixture()
def flashinfer(monkeypatch):
    calls: list[dict] = []

    def shuffle(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(-1, 128, rows.shape[1])[:, PERMUTATION].reshape(rows.shape)

    def shuffle_matrix_a(input_tensor, epilogue_tile_m):
        assert epilogue_tile_m == 128 and input_tensor.dtype == torch.uint8 and input_tensor.is_contiguous()
        return shuffle(input_tensor)

    def shuffle_matrix_sf_a(input_tensor, epilogue_tile_m, num_elts_per_sf=16):
        assert epilogue_tile_m == 128 and input_tensor.dtype == torch.uint8  # linear layout
        return swizzle(shuffle(input_tensor))

    def mm_fp4(a, b, a_descale, b_descale, alpha=None, out_dtype=torch.bfloat16, out=None, block_size=16,
               use_8x4_sf_layout=False, backend="auto", use_nvfp4=True, enable_pdl=True):
        calls.append({"backend": backend, "b": tuple(b.shape)})
        assert a.dtype == b.dtype == a_descale.dtype == b_descale.dtype == torch.uint8
        assert b.stride(0) == 1 and b_descale.stride(0) == 1  # column major
        assert a.shape[1] == b.shape[0] and alpha.shape == (1,) and alpha.dtype == torch.float32
        assert out_dtype in (torch.bfloat16, torch.float16) and (backend != "trtllm" or out_dtype == torch.bfloat16)
        blocks = a.shape[1] // 8

        def decode(codes, scales):  # whatever the nibble order, as long as both operands share it
            pairs = torch.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1).long()
            return E2M1[pairs] * unswizzle(scales, codes.shape[0], blocks).float().repeat_interleave(16, 1)

        weight = decode(b.t().contiguous(), b_descale.t().contiguous())
        if backend == "trtllm":  # the kernel undoes the shuffle
            weight = weight.view(-1, 128, weight.shape[1])[:, PERMUTATION.argsort()].reshape(weight.shape)
        return ((decode(a, a_descale) @ weight.t()) * alpha).to(out_dtype)

    module = ModuleType("flashinfer")
    module.__spec__ = ModuleType("spec")  # find_spec looks for one
    for function in (mm_fp4, shuffle_matrix_a, shuffle_matrix_sf_a):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return calls


@pytest.mark.parametrize(("wanted", "said", "backend"), [
    ("auto", None, None), ("comfy_kitchen", "cudnn", None), ("auto", "cudnn", "cudnn"), ("auto", "FlashInfer_TRTLLM", "trtllm"),
    ("auto", "cutlass", "cutlass"), ("auto", "flashinfer_cutlass", "cutlass"), ("auto", "auto", "auto"),
    ("flashinfer_cudnn", "trtllm", "cudnn"), ("flashinfer_trtllm", None, "trtllm"), ("flashinfer_cutlass", None, "cutlass")])
def test_choice(wanted, said, backend, flashinfer):
    environment = {VARIABLE: said} if said else {}
    assert choose(wanted, BLACKWELL, environment)[0] == backend


def test_choice_falls_back_and_says_why(monkeypatch, flashinfer):
    for capability, reason in (((9, 0), "SM 9.0"), (None, "no NVIDIA GPU")):
        backend, note = choose("flashinfer_cudnn", capability, {})
        assert backend is None and reason in note and "SM 10.0" in note
    backend, note = choose("auto", BLACKWELL, {VARIABLE: "magic"})
    assert backend is None and "'magic' is none of auto, cudnn" in note
    del sys.modules["flashinfer"].mm_fp4
    backend, note = choose("flashinfer_cudnn", BLACKWELL, {})
    assert backend is None and "does not import" in note and "comfy-kitchen" in note
    monkeypatch.delitem(sys.modules, "flashinfer")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    backend, note = choose("flashinfer_cudnn", BLACKWELL, {})
    assert backend is None and "pip install flashinfer-python" in note


def test_the_choice_of_a_load(flashinfer):
    from quantized_transformers.host import Machine
    from quantized_transformers.quant.kernels import nunchaku_wheel
    from quantized_transformers.quant.kernels.choose import Wanted
    from quantized_transformers.quant.kernels.choose import choose as kernels

    found = {"nunchaku": nunchaku_wheel.Wheel("", "none"), "torch_npu": None}
    b200 = Machine("cuda", "B200", BLACKWELL, matmuls=frozenset({"NVFP4", "FP8"}), found=found)
    choice = kernels(Wanted(fp4_backend="flashinfer_cudnn"), ["nvfp4", "fp8"], b200)
    assert choice.kernels == {"nvfp4": "flashinfer:cudnn", "fp8": "comfy_kitchen"} and choice.native
    assert "NVFP4 runs: flashinfer:cudnn (as chosen) on B200: FlashInfer (cudnn) multiplies NVFP4" in choice.lines
    assert kernels(Wanted("dequantize", "flashinfer_cudnn"), ["nvfp4"], b200).kernels == {"nvfp4": ""}
    assert "no effect" in kernels(Wanted(fp4_backend="flashinfer_cudnn"), ["fp8"], b200).notes[0]
    ada = Machine("cuda", "RTX 4090", (8, 9), matmuls=frozenset({"FP8"}), found=found)
    choice = kernels(Wanted(fp4_backend="flashinfer_cudnn"), ["nvfp4"], ada)
    assert choice.kernels == {"nvfp4": ""} and "SM 8.9" in choice.notes[0]


def stored(rows: int, columns: int, scale: float, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"weight": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=g),
            "weight_scale": torch.rand(rows, columns // 16, generator=g).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor(scale), "input_scale": torch.tensor(0.002)}


@pytest.mark.parametrize("backend", ["cudnn", "cutlass", "trtllm", "auto"])
@pytest.mark.parametrize("scales", [(0.01,), (0.01, 0.02, 0.03)])
def test_multiplies_every_shard(backend, scales, flashinfer):
    import comfy.ops
    import comfy_kitchen

    columns, rows = 128, 128
    parts = [stored(rows, columns, s, i) for i, s in enumerate(scales)]
    tiles = [NVFP4_FORMAT.coded(str(i), p, ByteOrder()).tiles[0].at(i * rows) for i, p in enumerate(parts)]
    tensors = join(tiles, ["x"], (rows * len(scales), columns), own={"nvfp4"}).tensors
    operations = with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.bfloat16),
                               {"nvfp4": f"flashinfer:{backend}"})
    module = operations.Linear(columns, rows * len(scales), bias=True, device="cpu", dtype=torch.bfloat16)
    bias = torch.randn(rows * len(scales)).to(torch.bfloat16)
    assert not any(module.load_state_dict({**tensors, "bias": bias}, strict=False))
    x = torch.randn(40, columns, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)  # pads to 48
    with torch.inference_mode():
        out = module(x)
    assert [c["backend"] for c in flashinfer] == [backend] * len(scales)
    codes, block = comfy_kitchen.quantize_nvfp4(x, torch.tensor(0.002), pad_16x=True)
    activation = comfy_kitchen.dequantize_nvfp4(codes, torch.tensor(0.002), block, torch.float32)[:40]
    weight = torch.cat([decode_nvfp4(p["weight"], p["weight_scale"], p["weight_scale_2"]) for p in parts])
    exact = activation @ weight.t() + bias.float()
    assert float((out.float() - exact).norm() / exact.norm()) < 2 ** -8  # BF16 out, and once more for the bias


def test_sizes_the_kernels_do_not_take_go_elsewhere(flashinfer):
    import comfy.ops

    part = stored(48, 128, 0.01, 0)
    tensors = join(NVFP4_FORMAT.coded("x", part, ByteOrder()).tiles, ["x"], (48, 128), own={"nvfp4"}).tensors
    operations = with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32),
                               {"nvfp4": "flashinfer:cudnn"})
    module = operations.Linear(128, 48, bias=False, device="cpu", dtype=torch.float32)
    assert not any(module.load_state_dict(tensors, strict=False))
    with torch.inference_mode():
        assert module(torch.randn(16, 128)).shape == (16, 48)
    assert not flashinfer
