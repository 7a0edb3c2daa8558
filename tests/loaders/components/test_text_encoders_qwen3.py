"""Forwards of text encoders that are Qwen3's, Qwen3-VL's, Gemma 3's and Ministral's against transformers and diffusers' own
pipelines, as test_text_encoders_qwen_mistral.py does of older ones.
"""

from __future__ import annotations

import inspect
import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quantized_transformers.loaders.components import text_encoder
from quantized_transformers.loaders.components.text_encoders import qwen3, qwen3_vl, qwen25_vl
from quantized_transformers.loaders.errors import CheckpointError
from support import text_encoders_llm as llm
from support.common import rel_l2
from support.text_encoders_llm import PROMPTS, ids
from support.text_llm import FORWARD, edit, fp32, load, picture, reference

pytestmark = [pytest.mark.parity, pytest.mark.full, pytest.mark.usefixtures("let_go")]


def test_krea2(tmp_path):
    """Twelve states of Qwen3-VL 4B, behind the system prompt; diffusers' padding, in the middle of its prompt, cut out."""
    from diffusers import Krea2Pipeline
    from transformers import AutoTokenizer, Qwen3VLTextModel

    folder = llm.qwen3_vl("krea2", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    prefix = ("<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
              "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n")  # pipeline_krea2.py
    pipeline = SimpleNamespace(
        tokenizer=tokenizer, text_encoder=fp32(Qwen3VLTextModel, folder), prompt_template_encode_start_idx=34,
        prompt_template_encode_prefix=prefix, prompt_template_encode_suffix="<|im_end|>\n<|im_start|>assistant\n",
        prompt_template_encode_num_suffix_tokens=5, text_encoder_select_layers=qwen3_vl.TAPS)
    states, masks = Krea2Pipeline.get_text_hidden_states(pipeline, list(PROMPTS), 64, torch.device("cpu"))
    clip = load(folder)
    for prompt, one, mask in zip(PROMPTS, states, masks, strict=True):
        out = clip.encode_from_tokens(clip.tokenize(prompt))
        expected = one[mask].flatten(1)
        assert out[0].shape == expected.shape and rel_l2(out[0], expected) < FORWARD
    edit(folder, text_encoder_select_layers=[1, 2])
    with pytest.raises(CheckpointError, match="text_encoder_select_layers"):
        load(folder)


def test_ideogram4(tmp_path):
    """Thirteen states of Qwen3-VL 8B, the last of them before the final norm."""
    from diffusers import Ideogram4Pipeline
    from transformers import AutoTokenizer, Qwen3VLTextModel

    folder = llm.qwen3_vl("ideogram4", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = SimpleNamespace(language_model=fp32(Qwen3VLTextModel, folder))
    clip = load(folder)
    for prompt in PROMPTS:
        tokens = clip.tokenize(prompt)
        chat = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        numbers = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert ids(tokens) == numbers[0].tolist()
        states = Ideogram4Pipeline._get_text_encoder_hidden_states(
            model, numbers, torch.ones_like(numbers), torch.arange(numbers.shape[1])[None])
        expected = torch.stack(states).permute(1, 2, 3, 0).flatten(2)
        out = clip.encode_from_tokens(tokens)
        assert out.shape == expected.shape and rel_l2(out, expected) < FORWARD


SEEN = 4e-5
EYES = {"hidden_size": 128, "intermediate_size": 96, "depth": 4, "deepstack_visual_indexes": [0, 1, 2], "num_heads": 16,
        "num_position_embeddings": 2304}


def test_joyimage_sees(tmp_path, monkeypatch):
    """Eyes of smaller sizes than the host's, on both sides: what they see, and the states behind it before the final norm."""
    import comfy.text_encoders.qwen3vl as theirs
    from diffusers import JoyImageEditPipeline
    from transformers import AutoTokenizer, Qwen3VLModel

    small = {key: EYES[key] for key in ("hidden_size", "intermediate_size", "depth", "deepstack_visual_indexes")}
    monkeypatch.setitem(qwen3_vl.VISION, qwen3_vl.LARGE, small)
    monkeypatch.setitem(theirs.QWEN3VL_VISION, qwen3_vl.LARGE, small)
    folder = llm.qwen3_vl("joyimage", tmp_path / "base", EYES, num_hidden_layers=5)
    tokenizer, model = AutoTokenizer.from_pretrained(folder / "tokenizer"), fp32(Qwen3VLModel, folder)
    clip = load(folder)
    _, pixels = picture(320, 224, 3)
    seen: list[Any] = []
    clip.cond_stage_model.qwen3vl_8b.transformer.visual.register_forward_hook(lambda _m, args, out: seen.append((args, out)))
    for images in ([], [pixels]):
        tokens = clip.tokenize(PROMPTS[0], images=images)
        out = clip.encode_from_tokens(tokens)
        given = {}
        numbers = torch.tensor([[token if isinstance(token, int) else qwen25_vl.IMAGE_TOKEN for token in ids(tokens)]])
        if images:
            (patches, grid), (merged, deep) = seen[0]
            count = merged.shape[0]
            at = numbers[0].tolist().index(qwen25_vl.IMAGE_TOKEN)
            numbers = torch.cat([numbers[:, :at], numbers.new_full((1, count), qwen25_vl.IMAGE_TOKEN), numbers[:, at + 1:]], 1)
            given = {"pixel_values": patches.flatten(1), "image_grid_thw": grid.long()}
            # the host's tower is 1.9e-5 from transformers' in F64, transformers' own in F32 8e-7
            assert rel_l2(merged, model.visual(patches.flatten(1), grid_thw=grid.long()).pooler_output) < SEEN
            if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
                given["mm_token_type_ids"] = (numbers == qwen25_vl.IMAGE_TOKEN).int()
        kept = JoyImageEditPipeline._get_last_decoder_hidden_states(
            SimpleNamespace(text_encoder=SimpleNamespace(model=model)), model, input_ids=numbers, **given)
        expected = kept[:, 34:]  # of the system prompt
        assert out.shape == expected.shape and rel_l2(out, expected) < (SEEN if images else FORWARD)
    words = tokenizer(PROMPTS[0])["input_ids"]
    assert ids(clip.tokenize(PROMPTS[0]))[36:-5] == words


def test_ltx2(tmp_path):
    """All 49 states of Gemma 3, normed as diffusers norms them, through the projection of the folder connectors/. It is so
    large that all but some of its rows are zeros, which the file has not; the connectors' own tensors are the MODEL's."""
    from diffusers.pipelines.ltx2.connectors import per_layer_masked_mean_norm
    from transformers import AutoTokenizer, Gemma3ForCausalLM

    columns, rows = 3840 * 49, range(0, 3840, 960)
    projection = torch.from_numpy(np.zeros((3840, columns), np.uint16)).view(torch.bfloat16)
    for row in rows:
        projection[row] = torch.randn(columns) * columns ** -0.5
    folder = llm.ltx2(tmp_path / "base", {
        "text_proj_in.weight": projection, "video_connector.learnable_registers": torch.ones(2, 2, dtype=torch.bfloat16)})
    model, tokenizer = fp32(Gemma3ForCausalLM, folder), AutoTokenizer.from_pretrained(folder / "tokenizer")
    loaded = text_encoder.load(text_encoder.Request(str(folder)))
    assert "LTX2TextConnectors" in loaded.report and "vision tower" in loaded.report
    prompt = "a red cat, running over the old river"
    numbers = tokenizer(prompt, return_tensors="pt").input_ids
    tokens = loaded.clip.tokenize(prompt)
    assert ids(tokens)[-numbers.shape[1]:] == numbers[0].tolist() and not any(ids(tokens)[:-numbers.shape[1]])
    tokens = {name: [batch[-numbers.shape[1] - 3:] for batch in value] for name, value in tokens.items()}  # less padding
    states = torch.stack(model(numbers, output_hidden_states=True).hidden_states, -1)
    normed = per_layer_masked_mean_norm(states, torch.tensor([numbers.shape[1]]), "cpu")
    expected = torch.zeros(1, numbers.shape[1], 3840)
    expected[..., list(rows)] = normed @ projection[list(rows)].float().T
    out = loaded.clip.encode_from_tokens(tokens)
    assert out.shape == expected.shape and rel_l2(out, expected) < FORWARD
    path = folder / "connectors" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "caption_channels": 2560}))
    with pytest.raises(CheckpointError, match="caption_channels 2560"):
        load(folder)


def test_ernie(tmp_path):
    """Ministral 3: the last but one state of a prompt as it is; the scaling of its rotary embedding is left out, and said."""
    from diffusers import ErnieImagePipeline
    from transformers import Mistral3Model, PreTrainedTokenizerFast

    folder = llm.ernie(tmp_path / "base")
    model = fp32(Mistral3Model, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    pipeline = SimpleNamespace(text_encoder=model, tokenizer=lambda text, **kwargs: {
        "input_ids": [1, *tokenizer(text, add_special_tokens=False)["input_ids"]]})  # as published: <s> before a prompt
    expected = [ErnieImagePipeline.encode_prompt(pipeline, prompt, "cpu")[0] for prompt in PROMPTS]
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0,
                                                "beta_slow": 1.0, "original_max_position_embeddings": 16384}
    for scaled in (False, True):
        if scaled:
            path.write_text(json.dumps(config))
        loaded = text_encoder.load(text_encoder.Request(str(folder)))
        assert ("YaRN" in loaded.report) == scaled and loaded.report.startswith("ERNIE-Image")
        for prompt, one in zip(PROMPTS, expected, strict=True):
            out = loaded.clip.encode_from_tokens(loaded.clip.tokenize(prompt))[0]
            assert out.shape == one.shape and rel_l2(out, one) < FORWARD


def test_ovis(tmp_path):
    from diffusers import OvisImagePipeline
    from transformers import AutoTokenizer, Qwen3Model

    folder = llm.ovis(tmp_path / "base")
    pipeline = SimpleNamespace(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"), text_encoder=fp32(Qwen3Model, folder), user_prompt_begin_id=28,
        system_prompt="Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of "
                      "the objects and background: ")  # pipeline_ovis_image.py
    pipeline._get_messages = partial(OvisImagePipeline._get_messages, pipeline)
    clip = load(folder)
    for prompt in PROMPTS:
        expected = OvisImagePipeline._get_ovis_prompt_embeds(pipeline, prompt, device="cpu", dtype=torch.float32)
        out = clip.encode_from_tokens(clip.tokenize(prompt))
        assert out.shape == expected.shape and rel_l2(out, expected) < FORWARD


def test_z_image(language_models):
    from diffusers import ZImagePipeline
    from transformers import AutoTokenizer

    folder = language_models("z_image")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    pipeline = ZImagePipeline(None, None, reference(folder), tokenizer, None)
    expected = [pipeline._encode_prompt([prompt], torch.device("cpu"))[0] for prompt in PROMPTS]
    del pipeline
    clip = load(folder)
    for prompt, states in zip(PROMPTS, expected, strict=True):
        chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True, enable_thinking=True)
        tokens = clip.tokenize(prompt)
        assert ids(tokens) == tokenizer(chat)["input_ids"]
        out = clip.encode_from_tokens(tokens)[0]
        assert out.shape == states.shape and out.shape[-1] == llm.WIDTHS["z_image"]
        assert rel_l2(out, states) < FORWARD


def test_flux2_klein(language_models):
    """4B, padded to 512 tokens as the pipeline pads them."""
    from diffusers import Flux2KleinPipeline
    from transformers import AutoTokenizer

    folder = language_models("flux2_klein")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    states = Flux2KleinPipeline._get_qwen3_prompt_embeds(reference(folder), tokenizer, list(PROMPTS),
                                                           dtype=torch.float32)
    clip = load(folder)
    for prompt, expected in zip(PROMPTS, states, strict=True):
        chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True, enable_thinking=False)
        tokens = clip.tokenize(prompt)
        assert ids(tokens) == tokenizer(chat, padding="max_length", max_length=512)["input_ids"]
        out, = clip.encode_from_tokens(tokens)
        assert out.shape == expected.shape == (512, llm.WIDTHS["flux2_klein"]) and rel_l2(out, expected) < FORWARD


@pytest.mark.parametrize("tied", [False, True])
def test_flux2_klein_9b(tied, qwen_folder, tmp_path):
    """The width chooses Qwen3 8B, whose head, where it has one, comes along. Few words: the real vocabulary is above."""
    from safetensors.torch import load_file

    llm.klein(4096, tmp_path, vocab_size=1000, tie_word_embeddings=tied)
    (tmp_path / "tokenizer").symlink_to(qwen_folder)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline", "text_encoder": [
        "transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2TokenizerFast"]}), encoding="utf-8")
    numbers = list(range(7, 1000, 31))
    states = reference(tmp_path)(torch.tensor([numbers]), output_hidden_states=True).hidden_states
    expected = torch.cat([states[at] for at in (9, 18, 27)], -1)
    clip = load(tmp_path)
    tokens = clip.tokenize("a cat")
    assert tokens.keys() == {"qwen3_8b"} and len(ids(tokens)) == 512
    out = clip.encode_from_tokens({"qwen3_8b": [[(number, 1.0) for number in numbers]]})
    assert out.shape == expected.shape and rel_l2(out, expected) < FORWARD
    model = clip.cond_stage_model.qwen3_8b.transformer.model
    assert hasattr(model, "lm_head") != tied
    if not tied:
        stored = load_file(tmp_path / "text_encoder" / "model.safetensors")
        assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])


def test_flux2_klein_needs_the_states_it_reads():
    config = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 2560, "intermediate_size": 16,
              "num_hidden_layers": 26, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128,
              "vocab_size": 1000, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    for change, message in (({}, "needs 27 layers"), ({"hidden_size": 2048, "num_hidden_layers": 28}, "hidden_size 2048")):
        with pytest.raises(CheckpointError, match=message):
            qwen3.KLEIN_4B.host_config(config | change)


def test_other_numbers_reach_the_model(qwen_folder, tmp_path):
    """transformers' own result with another rope_theta, epsilon, vocabulary and heads than Qwen3 4B's."""
    from transformers import Qwen3Config

    llm.write("Qwen3ForCausalLM", Qwen3Config(
        hidden_size=2560, intermediate_size=64, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3,
        head_dim=128, vocab_size=1000, rms_norm_eps=0.1, rope_theta=50.0), tmp_path / "text_encoder")
    (tmp_path / "tokenizer").symlink_to(qwen_folder)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "ZImagePipeline", "text_encoder": [
        "transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2Tokenizer"]}), encoding="utf-8")
    numbers = list(range(7, 1000, 31))
    states = reference(tmp_path)(torch.tensor([numbers]), output_hidden_states=True).hidden_states[-2]
    out = load(tmp_path).encode_from_tokens({"qwen3_4b": [[(number, 1.0) for number in numbers]]})
    assert rel_l2(out, states) < FORWARD
