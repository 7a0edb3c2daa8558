"""Load LoRA for Transformer: LoRAs in diffusers' names against their definition and against diffusers with peft.

Those of the derived classes are in test_derived_parity.py. ComfyUI runs in fp32 on this CPU."""

from __future__ import annotations

import contextlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders import loras, model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.nodes.load_lora import QT_LoadLoRA
from support import common, flux, flux2, hunyuan_video, lora, qwen_image, wan, z_image

pytestmark = pytest.mark.parity

FORWARD = 1e-5  # as in each model's own file
MODELS = {"FLUX.1": (flux, {}, {}), "FLUX.2": (flux2, {}, {}), "HunyuanVideo": (hunyuan_video, {}, {}), "Qwen-Image": (qwen_image, {}, {}),
          "Wan T2V": (wan, *wan.VARIANTS["T2V"]), "Wan2.1 I2V": (wan, *wan.VARIANTS["Wan2.1 I2V"]), "Z-Image": (z_image, {}, {})}


@contextlib.contextmanager
def small(kind):
    with getattr(kind, "small_widths", contextlib.nullcontext)():
        yield


def load(folder):
    return model.load(model.Request(str(folder), dtype="fp32"), quiet=True).patcher


@pytest.mark.parametrize("name", MODELS)
def test_every_linear(name, tmp_path):
    """In diffusers' names, the definition W + B A; taken off, nothing is left."""
    kind, sizes, given = MODELS[name]
    net = kind.make(**sizes).float()
    net.save_pretrained(tmp_path / "model")
    tensors, merge_it = lora.of_every_linear(net, "transformer.")
    with small(kind):
        base = load(tmp_path / "model")
        before = kind.comfy_velocity(base, **kind.inputs(**given))
        patched, report = lora.by_our_node(base, tensors, tmp_path)
        found = kind.comfy_velocity(patched, **kind.inputs(**given))
        assert "left away" not in report, report
        merge_it(1.0)
        expected = kind.diffusers_velocity(net, **kind.inputs(**given))
        assert common.rel_l2(found, expected) < FORWARD
        assert common.rel_l2(before, expected) > 0.01
        assert torch.equal(kind.comfy_velocity(base, **kind.inputs(**given)), before)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_that_diffusers_saved(rslora, tmp_path):
    """With the scale of each layer in its header, and nowhere else; diffusers runs it by peft."""
    from diffusers import WanPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    net = wan.make().float()
    net.save_pretrained(tmp_path / "model")
    net.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v", "ffn.net.0.proj", "ffn.net.2"], init_lora_weights=False,
                               rank_pattern={"blocks.1.attn1.to_q": 2}, alpha_pattern={"blocks.0.ffn.net.2": 9}, use_rslora=rslora))
    WanPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(net),
                                  transformer_lora_adapter_metadata=net.peft_config["default"].to_dict())
    file = tmp_path / "pytorch_lora_weights.safetensors"
    patched, report = QT_LoadLoRA.execute(load(tmp_path / "model"), path=str(file)).args
    assert "left away" not in report
    with torch.no_grad():
        expected = wan.diffusers_velocity(net, **wan.inputs())
    found = wan.comfy_velocity(patched, **wan.inputs())
    assert common.rel_l2(found, expected) < FORWARD
    save_file(load_file(file), str(tmp_path / "bare.safetensors"))  # without the header it is another LoRA
    patched, _ = QT_LoadLoRA.execute(load(tmp_path / "model"), path=str(tmp_path / "bare.safetensors")).args
    assert common.rel_l2(wan.comfy_velocity(patched, **wan.inputs()), expected) > 1e-3


@pytest.mark.parametrize("name", ["HunyuanVideo", "Wan T2V"])
def test_on_an_fp8_model(name, tmp_path):
    """Beside the quantized weight, where several stored layers are rows of one: exactly W_dequantized + B A."""
    kind, _, given = MODELS[name]
    net = kind.make()
    folder = kind.export(net, tmp_path / "fp8")
    tensors, _ = lora.of_every_linear(net.float(), "transformer.")
    base = model.load(model.Request(str(folder), dtype="fp32", compute="dequantize"), quiet=True).patcher
    patched, _ = lora.by_our_node(base, tensors, tmp_path)
    net.load_state_dict(lora.merge(common.stored(folder), tensors))
    expected = kind.diffusers_velocity(net, **kind.inputs(**given))
    assert common.rel_l2(kind.comfy_velocity(patched, **kind.inputs(**given)), expected) < FORWARD


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A HunyuanVideo, whose to_q, to_k and to_v are rows of one layer; and the same through the node."""
    folder = tmp_path_factory.mktemp("video")
    hunyuan_video.make().float().save_pretrained(folder / "model")
    base = load(folder / "model")
    return base, lambda tensors, metadata=None: lora.by_our_node(base, tensors, folder, metadata)


def pair(name, rows, columns, rank=4):
    g = torch.Generator().manual_seed(len(name))
    return {f"{name}.lora_A.weight": torch.randn(rank, columns, generator=g), f"{name}.lora_B.weight": torch.randn(rows, rank, generator=g)}


def delta(tensors, name):
    return tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]


def change(patched, base, name):
    """What patches do to a weight of the host's, by the host."""
    key = f"diffusion_model.{name}"
    weight = base.model_state_dict()[key].float()
    import comfy.lora

    return comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key) - weight


def close(a, b):
    return (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("parts", ["q", "k", "v", "qv", "kv", "qkv"])
def test_some_of_the_layers_that_are_rows_of_one(parts, video):
    base, through = video
    tensors = {key: value for part in parts for key, value in pair(f"transformer.transformer_blocks.0.attn.to_{part}", 256, 256).items()}
    found = change(through(tensors)[0], base, "double_blocks.0.img_attn.qkv.weight")
    for at, part in enumerate("qkv"):
        rows = found[256 * at:256 * (at + 1)]
        wanted = delta(tensors, f"transformer.transformer_blocks.0.attn.to_{part}") if part in parts else torch.zeros(256, 256)
        assert close(rows, wanted) if part in parts else not rows.any()


def test_every_spelling_of_a_name(video):
    base, through = video
    layer, native = "transformer_blocks.0.ff.net.2", "double_blocks.0.img_mlp.2.weight"
    made = pair(layer, 256, 1024)
    for prefix, flat in [(prefix, False) for prefix in loras.DOTTED] + [(prefix, True) for prefix in loras.FLAT]:
        name = prefix + (layer.replace(".", "_") if flat else layer)
        for up, down in ((".lora_B.weight", ".lora_A.weight"), (".lora_up.weight", ".lora_down.weight"),
                         (".lora_B.default.weight", ".lora_A.default.weight"), ("_lora.up.weight", "_lora.down.weight")):
            tensors = {name + up: made[f"{layer}.lora_B.weight"], name + down: made[f"{layer}.lora_A.weight"],
                       f"{name}.alpha": torch.tensor(2.0)}
            patched, report = through(tensors)
            assert "1 layers, 1 of them by diffusers' names" in report and "left away" not in report, report
            assert close(change(patched, base, native), 0.5 * delta(made, layer)), name + up


def test_native_names_stay(video):
    base, through = video
    made = pair("diffusion_model.double_blocks.0.img_mlp.2", 256, 1024)
    patched, report = through(made)
    assert "1 layers, 0 of them by diffusers' names" in report
    assert close(change(patched, base, "double_blocks.0.img_mlp.2.weight"), delta(made, "diffusion_model.double_blocks.0.img_mlp.2"))


def test_what_is_no_product_of_two_is_the_hosts(video):
    """LoKr on a layer that is one of the host's; on rows of one it is told."""
    base, through = video
    layer = "transformer.transformer_blocks.0.ff.net.2"
    a, b = torch.randn(16, 32), torch.randn(16, 32)
    patched, report = through({f"{layer}.lokr_w1": a, f"{layer}.lokr_w2": b})
    assert close(change(patched, base, "double_blocks.0.img_mlp.2.weight"), torch.kron(a, b))
    layer = "transformer.transformer_blocks.0.attn.to_q"
    with pytest.raises(CheckpointError, match="nothing for a HunyuanVideo.*lokr_w1"):
        through({f"{layer}.lokr_w1": torch.randn(16, 16), f"{layer}.lokr_w2": torch.randn(16, 16)})


def test_what_is_left_away_is_told(video):
    base, through = video
    made = {**pair("transformer.transformer_blocks.0.ff.net.2", 256, 1024), **pair("transformer.transformer_blocks.9.ff.net.2", 256, 1024),
            **pair("text_encoder.layers.0.mlp", 8, 8), **pair("lora_te1_layers_0_mlp", 8, 8)}
    patched, report = through(made)
    assert "4 tensors are for text encoders" in report
    assert "2 tensors are for layers that this model does not have" in report and "transformer_blocks.9.ff.net.2.lora_A" in report
    assert list(patched.patches) == ["diffusion_model.double_blocks.0.img_mlp.2.weight"] and not base.patches


@pytest.mark.parametrize("tensors, match", [
    (pair("transformer.transformer_blocks.0.ff.net.2", 512, 1024), "another size.*512, 1024.*256, 1024"),
    (pair("transformer.transformer_blocks.0.ff.net.2", 256, 512), "another size"),
    (pair("diffusion_model.double_blocks.0.img_mlp.2", 128, 1024), "another size"),
    (pair("transformer.transformer_blocks.0.attn.to_q", 512, 256), "another size"),
    (pair("transformer.transformer_blocks.0.attn.to_q", 256, 128), "another size"),
    (pair("transformer.blocks.0.attn1.to_q", 256, 256), "nothing for a HunyuanVideo.*blocks.0.attn1"),
    (pair("text_encoder.layers.0.mlp", 8, 8), "nothing for a HunyuanVideo")])
def test_what_is_not_for_this_model_is_refused(tensors, match, video):
    base, through = video
    with pytest.raises(CheckpointError, match=match):
        through(tensors)
    assert not base.patches


def test_rows_that_cannot_be_told():
    """Of a model that no table of sizes is known of: values alone do not say where queries and the rest end."""
    made = loras.Made((1000, 8), tuple(loras.Part(f"block.{name}.weight", loras.Fraction(0), loras.Fraction(1)) for name in
                                       ("to_q", "to_k", "to_v", "mlp")))
    tensors = pair("block.to_v", 100, 8)
    with pytest.raises(CheckpointError, match="which rows of .* cannot be told"):
        loras.convert(tensors, {}, {"block.all.weight": made}, ())
    tensors |= pair("block.to_q", 300, 8)
    found = loras.convert(tensors, {}, {"block.all.weight": made}, ()).tensors
    up, down = found["diffusion_model.block.all.lora_up.weight"], found["diffusion_model.block.all.lora_down.weight"]
    product = up @ down
    assert close(product[:300], delta(tensors, "block.to_q")) and close(product[400:500], delta(tensors, "block.to_v"))
    assert not product[300:400].any() and not product[500:].any()


@pytest.mark.parametrize("file, match", [("no.safetensors", "not there"), ("pickle.bin", "no .safetensors"), ("cut.safetensors", "cannot be read")])
def test_a_file_that_is_none(file, match, video, tmp_path):
    base, _ = video
    if file != "no.safetensors":
        (tmp_path / file).write_bytes(b"\x80\x04")
    if "cut" not in file:
        assert match in QT_LoadLoRA.validate_inputs(path=str(tmp_path / file))
    with pytest.raises(CheckpointError, match=match):
        QT_LoadLoRA.execute(base, path=str(tmp_path / file))


def test_a_name_in_the_folder_of_loras(video, tmp_path):
    base, _ = video
    with common.model_folder("loras", tmp_path):
        (tmp_path / "sub").mkdir()
        save_file(pair("transformer.transformer_blocks.0.ff.net.2", 256, 1024), str(tmp_path / "sub" / "qt_one.safetensors"))
        listed = next(given for given in QT_LoadLoRA.define_schema().inputs if given.id == "lora").options
        assert "sub/qt_one.safetensors" in [name.replace("\\", "/") for name in listed]
        assert QT_LoadLoRA.validate_inputs(lora="sub/qt_one.safetensors") is True
        for given in ({"lora": "sub/qt_one.safetensors"}, {"path": '"sub/qt_one.safetensors"'}):
            patched, _ = QT_LoadLoRA.execute(base, **given).args
            assert len(patched.patches) == 1
        patched, report = QT_LoadLoRA.execute(base, lora="sub/qt_one.safetensors", strength=0.0).args
        assert not patched.patches and "strength 0" in report
        marks = [QT_LoadLoRA.fingerprint_inputs(lora="sub/qt_one.safetensors", strength=s) for s in (1.0, 0.5)]
        assert marks[0] != marks[1]
