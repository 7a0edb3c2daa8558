"""The text encoders of FLUX.1, Wan and HunyuanVideo against diffusers' own encode_prompt on the same folder.

Weights are kept in F32 (dtype fp32) on both sides: the same network in two implementations.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from quantized_transformers.loaders.components import text_encoder
from quantized_transformers.loaders.components import text_encoders as registry
from quantized_transformers.loaders.errors import CheckpointError
from support import text_encoders as tiny
from support import text_encoders_llm as llm
from support.common import config_of, rel_l2, stored
from support.common import save as write
from support.text_checks import (
    CHECKS,
    PROMPTS,
    assert_flux,
    assert_hunyuan_dit,
    assert_hunyuan_video,
    assert_sd3,
    assert_sdxl,
    assert_wan,
    copy_of,
    encode,
)

LARGE = ("hidream", "hunyuan_video")  # whose tokenizers have Llama's real vocabulary
pytestmark = pytest.mark.parity

@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")

    class Bases(dict):
        def __missing__(self, family):
            return self.setdefault(family, tiny.base(family, root / family))

    return Bases()


def load(folder: Path, dtype: str = "fp32"):
    return text_encoder.load(text_encoder.Request(str(folder), dtype=dtype))


@pytest.mark.parametrize("family", [pytest.param(family, marks=[pytest.mark.full] if family in LARGE else ())
                                    for family in tiny.PIPELINES])
def test_states_are_those_of_the_pipeline(family, bases):
    loaded = load(bases[family])
    CHECKS[family](loaded.clip, bases[family])
    widths = {"flux1": (tiny.FLUX_TEXT, tiny.FLUX_POOLED), "wan": (tiny.WAN_TEXT, None),
              "hunyuan_video": (tiny.HUNYUAN_TEXT, tiny.HUNYUAN_POOLED),
              "sdxl": (tiny.SDXL_TEXT, tiny.SDXL_POOLED), "lumina2": (tiny.LUMINA_TEXT, None),
              "sd15": (tiny.FLUX_POOLED, tiny.FLUX_POOLED), "sd3": (tiny.SD3_TEXT, 2 * tiny.SDXL_POOLED),
              "hidream": (tiny.FLUX_TEXT, 2 * tiny.SDXL_POOLED)}.get(family, (tiny.FLUX_TEXT, None))
    states, rest = encode(loaded.clip, "a")
    assert (states.shape[-1], rest["pooled_output"].shape[-1] if widths[1] else None) == widths
    for name in ("text_encoder", "model.safetensors", "float32", "tokenizer"):
        assert name in loaded.report


def test_every_family_is_called_with_a_prompt():
    """Here or beside: a family whose tokenizer nobody calls would break unseen where the host calls it otherwise."""
    called = [*tiny.PIPELINES.values(), *llm.PIPELINES.values()]
    for family in registry.families():
        assert any(pipeline.startswith(family.pipelines) for pipeline in called), family.name


def rewrite(folder: Path, change) -> None:
    """Write an encoder folder again with other tensors; `change` gets them and returns them."""
    tensors, config = stored(folder), config_of(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write(folder, change(tensors), config, {"format": "pt"}, "model.safetensors")


def test_names_of_transformers_4(bases, tmp_path):
    """As the published files have them: CLIP's prefix and position_ids, T5's embedding twice."""
    folder = copy_of(bases["flux1"], tmp_path)
    rewrite(folder / "text_encoder", lambda tensors: {
        **{f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()},
        "text_model.embeddings.position_ids": torch.arange(77)[None]})
    rewrite(folder / "text_encoder_2", lambda tensors: {
        **tensors, "encoder.embed_tokens.weight": tensors["shared.weight"].clone()})
    assert_flux(load(folder).clip, folder, prompts=PROMPTS[:1])


def test_embedding_stored_by_its_other_name(bases, tmp_path):
    folder = copy_of(bases["flux1"], tmp_path)
    rewrite(folder / "text_encoder_2", lambda tensors: {
        "encoder.embed_tokens.weight" if name == "shared.weight" else name: tensor for name, tensor in tensors.items()})
    expected, _ = encode(load(bases["flux1"]).clip, PROMPTS[0])
    assert torch.equal(encode(load(folder).clip, PROMPTS[0])[0], expected)


@pytest.mark.full
def test_llava(bases, tmp_path):
    """HunyuanVideo I2V: the names of the published file, and those of transformers 5 in memory."""
    from transformers import LlamaModel

    folder = copy_of(bases["hunyuan_video"], tmp_path)
    tiny.llava().save_pretrained(folder / "text_encoder")
    edit(folder / "model_index.json", _class_name="HunyuanVideoImageToVideoPipeline",
         text_encoder=["transformers", "LlavaForConditionalGeneration"])
    loaded = load(folder)
    assert "vision tower" in loaded.report
    # the pipeline without pictures takes the states of the language model alone
    edit(folder / "model_index.json", _class_name="HunyuanVideoPipeline")
    assert_hunyuan_video(loaded.clip, folder, prompts=PROMPTS[:1], language=lambda model: next(
        module for module in model.modules() if isinstance(module, LlamaModel)))
    moved = {"vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector.",
             "language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model."}

    def rename(name: str) -> str:
        old = next(old for old in moved if name.startswith(old))
        return moved[old] + name.removeprefix(old)

    rewrite(folder / "text_encoder", lambda tensors: {rename(name): t for name, t in tensors.items()})
    again = load(folder).clip
    assert torch.equal(encode(again, PROMPTS[0])[0], encode(loaded.clip, PROMPTS[0])[0])


def test_sdxl_as_published(bases, tmp_path):
    """transformers 4's names, the old end of text, twins of half precision; and the refiner, which has CLIP-G alone."""
    folder = copy_of(bases["sdxl"], tmp_path)
    for part in ("text_encoder", "text_encoder_2"):
        rewrite(folder / part, lambda tensors: {
            name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in tensors.items()})
        (folder / part / "model.fp16.safetensors").write_bytes((folder / part / "model.safetensors").read_bytes())
        edit(folder / part / "config.json", eos_token_id=2, bos_token_id=0, pad_token_id=1)
    loaded = load(folder)
    assert_sdxl(loaded.clip, folder, prompts=PROMPTS[:1])
    assert "SDXL" in loaded.report and "CLIPTextModelWithProjection, model.safetensors" in loaded.report
    edit(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    states, rest = encode(load(folder).clip, PROMPTS[0])
    both, both_rest = encode(loaded.clip, PROMPTS[0])
    assert torch.equal(states, both[..., -tiny.SDXL_POOLED:])
    assert torch.equal(rest["pooled_output"], both_rest["pooled_output"])


@pytest.mark.parametrize("lacking", [("text_encoder_3",), ("text_encoder", "text_encoder_2")])
def test_sd3_without_some_of_its_encoders(lacking, bases, tmp_path):
    folder = copy_of(bases["sd3"], tmp_path)
    edit(folder / "model_index.json", **{name: [None, None] for part in lacking for name in
                                         (part, part.replace("text_encoder", "tokenizer"))})
    loaded = load(folder)
    assert "left out" in loaded.report and f"\n{lacking[0]}: " not in loaded.report
    if lacking == ("text_encoder_3",):
        assert_sd3(loaded.clip, folder, prompts=PROMPTS[:1])
    else:
        both, rest = encode(load(bases["sd3"]).clip, PROMPTS[0])
        states, alone = encode(loaded.clip, PROMPTS[0])
        assert torch.equal(states, both[:, 77:]) and not alone["pooled_output"].any() and rest["pooled_output"].any()


def test_a_projection_that_comfyui_leaves_out_is_refused(bases, tmp_path):
    folder = copy_of(bases["sd3"], tmp_path)
    tiny.clip_l_projected(identity=False).save_pretrained(folder / "text_encoder")
    refused(folder, "text_projection is not the identity")


@pytest.mark.full
def test_llama_31_is_computed_without_its_scaling(bases, tmp_path):
    """HiDream's; the report says it. The tokenizer has special tokens of its own."""
    folder = copy_of(bases["hidream"], tmp_path)
    edit(folder / "text_encoder_4" / "config.json", rope_parameters={
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})
    loaded, plain = load(folder), load(bases["hidream"])
    assert "without the scaling" in loaded.report and "without the scaling" not in plain.report
    first, second = (encode(one.clip, "a")[1]["conditioning_llama3"] for one in (loaded, plain))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("module", "file"), [
    ("t5", "t5_config_xxl"), ("t5_old", "t5_old_config_xxl"), ("pile_t5", "t5_pile_config_xl"),
    ("mt5", "mt5_config_xl"), ("bert", "hydit_clip")])
def test_published_sizes_are_the_hosts(module, file):
    from importlib import import_module

    sizes = import_module(f"{registry.__name__}.{module}").SIZES
    content = json.loads((tiny.BUNDLED / "text_encoders" / f"{file}.json").read_text())
    assert sizes == {key: content[key] for key in sizes}


def test_sdxl_padded_otherwise(bases, tmp_path):
    """A folder whose second tokenizer pads with the end of text, as the first does."""
    folder = copy_of(bases["sdxl"], tmp_path)
    tiny.tokenizer_clip(folder / "tokenizer_2")
    loaded = load(folder)
    assert "padded with <|endoftext|>" in loaded.report and "padded with" not in load(bases["sdxl"]).report
    assert_sdxl(loaded.clip, folder)
    assert rel_l2(encode(loaded.clip, "a")[0], encode(load(bases["sdxl"]).clip, "a")[0]) > 0.01


def test_sdxl_that_is_refused(bases, tmp_path):
    folder = copy_of(bases["sdxl"], tmp_path)
    second = folder / "text_encoder_2"
    whole = stored(second)
    rewrite(second, lambda tensors: {name: t for name, t in tensors.items() if name != "text_projection.weight"})
    refused(folder, "missing tensor text_projection.weight")
    rewrite(second, lambda _: whole)
    edit(second / "config.json", projection_dim=64)
    refused(folder, "projection_dim 64")
    edit(second / "config.json", projection_dim=tiny.SDXL_POOLED, num_hidden_layers=24)
    refused(folder, "31 layers or more, this one has 24")
    edit(second / "config.json", num_hidden_layers=32, hidden_act="quick_gelu")  # the host would lose it
    refused(folder, "sets both CLIP text encoders at once", "hidden_act")
    edit(second / "config.json", hidden_act="gelu")
    rewrite(second, lambda tensors: {name: t for name, t in tensors.items() if "layers.3.mlp.fc1" not in name})
    refused(folder, "missing", "layers.3.mlp.fc1")


@pytest.mark.full
def test_as_deep_as_published(bases, tmp_path):
    """24 blocks with 10240 rows: what ComfyUI recognises a T5-XXL by, without help. Narrow in everything else."""
    folder = copy_of(bases["flux1"], tmp_path)
    tiny.t5(d_model=16, d_ff=10240, num_layers=24, num_heads=2, d_kv=8).save_pretrained(folder / "text_encoder_2")
    # transformers in F32 is 2.5e-5 away from itself in F64 here, ComfyUI 3.1e-5
    assert_flux(load(folder).clip, folder, within=1e-4, prompts=PROMPTS[:1])


@pytest.mark.full
def test_as_wide_as_published(bases, tmp_path):
    """One block of UMT5-XXL's real sizes (but for the vocabulary)."""
    folder = copy_of(bases["wan"], tmp_path)
    tiny.umt5(128, d_kv=64, d_ff=10240, num_heads=64, num_layers=1).save_pretrained(folder / "text_encoder")
    clip = load(folder, "default").clip
    feed_forward = clip.cond_stage_model.umt5xxl.transformer.encoder.block[0].layer[1].DenseReluDense
    assert feed_forward.wi_1.weight.shape == (10240, 4096)
    clip.set_tokenizer_option("umt5xxl_min_length", 32)
    assert_wan(clip, folder, prompts=PROMPTS[:1], length=32)


def test_shards(bases, tmp_path):
    folder = copy_of(bases["wan"], tmp_path)
    (folder / "text_encoder" / "model.safetensors").unlink()
    tiny.umt5(128, d_ff=64).save_pretrained(folder / "text_encoder", max_shard_size="3MB")
    shards = len(list((folder / "text_encoder").glob("*.safetensors")))
    loaded = load(folder)
    assert shards > 1 and f"{shards} shards" in loaded.report
    assert_wan(loaded.clip, folder, prompts=PROMPTS[:1])


def test_dtypes(bases):
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for family, names in (("flux1", ("clip_l", "t5xxl")), ("wan", ("umt5xxl",))):
        for dtype, expected in kinds.items():
            loaded = load(bases[family], dtype)
            for name in names:
                model = getattr(loaded.clip.cond_stage_model, name).transformer
                assert {p.dtype for p in model.parameters()} == {expected}
            assert str(expected).removeprefix("torch.") in loaded.report
    assert load(bases["wan"], "default").clip.cond_stage_model.umt5xxl.transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["flux1", "wan"])
def test_the_host_can_load_it_again(family, bases):
    clip = load(bases[family]).clip
    factory, arguments = clip.patcher.cached_patcher_init[:2]
    again = factory(*arguments, disable_dynamic=True)
    assert type(again) is not type(clip) and again.cached_patcher_init[1] == arguments
    first, second = clip.patcher.model_state_dict(), again.model_state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert again.clone().model is again.model


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("family", "part", "name"), [
    ("flux1", "text_encoder", "encoder.layers.1.mlp.fc2.bias"), ("flux1", "text_encoder_2", "shared.weight"),
    ("wan", "text_encoder", "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight")])
def test_missing_and_unknown_tensors(family, part, name, bases, tmp_path):
    folder = copy_of(bases[family], tmp_path)
    rewrite(folder / part, lambda tensors: {key: t for key, t in tensors.items() if not key.endswith(name)})
    refused(folder, "missing", name)
    rewrite(folder / part, lambda tensors: {**tensors, "adapter.weight": torch.zeros(2, 2)})
    refused(folder, "unexpected", "adapter.weight")


def test_other_twin(bases, tmp_path):
    folder = copy_of(bases["wan"], tmp_path)
    rewrite(folder / "text_encoder", lambda tensors: {
        **tensors, "encoder.embed_tokens.weight": tensors["shared.weight"] * 2})
    refused(folder, "shared.weight", "differ")


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(("part", "values", "words"), [
    ("text_encoder", {"architectures": ["CLIPTextModelWithProjection"]}, ["CLIPTextModelWithProjection"]),
    ("text_encoder", {"hidden_act": "silu"}, ["hidden_act silu"]),
    ("text_encoder", {"eos_token_id": 3}, ["eos_token_id 3"]),
    ("text_encoder_2", {"relative_attention_num_buckets": 16}, ["relative_attention_num_buckets 16"]),
    ("text_encoder_2", {"dense_act_fn": "relu"}, ["dense_act_fn relu"]),
    ("text_encoder_2", {"d_ff": 128}, ["expected [128, 64]"]),
    ("text_encoder_2", {"num_layers": 2}, ["unexpected"]),
    ("text_encoder_2", {"quantization_config": {"quant_method": "aqlm"}}, ["quantization method", "aqlm"])])
def test_configurations_that_are_refused(part, values, words, bases, tmp_path):
    folder = copy_of(bases["flux1"], tmp_path)
    edit(folder / part / "config.json", **values)
    refused(folder, *words)


def test_other_rotary_embeddings_are_refused(bases, tmp_path):
    folder = copy_of(bases["hunyuan_video"], tmp_path)
    edit(folder / "text_encoder" / "config.json", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5})
    refused(folder, "llama3")
    edit(folder / "text_encoder" / "config.json", head_dim=64, rope_parameters={"rope_theta": 5e5})
    refused(folder, "head_dim 64")


def test_a_scale_that_is_none_is_refused(bases, tmp_path):
    folder = copy_of(bases["flux1"], tmp_path)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    rewrite(folder / "text_encoder_2", lambda tensors: {
        **tensors, name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.tensor(float("nan"))})
    refused(folder, "weight_scale", "nan")


def test_hunyuan_dit_as_published(bases, tmp_path):
    """vocab.txt alone, and the names of a BERT with a head around it; nothing of the host stays changed."""
    import comfy.text_encoders.long_clipl

    before = comfy.text_encoders.long_clipl.model_options_long_clip
    folder = copy_of(bases["hunyuan_dit"], tmp_path)
    bundled = tiny.BUNDLED / "text_encoders" / "hydit_clip_tokenizer"
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(bundled, folder / "tokenizer")
    rewrite(folder / "text_encoder", lambda tensors: {
        **{f"bert.{name}": tensor for name, tensor in tensors.items()}, "cls.predictions.bias": torch.zeros(2),
        "bert.embeddings.position_ids": torch.arange(512)[None]})
    assert_hunyuan_dit(load(folder).clip, folder, prompts=PROMPTS[:1])
    assert comfy.text_encoders.long_clipl.model_options_long_clip is before
    edit(folder / "tokenizer" / "tokenizer_config.json", do_lower_case=False)
    refused(folder, "another tokenizer", "do_lower_case False")
    shutil.copy(bundled / "tokenizer_config.json", folder / "tokenizer")
    lines = (bundled / "vocab.txt").read_text(encoding="utf-8").split("\n")
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join([*lines[:200], lines[201], lines[200], *lines[202:]]), encoding="utf-8")
    refused(folder, "another tokenizer", "2 other pieces")
    (folder / "tokenizer_2" / "spiece.model").unlink()
    shutil.copy(bundled / "vocab.txt", folder / "tokenizer")
    refused(folder, "spiece.model")


@pytest.mark.parametrize(("values", "word"), [
    ({"hidden_act": "relu"}, "hidden_act relu"), ({"position_embedding_type": "relative_key"}, "position_embedding_type relative_key"),
    ({"is_decoder": True}, "is_decoder True"), ({"num_hidden_layers": 2}, "unexpected"), ({"vocab_size": 21128}, "21128")])
def test_another_bert_is_refused(values, word, bases, tmp_path):
    folder = copy_of(bases["hunyuan_dit"], tmp_path)
    edit(folder / "text_encoder" / "config.json", **values)
    refused(folder, word)


@pytest.mark.parametrize("change", ["other", "lost", "merges"])
def test_another_tokenizer_is_refused(change, bases, tmp_path):
    folder = copy_of(bases["flux1"], tmp_path)
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    if change == "other":
        vocab["cat</w>"], vocab["dog</w>"] = vocab["dog</w>"], vocab["cat</w>"]
    elif change == "lost":
        del vocab["cat</w>"]
    else:
        merges[0], merges[1] = merges[1], merges[0]
    path.write_text(json.dumps(content), encoding="utf-8")
    refused(folder, "another tokenizer", *(["cat</w>"] if change != "merges" else []))


def test_tokenizer_as_older_repositories_have_it(bases, tmp_path):
    """vocab.json and merges.txt, without tokenizer.json."""
    folder = copy_of(bases["flux1"], tmp_path)
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(tiny.BUNDLED / "sd1_tokenizer", folder / "tokenizer")
    load(folder)
    (folder / "tokenizer" / "vocab.json").unlink()
    refused(folder, "tokenizer.json")


def test_umt5_needs_its_sentencepiece_model(bases, tmp_path):
    folder = copy_of(bases["wan"], tmp_path)
    (folder / "tokenizer" / "spiece.model").unlink()
    refused(folder, "spiece.model")


def test_other_pipelines_are_refused_by_name(bases, tmp_path):
    folder = copy_of(bases["flux1"], tmp_path)
    edit(folder / "model_index.json", _class_name="StableDiffusion4Pipeline")
    refused(folder, "StableDiffusion4Pipeline", "CLIPTextModel", "supported: FLUX.1")
    edit(folder / "model_index.json", _class_name="FluxPipeline", text_encoder_3=["transformers", "T5EncoderModel"])
    refused(folder, "text_encoder_3")


def test_components_without_a_class_are_none(bases, tmp_path):
    folder = copy_of(bases["wan"], tmp_path)
    edit(folder / "model_index.json", text_encoder_2=[None, None], image_encoder=["transformers", "CLIPVisionModel"])
    load(folder)


def test_the_check_of_the_hosts_choice_can_fail(bases, monkeypatch):
    from dataclasses import replace

    flux = registry.family_of(json.loads((bases["flux1"] / "model_index.json").read_text()))
    monkeypatch.setattr(text_encoder, "family_of", lambda index: replace(flux, host_class="SD3ClipModel"))
    refused(bases["flux1"], "FluxClipModel_")


def test_node(bases):
    from quantized_transformers.nodes.load_parts import QT_LoadBaseTextEncoder as Node

    folder = str(bases["wan"])
    clip, report = Node.execute(base_model="", reference=folder, dtype="bf16").args
    assert report.startswith("Wan") and clip.tokenize("a")
    first = Node.fingerprint_inputs(base_model="", reference=folder)
    assert first == Node.fingerprint_inputs(base_model="", reference=folder)
    spiece = bases["wan"] / "tokenizer" / "spiece.model"
    spiece.write_bytes(spiece.read_bytes())
    assert first != Node.fingerprint_inputs(base_model="", reference=folder)
