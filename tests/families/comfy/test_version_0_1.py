"""Files that version 0.1 saved, with its markers (`qt.row_shards`, `qt.svdquant`, `qt.ascend.*`), load for ever: the
same model, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers import online_mxfp8
from quantized_transformers.makers.save import save
from support import common, flux, svdquant_models, wan
from support import modelslim as ms
from support.version_0_1 import as_version_0_1, marker

pytestmark = pytest.mark.parity

SLIM = ("mxfp4_smooth", "w8a8", "w4a4_dynamic", "dual", "mixed")
CASES = ("fp8", "nvfp4", "mixture", "dynamic", "svdq int4", "svdq nvfp4", *SLIM)


def load(reference: Any, **request: Any):
    return model.load(model.Request(str(reference), **request), quiet=True)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Name -> (a MODEL, its forward)."""
    root = tmp_path_factory.mktemp("models")
    exported = wan.export(wan.make(), root / "wan", "FP8")
    dynamic = {name: t for name, t in common.stored(exported).items() if not name.endswith("input_scale")}

    def run_flux(patcher):
        return flux.comfy_velocity(patcher, **flux.inputs())

    def run_wan(patcher):
        return wan.comfy_velocity(patcher, **wan.inputs())

    def run_slim(patcher):
        return wan.comfy_velocity(patcher, **ms.inputs(16))

    models = {"fp8": (load(tiny.fp8).patcher, run_flux), "nvfp4": (load(tiny.nvfp4).patcher, run_flux),
              "mixture": (online_mxfp8.quantize(load(tiny.mixed).patcher, "^$", step=lambda: None)[0], run_flux),
              "dynamic": (load(common.save(root / "dynamic", dynamic, common.config_of(exported))).patcher, run_wan)}
    for precision in ("int4", "nvfp4"):
        path = svdquant_models.make_flux(precision).write(root / f"svdq {precision}")
        models[f"svdq {precision}"] = load(path, compute="dequantize").patcher, run_flux
    return models | {name: (load(ms.folder(name, root / name)).patcher, run_slim) for name in SLIM}


def old_file(patcher, name: str, folder: Path) -> Path:
    tensors = as_version_0_1(load_file(str(save(patcher, f"0.1 {name}", overwrite=True, step=lambda n: None)[0])))
    assert not any(b"qt.tiles" in bytes(t.tolist()) for n, t in tensors.items() if n.endswith("comfy_quant"))
    assert any(b'"qt.' in bytes(t.tolist()) for n, t in tensors.items() if n.endswith("comfy_quant"))
    save_file({n: t.contiguous() for n, t in tensors.items()}, str(folder / "old.safetensors"))
    return folder / "old.safetensors"


@pytest.mark.parametrize("name", CASES)
def test_the_same_model(name, made, output, tmp_path):
    patcher, run = made[name]
    path = old_file(patcher, name, tmp_path)
    again = load(path, compute="dequantize" if name.startswith("svdq") else "auto")
    ours, back = patcher.model.diffusion_model.state_dict(), again.patcher.model.diffusion_model.state_dict()
    assert ours.keys() == back.keys()
    for key, tensor in ours.items():
        assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, back[key]))), key
    assert torch.equal(run(again.patcher), run(patcher))


def test_stored_bytes_stay_views(made, output, tmp_path):
    path = old_file(made["fp8"][0], "views", tmp_path)
    from quantized_transformers.loaders.assemble import assemble
    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import read
    from quantized_transformers.loaders.locate import locate

    checkpoint = Checkpoint(locate(str(path)))
    family, plan = read(checkpoint)
    tensors = family.tensors(checkpoint, plan)
    mapped = {t.untyped_storage().data_ptr() + t.storage_offset() * t.element_size() for t in tensors.mapped.values()}
    native = assemble(plan, tensors)
    copied = [n for n, t in native.tensors.items() if t.numel() > 16 and t.data_ptr() not in mapped
              and not n.endswith((".comfy_quant", "_scale"))]  # a scale is a value of the vector of all parts'
    assert native.layouts["qt.tiles"] > 4 and not copied


def test_awq_in_the_kernels_order(made, output, tmp_path):
    """0.1 saved its I32 codes as F8_E4M3 of four times the columns."""
    from quantized_transformers.quant.layouts import stored
    from quantized_transformers.quant.svdquant.packed import packed

    tensors = load_file(str(save(made["svdq int4"][0], "0.1 packed", overwrite=True, step=lambda n: None)[0]))
    for name in [n for n, t in tensors.items() if n.endswith(".comfy_quant") and b'"awq"' in bytes(t.tolist())]:
        layer, conf = name.removesuffix("comfy_quant"), json.loads(bytes(tensors[name].tolist()))
        own = {n.removeprefix(layer): t for n, t in tensors.items() if n.startswith(layer)}
        tiles = [packed(tile) for tile in stored.tiles(stored.described(conf), own)]
        tensors |= {layer + leaf: stored.as_saved(t) for leaf, t in stored.named(tiles)[1].items()}
        tensors[name] = marker(stored.conf_of(tiles))
    assert any(b'"order": "nunchaku"' in bytes(t.tolist()) for n, t in tensors.items() if n.endswith(".comfy_quant"))
    old = as_version_0_1(tensors)
    for name, mark in old.items():
        conf = json.loads(bytes(mark.tolist())) if name.endswith(".comfy_quant") else {}
        if any(one.get("packed") for one in conf.get("parts", ())):
            weight = name.replace("comfy_quant", "weight")
            old[weight] = old[weight].view(torch.float8_e4m3fn)
    save_file({n: t.contiguous() for n, t in old.items()}, str(tmp_path / "old.safetensors"))
    patcher, run = made["svdq int4"]
    assert torch.equal(run(load(tmp_path / "old.safetensors", compute="dequantize").patcher), run(patcher))


MALFORMED = [{"rows": "32"}, {"rows": None}, {"codec": ["fp8"]}, {"fields": {"codes": ["weight"]}}, {"row": -1}]


@pytest.mark.parametrize("change", MALFORMED, ids=str)
def test_malformed_markers_are_refused(change, made, output, tmp_path):
    tensors = load_file(str(save(made["fp8"][0], "0.1 malformed", overwrite=True, step=lambda n: None)[0]))
    name = next(n for n, t in tensors.items() if n.endswith(".comfy_quant") and b"qt.tiles" in bytes(t.tolist()))
    conf = json.loads(bytes(tensors[name].tolist()))
    conf["tiles"][0] |= change
    save_file({**tensors, name: marker(conf)}, str(tmp_path / "malformed.safetensors"))
    with pytest.raises(CheckpointError):
        load(tmp_path / "malformed.safetensors")


BROKEN = {
    "rows": ("fp8", lambda t, layer: {f"{layer}.weight_shard_1": t[f"{layer}.weight_shard_1"][:8]}, "tiles .* do not make"),
    "scales": ("fp8", lambda t, layer: {f"{layer}.weight_scale": t[f"{layer}.weight_scale"].half()}, "scale is float16"),
    "no parts": ("svdq int4", lambda t, layer: {f"{layer}.comfy_quant": marker({"format": "qt.svdquant"})},
                 "does not list its parts"),
    "one scale short": ("fp8", lambda t, layer: {f"{layer}.weight_scale": t[f"{layer}.weight_scale"][:-1]},
                        r"weight_scale is \[2\], expected \[3\]"),
    "no number": ("fp8", lambda t, layer: {f"{layer}.weight_scale": t[f"{layer}.weight_scale"] * float("nan")},
                  "weight_scale holds NaN, expected finite positive numbers"),
    "unknown": ("w8a8", lambda t, layer: {f"{layer}.comfy_quant": marker({"format": "qt.ascend.w1a1"})},
                "'qt.ascend.w1a1', which this version does not load"),
    "another layer's": ("w8a8", lambda t, layer: {f"{layer}.weight_quant_bias": t[f"{layer}.weight_quant_bias"][:5]},
                        r"quant_bias is \[5\]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_files_are_refused(case, made, output, tmp_path):
    name, change, message = BROKEN[case]
    tensors = load_file(str(old_file(made[name][0], name, tmp_path)))
    layer = next(n for n, t in tensors.items() if n.endswith(".comfy_quant") and b'"qt.' in bytes(t.tolist())
                 and (name != "fp8" or n.replace("comfy_quant", "weight_shard_1") in tensors)).removesuffix(".comfy_quant")
    assert json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist()))["format"].startswith("qt.")
    save_file({n: t.contiguous() for n, t in {**tensors, **change(tensors, layer)}.items()},
              str(tmp_path / "broken.safetensors"))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "broken.safetensors")


def test_a_dense_delta_comes_along(made, output, tmp_path):
    """Beside SVDQuant weights, as 0.1 saved patches that are no plain LoRA, and as layers with a bias of their own have
    it still."""
    patcher, run = made["svdq int4"]
    layer = "double_blocks.0.img_attn.qkv.weight"
    difference = torch.randn(768, 256, generator=torch.Generator().manual_seed(0)) / 50
    patched = patcher.clone()
    patched.add_patches({f"diffusion_model.{layer}": ("diff", (difference,))})
    expected = run(patched)
    assert common.rel_l2(expected, run(patcher)) > 1e-3
    tensors = load_file(str(save(patcher, "0.1 delta", step=lambda n: None)[0])) | {f"{layer}_delta": difference}
    for name, content in (("new", tensors), ("old", as_version_0_1(tensors))):
        save_file({n: t.contiguous() for n, t in content.items()}, str(tmp_path / f"{name}.safetensors"))
        again = run(load(tmp_path / f"{name}.safetensors", compute="dequantize").patcher)
        assert common.rel_l2(again, expected) < 1e-5
