"""Other text encoders in the place of a base's: what takes which place, what is refused, and what nodes do with the CLIP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders.components import text_encoder
from quantized_transformers.loaders.errors import CheckpointError
from support import text_encoders as tiny
from support import text_gguf, text_packed
from support.common import rel_l2
from support.text_checks import PROMPTS, assert_wan, copy_of, encode
from support.workflow import queued

pytestmark = pytest.mark.parity

NETWORK = "umt5xxl.transformer"


def model(**sizes):
    return tiny.umt5(128, **{"d_ff": 64, **sizes})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Wan's, without the weights that are replaced."""
    folder = tiny.base("wan", tmp_path_factory.mktemp("base") / "base")
    for weights in (folder / "text_encoder").glob("*.safetensors"):
        weights.rename(folder / "weights.kept")
    return folder


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    return text_gguf.write(model(), tmp_path_factory.mktemp("gguf") / "umt5.gguf", "t5encoder",
                           lambda name: "Q5_1" if "attn" in name else "Q8_0")


def load(base: Path, *overrides: object, dtype: str = "default"):
    return text_encoder.load(text_encoder.Request(str(base), dtype=dtype, overrides=tuple(map(str, overrides))))


def dense_base(base: Path, made, target: Path) -> Path:
    shutil.copytree(base, target)
    made.save_pretrained(target / "text_encoder")
    return target


def test_what_is_loaded_stays_quantized(base, gguf, tmp_path):
    loaded = load(base, gguf)
    network = loaded.clip.cond_stage_model.get_submodule(NETWORK)
    kinds = {name: module.weight._params.tiles[0].codec for name, module in network.named_modules()
             if hasattr(getattr(module, "weight", None), "_params")}
    assert kinds["shared"] == "ggml_q8_0" and kinds["encoder.block.1.layer.0.SelfAttention.q"] == "ggml_q5_1"
    assert len(kinds) == 1 + 3 * 7
    assert loaded.clip.patcher.model_size() < 1.05 * gguf.stat().st_size
    for line in ("override: " + str(gguf), "GGUF Q5_1", "GGUF Q8_0", "dequantized for every matmul"):
        assert line in loaded.report
    again = text_encoder.rebuild(*loaded.clip.patcher.cached_patcher_init[1])
    expected, _ = encode(loaded.clip, PROMPTS[0])
    copied = loaded.clip.clone()
    copied.patcher, copied.cond_stage_model = again, again.model
    assert torch.equal(encode(copied, PROMPTS[0])[0], expected)


def test_halves_stay_halves(base, tmp_path):
    """llama.cpp keeps norms in F32 and matrices in F16: nothing is made twice as large. A table may be cast to FP8 where
    layers have scales."""
    made = model()
    file = text_gguf.write(made, tmp_path / "f16.gguf", "t5encoder", "F16")
    loaded = load(base, file)
    assert loaded.clip.patcher.model_size() < 1.05 * file.stat().st_size and "quantized" not in loaded.report
    assert_wan(loaded.clip, dense_base(base, text_gguf.dequantized(made, file), tmp_path / "dense"), prompts=PROMPTS[:1])
    table = model()
    dense = text_packed.write_file(table, tmp_path / "scaled.safetensors", "scaled_fp8")
    tensors = load_file(str(tmp_path / "scaled.safetensors"))
    name = next(name for name in tensors if "shared" in name or "embed_tokens" in name)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    dense.shared.weight.data = tensors[name].float()
    save_file(tensors, str(tmp_path / "cast.safetensors"))
    loaded = load(base, tmp_path / "cast.safetensors")
    assert_wan(loaded.clip, dense_base(base, dense, tmp_path / "cast"), within=1e-4, prompts=PROMPTS[:1])


def test_loras(base, gguf, tmp_path):
    """Beside the weight, full and in low VRAM; taken off, nothing is left."""
    import comfy.model_management
    import comfy.sd

    made = text_gguf.dequantized(model(), gguf)
    layers = {"encoder.block.0.layer.0.SelfAttention.q": (64, 4096), "encoder.block.2.layer.1.DenseReluDense.wi_1": (64, 4096)}
    g, lora = torch.Generator().manual_seed(3), {}
    for name, (rows, columns) in layers.items():
        down, up = torch.randn(4, columns, generator=g) * columns ** -0.5, torch.randn(rows, 4, generator=g) * 0.5
        lora[f"text_encoders.{NETWORK}.{name}.lora_down.weight"], lora[f"text_encoders.{NETWORK}.{name}.lora_up.weight"] = down, up
        made.get_submodule(name).weight += up @ down
    clip = load(base, gguf).clip
    before, _ = encode(clip, PROMPTS[0])
    _, patched = comfy.sd.load_lora_for_models(None, clip, lora, 0, 1.0)
    assert len(patched.patcher.patches) == 2
    dense = dense_base(base, made, tmp_path / "dense")
    assert_wan(patched, dense, within=1e-4, prompts=PROMPTS[:1])
    assert rel_l2(encode(patched, PROMPTS[0])[0], before) > 1e-3
    comfy.model_management.unload_all_models()
    tokens = clip.tokenize(PROMPTS[0])
    patched.patcher.patch_model(patched.patcher.load_device, lowvram_model_memory=1)
    try:
        assert patched.patcher.model.model_lowvram
        few = patched.cond_stage_model.encode_token_weights(tokens)[0]
    finally:
        patched.patcher.unpatch_model(patched.patcher.offload_device)
    assert rel_l2(few, encode(patched, PROMPTS[0])[0]) < 1e-5
    assert torch.equal(encode(clip, PROMPTS[0])[0], before)


def damaged(file: Path, name: str, row: int, target: Path) -> Path:
    """The file with NaN in the first scale of a row of a tensor in Q8_0 or Q5_1."""
    tensor = next(tensor for tensor in GGUFReader(str(file)).tensors if tensor.name == name)
    data = bytearray(file.read_bytes())
    at = tensor.data_offset + row % len(tensor.data) * tensor.data.shape[1]
    data[at:at + 2] = b"\x01\x7e"
    target.write_bytes(data)
    return target


def test_scales_that_are_no_numbers(base, gguf, tmp_path):
    """Refused when the host has loaded the encoder, which on a CPU is at once; of the table of words only the rows of a
    prompt are read, and looked at."""
    clip = load(base, gguf).clip
    expected, _ = encode(clip, PROMPTS[0])
    read = {token for token, *_ in clip.tokenize(PROMPTS[0])["umt5xxl"][0]}
    spare = next(row for row in range(3, 64) if row not in read)
    assert torch.equal(encode(load(base, damaged(gguf, "token_embd.weight", spare, tmp_path / "spare.gguf")).clip, PROMPTS[0])[0],
                       expected)
    for name, row in (("enc.blk.1.attn_q.weight", -1), ("token_embd.weight", max(read))):
        file = damaged(gguf, name, row, tmp_path / "damaged.gguf")
        with pytest.raises(CheckpointError, match=f"^{name} holds NaN, expected finite numbers\n.*where: {base}"):
            encode(load(base, file).clip, PROMPTS[0])


def test_saved_by_the_host_and_loaded_again(base, gguf, tmp_path):
    import folder_paths
    from comfy_extras.nodes_model_merging import CLIPSave

    clip = load(base, gguf).clip
    expected, _ = encode(clip, PROMPTS[0])
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    try:
        CLIPSave().save(clip, "saved")
    finally:
        folder_paths.set_output_directory(before)
    file = max(tmp_path.glob("saved*.safetensors"), key=lambda path: path.stat().st_size)  # beside one of a temperature
    again = load(base, file)
    assert "GGUF Q5_1" in again.report and torch.equal(encode(again.clip, PROMPTS[0])[0], expected)


def test_a_pipeline_in_the_place_of_the_bases(base, tmp_path):
    """Of several encoders those that the base has; shards; bitsandbytes' double quantization."""
    other = copy_of(base, tmp_path / "a")
    dense = text_packed.write(model(d_model=4096), tmp_path / "packed", "bnb_nf4", double=True)
    shutil.rmtree(other / "text_encoder")
    shutil.copytree(tmp_path / "packed", other / "text_encoder")
    tensors = load_file(str(other / "text_encoder" / "model.safetensors"))
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, str(other / "text_encoder" / file))
    (other / "text_encoder" / "model.safetensors").unlink()
    (other / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {name: file for file, held in parts.items() for name in held}}))
    loaded = load(base, other)
    assert "NF4" in loaded.report
    assert_wan(loaded.clip, dense_base(base, dense, tmp_path / "dense"), within=1e-4, prompts=PROMPTS[:1])
    same = load(other)  # a base that is quantized itself
    assert torch.equal(encode(same.clip, PROMPTS[0])[0], encode(loaded.clip, PROMPTS[0])[0])


def refused(base: Path, *overrides: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(base, *overrides)
    return str(caught.value)


def test_what_is_none_of_the_bases(base, gguf, tmp_path):
    assert "two overrides are the text_encoder of the base" in refused(base, gguf, gguf)
    narrow = text_gguf.write(tiny.t5(), tmp_path / "narrow.gguf", "t5encoder")
    assert "UMT5 of width 64, the base's is 4096 wide" in refused(base, narrow)
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)}, str(tmp_path / "flux.safetensors"))
    text = refused(base, tmp_path / "flux.safetensors")
    assert "none of the base's text encoders (UMT5)" in text and "double_blocks.0" in text
    assert "no such file" in refused(base, tmp_path / "nowhere.gguf")
    cut = model()
    del cut.encoder.block[1].layer[1].DenseReluDense.wi_1
    tensors = {name: tensor.clone() for name, tensor in cut.state_dict().items()}
    save_file(tensors, str(tmp_path / "cut.safetensors"))
    assert "missing tensor encoder.block.1.layer.1.DenseReluDense.wi_1.weight" in refused(base, tmp_path / "cut.safetensors")
    assert "there is no .safetensors file" in refused(base)


def test_a_base_that_edits_pictures_needs_eyes(tmp_path):
    from support.text_gguf_models import EXPORTS, make
    from support.text_host import config_of

    folder = tmp_path / "base"
    for name in ("text_encoder", "tokenizer"):
        (folder / name).mkdir(parents=True)
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config_of(make("qwen25vl"))))
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "QwenImageEditPlusPipeline", "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"]}))
    text = refused(folder, EXPORTS / "qwen25vl.gguf")
    assert "has no eyes, and the base edits pictures" in text and "mmproj" in text
    assert "there is no .safetensors file" in refused(folder, EXPORTS / "qwen25vl-mmproj.gguf")


def test_node(base, gguf, tmp_path):
    from quantized_transformers.nodes.load_parts import QT_LoadBaseTextEncoder as Node

    given = {"base_model": str(base), "override_reference": str(gguf)}
    clip, report = Node.execute(**given).args
    assert "GGUF Q8_0" in report and encode(clip, "a")[0].shape[-1] == tiny.WAN_TEXT
    assert queued(Node, **given) is True
    assert "no such file" in queued(Node, **{**given, "override_reference": str(tmp_path / "lost.gguf")})
    assert "no such file" in queued(Node, **{**given, "override": str(tmp_path / "lost.gguf"), "override_reference": ""})
    other = Path(shutil.copy(gguf, tmp_path / "other.gguf"))
    prints = [Node.fingerprint_inputs(**{**given, "override_reference": str(file)}) for file in (gguf, gguf, other)]
    assert prints[0] == prints[1] != prints[2]
