"""Forwards of FLUX.2's, Qwen-Image's and Z-Image's text encoders against transformers and diffusers' own pipelines.

ComfyUI and transformers both compute in fp32 on the stored BF16 weights, on this CPU.
"""

from __future__ import annotations

import gc
import inspect
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quantized_transformers.loaders.components import text_encoder
from quantized_transformers.loaders.components.text_encoders import mistral3, qwen3, qwen3_vl, qwen25_vl
from quantized_transformers.loaders.errors import CheckpointError
from support import text_encoders_llm as llm
from support import text_gguf, transformers_versions
from support.common import rel_l2
from support.text_checks import encode
from support.text_encoders_llm import PROMPTS, STRINGS, ids

pytestmark = [pytest.mark.parity, pytest.mark.full]

# fp32 rounding (6e-8) over some hundred sums a layer; measured 2e-7 .. 9e-7
FORWARD = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """family -> its folder, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            entries = llm.save(family, made[family])
            index = {"_class_name": llm.PIPELINES[family], **entries}
            (made[family] / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        return made[family]
    return make


@pytest.fixture(autouse=True)
def free():
    yield
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()


def load(folder: Path, *overrides: Path) -> Any:
    return text_encoder.load(text_encoder.Request(str(folder), overrides=tuple(map(str, overrides)))).clip


def reference(folder: Path) -> Any:
    """transformers' model, fp32; of a large one the BF16 tensors are made fp32 only while they are used."""
    import transformers

    name = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder / "text_encoder").eval()
    for parameter in model.parameters():  # transformers 4 makes them fp32
        parameter.data = parameter.data.bfloat16()
    model.requires_grad_(False)
    model.lm_head = torch.nn.Identity()  # nobody reads the logits
    if sum(p.numel() for p in model.parameters()) < 2e8:
        return model.float()
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    large = {id(p) for block in lists for p in block.parameters()} | {id(model.get_input_embeddings().weight)}
    for parameter in model.parameters():
        if id(parameter) not in large:
            parameter.data = parameter.data.float()
    for block in (block for blocks in lists for block in blocks):
        block.register_forward_pre_hook(to_fp32)
        block.register_forward_hook(back)
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.float())
    return model


def to_fp32(block: torch.nn.Module, _args: Any) -> None:
    for parameter in block.parameters():
        parameter.stored, parameter.data = parameter.data, parameter.data.float()


def back(block: torch.nn.Module, _args: Any, _out: Any) -> None:
    for parameter in block.parameters():
        parameter.data = parameter.stored


def places(_module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """What the processor says of each token, which diffusers 0.42 does not hand on. Without it transformers 5 numbers a
    picture's tokens as if they were text; transformers 4, with which the model was published, sees them by their ids."""
    return args, {**kwargs, "mm_token_type_ids": (kwargs["input_ids"] == qwen25_vl.IMAGE_TOKEN).int()}


def picture(width: int, height: int, seed: int) -> tuple[Any, torch.Tensor]:
    """The same picture for diffusers (PIL) and for the host (F32 [1, H, W, 3] in 0..1)."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels), torch.from_numpy(pixels)[None].float() / 255


def test_flux2(base, tmp_path):
    from diffusers import Flux2Pipeline
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from transformers import AutoProcessor

    folder = base("flux2")
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


def test_qwen_image_and_edit(base, tmp_path):
    """One encoder for both: text alone, then two pictures (40 and 16 patches, the first in two windows). Then the same from
    two GGUF files, language model and eyes, in the place of the base's."""
    from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
    from transformers import AutoTokenizer, Qwen2VLProcessor

    folder = base("qwen_image_edit")
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
def of_qwen25(base):
    """What the pipelines with Qwen2.5-VL make of prompts, by one model: family -> (prompts, states as the host cuts them,
    the prompts' own templates)."""
    from diffusers import HunyuanImagePipeline, Kandinsky5T2IPipeline, LongCatImagePipeline
    from transformers import AutoTokenizer

    folder = base("qwen_image")
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
def test_of_qwen25(family, of_qwen25, base, tmp_path):
    folder = llm.of_qwen25(family, base("qwen_image"), tmp_path / "base")
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


def fp32(kind: Any, folder: Path) -> Any:
    """Made in F32: one that was made BF16 keeps its angles, and Gemma's scale of embeddings, rounded."""
    return transformers_versions.loaded(kind, folder / "text_encoder", torch.float32).eval().requires_grad_(False)


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


def edit(folder: Path, **values: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


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


def test_z_image(base):
    from diffusers import ZImagePipeline
    from transformers import AutoTokenizer

    folder = base("z_image")
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


def test_flux2_klein(base):
    """4B, padded to 512 tokens as the pipeline pads them."""
    from diffusers import Flux2KleinPipeline
    from transformers import AutoTokenizer

    folder = base("flux2_klein")
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
