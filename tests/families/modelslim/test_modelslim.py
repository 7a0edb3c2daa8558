"""Real msmodelslim 26.1.0 exports of a tiny Wan (support/modelslim.py): what loads, and what ComfyUI does with it.
What the numbers are is in test_modelslim_layers.py, what is refused in test_modelslim_refused.py."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.families import modelslim
from quantized_transformers.loaders.locate import locate
from quantized_transformers.loaders.report import describe_report
from quantized_transformers.views.layer_map import layer_map
from support import lora as lora_tools
from support import modelslim as ms
from support import wan
from support.common import SUMS, rel_l2
from support.modelslim import same

pytestmark = pytest.mark.parity

# fp32 forwards of one network twice: as in test_wan.py.
FORWARD = 1e-5
ALL = list(ms.EXPORTS)
Q, FFN = "blocks.0.self_attn.q", "blocks.0.ffn.0"


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return ms.copy_all(tmp_path_factory.mktemp("modelslim"))


def run(patcher, channels=16, **kwargs):
    return wan.comfy_velocity(patcher, **ms.inputs(channels), **kwargs)


def test_report(exports):
    report = ms.load(exports["mxfp8"].folder).report
    for words in ("modelslim (by msmodelslim, MindIE writer)", "6 BF16, 10 W8A8_MXFP8", "runs: comfy_kitchen (chosen for this device) on ",
                  "2 tensors that only quantized attention reads are left out: blocks.0.self_attn.k_rot, "
                  "blocks.0.self_attn.q_rot"):
        assert words in report
    assert "runs: reference (as chosen) on " in ms.load(exports["mxfp8"].folder, compute="native").report
    smooth = ms.load(exports["mxfp4_smooth"].folder).report
    assert smooth.count("smoothing vector") == 1 and "the same of 9 more layers" in smooth
    assert "blocks.0.cross_attn.o: quant_bias overflowed" in ms.load(exports["w8a8_fp16"].folder).report


def test_int8_that_the_host_has_switched_off_is_said(exports, monkeypatch):
    """Newer hosts do so for some devices and then dequantize at every call; this one has no such switch yet."""
    import comfy.model_management

    words = "emulated (weights dequantized), because ComfyUI has INT8 off for this device"
    assert words not in ms.load(exports["w8a8_dynamic"].folder).report
    monkeypatch.setattr(comfy.model_management, "supports_int8_compute", lambda device: False, raising=False)
    assert words in ms.load(exports["w8a8_dynamic"].folder).report
    assert words not in ms.load(exports["mxfp8"].folder).report


def test_inspect(exports):
    """Headers and the description are enough; every type has a colour of its own in the layer map."""
    for name, counts in ms.COUNTS.items():
        description = describe(Checkpoint(locate(str(exports[name].folder))))
        report = describe_report(description)
        assert description.formats == counts and report.endswith("this checkpoint loads")
        assert counts.keys() - {"BF16", "F16"} <= modelslim.COLOURS.keys()
        json.dumps(description.to_json())
        assert layer_map(description).size[1] > 100


def test_two_experts(exports):
    """transformer is high noise, transformer_2 low noise; an expert's own folder is itself."""
    export = exports["mxfp8"]
    patchers = {}
    for component, folder in (("transformer", "high_noise_model"), ("transformer_2", "low_noise_model")):
        patchers[component] = ms.load(export.folder, component=component).patcher
        inner = export.folder / folder
        decoded = ms.decode(ms.stored(inner), ms.described(inner))
        assert torch.equal(ms.weights(patchers[component])["blocks.0.ffn.2"], decoded["blocks.0.ffn.2"].float())
        assert same(ms.load(inner).patcher, patchers[component])
    assert not same(*patchers.values())


def test_an_expert_that_is_not_there(exports, tmp_path):
    shutil.copytree(exports["mxfp8"].inner, tmp_path / "high_noise_model")
    assert ms.load(tmp_path).description.formats == ms.COUNTS["mxfp8"]
    with pytest.raises(CheckpointError, match="this export has no low_noise_model"):
        ms.load(tmp_path, component="transformer_2")
    with pytest.raises(CheckpointError, match="it has no transformer_2"):
        ms.load(exports["w8a8"].folder, component="transformer_2")


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("w8a8_dynamic", "mxfp4")])
def test_diffusers_names(name, exports, tmp_path):
    """A repo as SGLang's tool writes it, whole, its transformer, and its file: the same model, tensor for tensor."""
    from diffusers import WanTransformer3DModel

    export = exports[name]
    entries = {**export.entries, "blocks.0.self_attn.quant_type": "FP8_DYNAMIC"}
    folder = ms.repack(export.tensors, entries, tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}', encoding="utf-8")
    with torch.device("meta"):
        names = set(WanTransformer3DModel.from_config(ms.config()).state_dict())
    assert names <= set(load_file(str(folder / "diffusion_pytorch_model.safetensors")))
    expected = ms.load(export.folder).patcher
    for reference in (tmp_path, folder, folder / "diffusion_pytorch_model.safetensors"):
        loaded = ms.load(reference)
        assert loaded.description.naming.style == "diffusers" and same(loaded.patcher, expected)
    assert "attention is quantized in 1 layers on an NPU" in loaded.report


def test_shards(exports, tmp_path):
    """Several shards by their index, and one that is missing."""
    export, weight_map = exports["mxfp8"], {}
    names = sorted(export.tensors)
    for i in range(3):
        file = f"quant_model_weight-{i + 1:05}-of-00003.safetensors"
        save_file({name: export.tensors[name] for name in names[i::3]}, str(tmp_path / file))
        weight_map |= dict.fromkeys(names[i::3], file)
    (tmp_path / "quant_model_weight.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "quant_model_description_w8a8_mxfp8.json").write_text(json.dumps(export.entries))
    assert same(ms.load(tmp_path).patcher, ms.load(export.folder).patcher)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match="1 of 3 shards are missing"):
        ms.load(tmp_path)


def test_two_exports_in_one_folder(exports, tmp_path):
    """Each weight file has its description; which one is meant must be said."""
    for name in ("w8a8", "mxfp4_smooth"):
        shutil.copytree(exports[name].folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="there are 2 weight files"):
        ms.load(tmp_path)
    for name, kind in (("w8a8", "w8a8"), ("mxfp4_smooth", "w4a4_mxfp4")):
        file = f"quant_model_weight_{kind}.safetensors"
        assert ms.load(tmp_path, weights_name=file).description.formats == ms.COUNTS[name]
        assert ms.load(tmp_path / file).description.formats == ms.COUNTS[name]


@pytest.fixture(scope="module")
def base(exports, tmp_path_factory):
    """Float sources as native files, and a deferred base's folder."""
    folder = tmp_path_factory.mktemp("base")
    for name, file in (("w4a4_dynamic", "wan"), ("w8a8", "normal")):
        tensors = {key: p.to(torch.bfloat16).contiguous() for key, p in exports[name].source().named_parameters()}
        tensors["text_embedding.0.weight"] = torch.nn.functional.pad(tensors["text_embedding.0.weight"],
                                                                     (0, ms.HOST_TEXT - ms.TEXT))
        save_file(tensors, str(folder / f"{file}.safetensors"))
    (folder / "config.json").write_text(json.dumps(ms.config()), encoding="utf-8")
    return folder


LORA = lora_tools.random_lora({Q: (128, 128), FFN: (512, 128), "blocks.0.ffn.2": (128, 512), "head.head": (64, 128)},
                              "diffusion_model.")


@pytest.mark.parametrize("name", ["mxfp8", "w8a8", "w4a4_dynamic", "mxfp4_smooth", "mixed"])
def test_override_keeps_what_is_on_the_base(name, exports, base, tmp_path):
    """A LoRA on a deferred or loaded base moves to the quantized weights."""
    folder = exports[name].folder
    patched = lora_tools.load_lora(ms.load(folder).patcher, LORA, tmp_path)
    expected = lora_tools.low_vram(patched, lambda p: run(p, load=False))
    for patcher in (model.defer(model.Request(str(base))).patcher, ms.load(base / "wan.safetensors").patcher):
        loaded = model.override(lora_tools.load_lora(patcher, LORA, tmp_path), model.Request(str(folder)))
        assert "patches carried over from the base MODEL: 4" in loaded.report
        assert torch.equal(lora_tools.low_vram(loaded.patcher, lambda p: run(p, load=False)), expected)


def test_an_override_of_other_sizes_is_refused(exports, base):
    for name, difference in (("mxfp4", "layers = 1"), ("w8a8_dynamic", "in = 16")):
        with pytest.raises(CheckpointError, match=difference):
            model.override(model.defer(model.Request(str(base))).patcher, model.Request(str(exports[name].folder)))


@pytest.mark.parametrize("name", ["mxfp8", "w8a8", "w4a4_dynamic", "mxfp4_smooth", "dual", "mixed"])
def test_a_lora_is_the_definition(name, exports, tmp_path):
    """Patched as a layer runs: exactly W + B A of the decoded weights."""
    export = exports[name]
    patched = lora_tools.load_lora(ms.load(export.folder, compute="dequantize").patcher, LORA, tmp_path)
    network = ms.decoded_source(export)
    for layer in (Q, FFN, "blocks.0.ffn.2", "head.head"):
        a, b = (LORA[f"diffusion_model.{layer}.lora_{x}.weight"] for x in "AB")
        network.get_submodule(layer).weight += b @ a
    expected = ms.velocity(network, **ms.inputs())
    assert rel_l2(lora_tools.low_vram(patched, lambda p: run(p, load=False)), expected) < FORWARD


@pytest.mark.parametrize("name", ["mxfp8_ascendv1", "w8a8", "w4a4_dynamic", "mxfp4_smooth"])
def test_a_lora_has_the_effect_it_has_on_the_float_model(name, exports, base, tmp_path):
    """Merged into the weights, where 8 bits are quantized again and 4 bits stay dequantized: without it the difference
    is 1, at half its strength .5. The rest is quantization, in W8A8 also activations out of the calibrated range."""
    source = "normal" if exports[name].export.normal else "wan"
    plain, quantized = ms.load(base / f"{source}.safetensors").patcher, ms.load(exports[name].folder).patcher
    effect = run(lora_tools.load_lora(plain, LORA, tmp_path)) - run(plain)
    before = run(quantized)
    ours = run(lora_tools.load_lora(quantized, LORA, tmp_path)) - before
    assert rel_l2(ours, effect) < 0.25
    assert torch.equal(run(quantized), before)  # and it can be taken off again


@pytest.mark.parametrize("name", ALL)
def test_the_host_can_rebuild_it(name, exports):
    """cached_patcher_init, as multi-GPU and non-dynamic clones use it."""
    export = exports[name]
    patcher = ms.load(export.folder).patcher
    factory, arguments = patcher.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert again.model is not patcher.model and same(again, patcher)
    copy = patcher.deepclone_multigpu()
    assert torch.equal(run(copy, export.channels), run(patcher, export.channels))


@pytest.mark.parametrize("compute", ["auto", "dequantize"])
@pytest.mark.parametrize("name", ALL)
def test_saved_by_the_host_and_loaded_again(name, compute, exports, tmp_path):
    """ComfyUI's own save keeps every byte, for this pack to read; stock ComfyUI loads what is in its own formats."""
    import comfy.sd

    export = exports[name]
    patcher = ms.load(export.folder, compute=compute).patcher
    expected = run(patcher, export.channels)
    path = str(tmp_path / "saved.safetensors")
    comfy.sd.save_checkpoint(path, patcher)
    again = ms.load(path)
    # types that are ComfyUI's own formats, and called so; floats as ComfyUI holds them, which is F32 on a CPU
    host_s = {"W8A8_DYNAMIC": "INT8", "W8A8_MXFP8": "MXFP8", "BF16": "F32", "F16": "F32"}
    assert again.description.formats == {host_s.get(kind, kind): count for kind, count in ms.COUNTS[name].items()}
    assert load_file(path)["model.diffusion_model.head.head.weight"].dtype == torch.float32
    assert same(again.patcher, patcher) and torch.equal(run(again.patcher, export.channels), expected)
    if compute == "auto" and name in ("mxfp8", "w8a8_dynamic"):
        stock = comfy.sd.load_diffusion_model(path)
        found = run(stock, export.channels)
        assert torch.equal(found, expected) if name == "w8a8_dynamic" else rel_l2(found, expected) < SUMS


def test_damaged_saves_are_refused(exports, tmp_path):
    import comfy.sd

    path = str(tmp_path / "saved.safetensors")
    comfy.sd.save_checkpoint(path, ms.load(exports["mxfp4_smooth"].folder).patcher)
    tensors = load_file(path)
    prefix = next(k for k in tensors if k.endswith(f"{Q}.weight")).removesuffix("weight")
    for leaf, change, message in (("weight", lambda t: t[:64], r"codes is \[64, 64\], expected \[128, 64\]"),
                                  ("weight_t0_scale", lambda t: t.float(), "scale is float32, expected uint8"),
                                  ("comfy_quant", lambda t: t[:5], "no JSON"),
                                  ("comfy_quant", lambda t: torch.tensor(list(b'{"format": "qt.ascend.new"}'),
                                                                         dtype=torch.uint8), "says 'qt.ascend.new'"),
                                  ("mystery", lambda t: torch.ones(2), "unexpected tensors"),
                                  ("bias", lambda t: None, "missing tensor")):
        damaged = {**tensors, prefix + leaf: change(tensors.get(prefix + leaf))}
        file = str(tmp_path / f"{leaf}.safetensors")
        save_file({k: v.contiguous() for k, v in damaged.items() if v is not None}, file)
        with pytest.raises(CheckpointError, match=message):
            ms.load(file)


def test_node(exports, monkeypatch):
    """The node's inputs in order, and what it puts out."""
    import folder_paths

    from quantized_transformers.nodes.ascend import QT_ModelSlimLoader

    root = exports["mxfp8"].folder.parent
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(root)], set()))
    schema = QT_ModelSlimLoader.define_schema()
    assert [i.id for i in schema.inputs] == ["folder", "component", "reference", "compute", "revision",
                                             "download_missing"]
    assert schema.inputs[0].options[:len(ALL)] == sorted(ALL)
    patcher, report = QT_ModelSlimLoader.execute("mxfp8", "transformer_2").args
    assert same(patcher, ms.load(exports["mxfp8"].folder, component="transformer_2").patcher) and "MindIE" in report
    before = QT_ModelSlimLoader.fingerprint_inputs("w8a8")
    description = root / "w8a8" / "quant_model_description_w8a8.json"
    description.write_text(description.read_text() + " ")
    assert QT_ModelSlimLoader.fingerprint_inputs("w8a8") != before
