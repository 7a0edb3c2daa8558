"""Which backend runs what, and torch_npu's calls, checked by a fake that knows the real operators' declarations."""

from __future__ import annotations

import sys

import pytest
import torch

from quantized_transformers.host import Machine
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.quant.ascend.schemes import SCHEMES
from quantized_transformers.quant.kernels import kernel, nunchaku_wheel, torch_npu
from quantized_transformers.quant.kernels.base import Activation
from quantized_transformers.quant.kernels.choose import Wanted, choose
from quantized_transformers.quant.kernels.torch_npu import NEEDS, DeviceFacts, cann_at_least
from quantized_transformers.quant.layouts import host_tiles
from support import ascend
from support.ascend_net import native, operations
from support.fake_torch_npu import SCHEMAS, FakeTorchNPU, NPUError, bind, install

pytestmark = pytest.mark.unit

EVERY = frozenset(torch_npu.OPS)


def facts(generation="A5", cann="8.5.0", version="2.14.0", npu=True, ops=EVERY, error=""):
    return DeviceFacts(npu, generation, cann, version, error, ops)


def machine(found: DeviceFacts) -> Machine:
    return Machine("npu" if found.npu else "cpu", "here", found={"torch_npu": found, "nunchaku": nunchaku_wheel.Wheel("", "none")})


CPU = DeviceFacts()
TABLE = [
    # wanted, kinds, facts -> kernel of the first, words of the lines
    ("auto", ["w8a8_mxfp8"], CPU, "comfy_kitchen", "ceiling"),
    ("auto", ["w8a8"], CPU, "comfy_kitchen", "in INT8 arithmetic without fast kernels"),
    ("auto", ["w4a4_mxfp4", "w8a8"], CPU, "comfy_kitchen", "W4A4_MXFP4 runs: comfy_kitchen (chosen for this device) on here: "
                                                         "emulated (weights dequantized); activations stay unquantized"),
    ("auto", ["w8a8_mxfp8"], facts(), "torch_npu", "torch_npu 2.14.0 on Ascend A5, CANN 8.5.0"),
    ("auto", ["w8a8_dynamic", "w8a8"], facts("A2"), "torch_npu", "W8A8 and W8A8_DYNAMIC run: torch_npu"),
    ("auto", ["w8a8_dynamic"], facts("A3"), "torch_npu", "A3"),
    ("auto", ["w4a4_dynamic"], facts("A2"), "torch_npu", "A2"),
    ("auto", ["w4a4_dynamic"], facts("A5"), "reference", "W4A4_DYNAMIC needs an Ascend A2 or A3, this NPU is A5; plain torch"),
    ("auto", ["w8a8_mxfp8"], facts("A2"), "reference", "W8A8_MXFP8 needs an Ascend A5, this NPU is A2"),
    ("auto", ["w8a8_mxfp8"], facts(cann="8.0.RC2"), "reference", "needs CANN 8.0.RC3 or newer, this is CANN 8.0.RC2"),
    ("auto", ["w8a16"], facts(), "reference", "no matmul for W8A16"),
    ("comfy_kitchen", ["w8a8_mxfp8"], facts(), "comfy_kitchen", "floor"),
    ("reference", ["w8a8_mxfp8"], CPU, "reference", "exact, and slow"),
    ("torch_npu", ["w8a8_mxfp8"], facts(), "torch_npu", "CANN 8.5.0"),
]
REFUSED = [
    (["w8a8"], CPU, "torch_npu is not installed: install torch_npu", "comfy_kitchen"),
    (["w8a8"], facts(npu=False, version="", error="ImportError: libhccl.so"), "does not import .*libhccl.*: install torch_npu",
     "comfy_kitchen"),
    (["w8a8"], facts(npu=False), "does not run models on an Ascend NPU", "comfy_kitchen"),
    (["w8a8_mxfp8"], facts("A2"), "needs an Ascend A5, this NPU is A2", "reference"),
    (["w8a8_dynamic", "w4a4_mxfp4"], facts("A3"), "W4A4_MXFP4 needs an Ascend A5", "where: W4A4_MXFP4 layers"),
    (["w4a4_dynamic"], facts("A5"), "W4A4_DYNAMIC needs an Ascend A2 or A3", "reference"),
    (["w8a8"], facts("310P"), "this NPU is 310P", "reference"),
    (["w8a8"], facts(""), "an unknown generation", "reference"),
    (["w8a8"], facts("A2", cann="8.0.RC1"), "needs CANN 8.0.RC2 or newer, this is CANN 8.0.RC1: update CANN", "reference"),
    (["w8a8"], facts("A2", cann=""), "an unknown version: update CANN", "reference"),
    (["w8a8"], facts(ops=EVERY - {"npu_quantize"}), "torch_npu 2.14.0 has no npu_quantize: update torch_npu", "reference"),
    (["wfp8afp8_dynamic"], facts(), "no matmul for WFP8AFP8_DYNAMIC", "reference"),
]


@pytest.mark.parametrize(("wanted", "kinds", "found", "name", "words"), TABLE)
def test_the_choice(wanted, kinds, found, name, words):
    choice = choose(Wanted(backend=wanted), kinds, machine(found))
    assert choice.kernels[kinds[0]] == name and words in "\n".join(choice.lines)


@pytest.mark.parametrize(("kinds", "found", "what", "do"), REFUSED)
def test_refusals(kinds, found, what, do):
    with pytest.raises(CheckpointError, match=what) as refusal:
        choose(Wanted(backend="torch_npu"), kinds, machine(found))
    assert "where: " in str(refusal.value) and "what to do: set backend to 'auto', which takes " in str(refusal.value)
    assert do in str(refusal.value)


def test_each_kind_has_its_own_kernel():
    """On an NPU that runs one of two kinds, the other is multiplied in plain torch."""
    choice = choose(Wanted(), ["w8a8", "w4a4_dynamic"], machine(facts("A5")))
    assert choice.kernels == {"w8a8": "torch_npu", "w4a4_dynamic": "reference"} and not choice.native


NATIVE = [
    # compute "native": activations are quantized, or it is refused
    ("w8a8", CPU, "comfy_kitchen"), ("w8a16", CPU, "comfy_kitchen"), ("w4a4_mxfp4", CPU, "reference"),
    ("w8a8_mxfp8", CPU, "reference"), ("w8a8", facts("A2"), "torch_npu"), ("w4a4_dynamic", facts("A5"), ""),
    ("w8a16", facts(), "")]


@pytest.mark.parametrize(("kind", "found", "name"), NATIVE)
def test_native_quantizes_activations(kind, found, name):
    if name:
        assert choose(Wanted("native"), [kind], machine(found)).kernels == {kind: name}
    else:
        with pytest.raises(CheckpointError, match=f"{kind.upper()}.*\n.*set compute to 'auto' or 'dequantize'"):
            choose(Wanted("native"), [kind], machine(found))
    blackwell = Machine("cuda", "B200", (10, 0), matmuls=frozenset({"MXFP8"}), found=machine(CPU).found)
    assert choose(Wanted("native"), ["w8a8_mxfp8"], blackwell).kernels == {"w8a8_mxfp8": "comfy_kitchen"}


def test_unknown_names():
    with pytest.raises(CheckpointError, match="backend 'cuda', expected one of auto, dequantize, torch_npu"):
        choose(Wanted(backend="cuda"), ["w8a8"], machine(CPU))
    with pytest.raises(ValueError, match="none of"):
        kernel("auto")
    assert [kernel(name).name for name in ("torch_npu", "comfy_kitchen", "reference")] == [
        "torch_npu", "comfy_kitchen", "reference"]


@pytest.mark.parametrize(("version", "minimum", "enough"), [
    ("8.0.RC3", "8.0.RC3", True), ("8.0.RC2", "8.0.RC3", False), ("8.0.RC3.alpha003", "8.0.RC3", True),
    ("8.0.0", "8.0.RC3", True), ("8.0.0.alpha001", "8.0.RC3", True), ("7.0.0", "8.0.RC2", False),
    ("8.5.0", "8.0.RC3", True), ("9.1.1", "8.5.0", True), ("10.0.0", "9.1.1", True), ("", "8.0.RC2", False),
    ("not known", "8.0.RC2", False), ("8.2.RC1", "8.0.0", True)])
def test_cann_versions(version, minimum, enough):
    assert cann_at_least(version, minimum) is enough


@pytest.mark.parametrize(("soc", "name"), [(220, "A2"), (225, "A2"), (250, "A3"), (255, "A3"), (260, "A5"), (202, "310P"),
                                           (104, "910"), (-1, "")])
def test_generations(soc, name):
    assert torch_npu.generation(soc) == name


def test_facts_of_a_machine(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # an import of it raises
    assert not torch_npu.device_facts("npu").torch_npu
    install(monkeypatch, soc=250, cann="8.1.RC1", without=("npu_dual_level_quant_matmul",))
    found = torch_npu.device_facts("npu")
    assert found == DeviceFacts(True, "A3", "8.1.RC1", "2.14.0", "", EVERY - {"npu_dual_level_quant_matmul"})
    assert torch_npu.device_facts("cpu") == DeviceFacts(False, "", "8.1.RC1", "2.14.0", "", found.ops)


def test_cann_from_its_folder_where_torch_npu_does_not_tell(monkeypatch, tmp_path):
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, "torch_npu.npu.utils", None)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert torch_npu.cann_version() == ""
    folder = tmp_path / "latest" / "x86_64-linux"
    folder.mkdir(parents=True)
    (folder / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=8.0.RC3\narch=x86_64\n")
    assert torch_npu.cann_version() == "8.0.RC3"


def columns_of(kind: str) -> int:
    return 1024 if "DUAL" in kind else 128


def layer(kind: str, smoothed: bool = False, rows: int = 48, columns: int = 0, bias: bool = True):
    """A tile as a kernel gets it, the stored tensors, and the bias in BF16."""
    part = ascend.make(kind, rows, columns or columns_of(kind), bias=bias)
    if bias:
        part["bias"] = part["bias"].bfloat16().float()
    if smoothed:
        part["mul_scale"] = torch.rand(columns or columns_of(kind)) + 0.5
    made = native(kind, part, bias)
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    if made.layout == "qt.tiles":
        return made.tile, part
    name = {"mxfp8": "TensorCoreMXFP8Layout", "int8_tensorwise": "TensorWiseINT8Layout"}[made.layout]
    params = get_layout_class(name).Params(scale=made.tensors["weight_scale"], orig_dtype=torch.bfloat16,
                                           orig_shape=(made.rows, made.columns))
    return host_tiles.tile_of(QuantizedTensor(made.tensors["weight"], name, params)), part


def run(name: str, x: torch.Tensor, tile, bias):
    return kernel(name).linear(Activation(x), tile, bias)


def activations(columns: int, dtype=torch.bfloat16) -> torch.Tensor:
    x = torch.randn(16, columns, generator=torch.Generator().manual_seed(9))
    x[2] = 0
    return x.to(dtype)


SOC = {"W4A4_DYNAMIC": 220}
RUN = [kind for kind in SCHEMES if SCHEMES[kind].kind in NEEDS and kind != "MXFP4"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", RUN)
def test_torch_npu_equals_the_reference(monkeypatch, kind, dtype, smoothed, bias):
    """Every operator call is one the real package declares; the result is the reference's, up to the order of F32 sums
    and (INT4 and patched biases, which are added after the operator) one more rounding."""
    fake = install(monkeypatch, soc=SOC.get(kind, 260))
    tile, part = layer(kind, smoothed, bias=bias)
    stored = part["bias"].to(torch.bfloat16) if bias else None
    if "bias" in tile.fields:
        tile = tile.having(bias=tile["bias"].bfloat16())
    x = activations(columns_of(kind), dtype)
    out = run("torch_npu", x, tile, stored)
    seen = x.bfloat16() if dtype == torch.float32 else x  # an NPU's operators take no F32 activations
    expected = run("reference", seen, tile, stored)
    assert out.dtype == dtype and fake.calls and set(NEEDS[tile.place.codec].ops) == set(fake.calls)
    if kind in ("W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC") or kind == "W4A4_DYNAMIC" and not bias:
        assert torch.equal(out, expected.to(dtype))
    else:
        step = torch.finfo(seen.dtype).eps * (1 if kind != "W4A4_DYNAMIC" else 2)
        bound = expected.float().abs() * step + 1e-5
        if kind == "W4A4_DYNAMIC":
            bound += (expected.float() - part["bias"]).abs() * step
        assert ((out.float() - expected.float()).abs() <= bound).all()


@pytest.mark.parametrize(("kind", "rows", "columns"), [("W4A4_DYNAMIC", 44, 128), ("W4A4_DYNAMIC", 48, 100),
                                                      ("W4A4_MXFP4", 48, 96), ("W4A4_MXFP4_DUALSCALE", 48, 768)])
def test_sizes_that_an_operator_does_not_take_go_to_the_reference(monkeypatch, kind, rows, columns):
    fake = install(monkeypatch, soc=SOC.get(kind, 260))
    tile, _ = layer(kind, rows=rows, columns=columns)
    x = activations(columns)
    out = run("torch_npu", x, tile, None)
    assert not fake.calls and torch.equal(out, run("reference", x, tile, None))


def test_mxfp8_with_an_odd_number_of_blocks(monkeypatch):
    install(monkeypatch)
    tile, part = layer("W8A8_MXFP8", columns=96)
    x = activations(96)
    out = run("torch_npu", x, tile, part["bias"].bfloat16())
    expected = torch.from_numpy(ascend.forward("W8A8_MXFP8", part, x)).bfloat16()
    assert torch.allclose(out.float(), expected.float(), rtol=2 ** -7, atol=1e-5)


def test_a_layer_of_the_host_runs_on_the_npu(monkeypatch):
    """Through the Linear of the host, as a model does it."""
    for kind in ("W8A8_MXFP8", "W8A8_DYNAMIC", "W8A8"):
        fake = install(monkeypatch)
        part = ascend.make(kind)
        made = native(kind, part, True)
        module = operations("torch_npu", torch.bfloat16, disabled={"mxfp8"}).Linear(128, 48, device="cpu",
                                                                                    dtype=torch.bfloat16)
        module.load_state_dict(dict(made.tensors))
        with torch.inference_mode():
            out = module(activations(128).reshape(2, 8, 128))
        assert set(fake.calls) == set(NEEDS[made.tile.place.codec].ops) and out.shape == (2, 8, 48)


# The fake itself: what the real package refuses must not pass.
def quant_matmul(**change):
    return {"x1": torch.zeros(4, 64, dtype=torch.int8), "x2": torch.zeros(8, 64, dtype=torch.int8).t(),
            "scale": torch.ones(8), "pertoken_scale": torch.ones(4), "output_dtype": torch.bfloat16} | change


@pytest.mark.parametrize(("change", "says"), [
    ({"x2": torch.zeros(8, 64, dtype=torch.int8)}, "int8"), ({"scale": torch.ones(8, 1)}, "scale is F32"),
    ({"pertoken_scale": torch.ones(4, 1)}, "pertoken_scale"), ({"bias": torch.ones(8).bfloat16()}, "bias is F32"),
    ({"output_dtype": torch.float32}, "output_dtype"), ({"axis": 1}, "no argument axis"),
    ({"scale": 3}, "scale is int, declared Tensor"), ({"group_sizes": [1, 1, 32]}, "options")])
def test_the_fake_refuses_what_the_real_one_does(change, says):
    fake = FakeTorchNPU()
    fake.npu_quant_matmul(**quant_matmul())
    with pytest.raises(NPUError, match=says):
        fake.npu_quant_matmul(**quant_matmul(**change))


def test_the_fake_checks_generation_and_format():
    with pytest.raises(NPUError, match="not on A2"):
        FakeTorchNPU(soc=220).npu_dynamic_mx_quant(torch.zeros(2, 64, dtype=torch.bfloat16), dst_type=292)
    with pytest.raises(NPUError, match="round_mode"):
        FakeTorchNPU().npu_dynamic_mx_quant(torch.zeros(2, 64, dtype=torch.bfloat16), dst_type=292, round_mode="round")
    with pytest.raises(NPUError, match="positional"):
        bind("npu_dynamic_mx_quant", (torch.zeros(2, 64), -1), {})
    assert set(SCHEMAS) == EVERY
