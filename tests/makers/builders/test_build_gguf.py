"""build-gguf against gguf-py: the file is, byte for byte, what gguf-py's writer and quantizers make of the model under the
names that ComfyUI's own converter gives it, by the rules of ComfyUI-GGUF's; and diffusers' forward on its weights.

What ComfyUI-GGUF's loader.py relies on is checked with gguf-py: its list of architectures, general.* keys, shapes, the
type of orig_shape. With its checkout in COMFYUI_GGUF_PATH the real loader reads the files, too.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from quantized_transformers.loaders.architectures import ARCHITECTURES
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from quantized_transformers.makers.builders.gguf import build_gguf
from quantized_transformers.makers.builders.gguf_rules import RULES, rules_of
from support import common, flux, host_models, qwen_image, wan
from support.gguf_files import Kind
from support.host_sizes import MODELS
from support.real_files import EXACT, load

pytestmark = pytest.mark.parity

KINDS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "TQ2_0", "TQ1_0", "BF16", "F16")
FILE_TYPES = {"MXFP4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE} | {
    kind: gguf.LlamaFileType[f"MOSTLY_{kind}"] for kind in KINDS if kind != "MXFP4"}
# ComfyUI-GGUF's loader.py, IMG_ARCH_LIST
LOADED = {"flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan", "lumina2", "qwen_image"}
FLUX_ENDS = ("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.")
DIFFUSERS_ENDS = ("x_embedder.", "context_embedder.", "time_text_embed.", "norm_out.", "proj_out.")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(a diffusers pipeline of a tiny FLUX.1, its model, the same in one file with the vendor's names)."""
    import comfy.model_detection

    root, model = tmp_path_factory.mktemp("base"), flux.make(double=1, single=1)
    model.save_pretrained(root / "pipeline" / "transformer")
    (root / "pipeline" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    native = comfy.model_detection.convert_diffusers_mmdit(  # which writes into what it is given
        {name: tensor.clone() for name, tensor in model.state_dict().items()})
    native = {name.replace("_norm.weight", "_norm.scale"): tensor.contiguous() for name, tensor in native.items()}
    common.save(root / "native", native, None, None, "model.safetensors")
    return root / "pipeline", model, native, root / "native" / "model.safetensors"


def opened(path: Path) -> tuple[dict, dict]:
    """(keys of general and comfy, name -> tensor) by gguf-py's reader."""
    reader = gguf.GGUFReader(path)
    keys = {field.name: field.contents() for field in reader.fields.values()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def meaning(tensor) -> np.ndarray:
    shape = tuple(int(side) for side in reversed(tensor.shape))
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def again(path: Path, arch: str, kind: str, values: dict[str, torch.Tensor], types: dict[str, str]) -> Path:
    """The file as ComfyUI-GGUF's converter writes one, with gguf-py alone."""
    writer = gguf.GGUFWriter(path=None, arch=arch)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[kind])
    for name, tensor in values.items():
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), Kind[types[name]]), raw_dtype=Kind[types[name]])
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def flux_type(name: str, tensor: torch.Tensor, kind: str) -> str:
    """The type of a tensor of FLUX.1 in BF16, by the converter and llama-quantize."""
    if tensor.ndim == 1 or tensor.numel() <= 1024:
        return "F32"
    if kind in ("BF16", "F16"):
        return kind
    return "BF16" if name.startswith(FLUX_ENDS) else kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_gguf_pys(base, tmp_path, kind):
    pipeline, _, native, single = base
    made = build_gguf(base=str(pipeline), output=str(tmp_path / "model.gguf"), kind=kind)
    keys, tensors = opened(made.folder)
    assert keys["general.architecture"] == "flux" and keys["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert tensors.keys() == native.keys()
    values = {name: native[name] for name in tensors}
    other = again(tmp_path / "other.gguf", "flux", kind, values, {name: flux_type(name, t, kind) for name, t in values.items()})
    assert made.folder.read_bytes() == other.read_bytes()
    if kind == "Q4_1":
        from_native = build_gguf(base=str(single), output=str(tmp_path / "native"), kind=kind)
        assert from_native.folder == tmp_path / "native.gguf" and opened(from_native.folder)[0] == keys
        assert all(np.array_equal(tensor.data, tensors[name].data) for name, tensor in opened(from_native.folder)[1].items())
        assert from_native.statistics == made.statistics


def test_forward_is_diffusers(base, tmp_path):
    """Loaded by this pack's GGUF family, against diffusers on gguf.quants.dequantize of what gguf.quants.quantize makes."""
    (pipeline, model, _, _), kind = base, "Q4_0"
    made = build_gguf(base=str(pipeline), output=str(tmp_path / "model.gguf"), kind=kind)
    loaded = load(made.folder)
    assert loaded.description.family == "gguf" and loaded.description.formats[f"GGUF {kind}"] == made.statistics["quantized_weights"]
    oracle = type(model).from_config(model.config).eval()
    truth = {}
    for name, tensor in model.state_dict().items():
        truth[name] = tensor.float()
        if name.endswith(".weight") and tensor.ndim == 2 and not name.startswith(DIFFUSERS_ENDS):
            packed = gguf.quants.quantize(truth[name].numpy(), Kind[kind])
            truth[name] = torch.from_numpy(gguf.quants.dequantize(packed, Kind[kind]).copy())
    oracle.load_state_dict(truth)
    error = common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), flux.diffusers_velocity(oracle, **flux.inputs()))
    assert error < EXACT


def test_wan(tmp_path):
    """A convolution of five dimensions and the modulations, as ComfyUI-GGUF has them: F32 in their own shape; the MLP's
    last layer in Q4_1 where the others are Q4_0."""
    model = wan.make()
    model.save_pretrained(tmp_path / "wan")
    made = build_gguf(base=str(tmp_path / "wan"), output=str(tmp_path / "q4.gguf"), kind="Q4_0")
    keys, tensors = opened(made.folder)
    state = model.state_dict()
    assert keys["general.architecture"] == "wan" and keys["general.file_type"] == 2
    for name, stored in (("patch_embedding.weight", "patch_embedding.weight"), ("head.modulation", "scale_shift_table"),
                         ("blocks.1.modulation", "blocks.1.scale_shift_table")):
        assert tensors[name].tensor_type == Kind.F32
        assert np.array_equal(meaning(tensors[name]), state[stored].float().numpy())
    assert len(tensors["patch_embedding.weight"].shape) == 5
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["blocks.0.ffn.2.weight"] == "Q4_1" and kinds["blocks.0.ffn.0.weight"] == "Q4_0"
    assert {kinds[name] for name in ("head.head.weight", "text_embedding.0.weight", "time_projection.1.weight")} == {"BF16"}
    plain = build_gguf(base=str(tmp_path / "wan"), output=str(tmp_path / "bf16.gguf"), kind="BF16")
    wanted = wan.diffusers_velocity(model.float(), **wan.inputs())
    assert common.rel_l2(wan.comfy_velocity(load(plain.folder).patcher, **wan.inputs()), wanted) < EXACT


def test_qwen_image(tmp_path):
    """The switch that only a name is survives."""
    qwen_image.make(zero_cond_t=True).save_pretrained(tmp_path / "base")
    made = build_gguf(base=str(tmp_path / "base"), output=str(tmp_path / "model.gguf"), kind="Q8_0")
    keys, tensors = opened(made.folder)
    assert keys["general.architecture"] == "qwen_image"
    assert made.folder.stat().st_size % 32 == 0  # ggml reads the last tensor, which has 4 bytes, with its padding
    assert tensors["transformer_blocks.0.attn.to_q.weight"].tensor_type == Kind.Q8_0
    assert {tensors[f"{name}.weight"].tensor_type for name in ("img_in", "proj_out")} == {Kind.BF16}
    assert "__index_timestep_zero__" in tensors and describe(Checkpoint(locate(str(made.folder)))).dims["zero_cond_t"] == 1


def test_every_model_has_the_name_that_comfyui_gguf_reads():
    import comfy.supported_models

    classes = {one.__name__ for one in comfy.supported_models.models} | {one.name for one in ARCHITECTURES}
    named = {}
    for name in classes:
        try:
            named[name] = rules_of(name, "").name
        except CheckpointError as error:
            assert "ComfyUI-GGUF reads no" in str(error)
    assert set(named.values()) == LOADED == set(RULES)
    wanted = {"Z-Image": "lumina2", "ZImage": "lumina2", "FLUX.2": "flux", "Chroma": "flux", "WAN22_S2V": "wan",
              "HunyuanVideo": "hyvid", "CosmosT2IPredict2": "cosmos", "LTXAV": "ltxv", "SSD1B": "sdxl", "SD15": "sd1"}
    assert wanted.items() <= named.items()
    assert not named.keys() & {"HunyuanDiT", "SDXLRefiner", "SD20", "HiDreamO1", "ChromaRadiance", "CosmosT2V", "StableAudio"}


def test_unet(tmp_path):
    """Stable Diffusion: what does not divide by 256 is stored in rows of 256, its shape beside it in I32."""
    name = next(name for name in MODELS if name.startswith("SD 1"))
    tensors = host_models.make(name)
    with host_models.detected(name):
        single = common.save(tmp_path, tensors, None, None, "sd.safetensors") / "sd.safetensors"
        made = build_gguf(base=str(single), output=str(tmp_path / "sd.gguf"), kind="Q5_1")
        parameters = dict(load(made.folder).patcher.model.diffusion_model.named_parameters())
    keys, found = opened(made.folder)
    assert keys["general.architecture"] == "sd1"
    cut = {key.removeprefix("comfy.gguf.orig_shape."): value for key, value in keys.items() if "orig_shape" in key}
    assert len(cut) > 10 and all(found[key].shape[0] == 256 and shape == list(tensors[key].shape) for key, shape in cut.items())
    fields = gguf.GGUFReader(made.folder).fields
    assert {tuple(fields[f"comfy.gguf.orig_shape.{key}"].types) for key in cut} == {(gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)}
    quantized = [key for key in cut if found[key].tensor_type == Kind.Q5_1]
    assert any(tensors[key].ndim == 4 for key in quantized)
    for key in cut:
        raw = gguf.quants.quantize(tensors[key].numpy().reshape(-1, 256), found[key].tensor_type)
        assert np.array_equal(found[key].data.reshape(-1).view(np.uint8), raw.reshape(-1).view(np.uint8))
        weight = parameters[key]
        weight = weight.dequantize() if hasattr(weight, "dequantize") else weight
        assert np.array_equal(weight.float().numpy().reshape(-1), meaning(found[key]).reshape(-1))


def test_layers_that_stay(base, tmp_path):
    pipeline, _, native, single = base
    linears = [name for name, tensor in native.items() if name.endswith(".weight") and tensor.ndim == 2]

    def build(where=single, kind="Q8_0", **options):
        made = build_gguf(base=str(where), output=str(tmp_path / "x.gguf"), kind=kind, overwrite=True, **options)
        return made, {name for name, tensor in opened(made.folder)[1].items() if tensor.tensor_type == Kind[kind]}

    auto, chosen = build()
    assert chosen == {name for name in linears if not name.startswith(FLUX_ENDS)}
    assert auto.statistics == {"quantized_weights": len(chosen), "kept_weights": len(linears) - len(chosen),
                               "undivided_weights": 0, "other_tensors": len(native) - len(linears)}
    made, found = build(keep_patterns=["^single_blocks", "^nothing$"])
    assert found == {name for name in chosen if name.startswith("double")}
    assert "these patterns match no layer: ^nothing$" in made.report
    for where in (single, pipeline):  # build-fp8's preset is in diffusers' names, and keeps modulations and MLPs
        assert build(where, model_type="flux1")[1] == {name for name in chosen if not any(
            word in name for word in ("_mod.", "modulation.", "_mlp."))}
    assert build(model_type="none")[1] == set(linears)
    made, found = build(model_type="none", kind="TQ2_0")  # 256 values a block
    assert found == {name for name in linears if native[name].shape[1] % 256 == 0} != set(linears)
    assert made.statistics["undivided_weights"] == len(linears) - len(found) and "no multiple of 256" in made.report
    with pytest.raises(CheckpointError, match="nothing to quantize"):
        build(keep_patterns=["."])
    with pytest.raises(CheckpointError, match="model type wan22 is for"):
        build(model_type="wan22")


def test_numbers_that_do_not_fit(base, tmp_path):
    """NaN and what F16 cannot hold is refused by name; F32 sources become F16, whose vectors stay F32; a block of
    almost nothing is zero in MXFP4, whose exponent gguf-py lets wrap around."""
    _, _, native, _ = base
    where, out = tmp_path / "base", tmp_path / "out.gguf"

    def build(kind="Q8_0", **changed):
        common.save(where, {name: t.float() for name, t in native.items()} | changed, None, None, "model.safetensors")
        return opened(build_gguf(base=str(where / "model.safetensors"), output=str(out), kind=kind, overwrite=True).folder)[1]

    key = "double_blocks.0.img_attn.proj.weight"
    tensors = build()
    assert tensors["img_in.weight"].tensor_type == Kind.F16 and tensors["img_in.bias"].tensor_type == Kind.F32
    before = out.read_bytes()
    for value, match in ((float("nan"), "NaN"), (7e4, "holds 70000, and Q8_0 ends at F16's 65504")):
        weight = native[key].float()
        weight[3, 5] = value
        with pytest.raises(CheckpointError, match=match):
            build(**{key: weight})
        assert out.read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == ["base", "out.gguf"]
    weight = native[key].float()
    weight[:2] = 1e-39
    assert not np.abs(meaning(build("MXFP4", **{key: weight})[key])[:2]).any()
    assert np.array_equal(meaning(build("BF16", **{key: native[key].float() * 1e6})[key])[0],
                          (native[key].float() * 1e6).bfloat16().float().numpy()[0])


def test_refused(base, tmp_path, monkeypatch):
    pipeline, _, native, single = base

    def refused(match, **options):
        with pytest.raises(CheckpointError, match=match) as error:
            build_gguf(**{"base": str(pipeline), "output": str(tmp_path / "out.gguf"), **options})
        assert "what to do" in str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(("gguf", "part"))) == []

    refused("unknown GGUF type", kind="Q4_K")
    refused("unknown model type", model_type="q")
    refused("is no regular expression", keep_patterns=["("])
    refused("no output file is given", output=" ")
    refused("no name of a file", output="../x.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(CheckpointError, match="a link or a folder"):
        build_gguf(base=str(single), output=str(tmp_path / "folder"))
    (tmp_path / "folder.gguf").rmdir()
    codes = {name: t.to(torch.float8_e4m3fn) if name.endswith("qkv.weight") else t for name, t in native.items()}
    common.save(tmp_path / "fp8", codes, None, None, "model.safetensors")
    refused("is not in BF16, F16 or F32", base=str(tmp_path / "fp8" / "model.safetensors"))
    common.save(tmp_path / "less", {n: t for n, t in native.items() if n != "img_in.bias"}, None, None, "model.safetensors")
    refused("missing tensor img_in.bias", base=str(tmp_path / "less" / "model.safetensors"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refused("are free")
    monkeypatch.undo()

    def cancel(total):
        def step(count):
            raise KeyboardInterrupt
        return step

    with pytest.raises(KeyboardInterrupt):
        build_gguf(base=str(pipeline), output=str(tmp_path / "out.gguf"), progress=cancel)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_what_is_there_stays(base, tmp_path):
    _, _, native, _ = base
    common.save(tmp_path, native, None, None, "model.safetensors")
    single, out = tmp_path / "model.safetensors", tmp_path / "out.gguf"
    out.write_text("mine", encoding="utf-8")
    for overwrite, match in ((False, "this file exists"), (True, "no GGUF file, so it is not overwritten")):
        with pytest.raises(CheckpointError, match=match):
            build_gguf(base=str(single), output=str(out), overwrite=overwrite)
    assert out.read_text(encoding="utf-8") == "mine"

    def touched(total):
        def step(count):
            os.utime(single, ns=(1, 1))
        return step

    with pytest.raises(CheckpointError, match="the source file changed meanwhile .*it was written to"):
        build_gguf(base=str(single), output=str(tmp_path / "new.gguf"), progress=touched)
    first = build_gguf(base=str(single), output=str(tmp_path / "new.gguf"), kind="BF16").folder
    with pytest.raises(CheckpointError, match="the output is the file to read"):
        build_gguf(base=str(first), output=str(first), overwrite=True)
    second = build_gguf(base=str(first), output=str(tmp_path / "second.gguf"), kind="Q8_0").folder  # a GGUF of 16 bits
    direct = build_gguf(base=str(single), output=str(tmp_path / "direct.gguf"), kind="Q8_0").folder
    assert second.read_bytes() == direct.read_bytes()
    with pytest.raises(CheckpointError, match="is not in BF16, F16 or F32"):
        build_gguf(base=str(second), output=str(tmp_path / "third.gguf"))


def test_command_and_node(base, tmp_path, capsys, monkeypatch):
    import argparse
    import json

    from quantized_transformers.commands import build_gguf as command
    from quantized_transformers.nodes.build import QT_BuildGGUF

    pipeline = base[0]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    monkeypatch.chdir(tmp_path)
    options = parser.parse_args(["--base-transformer-dir", str(pipeline), "--output", "a.gguf", "--type", "Q5_0",
                                 "--keep-pattern", "^single", "--json"])
    assert command.run(options) == 0 and (tmp_path / "a.gguf").is_file()
    printed = capsys.readouterr()
    assert json.loads(printed.out)["quantized_weights"] == 10 and "100 %" in printed.err
    made = QT_BuildGGUF.execute(str(pipeline), str(tmp_path / "b"), "Q5_0", "auto", "^single\n\n", False)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    assert "general.architecture flux" in made.args[0]
    assert QT_BuildGGUF.validate_inputs(base=str(pipeline), keep_patterns="a\n(b)?") is True
    assert "no regular expression" in QT_BuildGGUF.validate_inputs(keep_patterns="(")
    assert "there is no such file or folder" in QT_BuildGGUF.validate_inputs(base=str(tmp_path / "nothing"))
    check, made = QT_BuildGGUF.validate_inputs, str(tmp_path / "b.gguf")
    assert "no base is given" in check(output=made) and check(base=None, output=None) is True
    assert check(base=str(pipeline), output=str(tmp_path / "new")) is True
    assert "exists" in check(base=str(pipeline), output=made) and check(base=str(pipeline), output=made, overwrite=True) is True
    assert "no output file is given" in check(base=str(pipeline), output="")


@pytest.mark.skipif("COMFYUI_GGUF_PATH" not in os.environ, reason="ComfyUI-GGUF's own loader, where COMFYUI_GGUF_PATH has it")
@pytest.mark.parametrize("kind", KINDS)
def test_comfyui_gguf_reads_it(base, tmp_path, kind):
    """Its loader's tensors, decoded by its own code, are gguf-py's; stock ComfyUI detects the model by their shapes."""
    import comfy.model_detection

    folder = Path(os.environ["COMFYUI_GGUF_PATH"]).resolve()
    sys.path.insert(0, str(folder.parent))
    loader = importlib.import_module(f"{folder.name}.loader")
    dequant = importlib.import_module(f"{folder.name}.dequant")
    wan.make().save_pretrained(tmp_path / "wan")
    for reference, arch in ((base[0], "flux"), (tmp_path / "wan", "wan")):
        made = build_gguf(base=str(reference), output=str(tmp_path / f"{arch}.gguf"), kind=kind)
        found, said = loader.gguf_sd_loader(str(made.folder), return_arch=True)
        assert said == arch in LOADED
        _, tensors = opened(made.folder)
        assert found.keys() == tensors.keys()
        for name, tensor in found.items():
            weight = dequant.dequantize_tensor(tensor, torch.float32, torch.float32)
            assert np.array_equal(torch.as_tensor(weight).float().numpy().reshape(-1), meaning(tensors[name]).reshape(-1))
        config = comfy.model_detection.detect_unet_config(found, "")
        assert config["image_model"] == {"flux": "flux", "wan": "wan2.1"}[arch]
