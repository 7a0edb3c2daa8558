"""Forwards of text encoders that are Mistral's and Qwen2.5-VL's against transformers and diffusers' own pipelines (test_*_qwen3.py
has the newer ones). ComfyUI and transformers both compute in fp32 on the stored BF16 weights, on this CPU.
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantized_transformers.loaders.components import text_encoder
from quantized_transformers.loaders.components.text_encoders import mistral3, qwen25_vl
from quantized_transformers.loaders.errors import CheckpointError
from support import text_encoders_llm as llm
from support import text_gguf
from support.common import rel_l2
from support.text_checks import encode
from support.text_encoders_llm import PROMPTS, STRINGS, ids
from support.text_llm import FORWARD, load, picture, reference

pytestmark = [pytest.mark.parity, pytest.mark.full, pytest.mark.usefixtures("let_go")]


def places(_module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """What the processor says of each token, which diffusers 0.42 does not hand on. Without it transformers 5 numbers a
    picture's tokens as if they were text; transformers 4, with which the model was published, sees them by their ids."""
    return args, {**kwargs, "mm_token_type_ids": (kwargs["input_ids"] == qwen25_vl.IMAGE_TOKEN).int()}


def test_flux2(language_models, tmp_path):
    from diffusers import Flux2Pipeline
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from transformers import AutoProcessor

    folder = language_models("flux2")
    model, processor = reference(folder), AutoProcessor.from_pretrained(folder / "tokenizer")
    states = Flux2Pipeline._get_mistral_3_small_prompt_embeds(model, processor, list(PROMPTS), dtype=torch.float32,
                                                              max_sequence_length=160)
    del model
    clip = load(folder)
    for prompt, padded in zip(PROMPTS, states, strict=True):
        tokens = clip.tokenize(prompt)
        assert ids(tokens) == processor.apply_chat_template(format_input([prompt], SYSTEM_MESSAGE), tokenize=True,
                                                            return_dict=True)["input_ids"][0].tolist()
        out, = clip.encode_from_tokens(tokens)
        assert out.shape[-1] == llm.WIDTHS["flux2"] and len(out) < 160
        assert rel_l2(out, padded[-len(out):]) < FORWARD
    saved = saved_tokenizer(clip, tmp_path)
    assert all(ids(saved.tokenize_with_weights(text)) == ids(clip.tokenize(text)) for text in STRINGS)


def saved_tokenizer(clip: Any, folder: Path) -> Any:
    """The host's tokenizer from what its CLIPSave node writes."""
    import comfy.text_encoders.flux
    import folder_paths
    from comfy_extras.nodes_model_merging import CLIPSave
    from safetensors import safe_open

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(folder))
    CLIPSave().save(clip, "saved")
    folder_paths.set_output_directory(before)
    file, = folder.glob("saved*.safetensors")
    with safe_open(file, "pt") as content:
        assert "mistral3_24b.transformer.model.layers.30.self_attn.q_proj.weight" in content.keys()  # noqa: SIM118
        with mistral3.MISTRAL3.during():
            return comfy.text_encoders.flux.Flux2Tokenizer(tokenizer_data={"tekken_model": content.get_tensor("tekken_model")})


def test_qwen_image_and_edit(language_models, tmp_path):
    """One encoder for both: text alone, then two pictures (40 and 16 patches, the first in two windows). Then the same from
    two GGUF files, language model and eyes, in the place of the base's."""
    from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
    from transformers import AutoTokenizer, Qwen2VLProcessor

    folder = language_models("qwen_image_edit")
    model = reference(folder)
    towers: list[torch.Tensor] = []
    tower = getattr(model.model, "visual", None) or model.visual  # before 4.52
    tower.register_forward_hook(lambda _m, _a, out: towers.append(getattr(out, "pooler_output", out)))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    processor = Qwen2VLProcessor.from_pretrained(folder / "processor")
    text = QwenImagePipeline(None, None, model, tokenizer, None)
    edit = QwenImageEditPlusPipeline(None, None, model, tokenizer, processor, None)
    expected = [text._get_qwen_prompt_embeds([prompt], torch.device("cpu"), torch.float32)[0] for prompt in PROMPTS]
    text_ids = [tokenizer(text.prompt_template_encode.format(prompt))["input_ids"] for prompt in PROMPTS]
    (first, first_pixels), (second, second_pixels) = picture(140, 56, 1), picture(56, 56, 2)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(places, with_kwargs=True)
    edited, _ = edit._get_qwen_prompt_embeds([PROMPTS[0]], [first, second], torch.device("cpu"), torch.float32)
    template = edit.prompt_template_encode
    files = [text_gguf.write(model, tmp_path / "lm.gguf", "qwen2vl", "BF16"),
             text_gguf.write(model, tmp_path / "mmproj.gguf", "clip", "F16")]
    del model, text, edit
    clip = load(folder)
    for prompt, states, token_ids in zip(PROMPTS, expected, text_ids, strict=True):
        tokens = clip.tokenize(prompt)
        assert ids(tokens) == token_ids
        out = clip.encode_from_tokens(tokens)
        assert out.shape == states.shape and out.shape[-1] == llm.WIDTHS["qwen_image"]
        assert rel_l2(out, states) < FORWARD
    seen: list[torch.Tensor] = []
    clip.cond_stage_model.qwen25_7b.transformer.visual.register_forward_hook(lambda _m, _a, out: seen.append(out))
    mark = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"  # as the host's TextEncodeQwenImageEditPlus
    tokens = clip.tokenize(mark.format(1) + mark.format(2) + PROMPTS[0], images=[first_pixels, second_pixels],
                           llama_template=template)
    out = clip.encode_from_tokens(tokens)
    assert rel_l2(torch.cat(seen), towers[0]) < FORWARD
    assert out.shape == edited.shape and rel_l2(out, edited) < FORWARD
    del clip
    (folder / "text_encoder").rename(tmp_path / "text_encoder")
    (folder / "text_encoder").mkdir()
    shutil.copy(tmp_path / "text_encoder" / "config.json", folder / "text_encoder")
    clip = load(folder, *reversed(files))
    assert rel_l2(clip.encode_from_tokens(tokens), edited) < FORWARD
    (folder / "model_index.json").write_text((folder / "model_index.json").read_text().replace("EditPlus", ""))
    blind = load(folder, files[0])
    assert rel_l2(blind.encode_from_tokens(blind.clone().tokenize(PROMPTS[0])), expected[0]) < FORWARD
    with pytest.raises(CheckpointError, match="sees no pictures"):
        blind.encode_from_tokens(tokens)


GLYPHS = 'a sign that says "Open 24h" and “開”, at night'


@pytest.fixture(scope="module")
def of_qwen25(language_models):
    """What the pipelines with Qwen2.5-VL make of prompts, by one model: family -> (prompts, states as the host cuts them,
    the prompts' own templates)."""
    from diffusers import HunyuanImagePipeline, Kandinsky5T2IPipeline, LongCatImagePipeline
    from transformers import AutoTokenizer

    folder = language_models("qwen_image")
    model, tokenizer = reference(folder), AutoTokenizer.from_pretrained(folder / "tokenizer")
    cpu, f32, made = torch.device("cpu"), torch.float32, {}
    refiner = ("<|start_header_id|>system<|end_header_id|>\n\nDescribe the image by detailing the color, shape, size, texture, "
               "quantity, text, spatial relationships of the objects and background:<|eot_id|><|start_header_id|>user"
               "<|end_header_id|>\n\n{}<|eot_id|>")  # pipeline_hunyuanimage_refiner.py
    for family, prompts, more in (("hunyuan_image", (*PROMPTS, GLYPHS), {}), (
            "hunyuan_refiner", PROMPTS[:1], {"template": refiner, "drop_idx": 36})):
        states, masks = HunyuanImagePipeline._get_qwen_prompt_embeds(None, tokenizer, model, list(prompts), cpu, f32, 150, **more)
        made[family] = [(more.get("template", "{}").format(prompt), one[mask.bool()])
                        for prompt, one, mask in zip(prompts, states, masks, strict=True)]
    for family in ("kandinsky5", "kandinsky5_image"):
        template = kandinsky_template(family)
        pipeline = SimpleNamespace(
            prompt_template=template, text_encoder=model, tokenizer=lambda images=None, videos=None, **kwargs: tokenizer(**kwargs),
            prompt_template_encode_start_idx=len(tokenizer(template.split("{}")[0])["input_ids"]))
        made[family] = [(prompt, Kandinsky5T2IPipeline._encode_prompt_qwen(pipeline, [prompt], cpu, dtype=f32)[0][0])
                        for prompt in PROMPTS]
    pipeline = SimpleNamespace(tokenizer=tokenizer, text_encoder=model, device=cpu, tokenizer_max_length=512,
                               prompt_template_encode_prefix=longcat().T2I_PREFIX, prompt_template_encode_suffix=longcat().SUFFIX)
    made["longcat"] = [(prompt, LongCatImagePipeline._encode_prompt(pipeline, [prompt])[0])
                       for prompt in ("a 'red' cat's hat, \"Open 24h\"", PROMPTS[2])]
    return made


def kandinsky_template(family: str) -> str:
    """The host's, which differs from diffusers' by a letter."""
    import comfy.text_encoders.kandinsky5 as kandinsky5

    kind = kandinsky5.Kandinsky5TokenizerImage if "image" in family else kandinsky5.Kandinsky5Tokenizer
    return kind().llama_template


def longcat() -> Any:
    import comfy.text_encoders.longcat_image

    return comfy.text_encoders.longcat_image.LongCatImageTokenizer


@pytest.mark.parametrize("family", llm.OF_QWEN25)
def test_of_qwen25(family, of_qwen25, language_models, tmp_path):
    folder = llm.of_qwen25(family, language_models("qwen_image"), tmp_path / "base")
    clip = load(folder)
    for prompt, expected in of_qwen25[family]:
        out, rest = encode(clip, prompt)
        assert out[0].shape == expected.shape and rel_l2(out[0], expected) < FORWARD, prompt
        if family == "hunyuan_image":
            assert ("conditioning_byt5small" in rest) == ('"' in prompt)
    if family == "hunyuan_image":
        assert_glyphs(folder, rest, 'Text "Open 24h". Text "開". ')
    elif family.startswith("kandinsky"):
        from transformers import AutoTokenizer, CLIPTextModel

        _, rest = encode(clip, PROMPTS[0])  # for CLIP, round brackets are weights
        words = AutoTokenizer.from_pretrained(folder / "tokenizer_2")(PROMPTS[0], padding="max_length", max_length=77,
                                                                       truncation=True, return_tensors="pt")
        with torch.inference_mode():
            pooled = CLIPTextModel.from_pretrained(folder / "text_encoder_2").float()(**words).pooler_output
        assert rel_l2(rest["pooled_output"], pooled) < FORWARD


def assert_glyphs(folder: Path, rest: dict[str, Any], text: str) -> None:
    """What diffusers makes of the glyphs' text, without its padding."""
    from diffusers import HunyuanImagePipeline
    from transformers import ByT5Tokenizer, T5EncoderModel

    words = ByT5Tokenizer.from_pretrained(folder / "tokenizer_2")
    model = T5EncoderModel.from_pretrained(folder / "text_encoder_2").float()
    states, mask = HunyuanImagePipeline._get_byt5_prompt_embeds(None, words, model, text, "cpu", torch.float32)
    expected = states[mask.bool()]
    assert rest["conditioning_byt5small"][0].shape == expected.shape
    assert rel_l2(rest["conditioning_byt5small"][0], expected) < FORWARD


def test_hunyuan_video_15(tmp_path):
    """The language model without eyes, and byT5. The host's system prompt is diffusers' with other white space."""
    import comfy.text_encoders.hunyuan_video
    from diffusers import HunyuanVideo15Pipeline
    from transformers import AutoTokenizer, Qwen2_5_VLTextModel

    folder = llm.hunyuan_video_15(tmp_path / "base")
    model = Qwen2_5_VLTextModel.from_pretrained(folder / "text_encoder").float().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    template = comfy.text_encoders.hunyuan_video.HunyuanVideo15Tokenizer().llama_template
    system = template.split("<|im_end|>")[0].removeprefix("<|im_start|>system\n")
    loaded = text_encoder.load(text_encoder.Request(str(folder), dtype="fp32"))
    assert "sees no pictures" not in loaded.report and "Qwen2_5_VLTextModel" in loaded.report
    for prompt in (*PROMPTS, GLYPHS):
        with torch.inference_mode():
            states, mask = HunyuanVideo15Pipeline._get_mllm_prompt_embeds(
                model, tokenizer, prompt, torch.device("cpu"), 200, system_message=system, crop_start=0)
        expected = states[mask.bool()]
        out, rest = encode(loaded.clip, prompt)
        assert rel_l2(out[0], expected[-out.shape[1]:]) < FORWARD
    assert len(expected) - out.shape[1] == len(tokenizer(template.split("{}")[0])["input_ids"])
    assert_glyphs(folder, rest, 'Text "Open 24h". Text "開". ')
