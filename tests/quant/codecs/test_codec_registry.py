"""CONTRIBUTING's promise: a new codec, and a new kernel, is one file and one line. Here the files are in a temporary
folder, and the lines are names put into the registries; nothing else of the pack is touched."""

from __future__ import annotations

import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.locate import locate
from quantized_transformers.makers.save import save
from quantized_transformers.quant import codecs, formats, kernels
from quantized_transformers.views import layer_map, verdict
from support import common, flux

pytestmark = pytest.mark.parity

CODEC = '''
    """TERNARY: I8 codes -1, 0, 1 with one F32 scale a row."""

    from ..stored import PLAIN_DTYPES, wrong_shape
    from ..tile import Coded, Place, Tile
    from .base import LOW_RANK, Codec, Field


    class Ternary(Codec):
        name, title, why = "ternary", "TERNARY", "three values and a scale a row"
        requantizes = False  # so patches stay beside the weight
        fields = {"codes": Field(("int8",), lambda rows, columns: (rows, columns), 0),
                  "row_scale": Field(("float32",), lambda rows, columns: (rows, 1), 0), **LOW_RANK}

        def residual(self, tile, dtype):
            return (tile["codes"].float() * tile["row_scale"]).to(dtype)


    class TernaryFormat:
        name, codec, colour = "TERNARY", "ternary", (1, 2, 3)
        words, companions = frozenset({"ternary"}), frozenset({"row_scale"})

        def matches(self, leaves):
            return leaves["weight"].dtype == "I8" and "row_scale" in leaves

        def problem(self, leaves, rows, columns):
            return wrong_shape(leaves, rows, columns)

        def coded(self, name, part, order):
            place = Place("ternary", *part["weight"].shape)
            return Coded((Tile(place, {"codes": part["weight"], "row_scale": part["row_scale"]}),), part.get("bias"))


    CODECS, FORMATS = (Ternary(),), (TernaryFormat(),)
'''
KERNEL = '''
    """Adds and subtracts columns, as ternary weights allow."""

    from .base import NATIVE, Activation, Kernel, Speed, add_low_rank

    CALLS = []


    class Adder(Kernel):
        name, title, codecs = "adder", "the adder", frozenset({"ternary"})

        def runs(self, name, machine):
            return "" if machine.kind == "cpu" else "the adder is for CPUs"

        def speed(self, name, machine):
            return Speed(NATIVE, "adds and subtracts")

        def linear(self, act, tile, bias):
            CALLS.append(tile.place)
            codes = tile["codes"]
            out = (act.x @ (codes == 1).to(act.x.dtype).t() - act.x @ (codes == -1).to(act.x.dtype).t())
            out = out * tile["row_scale"][:, 0].to(act.x.dtype)
            return add_low_rank(out if bias is None else out + bias, act.x, tile)


    def get(variant):
        return KERNEL


    KERNEL = Adder()
'''


@pytest.fixture
def registered(tmp_path, monkeypatch):
    caches = (codecs.codecs, formats.formats, kernels.kernel, verdict.by_title, verdict.of_codecs)
    for package, name, source in ((codecs, "ternary", CODEC), (kernels, "adder", KERNEL)):
        folder = tmp_path / package.__name__.rpartition(".")[2]
        folder.mkdir()
        (folder / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        monkeypatch.setattr(package, "MODULES", (name, *package.MODULES))  # the line
    monkeypatch.setattr(formats, "MODULES", codecs.MODULES)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def ternary(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().mean(1, keepdim=True)
    return {"weight": (weight / scale).round().clamp(-1, 1).to(torch.int8), "row_scale": scale}


@pytest.fixture
def export(registered, tmp_path):
    """(a folder whose blocks' Linears are ternary but for one of a fused layer, the same dequantized)."""
    reference, tensors = flux.make().float(), {}
    with torch.no_grad():
        for name, module in reference.named_modules():
            if isinstance(module, torch.nn.Linear) and "blocks" in name and not name.endswith("0.attn.to_k"):
                part = ternary(module.weight)
                module.weight.copy_(part["weight"].float() * part["row_scale"])
                tensors |= {f"{name}.{leaf}": t for leaf, t in part.items()}
    plain = {name: t for name, t in reference.state_dict().items() if name not in tensors}
    reference.save_pretrained(tmp_path / "dense")
    return common.save(tmp_path / "ternary", {**plain, **tensors}, common.config_of(tmp_path / "dense")), reference


def test_a_codec_and_a_kernel_are_a_file_and_a_line_each(export, output, tmp_path):
    folder, reference = export
    expected = flux.diffusers_velocity(reference, **flux.inputs())
    loaded = model.load(model.Request(str(folder), dtype="fp32"), quiet=True)
    adder = kernels.import_module(".adder", kernels.__name__)
    assert not adder.CALLS and loaded.description.formats["TERNARY"] > 20
    assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), expected) < 1e-5
    assert len(adder.CALLS) > 20 and {place.codec for place in adder.CALLS} == {"ternary"}
    qkv = loaded.patcher.model.diffusion_model.double_blocks[0].img_attn.qkv
    assert [place.codec for place in qkv.weight._params.tiles] == ["ternary", "plain", "ternary"]
    # views, badges and doctor know it by its registry line alone
    description = describe(Checkpoint(locate(str(folder))))
    line = "TERNARY runs: adder (chosen for this device) on cpu: adds and subtracts"
    assert verdict.of_formats(description.formats) == verdict.Verdict("green", line) and line in loaded.report
    assert dict(verdict.families())["TERNARY"].level == "green" and layer_map.format_colours()["TERNARY"] == (1, 2, 3)
    # dequantized, saved and loaded again, in stock format
    dense = model.load(model.Request(str(folder), dtype="fp32", compute="dequantize"), quiet=True)
    calls = len(adder.CALLS)
    assert common.rel_l2(flux.comfy_velocity(dense.patcher, **flux.inputs()), expected) < 1e-5 and len(adder.CALLS) == calls
    path, report = save(loaded.patcher, "ternary", step=lambda n: None)
    assert "layers are TERNARY (three values and a scale a row)" in report
    again = model.load(model.Request(str(path), dtype="fp32"), quiet=True)
    assert torch.equal(flux.comfy_velocity(again.patcher, **flux.inputs()), flux.comfy_velocity(loaded.patcher, **flux.inputs()))
    assert again.description.family == "comfy" and again.description.formats["TERNARY"] > 10
    path, _ = save(loaded.patcher, "ternary stock", "stock", step=lambda n: None)
    assert torch.equal(load_file(str(path))["double_blocks.0.img_attn.proj.weight"],
                       reference.transformer_blocks[0].attn.to_out[0].weight.bfloat16())


@pytest.mark.parametrize("compute", ["auto", "dequantize"])
def test_its_loras_stay_beside_the_weight(compute, export, tmp_path):
    """A codec that cannot be coded again says so in one word, and a LoRA's effect is exact; taken off, nothing is left."""
    from support import lora as lora_tools

    folder, reference = export
    base = model.load(model.Request(str(folder), dtype="fp32", compute=compute), quiet=True)
    lora_tools.follows(base, reference, tmp_path)


def test_damaged_tiles_are_refused(export, output, tmp_path):
    from quantized_transformers.loaders.errors import CheckpointError

    path, _ = save(model.load(model.Request(str(export[0])), quiet=True).patcher, "damaged", step=lambda n: None)
    tensors = load_file(str(path))
    name = next(n for n in tensors if n.endswith("weight_t0_row_scale"))
    save_file({**tensors, name: tensors[name][:3]}, str(tmp_path / "damaged.safetensors"))
    with pytest.raises(CheckpointError, match=r"TERNARY at row 0, column 0: row_scale is \[3, 1\], expected"):
        model.load(model.Request(str(tmp_path / "damaged.safetensors")), quiet=True)
