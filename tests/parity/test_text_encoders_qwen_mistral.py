"""FLUX.2's, Qwen-Image's and Z-Image's text encoders against transformers and diffusers' own pipelines.

ComfyUI and transformers both compute in fp32 on the stored BF16 weights, on this CPU.
"""

from __future__ import annotations

import gc
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantized_transformers.loaders.components import text_encoder
from quantized_transformers.loaders.components.text_encoders import mistral3, qwen3, qwen25_vl, qwen_tokenizer
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.files.source import Source
from support import text_encoders_llm as llm
from support.common import rel_l2

# fp32 rounding (6e-8) over some hundred sums a layer; measured 2e-7 .. 9e-7
FORWARD = 1e-5
PROMPTS = ("a photo of a cat, sitting on a mat", "", "Ünïcode — 猫が座る 🐈‍⬛ 1234567,  two spaces\n\ttab (it's \"quoted\")")
STRINGS = (*PROMPTS, " leading", "trailing \n\n", "\r\n\r\nDon't I'LL we'Ve", "CamelCaseWord HTTPServer", "½ ³ 𝟘 ١٢٣ 2024/05/06",
           "한국어 русский العربية עברית", "é é ﬁ", "👩‍👩‍👧 🇩🇪", "a\u00a0b\u2003c\u200bd", "\x00\x1f\x7f\ufffd",
           "<s>[INST] not control [/INST]</s> <unk> [SYSTEM_PROMPT]", "<|im_start|>user\nx<|im_end|>", "x" * 300)


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


def load(folder: Path) -> Any:
    return text_encoder.load(text_encoder.Request(str(folder))).clip


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


def ids(tokens: dict[str, Any]) -> list[int]:
    batch, = next(iter(tokens.values()))
    return [token[0] for token in batch]


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


def test_qwen_image_and_edit(base):
    """One encoder for both: text alone, then two pictures (40 and 16 patches, the first in two windows)."""
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


# The published sizes in the form of transformers 4, put together by hand (no Hub here); Mistral's tower is cut short.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mistral3": {
        "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3",
        "text_config": {"head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 32768,
                        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
                        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None,
                        "vocab_size": 131072},
        "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 2, "head_dim": 64,
                          "num_attention_heads": 16, "intermediate_size": 4096, "patch_size": 14}},
    "qwen25_vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "hidden_act": "silu", "hidden_size": 3584,
        "image_token_id": 151655, "intermediate_size": 18944, "max_window_layers": 28, "model_type": "qwen2_5_vl",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}, "rope_theta": 1e6,
        "sliding_window": 32768, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064,
        "vision_config": {**llm.VISION, "out_hidden_size": 3584, "in_chans": 3, "spatial_patch_size": 14,
                          "tokens_per_second": 2, "model_type": "qwen2_5_vl"}},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2560, "intermediate_size": 9728, "max_window_layers": 36, "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936}}
MODULES = {"mistral3": mistral3, "qwen25_vl": qwen25_vl, "qwen3": qwen3}
HOSTS = {"mistral3": "Mistral3Small24B", "qwen25_vl": "Qwen25_7BVLI", "qwen3": "Qwen3_4B"}
LEAVES = {"mistral3": ("model.language_model.", "language_model.model."), "qwen25_vl": ("model.language_model.", "model."),
          "qwen3": ("model.", "")}


def changed(name: str, **values: Any) -> dict[str, Any]:
    """A published config.json with other values in its language model's part; vision={...} in its vision_config."""
    config = json.loads(json.dumps(PUBLISHED[name]))
    config.get("vision_config", {}).update(values.pop("vision", {}))
    (config.get("text_config") or config).update(values)
    return config


def in_memory(name: str) -> dict[str, torch.Tensor]:
    """The published model as transformers 5 names it, without memory."""
    import transformers

    config = json.loads(json.dumps(PUBLISHED[name]))
    made = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        tensors = getattr(transformers, config["architectures"][0])(made).state_dict()
    new, old = LEAVES[name]
    if any(key.startswith(new) for key in tensors):
        return dict(tensors)
    # before 4.52 the names in memory were those in files
    return {new + key.removeprefix(old) if key.startswith(old) else
            key.removeprefix("language_model.") if key.endswith("lm_head.weight") else f"model.{key}": value
            for key, value in tensors.items()}


@pytest.mark.parametrize("name", MODULES)
def test_published_sizes_and_names(name):
    """transformers' published model -> exactly the host's, from the names in memory (5) and in files (4)."""
    import comfy.ops
    import comfy.text_encoders.llama

    config, tensors = PUBLISHED[name], in_memory(name)
    assert MODULES[name].host_config(config) == {}
    host = getattr(comfy.text_encoders.llama, HOSTS[name])({}, torch.bfloat16, "meta", comfy.ops.manual_cast)
    expected = {key: value.shape for key, value in host.state_dict().items()}
    new, old = LEAVES[name]
    files = {key.replace(new, old, 1) if key.startswith(new) else key.removeprefix("model."): value
             for key, value in tensors.items()}
    assert files.keys() != tensors.keys()
    if name == "mistral3":
        files["language_model.lm_head.weight"] = files.pop("lm_head.weight")
    for stored in (tensors, files):
        out = MODULES[name].convert(stored, config)
        assert {key: value.shape for key, value in out.items()} == expected
        assert all(any(value is given for given in stored.values()) for value in list(out.values())[::50])


@pytest.mark.parametrize("name", MODULES)
def test_damaged_tensors_are_refused(name):
    config, tensors = PUBLISHED[name], in_memory(name)
    convert = MODULES[name].convert
    norm = next(key for key in tensors if key.endswith("layers.1.post_attention_layernorm.weight"))
    with pytest.raises(CheckpointError, match="missing: model.layers.1.post_attention_layernorm.weight"):
        convert({key: value for key, value in tensors.items() if key != norm}, config)
    with pytest.raises(CheckpointError, match="no place .*: model.layers.1.mlp.extra"):
        convert({**tensors, norm.replace("post_attention_layernorm.weight", "mlp.extra"): tensors[norm]}, config)
    with pytest.raises(CheckpointError, match="no place .*: model.layers.36.norm|no place .*: model.layers.40.norm"):
        last = "40" if name == "mistral3" else "36"
        convert({**tensors, norm.replace("layers.1.post_attention_layernorm", f"layers.{last}.norm"): tensors[norm]}, config)
    with pytest.raises(CheckpointError, match="other shapes than config.json says: model.layers.1.post"):
        convert({**tensors, norm: torch.empty(7, device="meta")}, config)
    with pytest.raises(CheckpointError, match="twice"):
        alias = norm.replace("model.language_model.", "language_model." if name == "qwen25_vl" else "model.")
        alias = norm.removeprefix("model.") if name == "qwen3" else alias
        convert({**tensors, alias: tensors[norm]}, config)
    with pytest.raises(CheckpointError, match="other shapes"):
        convert(tensors, changed(name, intermediate_size=4096))


@pytest.mark.parametrize(("name", "values"), [
    ("mistral3", {"hidden_size": 4096}), ("mistral3", {"head_dim": 160}), ("mistral3", {"hidden_act": "gelu"}),
    ("mistral3", {"sliding_window": 4096}), ("mistral3", {"num_hidden_layers": 29}), ("mistral3", {"rope_theta": None}),
    ("mistral3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e9, "factor": 16.0}}),
    ("mistral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),  # beside rope_theta 1e9
    ("qwen3", {"hidden_size": 2048}), ("qwen3", {"attention_bias": True}), ("qwen3", {"use_sliding_window": True}),
    ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}), ("qwen3", {"partial_rotary_factor": 0.5}),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}), ("qwen3", {"num_hidden_layers": 2}),
    ("qwen3", {"head_dim": 64}),
    ("qwen25_vl", {"num_key_value_heads": 2}), ("qwen25_vl", {"num_attention_heads": 14}),
    ("qwen25_vl", {"rope_scaling": {"type": "mrope", "mrope_section": [24, 20, 20]}}), ("qwen25_vl", {"rope_scaling": None}),
    ("qwen25_vl", {"vision": {"depth": 16}}), ("qwen25_vl", {"vision": {"window_size": 56}}),
    ("qwen25_vl", {"vision": {"fullatt_block_indexes": [7]}}), ("qwen25_vl", {"vision": {"out_hidden_size": 2048}}),
    ("qwen25_vl", {"vision": {"hidden_act": "gelu"}}), ("qwen25_vl", {"image_token_id": 7}),
    ("qwen25_vl", {"vision": {"rope_parameters": {"rope_theta": 500.0, "rope_type": "axial"}}})])
def test_what_the_host_fixes_is_refused(name, values):
    with pytest.raises(CheckpointError):
        MODULES[name].host_config(changed(name, **values))


@pytest.mark.parametrize("name", MODULES)
def test_what_the_host_can_be_told_is_passed_on(name):
    values = {"rope_theta": 12345.0, "rms_norm_eps": 1e-3, "vocab_size": 1000, "intermediate_size": 64}
    assert MODULES[name].host_config(changed(name, **values)) == values
    rope = {"rope_parameters": {"rope_theta": 12345.0, "rope_type": "default", "mrope_section": [16, 24, 24]}}
    assert MODULES[name].host_config(changed(name, rope_theta=None, rope_scaling=None, **rope)) == {"rope_theta": 12345.0}
    expected = {"num_hidden_layers": 30} | ({"final_norm": True} if name == "mistral3" else {})
    assert MODULES[name].host_config(changed(name, num_hidden_layers=30)) == expected


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


def host_tokenizer(folder: Path) -> Any:
    import comfy.text_encoders.flux

    tensors = mistral3.tokenizer(Source(str(folder), str(folder), ()))
    theirs = comfy.text_encoders.flux.load_mistral_tokenizer
    with mistral3.MISTRAL3.during():
        made = comfy.text_encoders.flux.Mistral3Tokenizer(tokenizer_data=tensors)
    assert comfy.text_encoders.flux.load_mistral_tokenizer is theirs  # nothing of the host stays changed
    return made


# the second is the pattern that transformers 4 gave every Mistral tokenizer, whatever its file said
@pytest.mark.parametrize("pattern", [
    llm.MISTRAL_PATTERN, r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                         r"\s*[\r\n]+|\s+(?!\S)|\s+"])
def test_mistral_token_ids(tmp_path, pattern):
    """From tokenizer.json and from tekken.json alone: transformers' token ids. Pieces are learned of the strings."""
    from transformers import AutoTokenizer

    content = llm.tekken("".join(STRINGS) * 3, pattern)
    llm.save_mistral_processor(tmp_path / "hf", content)
    (tmp_path / "tekken").mkdir()
    (tmp_path / "tekken" / "tekken.json").write_text(json.dumps(content), encoding="utf-8")
    written = json.loads((tmp_path / "hf" / "tokenizer.json").read_text(encoding="utf-8"))
    assert mistral3.from_tekken(content)["model"]["merges"] == written["model"]["merges"]  # their order, too
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(theirs("".join(STRINGS))["input_ids"]) < 0.7 * len("".join(STRINGS).encode())  # merges do apply
    for ours in (host_tokenizer(tmp_path / "hf"), host_tokenizer(tmp_path / "tekken")):
        for text in STRINGS:
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert ids({"": ours.tokenize_with_weights(text)}) == [1, *expected], text


@pytest.mark.parametrize("change", [
    lambda c: c["model"]["vocab"].pop("Ġt"), lambda c: c["added_tokens"].pop(17),
    lambda c: c["model"].update(type="Unigram"), lambda c: c.pop("model"),
    lambda c: c["added_tokens"][1].update(content="<bos>")])
def test_other_mistral_tokenizers_are_refused(tmp_path, change):
    llm.save_mistral_processor(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError):
        host_tokenizer(tmp_path)


def test_a_tekken_file_without_ours_is_left_to_the_host(tmp_path):
    """The hook must not touch what stock loaders read."""
    assert mistral3.read(llm.tekken()) is None


@pytest.mark.parametrize("change", [
    lambda c: c["model"]["vocab"].update({"Ġthe": 17}), lambda c: c["model"]["merges"].insert(0, ["a", "b"]),
    lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+")])
def test_other_qwen_tokenizers_are_refused(qwen_folder, tmp_path, change):
    content = json.loads((qwen_folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match="tokenizer"):
        qwen3.QWEN3.tokenizer(Source("", str(tmp_path), ()))


@pytest.mark.parametrize("change", [
    lambda c: c.update(normalizer=None), lambda c: c["added_tokens"][3].update(lstrip=True),
    lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
    lambda c: c["pre_tokenizer"]["pretokenizers"].pop(0)])
def test_other_ways_to_split_words_are_refused(qwen_rest, change):
    assert qwen_tokenizer.splits_alike(qwen_rest)
    change(qwen_rest)
    assert not qwen_tokenizer.splits_alike(qwen_rest)


@pytest.fixture
def qwen_rest(qwen_folder):
    """transformers' tokenizer.json without its vocabulary."""
    return {**json.loads((qwen_folder / "tokenizer.json").read_text(encoding="utf-8")), "model": {}}


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    llm.qwen_tokenizer().save_pretrained(folder)
    return folder


def test_qwen_tokenizer_as_transformers_4_saved_it(tmp_path):
    """vocab.json, merges.txt and tokenizer_config.json, with the 22 added tokens of Qwen-Image's own."""
    import shutil

    import comfy.sd1_clip

    bundled = Path(inspect.getfile(comfy.sd1_clip)).parent / "text_encoders" / "qwen25_tokenizer"
    shutil.copytree(bundled, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    for number in range(151665, 151669):
        config["added_tokens_decoder"].pop(str(number))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert qwen25_vl.QWEN25_VL.tokenizer(Source("", str(tmp_path), ())) == {}
    (tmp_path / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        qwen25_vl.QWEN25_VL.tokenizer(Source("", str(tmp_path), ()))
