"""The back end "nunchaku": finding the real engine, its hardware gate, and its kernels' arguments.

The kernels need a GPU and the wheel, so a stand-in with their signatures checks every argument by the shapes and dtypes
of their documentation, reads the packed tensors by the closed formulas, and computes
docs/sources/nunchaku.md, "Arithmetic", in F32.
"""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from quantized_transformers.host import Machine
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.quant.kernels import nunchaku_wheel
from quantized_transformers.quant.kernels.choose import Wanted, choose
from quantized_transformers.quant.layouts.tiled import tiles_of
from quantized_transformers.quant.patches import factors as lora
from support import svdquant
from support.svdquant import awq, rel, w4a4
from support.svdquant_net import SIZES, add, inputs, linear, linear_of, lora_file, make, merged, run

pytestmark = pytest.mark.unit

HALF = (torch.bfloat16, torch.float16)


class Engine:
    """nunchaku.ops.quantize, .gemm and .gemv."""

    def __init__(self):
        self.calls, self.acts = [], {}

    def quantize(self, input, output=None, oscales=None, lora_down=None, lora_act_out=None, smooth=None, fuse_glu=False,
                 fp4=False, pad_size=256):
        rows, columns = input.shape
        rank, group = lora_down.shape[1], 16 if fp4 else 64
        assert input.dtype in HALF and input.is_contiguous() and columns % 128 == 0
        assert lora_down.shape == (columns, rank) and rank % 16 == 0 and lora_down.dtype == input.dtype
        assert smooth.shape == (columns,) and smooth.dtype == input.dtype and lora_down.is_contiguous()
        assert (output, oscales, lora_act_out, fuse_glu) == (None, None, None, False)
        padded = svdquant.up_to(rows, pad_size)
        down = svdquant.take(lora_down, svdquant.at_down(columns, rank)).float()
        main = input.float() / svdquant.take(smooth, svdquant.at_scales(1, columns))[0].float()
        act = torch.empty(padded, columns // 2, dtype=torch.uint8)
        scales = torch.empty(columns // group, padded, dtype=torch.float8_e4m3fn if fp4 else input.dtype)
        self.acts[id(act)] = (act, svdquant.quantized(main, "nvfp4" if fp4 else "int4", rounded=False), scales)
        lora_act = torch.zeros(padded, rank)
        lora_act[:rows] = input.float() @ down
        return act, scales, lora_act

    def gemm(self, act, wgt, out=None, qout=None, ascales=None, wscales=None, oscales=None, poolout=None,
             lora_act_in=None, lora_up=None, lora_down=None, lora_act_out=None, norm_q=None, norm_k=None,
             rotary_emb=None, bias=None, smooth_factor=None, out_vk=None, out_linearattn=None, act_unsigned=False,
             lora_scales=None, fuse_silu=False, fp4=False, alpha=1.0, wcscales=None, out_q=None, out_k=None, out_v=None,
             attn_tokens=0):
        _, main, scales = self.acts.pop(id(act))
        assert ascales is scales and not act_unsigned and bias is None  # the standalone quantizer emits signed codes
        rows, columns, group = wgt.shape[0], wgt.shape[1] * 2, 16 if fp4 else 64
        assert wgt.dtype == torch.int8 and rows % 128 == 0 and columns == main.shape[1] and wgt.is_contiguous()
        assert out.shape == (main.shape[0], rows) and out.dtype in HALF
        assert wscales.shape == (columns // group, rows) and wscales.is_contiguous()
        assert wscales.dtype == (torch.float8_e4m3fn if fp4 else out.dtype)
        rank = lora_act_in.shape[1]
        assert lora_up.shape == (rows, rank) and lora_up.dtype == out.dtype and lora_act_in.dtype == torch.float32
        codes = svdquant.nibbles_of(wgt)[svdquant.at_codes(0, rows, columns)]
        if fp4:
            assert isinstance(alpha, float) and wcscales.shape == (rows,) and wcscales.dtype == out.dtype
            scale = svdquant.take(wscales, svdquant.at_micro(rows, columns // 16))
            channel = svdquant.take(wcscales, svdquant.at_scales(1, rows))[0]
            layer = svdquant.Layer("nvfp4", codes, scale, None, {}, tensor_scale=torch.tensor(alpha),
                                   channel_scale=channel)
        else:
            assert alpha is None and wcscales is None
            layer = svdquant.Layer("int4", codes, svdquant.take(wscales, svdquant.at_scales(columns // 64, rows)), None, {})
        up = svdquant.take(lora_up, svdquant.at_up(rows, rank)).float()
        out.copy_(main @ layer.residual.t() + lora_act_in[:main.shape[0]] @ up.t())
        self.calls.append(layer.kind)

    def gemv(self, in_feats, kernel, scaling_factors, zeros, m, n, k, group_size=64):
        assert 0 < m <= 8 and in_feats.shape == (m, k) and in_feats.dtype in HALF and group_size == 64  # aborts above
        assert kernel.shape == (n // 4, k // 2) and kernel.dtype == torch.int32
        assert scaling_factors.shape == zeros.shape == (k // 64, n)
        assert scaling_factors.dtype == zeros.dtype == in_feats.dtype
        codes = svdquant.nibbles_of(kernel)[svdquant.at_awq(n, k)]
        layer = svdquant.Layer("awq", codes, scaling_factors, None, {}, zeros=zeros)
        self.calls.append("awq")
        return (in_feats.float() @ layer.residual.t()).to(in_feats.dtype)


@pytest.fixture()
def engine(monkeypatch):
    engine = Engine()
    modules = {"nunchaku": {}, "nunchaku.ops": {}, "nunchaku.ops.gemv": {"awq_gemv_w4a16_cuda": engine.gemv},
               "nunchaku.ops.gemm": {"svdq_gemm_w4a4_cuda": engine.gemm},
               "nunchaku.ops.quantize": {"svdq_quantize_w4a4_act_fuse_lora_cuda": engine.quantize}}
    for name, functions in modules.items():
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    return engine


MADE = {"int4": lambda d: w4a4(200, 320, 40, dtype=d), "nvfp4": lambda d: w4a4(200, 320, 32, "nvfp4", dtype=d),
        "nvfp4 channels": lambda d: w4a4(384, 256, 16, "nvfp4", dtype=d, channel_scales=True),
        "awq": lambda d: awq(192, 640, dtype=d)}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("which", MADE)
def test_the_kernels_get_the_layer(which, dtype, engine):
    layer = MADE[which](torch.bfloat16)  # BF16 files run in FP16 on Turing
    x = inputs(layer.codes.shape[1], dtype=dtype)
    module = linear(layer, backend="nunchaku", dtype=dtype)
    out = run(module, x)
    assert rel(out, layer.forward(x, rounded=False)) < 4e-3  # BF16 output and bias
    assert engine.calls == ([layer.kind] if layer.kind != "awq" else ["awq"] * 3)
    assert rel(module.weight.dequantize(), layer.weight) < 4e-3


def test_unsigned_layers_keep_their_grid(engine):
    """The package's quantizer has no unsigned codes outside its fused MLP, so these stay with comfy-kitchen."""
    layer = w4a4(192, 320, 32, unsigned=True)
    x = inputs(320)
    assert rel(run(linear(layer, backend="nunchaku"), x), layer.forward(x)) < 1e-5 and not engine.calls


def test_a_lora_reaches_the_kernels(engine):
    base = make("nunchaku", torch.bfloat16)
    for name in ("qkv", "linear1", "mod"):
        file = lora_file(name)
        patched, x = add(base, file, 2.0), inputs(SIZES[name][1], dtype=torch.bfloat16)
        before = run(getattr(base.model.diffusion_model, name), x)
        patched.patch_model(patched.load_device)
        change = run(getattr(patched.model.diffusion_model, name), x).float() - before.float()
        patched.unpatch_model(patched.offload_device)
        assert rel(change, x.float() @ dict(merged(file, 2.0))[name].t()) < 2e-2
    assert "int4" in engine.calls and "awq" in engine.calls
    assert tiles_of(base.model.diffusion_model.qkv.weight)[0]["down"].shape[1] == 16
    found = lora.factors(patched.patches["diffusion_model.mod.weight"], (128, 128))
    assert tiles_of(lora.append(base.model.diffusion_model.mod.weight, found))[0]["down"].shape == (128, 8)


def test_a_saved_f32_pair_is_packed_in_16_bit():
    patched = add(make(), lora_file("qkv"))
    patched.patch_model(patched.load_device)
    module = patched.model.diffusion_model.qkv
    assert tiles_of(module.weight)[0]["down"].dtype == torch.float32
    again = linear_of({f"x.{k}": v for k, v in module.state_dict().items()}, (384, 128), "nunchaku", torch.bfloat16)
    assert rel(again.weight.dequantize(), module.weight.dequantize()) < 4e-3
    patched.unpatch_model(patched.offload_device)


IMPOSTOR = {"nunchaku/__init__.py": "raise RuntimeError('imported')",
            "nunchaku-0.16.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: nunchaku\nVersion: 0.16.1\n"}
REAL = {"nunchaku/__init__.py": "raise RuntimeError('imported')", "nunchaku/models/linear.py": "",
        "nunchaku/models/__init__.py": "", "nunchaku/_C.cpython-311-x86_64-linux-gnu.so": "",
        "nunchaku-1.2.1+cu13.0torch2.10.dist-info/METADATA":
            "Metadata-Version: 2.1\nName: nunchaku\nVersion: 1.2.1+cu13.0torch2.10\n"}


def installed(files, folder, monkeypatch):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return nunchaku_wheel.find()


def test_the_engine_is_found_without_importing_it(tmp_path, monkeypatch):
    assert installed(REAL, tmp_path, monkeypatch) == ("1.2.1+cu13.0torch2.10", "")
    assert "nunchaku" not in sys.modules


def test_the_statistics_library_is_told_apart(tmp_path, monkeypatch):
    wheel = installed(IMPOSTOR, tmp_path, monkeypatch)
    assert wheel.version == "0.16.1" and "nunchaku" not in sys.modules
    for text in ("(0.16.1) is a statistics library, not the SVDQuant engine", "-m pip uninstall nunchaku",
                 "-m pip install <wheel>", f"Python {sys.version_info[0]}.{sys.version_info[1]}", "torch ", "CUDA ",
                 "https://github.com/nunchaku-ai/nunchaku/releases"):
        assert text in wheel.problem


def test_not_there_or_not_built(tmp_path, monkeypatch):
    assert nunchaku_wheel.find().problem.startswith("nunchaku is not installed.")
    wheel = installed({name: text for name, text in REAL.items() if "_C" not in name}, tmp_path, monkeypatch)
    assert "no compiled module (_C)" in wheel.problem


GATE = {(7, 5): ("", 'Please use "int4"'), (8, 0): ("", 'Please use "int4"'), (8, 9): ("", 'Please use "int4"'),
        (9, 0): ("Unsupported GPU architecture 90 due to the lack of 4-bit tensorcores.",) * 2,
        (10, 0): ("Unsupported GPU architecture 100",) * 2, (10, 3): ("Unsupported GPU architecture 103",) * 2,
        (12, 0): ('Please use "fp4" quantization for Blackwell GPUs.', ""), (12, 1): ('Please use "fp4"', "")}


@pytest.mark.parametrize("capability", GATE)
def test_gate(capability):
    for kind, text in zip(("int4", "nvfp4"), GATE[capability], strict=True):
        found = nunchaku_wheel.gate({kind, "awq"}, capability)
        assert found.startswith(text) and bool(found) == bool(text)


# docs/sources/nunchaku.md, "Back ends": back end by "auto" without and with the engine, and the word for
# speed without it.
KITCHEN, ENGINE, DENSE = "comfy_kitchen", "nunchaku", "dequantize"
TABLE = {("int4", (7, 5)): (DENSE, ENGINE, "slower"), ("int4", (8, 0)): (KITCHEN, KITCHEN, "fast"),
         ("int4", (8, 9)): (KITCHEN, KITCHEN, "fast"), ("int4", (9, 0)): (KITCHEN, KITCHEN, "speed unknown"),
         ("int4", (10, 0)): (KITCHEN, KITCHEN, "untested"), ("int4", (12, 0)): (KITCHEN, KITCHEN, "untested"),
         ("int4", "gfx1100"): (KITCHEN, KITCHEN, "untested"), ("int4", "gfx1201"): (KITCHEN, KITCHEN, "untested"),
         ("int4", "gfx90a"): (DENSE, DENSE, "slower"), ("int4", "cpu"): (DENSE, DENSE, "slower"),
         ("int4", None): (DENSE, DENSE, "slower"), ("nvfp4", (7, 5)): (DENSE, DENSE, "slower"),
         ("nvfp4", (8, 9)): (DENSE, DENSE, "slower"), ("nvfp4", (9, 0)): (DENSE, DENSE, "slower"),
         ("nvfp4", (10, 0)): (KITCHEN, KITCHEN, "fast"), ("nvfp4", (12, 0)): (KITCHEN, KITCHEN, "fast"),
         ("nvfp4", "gfx1100"): (DENSE, DENSE, "slower"), ("nvfp4", "cpu"): (DENSE, DENSE, "slower")}


def machine(device, problem="nunchaku is not installed.") -> Machine:
    found = {"nunchaku": nunchaku_wheel.Wheel("", problem), "torch_npu": None}
    if device in ("cpu", None):
        return Machine(device or "mps", "here", found=found)
    if isinstance(device, str):
        return Machine("cuda", "here", gfx=device, found=found)
    return Machine("cuda", "here", device, found=found)


def chosen(wanted, kind, device, problem="nunchaku is not installed."):
    """(the kernel of the W4A4 layers, the line about them)."""
    choice = choose(Wanted(backend=wanted), [f"svdq_{kind}", "awq"], machine(device, problem))
    return choice.kernels[f"svdq_{kind}"] or DENSE, next(line for line in choice.lines if "SVDQ" in line)


@pytest.mark.parametrize(("kind", "device"), TABLE)
def test_decision_table(kind, device):
    without, with_engine, word = TABLE[kind, device]
    kernel, line = chosen("auto", kind, device)
    assert kernel == without and (word in line if word != "slower" else "dequantized for every matmul" in line)
    assert "chosen for this device" in line
    assert chosen("auto", kind, device, "")[0] == with_engine
    assert chosen("dequantize", kind, device)[0] == DENSE
    assert chosen("comfy_kitchen", kind, device)[0] == KITCHEN  # runs anywhere
    allowed = isinstance(device, tuple) and not nunchaku_wheel.gate({kind}, device)
    if allowed:
        assert chosen("nunchaku", kind, device, "")[0] == ENGINE
        with pytest.raises(CheckpointError, match=f"not installed.\n.*\n.*'auto', which takes {without} here"):
            choose(Wanted(backend="nunchaku"), [f"svdq_{kind}"], machine(device))
    else:
        with pytest.raises(CheckpointError, match="Please use|Unsupported GPU|NVIDIA GPUs only"):
            chosen("nunchaku", kind, device, "")


def test_turing_runs_the_engine_in_fp16():
    assert "FP16 only" in chosen("auto", "int4", (7, 5), "")[1]
    with pytest.raises(CheckpointError, match="expected one of auto"):
        chosen("fast", "int4", (8, 0))


def test_an_impostor_is_told_of():
    found = {"nunchaku": nunchaku_wheel.Wheel("0.16.1", "a statistics library"), "torch_npu": None}
    assert choose(Wanted(), ["svdq_int4"], Machine("cuda", "here", (8, 0), found=found)).notes == ("a statistics library",)
    assert not choose(Wanted(), ["fp8"], Machine("cuda", "here", (8, 0), found=found)).notes


def test_the_engine_runs_a_whole_file_or_nothing_of_it():
    """Turing has no FP4 kernels; the modulation of such a file stays out of the engine's, too."""
    choice = choose(Wanted(), ["svdq_nvfp4", "awq"], machine((7, 5), ""))
    assert choice.kernels == {"svdq_nvfp4": "", "awq": ""}
    assert choose(Wanted(), ["svdq_int4", "awq"], machine((7, 5), "")).kernels["awq"] == ENGINE
