"""Save Quantized Model: what stock ComfyUI loads, in a process without this pack, and what comes back bit by bit.

Files are compared with the exports they come from and with what ComfyUI's own save node writes; both are read by
safetensors itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers import online_mxfp8
from quantized_transformers.makers.save import save
from support import common, flux, svdquant_models, wan
from support import lora as lora_tools
from support import modelslim as ms
from support.pack import COMFYUI, PACK

pytestmark = pytest.mark.parity

BF16 = 2 ** -8  # the largest relative error of rounding to BF16
# Stock ComfyUI, nothing else: load a file by its own loader, run it, keep what comes out.
STOCK = """
import json, os, sys
sys.path[:0] = [os.environ["COMFYUI_PATH"], os.environ["TESTS"]]
jobs, sys.argv = json.loads(sys.argv[1]), ["comfyui", "--cpu"]
import comfy.options; comfy.options.enable_args_parsing()
import comfy.cli_args, comfy.sd, safetensors.torch, torch
torch.set_num_threads(int(os.environ["THREADS"]))
from support import flux, wan
from support import modelslim as ms
run = {"flux": lambda p: flux.comfy_velocity(p, **flux.inputs()), "wan": lambda p: wan.comfy_velocity(p, **wan.inputs()),
       "modelslim": lambda p: wan.comfy_velocity(p, **ms.inputs(48)),
       "smooth": lambda p: wan.comfy_velocity(p, **ms.inputs(16))}
out = {}
for name, path, kind in jobs:
    try:
        out[name] = run[kind](comfy.sd.load_diffusion_model(path)).contiguous()
    except KeyError as error:
        out[name] = torch.tensor(list(str(error).encode()), dtype=torch.uint8)
assert not [m for m in sys.modules if m.startswith("quantized_transformers")]
safetensors.torch.save_file(out, os.environ["OUT"])
"""
RUN = {"flux": lambda p: flux.comfy_velocity(p, **flux.inputs()), "wan": lambda p: wan.comfy_velocity(p, **wan.inputs()),
       "modelslim": lambda p: wan.comfy_velocity(p, **ms.inputs(48)),
       "smooth": lambda p: wan.comfy_velocity(p, **ms.inputs(16))}


@dataclass(frozen=True)
class Saved:
    """A MODEL, its file, the report, our forward, and that of stock ComfyUI (or the name of the format it refused)."""

    patcher: Any
    path: Path
    report: str
    ours: torch.Tensor
    stock: torch.Tensor | str


def load(reference: Any, **request: Any) -> Any:
    return model.load(model.Request(str(reference), **request), quiet=True).patcher


def dynamic(folder: Path, to: Path) -> Path:
    """A ModelOpt FP8 export without activation scales."""
    return common.save(to, {name: t for name, t in common.stored(folder).items() if not name.endswith("input_scale")},
                       common.config_of(folder))


@pytest.fixture(scope="module")
def saved(tiny, output, tmp_path_factory) -> dict[str, Saved]:
    root = tmp_path_factory.mktemp("exports")
    made = wan.make()
    wan_fp8, wan_nvfp4 = (wan.export(made, root / algorithm, algorithm) for algorithm in ("FP8", "NVFP4"))
    slim = {name: ms.folder(name, root / name) for name in ("w8a8_dynamic", "mxfp4_smooth")}
    svdq = svdquant_models.make_flux()
    sources: dict[str, tuple[Any, str, str]] = {
        "bf16": (load(tiny.bf16), "exact", "flux"),
        "fp8": (load(tiny.fp8), "exact", "flux"), "fp8 stock": (load(tiny.fp8), "stock", "flux"),
        "mixed stock": (load(tiny.mixed), "stock", "flux"),
        "nvfp4": (load(tiny.nvfp4), "exact", "flux"), "nvfp4 stock": (load(tiny.nvfp4), "stock", "flux"),
        "mxfp8": (online_mxfp8.quantize(load(tiny.bf16), step=lambda: None)[0], "exact", "flux"),
        "wan fp8": (load(wan_fp8), "exact", "wan"), "wan nvfp4": (load(wan_nvfp4), "exact", "wan"),
        "wan dynamic": (load(dynamic(wan_fp8, root / "dynamic")), "exact", "wan"),
        "wan dynamic stock": (load(root / "dynamic"), "stock", "wan"),
        "int8": (load(slim["w8a8_dynamic"]), "exact", "modelslim"),
        "mxfp4": (load(slim["mxfp4_smooth"]), "exact", "smooth"),
        "mxfp4 stock": (load(slim["mxfp4_smooth"], compute="dequantize"), "stock", "smooth"),
        "svdq": (load(svdq.write(root / "svdq"), compute="dequantize"), "exact", "flux"),
        "svdq stock": (load(root / "svdq", compute="dequantize"), "stock", "flux"),
    }
    files = {name: save(patcher, f"diffusion_models/{name}", form, step=lambda n: None)
             for name, (patcher, form, _) in sources.items()}
    jobs = [(name, str(files[name][0]), kind) for name, (_, _, kind) in sources.items()]
    environment = {**os.environ, "TESTS": str(PACK / "tests"), "COMFYUI_PATH": str(COMFYUI),
                   "OUT": str(root / "stock.safetensors"), "THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", STOCK, json.dumps(jobs)], env=environment, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    there = load_file(str(root / "stock.safetensors"))
    return {name: Saved(patcher, *files[name], RUN[kind](patcher), bytes(there[name].tolist()).decode()
            if there[name].dtype == torch.uint8 else there[name]) for name, (patcher, _, kind) in sources.items()}


def weights(patcher: Any) -> dict[str, torch.Tensor]:
    """All tensors of the diffusion model, by the host's own state_dict."""
    return {name: tensor.detach() for name, tensor in patcher.model.diffusion_model.state_dict().items()}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: codes that are kept as floats may be NaN."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)


HOST_FORMATS = {"bf16": set(), "mxfp8": {"mxfp8"}, "wan fp8": {"float8_e4m3fn"}, "wan nvfp4": {"nvfp4"},
                "int8": {"int8_tensorwise"}}


@pytest.mark.parametrize("name", HOST_FORMATS)
def test_stock_comfyui_runs_it_without_the_pack(name, saved):
    case = saved[name]
    if HOST_FORMATS[name] - {"int8_tensorwise"}:  # dequantized, in F32 sums of another order
        assert common.rel_l2(case.stock, case.ours) < common.SUMS
    else:
        assert torch.equal(case.stock, case.ours), common.rel_l2(case.stock, case.ours)
    assert "stock ComfyUI loads this file without this pack" in case.report
    with safe_open(str(case.path), "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    listed = json.loads(metadata.get("_quantization_metadata", '{"layers": {}}'))["layers"]
    assert {conf["format"] for conf in listed.values()} == HOST_FORMATS[name]
    tensors = load_file(str(case.path))
    assert {f"{layer}.comfy_quant" for layer in listed} == {n for n in tensors if n.endswith(".comfy_quant")}
    assert all(json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist())) == conf for layer, conf in listed.items())


OWN = {"fp8": "FP8", "nvfp4": "NVFP4", "wan dynamic": "FP8", "mxfp4": "W4A4_MXFP4", "svdq": "SVDQ INT4"}


@pytest.mark.parametrize("name", OWN)
def test_own_formats_say_so_and_stock_comfyui_refuses_them(name, saved):
    case = saved[name]
    own = sum(b"qt.tiles" in bytes(t.tolist()) for n, t in load_file(str(case.path)).items() if n.endswith(".comfy_quant"))
    said = re.findall(r"(\d+) layers are ([^,(]+) \(", case.report.partition("CANNOT load this file: ")[2])
    assert "qt.tiles" in case.stock and own and sum(int(count) for count, _ in said) == own
    assert OWN[name] in dict(reversed(one) for one in said) and "set format to 'stock'" in case.report


@pytest.mark.parametrize("name", [*HOST_FORMATS, *OWN])
def test_exact_files_come_back_bit_by_bit(name, saved):
    case = saved[name]
    again = load(case.path)
    assert same(weights(again), weights(case.patcher))
    factory, arguments = again.cached_patcher_init
    assert same(weights(factory(*arguments, disable_dynamic=True)), weights(case.patcher))


def test_bytes_are_those_of_the_export(saved, tiny):
    """Wan's layers are ComfyUI's, so a file has exactly the tensors of the export, and nothing that was BF16 grew."""
    case = saved["wan fp8"]
    folder = Path(case.patcher.cached_patcher_init[1][0].reference)

    def content(tensors: dict[str, torch.Tensor]) -> Counter:
        return Counter((str(t.dtype), tuple(t.shape) or (1,), raw(t).numpy().tobytes())
                       for name, t in tensors.items() if not name.endswith("comfy_quant"))

    assert content(load_file(str(case.path))) == content(common.stored(folder))
    plain, source = load_file(str(saved["bf16"].path)), common.stored(tiny.bf16)
    assert {t.dtype for t in plain.values()} == {torch.bfloat16}
    assert torch.equal(plain["img_in.weight"], source["x_embedder.weight"])
    assert sum(t.numel() for t in plain.values()) == sum(t.numel() for t in source.values())


@pytest.mark.parametrize("name,export", [("fp8 stock", "fp8"), ("mixed stock", "mixed"), ("nvfp4 stock", "nvfp4")])
def test_stock_format_rounds_only_what_the_host_cannot_hold(name, export, saved, tiny):
    case = saved[name]
    tensors, exact = load_file(str(case.path)), common.dequantize(common.stored(getattr(tiny, export)))
    block = "single_transformer_blocks.0."
    joined = torch.cat([exact[f"{block}{part}.weight"] for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")])
    assert torch.equal(tensors["single_blocks.0.linear1.weight"], joined.bfloat16())
    if export != "mixed":
        stored = common.stored(getattr(tiny, export))["transformer_blocks.0.ff.net.2.weight"]
        codes = tensors["double_blocks.0.img_mlp.2.weight"]
        assert torch.equal(codes.view(torch.uint8), stored.view(torch.uint8) if export == "fp8" else
                           (stored << 4) | (stored >> 4))
    assert not any(b"qt." in bytes(t.tolist()) for n, t in tensors.items() if n.endswith("comfy_quant"))
    assert 0 < common.rel_l2(case.stock, case.ours) < BF16
    assert "dequantized and rounded once to BF16" in case.report and "without this pack" in case.report


def test_dynamic_fp8_keeps_its_bytes_in_stock_format(saved):
    """One scale, none for activations: the host's layout holds it, once its matmul is told to be in full precision."""
    case, source = saved["wan dynamic stock"], load_file(str(saved["wan fp8"].path))
    tensors = load_file(str(case.path))
    for name, tensor in tensors.items():
        if not name.endswith("comfy_quant"):
            assert torch.equal(tensor.reshape(-1), source[name].reshape(-1)), name
    marks = [json.loads(bytes(t.tolist())) for n, t in tensors.items() if n.endswith("comfy_quant")]
    assert marks and all(m == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True} for m in marks)
    assert common.rel_l2(case.stock, RUN["wan"](load(Path(case.path).parent / "wan dynamic.safetensors",
                                                     compute="dequantize"))) < 1e-6


def test_stock_format_of_svdquant_and_modelslim(saved):
    """The effective weight of the definition (smoothing, low-rank branch, shifted bias), rounded once."""
    made, case = svdquant_models.make_flux(), saved["svdq stock"]
    network = made.dequantized()
    tensors = load_file(str(case.path))
    expected = torch.cat([network.get_submodule(f"single_transformer_blocks.0.{part}").weight
                          for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")])
    stored = tensors["single_blocks.0.linear1.weight"]
    assert stored.dtype == torch.bfloat16 and bool(((stored.float() - expected).abs() <= expected.abs() * BF16 + 1e-6).all())
    shifted = network.get_submodule("single_transformer_blocks.0.proj_out")
    assert common.rel_l2(tensors["single_blocks.0.linear2.bias"], shifted.bias) < 1e-6
    assert common.rel_l2(case.stock, case.ours) < BF16
    decoded = ms.decode(ms.stored(path := Path(saved["mxfp4"].patcher.cached_patcher_init[1][0].reference)), ms.described(path))
    tensors = load_file(str(saved["mxfp4 stock"].path))
    for layer in ("blocks.0.self_attn.q", "blocks.0.ffn.2"):
        assert torch.equal(tensors[f"{layer}.weight"], decoded[layer].bfloat16())
    assert common.rel_l2(saved["mxfp4 stock"].stock, saved["mxfp4 stock"].ours) < BF16


LORA = {"transformer_blocks.0.attn.to_q": (256, 256), "transformer_blocks.0.ff.net.2": (256, 1024),
        "single_transformer_blocks.0.proj_mlp": (1024, 256)}


@pytest.mark.parametrize("name", ["bf16", "fp8", "nvfp4", "svdq"])
def test_loras_are_in_the_file_as_comfyuis_save_node_puts_them_there(name, saved, output, tmp_path, monkeypatch):
    import comfy.model_management
    import comfy.sd

    patched = lora_tools.load_lora(saved[name].patcher, lora_tools.random_lora(LORA), tmp_path)
    file, report = save(patched, f"{name} lora", step=lambda n: None)
    assert "LoRAs and other patches of 3 tensors are in the file" in report
    comfy.sd.save_checkpoint(str(tmp_path / "theirs.safetensors"), patched)
    prefix = "model.diffusion_model."
    theirs = {n.removeprefix(prefix): t for n, t in load_file(str(tmp_path / "theirs.safetensors")).items()}
    ours = load_file(str(file))
    assert ours.keys() == theirs.keys() and ours.keys() >= {"double_blocks.0.img_attn.qkv.weight"}
    assert all(torch.equal(t.float(), theirs[n].float()) if t.dtype in (torch.bfloat16, torch.float16) else
               equal(t, theirs[n]) for n, t in ours.items())
    before = load_file(str(saved[name].path))
    assert sum(not equal(before[n], t) for n, t in ours.items() if n in before) >= 3
    # with the weights not in VRAM the host makes the patched ones while they are written
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models, **kwargs: None)
    patched.patch_model(patched.load_device, lowvram_model_memory=1)
    try:
        # what dynamic VRAM does with small layers: loaded at once, with their patches or without any
        for key in (next(iter(patched.patches)), "diffusion_model.time_in.in_layer.weight"):
            patched.patch_weight_to_device(key, patched.load_device, force_cast=True)
            patched.get_model_object(key.removesuffix(".weight")).weight_function = []
        lazy = load_file(str(save(patched, f"{name} lazy", step=lambda n: None)[0]))
        stock = load_file(str(save(patched, f"{name} lazy stock", "stock", step=lambda n: None)[0]))
    finally:
        patched.unpatch_model(patched.offload_device)
    assert lazy.keys() == ours.keys()
    assert all(equal(t, ours[n]) or t.dtype.itemsize > 1 and torch.equal(t.float(), ours[n].float())
               for n, t in lazy.items())
    if name == "fp8":
        qkv, layer = stock["double_blocks.0.img_attn.qkv.weight"], "double_blocks.0.img_attn.qkv.weight"
        codes = [ours[layer + leaf].float() for leaf in ("", "_t1_codes", "_t2_codes")]
        scales = [ours[f"{layer}_t{i}_scale"] for i in range(3)]
        dense = torch.cat([s * f for s, f in zip(codes, scales, strict=True)])
        up, down = (ours[f"{layer}_t0_{pair}"] for pair in ("up", "down"))
        dense[:len(up)] += up @ down.t()  # the LoRA of to_q
        assert (qkv.float() - dense).abs().max() <= 2 ** -8 * dense.abs().max()


@pytest.mark.parametrize("form", ["exact", "baked", "stock"])
@pytest.mark.parametrize("name", ["fp8", "svdq"])
def test_a_lora_that_is_no_number_gets_into_no_file(name, form, saved, output, tmp_path):
    lora = lora_tools.random_lora(LORA)
    lora["transformer.transformer_blocks.0.ff.net.2.lora_B.weight"][3, 2] = torch.nan
    patched = lora_tools.load_lora(saved[name].patcher, lora, tmp_path)
    before = set(output.iterdir())
    with pytest.raises(CheckpointError, match=r"double_blocks\.0\.img_mlp\.2 has weights that are not finite\n.*take the LoRAs"):
        save(patched, f"{name} {form} damaged", form, step=lambda n: None)
    assert set(output.iterdir()) == before


@pytest.mark.parametrize("export", ["fp8", "mixed"])
def test_mixtures_come_back_bit_by_bit(export, tiny, output):
    """MXFP8 beside FP8 and row shards: exact, what this pack loads is the MODEL, bit for bit; in stock format both load
    it."""
    patcher, _ = online_mxfp8.quantize(load(getattr(tiny, export)), "^$", step=lambda: None)
    path, _ = save(patcher, f"mixture {export} exact", step=lambda n: None)
    again = model.load(model.Request(str(path)), quiet=True)
    assert again.description.formats.keys() >= {"MXFP8", "FP8"} and not again.description.problems
    ours, back = patcher.model.diffusion_model.state_dict(), again.patcher.model.diffusion_model.state_dict()
    assert ours.keys() == back.keys() and all(equal(t, back[n]) for n, t in ours.items() if "comfy_quant" not in n)
    assert torch.equal(RUN["flux"](again.patcher), RUN["flux"](patcher))
    path, report = save(patcher, f"mixture {export}", "stock", step=lambda n: None)
    assert "stock ComfyUI loads this file" in report and "it loads with Load Base Model" in report
    import comfy.sd

    assert common.rel_l2(RUN["flux"](comfy.sd.load_diffusion_model(str(path))), RUN["flux"](patcher)) < BF16


def test_models_that_cannot_be_saved(tiny, output, saved):
    import comfy.sd

    deferred = model.defer(model.Request(str(tiny.bf16))).patcher
    with pytest.raises(CheckpointError, match="has no weights yet"):
        save(deferred, "deferred")
    with pytest.raises(CheckpointError, match="'both' is no format"):
        save(saved["bf16"].patcher, "x", "both")
    alien = load_file(str(saved["wan fp8"].path))
    name = next(n for n in alien if n.endswith(".comfy_quant"))
    patcher = comfy.sd.load_diffusion_model(str(saved["wan fp8"].path))
    patcher.get_model_object(f"diffusion_model.{name.removesuffix('.comfy_quant')}").quant_format = "someone.elses"
    with pytest.raises(CheckpointError, match="'someone.elses', which neither"):
        save(patcher, "alien")
    patcher = comfy.sd.load_diffusion_model(str(saved["wan fp8"].path))  # another loader's MODEL
    assert same(load_file(str(save(patcher, "foreign", step=lambda n: None)[0])), alien)
    assert not [f.name for f in output.iterdir() if f.name.endswith(".part")]


def test_f32_on_purpose_stays_f32(tiny, output):
    patcher = load(tiny.bf16, dtype="fp32")
    assert {t.dtype for t in load_file(str(save(patcher, "wide", step=lambda n: None)[0])).values()} == {torch.float32}
    half = {name: t.half() for name, t in common.stored(tiny.bf16).items()}
    folder = common.save(output / "half", half, common.config_of(tiny.bf16))
    got = load_file(str(save(load(folder), "half", step=lambda n: None)[0]))
    assert torch.equal(got["img_in.weight"].float(), half["x_embedder.weight"].float())
    assert {t.dtype for t in got.values()} <= {torch.float16, torch.bfloat16}


def test_wide_and_narrow_files_are_the_host_s_own_reading(saved, tmp_path):
    """The file's own order of tensors keeps every one aligned to its elements, and safetensors accepts it re-saved."""
    for case in saved.values():
        with open(case.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        assert length % 8 == 0
        size = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4}
        entries = [info for name, info in header.items() if name != "__metadata__"]
        assert all(info["data_offsets"][0] % size.get(info["dtype"], 1) == 0 for info in entries)
    save_file(load_file(str(saved["svdq"].path)), str(tmp_path / "again.safetensors"))
    assert load(tmp_path / "again.safetensors") is not None
