"""Small language-model text encoders, saved by transformers: FLUX.2's Mistral 3, Qwen-Image's Qwen2.5-VL, Z-Image's Qwen3.

Each is as small as the host lets it be. Where its code fixes a size (Mistral's and Qwen3's width, Qwen's vocabulary, all
of Qwen2.5-VL's vision tower) that size is real and most rows are zero, which a file system with holes does not store.
"""

from __future__ import annotations

import base64
import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Width of the conditioning that each gives (joint_attention_dim or cap_feat_dim of its transformer).
WIDTHS = {"flux2": 3 * 5120, "qwen_image": 512, "qwen_image_edit": 512, "z_image": 2560, "flux2_klein": 3 * 2560}
PIPELINES = {"flux2": "Flux2Pipeline", "qwen_image": "QwenImagePipeline", "z_image": "ZImagePipeline",
             "qwen_image_edit": "QwenImageEditPlusPipeline", "flux2_klein": "Flux2KleinPipeline"}
# Those that have Qwen-Image's encoder, alone or beside another
OF_QWEN25 = {"hunyuan_image": "HunyuanImagePipeline", "hunyuan_refiner": "HunyuanImageRefinerPipeline",
             "kandinsky5": "Kandinsky5T2VPipeline", "kandinsky5_image": "Kandinsky5T2IPipeline",
             "longcat": "LongCatImagePipeline"}
PIPELINES |= {**OF_QWEN25, "hunyuan_video_15": "HunyuanVideo15Pipeline", "krea2": "Krea2Pipeline",
              "ideogram4": "Ideogram4Pipeline", "joyimage": "JoyImageEditPipeline", "ovis": "OvisImagePipeline",
              "ernie": "ErnieImagePipeline", "ltx2": "LTX2Pipeline"}

HEAD = 128  # the host's head size
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 512,
          "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
CHAT_QWEN3 = ("{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' "
              "+ '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
              "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
              "{%- endif %}{%- endif %}")
CHAT_QWEN3_VL = ("{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.content is string %}"
                 "{{- message.content }}{%- else %}{%- for part in message.content %}{{- part.text }}{%- endfor %}{%- endif %}"
                 "{{- '<|im_end|>' + '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
                 "{%- endif %}")
PROMPTS = ("a photo of a cat, sitting on a mat", "", "Ünïcode — 猫が座る 🐈‍⬛ 1234567,  two spaces\n\ttab (it's \"quoted\")")
STRINGS = (*PROMPTS, " leading", "trailing \n\n", "\r\n\r\nDon't I'LL we'Ve", "CamelCaseWord HTTPServer", "½ ³ 𝟘 ١٢٣ 2024/05/06",
           "한국어 русский العربية עברית", "é é ﬁ", "👩‍👩‍👧 🇩🇪", "a\u00a0b\u2003c\u200bd", "\x00\x1f\x7f\ufffd",
           "<s>[INST] not control [/INST]</s> <unk> [SYSTEM_PROMPT]", "<|im_start|>user\nx<|im_end|>", "x" * 300)
CHAT_MISTRAL = ("{{- bos_token }}{%- for message in messages %}{%- if message.role == 'system' %}"
                "{{- '[SYSTEM_PROMPT]' }}{%- else %}{{- '[INST]' }}{%- endif %}{%- for part in message.content %}"
                "{{- part.text }}{%- endfor %}{%- if message.role == 'system' %}{{- '[/SYSTEM_PROMPT]' }}{%- else %}"
                "{{- '[/INST]' }}{%- endif %}{%- endfor %}")
# As in Mistral Small 3's tekken.json
MISTRAL_SPECIALS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
                    "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
MISTRAL_PATTERN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
                   r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
                   r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def save(family: str, folder: Path) -> dict[str, list[str]]:
    """Write text_encoder/, tokenizer/ (and processor/) of `family` into `folder`; returns their model_index.json entries.

    `family` is one of WIDTHS. Weights are BF16, the same in every run.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    entries = {"flux2": _flux2, "qwen_image": _qwen_image, "qwen_image_edit": _qwen_image_edit,
               "z_image": _z_image, "flux2_klein": _flux2_klein}[family](folder)
    torch.random.set_rng_state(state)
    return entries


def _flux2(folder: Path) -> dict[str, list[str]]:
    from transformers import Mistral3Config

    tokenizer = save_mistral_processor(folder / "tokenizer")
    # 31 layers: hidden state 30 is the last one that FLUX.2 reads, and with one more it is not the normed end
    text = {"model_type": "mistral", "hidden_size": 5120, "intermediate_size": 16, "num_hidden_layers": 31,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": HEAD, "vocab_size": tokenizer,
            "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None, "tie_word_embeddings": True}
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 1, "head_dim": 32, "patch_size": 14, "image_size": 56}
    write("Mistral3ForConditionalGeneration", Mistral3Config(text_config=text, vision_config=vision),
          folder / "text_encoder")
    return {"text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
            "tokenizer": ["transformers", "PixtralProcessor"]}


# 4 layers: HunyuanImage reads the third state from the end
QWEN25 = {"hidden_size": WIDTHS["qwen_image"], "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 4, "vocab_size": 151680, "rms_norm_eps": 1e-6}


def of_qwen25(family: str, qwen: Path, folder: Path) -> Path:
    """A base of OF_QWEN25 with the encoder and tokenizer of the Qwen-Image folder `qwen`."""
    folder.mkdir()
    entries = {"text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
               "tokenizer": ["transformers", "Qwen2Tokenizer"]}
    for name in entries:
        (folder / name).symlink_to(qwen / name)
    if family == "hunyuan_image":
        entries |= byt5(folder)
    elif family.startswith("kandinsky"):
        from support import text_encoders

        text_encoders.clip(WIDTHS["qwen_image"] // 8).save_pretrained(folder / "text_encoder_2")
        entries |= {"text_encoder_2": ["transformers", "CLIPTextModel"],
                    "tokenizer_2": ["transformers", text_encoders.tokenizer_clip(folder / "tokenizer_2")]}
    index = {"_class_name": OF_QWEN25[family], **entries}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def hunyuan_video_15(folder: Path) -> Path:
    """HunyuanVideo 1.5's base: the language model of Qwen2.5-VL alone, and byT5."""
    import transformers
    from transformers import Qwen2_5_VLConfig

    from support.transformers_versions import qwen25_vl_config, rope

    config = qwen25_vl_config({**QWEN25, **rope(1e6, mrope_section=[16, 24, 24])})
    kind = getattr(transformers, "Qwen2_5_VLTextModel", None)
    assert isinstance(config, Qwen2_5_VLConfig) and kind
    write(kind.__name__, config.text_config, folder / "text_encoder")
    qwen_tokenizer(CHAT_QWEN3).save_pretrained(folder / "tokenizer")
    entries = {"text_encoder": ["transformers", kind.__name__], "tokenizer": ["transformers", "Qwen2Tokenizer"], **byt5(folder)}
    index = {"_class_name": PIPELINES["hunyuan_video_15"], **entries}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def qwen3_vl(family: str, folder: Path, eyes: dict[str, Any] | None = None, **sizes: Any) -> Path:
    """A base of Krea-2, Ideogram 4 or JoyImage: a language model alone, or one with eyes of other sizes than the host's."""
    from transformers import Qwen3VLConfig, Qwen3VLTextConfig

    from support.transformers_versions import rope

    small = family == "krea2"
    text = {"hidden_size": 2560 if small else 256, "intermediate_size": 16 if small else 96, "num_attention_heads": 1,
            "num_hidden_layers": 3 if family == "joyimage" else 36, "num_key_value_heads": 1, "head_dim": HEAD,
            "vocab_size": 151680, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
            **rope(5e6, mrope_section=[24, 20, 20], mrope_interleaved=True), **sizes}
    if eyes is None:
        kind = "Qwen3VLTextModel"
        write(kind, Qwen3VLTextConfig(**text), folder / "text_encoder")
    else:
        kind = "Qwen3VLModel"
        write(kind, Qwen3VLConfig(text_config=text, vision_config={**eyes, "out_hidden_size": text["hidden_size"]}, image_token_id=151655,
                                  vision_start_token_id=151652, tie_word_embeddings=True), folder / "text_encoder")
    qwen_tokenizer(CHAT_QWEN3_VL).save_pretrained(folder / "tokenizer")
    index = {"_class_name": PIPELINES[family], "text_encoder": ["transformers", kind], "tokenizer": ["transformers", "Qwen2Tokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def ltx2(folder: Path, connectors: dict[str, torch.Tensor], **config: Any) -> Path:
    """LTX-2's base: Gemma 3 of 12B's width and depth, and what `connectors` has."""
    from transformers import Gemma3TextConfig

    from support import text_encoders

    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    write("Gemma3ForCausalLM", Gemma3TextConfig(
        vocab_size=320, hidden_size=3840, intermediate_size=16, num_hidden_layers=48, num_attention_heads=1,
        num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, sliding_window=1024, bos_token_id=2, eos_token_id=1,
        pad_token_id=0, rope_parameters=rope), folder / "text_encoder")
    kind = text_encoders.tokenizer_gemma(folder / "tokenizer")
    (folder / "connectors").mkdir()
    settings = {"_class_name": "LTX2TextConnectors", "caption_channels": 3840, "text_proj_in_factor": 49, **config}
    (folder / "connectors" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_with_holes(connectors, str(folder / "connectors" / "diffusion_pytorch_model.safetensors"))
    index = {"_class_name": PIPELINES["ltx2"], "text_encoder": ["transformers", "Gemma3ForCausalLM"],
             "tokenizer": ["transformers", kind], "connectors": ["ltx2", "LTX2TextConnectors"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def ernie(folder: Path) -> Path:
    """ERNIE-Image's base: Mistral3Model of Ministral 3's width."""
    from transformers import Mistral3Config

    from support.transformers_versions import rope

    tokenizer = save_mistral_tokenizer(folder / "tokenizer")
    # transformers' Ministral 3 is Mistral with YaRN, and queries that are larger behind 16384 tokens
    text = {"model_type": "mistral", "hidden_size": 3072, "intermediate_size": 16,
            "num_hidden_layers": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": HEAD, "vocab_size": tokenizer,
            "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": True, **rope(1e6)}
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 1, "head_dim": 32, "patch_size": 14, "image_size": 56}
    write("Mistral3Model", Mistral3Config(text_config=text, vision_config=vision), folder / "text_encoder")
    index = {"_class_name": PIPELINES["ernie"], "text_encoder": ["transformers", "Mistral3Model"],
             "tokenizer": ["transformers", "PreTrainedTokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def save_mistral_tokenizer(folder: Path) -> int:
    """A Mistral tokenizer alone, tokenizer.json. Returns the size of the vocabulary."""
    tokenizer = mistral_tokenizer(tekken(), folder)
    (folder / "tekken.json").unlink()
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def ovis(folder: Path) -> Path:
    """Ovis-Image's base: Qwen3Model of 2B's width."""
    from transformers import Qwen3Config

    write("Qwen3Model", Qwen3Config(hidden_size=2048, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                                    num_key_value_heads=1, head_dim=HEAD, vocab_size=151680, rms_norm_eps=1e-6, rope_theta=1e6),
          folder / "text_encoder")
    qwen_tokenizer(CHAT_QWEN3).save_pretrained(folder / "tokenizer")
    index = {"_class_name": PIPELINES["ovis"], "text_encoder": ["transformers", "Qwen3Model"], "tokenizer": [
        "transformers", "Qwen2TokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def byt5(folder: Path) -> dict[str, list[str]]:
    """byT5 as text_encoder_2, of its real heads and vocabulary and narrow, with some of Glyph's tokens."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    from support import text_encoders

    text_encoders.seeded(T5EncoderModel, T5Config(
        vocab_size=1510, d_model=64, d_ff=96, d_kv=64, num_heads=6, num_layers=3, **text_encoders.T5_KIND)).save_pretrained(
            folder / "text_encoder_2")
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["<color-0>", "<color-1>", "<en-font-0>"], special_tokens=True)
    tokenizer.save_pretrained(folder / "tokenizer_2")
    return {"text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer_2": ["transformers", "ByT5Tokenizer"]}


def _qwen_image(folder: Path) -> dict[str, list[str]]:
    from transformers import Qwen2_5_VLConfig

    text = {**QWEN25, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    write("Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLConfig(
        **text, vision_config=VISION, tie_word_embeddings=True, image_token_id=151655, video_token_id=151656,
        vision_start_token_id=151652), folder / "text_encoder")
    qwen_tokenizer().save_pretrained(folder / "tokenizer")
    return {"text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"]}


def _qwen_image_edit(folder: Path) -> dict[str, list[str]]:
    import transformers

    entries = _qwen_image(folder)
    limits = {"min_pixels": 3136, "max_pixels": 12845056}
    # before 4.52 the images' one takes videos, too
    video = getattr(transformers, "Qwen2VLVideoProcessor", None)
    transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**limits), qwen_tokenizer(), chat_template=CHAT_QWEN3,
        **{"video_processor": video(**limits)} if video else {}).save_pretrained(folder / "processor")
    return entries | {"processor": ["transformers", "Qwen2VLProcessor"]}


def _z_image(folder: Path) -> dict[str, list[str]]:
    from transformers import Qwen3Config

    config = Qwen3Config(hidden_size=2560, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=HEAD, vocab_size=151680, rms_norm_eps=1e-6, rope_theta=1e6,
                         tie_word_embeddings=True)
    write("Qwen3ForCausalLM", config, folder / "text_encoder")
    qwen_tokenizer(CHAT_QWEN3).save_pretrained(folder / "tokenizer")
    return {"text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2Tokenizer"]}


def klein(width: int, folder: Path, **sizes: Any) -> None:
    """FLUX.2 klein's text encoder. 28 layers: hidden state 27 is the last one read, and is not the normed end."""
    from transformers import Qwen3Config

    write("Qwen3ForCausalLM", Qwen3Config(**{
        "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 28, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": HEAD, "vocab_size": 151680, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True, **sizes}), folder / "text_encoder")


def _flux2_klein(folder: Path) -> dict[str, list[str]]:
    klein(2560, folder)
    qwen_tokenizer(CHAT_QWEN3).save_pretrained(folder / "tokenizer")
    return {"text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2TokenizerFast"]}


@cache
def qwen_tokenizer(chat_template: str | None = None) -> Any:
    """transformers' tokenizer from the vocabulary that ComfyUI bundles: that of Qwen2.5 and Qwen3."""
    import comfy.sd1_clip
    from transformers import Qwen2TokenizerFast

    tokenizer = Qwen2TokenizerFast.from_pretrained(
        Path(inspect.getfile(comfy.sd1_clip)).parent / "text_encoders" / "qwen25_tokenizer")
    if chat_template:
        tokenizer.chat_template = chat_template
    return tokenizer


def tekken(words: str = "", pattern: str = MISTRAL_PATTERN) -> dict[str, Any]:
    """A tekken.json: 1000 special tokens, all bytes, and pieces that a BPE learns from the licence's text and `words`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    teacher = Tokenizer(models.BPE())
    teacher.pre_tokenizer = pre_tokenizers.Sequence([  # type: ignore[assignment]
        pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8") + words
    teacher.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    learned = [bytes(to_byte[c] for c in piece)
               for piece, _ in sorted(teacher.get_vocab().items(), key=lambda item: item[1])]
    pieces = [bytes([byte]) for byte in range(256)] + [piece for piece in learned if len(piece) > 1]
    specials = MISTRAL_SPECIALS + [f"<SPECIAL_{i}>" for i in range(len(MISTRAL_SPECIALS), 1000)]
    return {"config": {"pattern": pattern, "num_vocab_tokens": len(pieces), "default_vocab_size": 1000 + len(pieces),
                       "default_num_special_tokens": 1000, "version": "v7"},
            "vocab": [{"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
                      for rank, piece in enumerate(pieces)],
            "special_tokens": [{"rank": rank, "token_str": token, "is_control": True}
                               for rank, token in enumerate(specials)]}


def mistral_tokenizer(content: dict[str, Any], folder: Path) -> Any:
    """transformers' own conversion of a tekken.json, written to `folder`/tekken.json on the way."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.mistral import MistralConverter

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tekken.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    if "vocab" in inspect.signature(MistralConverter).parameters:  # transformers 4 leaves reading to mistral_common
        specials = [token["token_str"] for token in content["special_tokens"]]
        names = [*specials, *(base64.b64decode(piece["token_bytes"]) for piece in content["vocab"])]
        converter = MistralConverter({name: rank for rank, name in enumerate(names)}, content["config"]["pattern"],
                                     additional_special_tokens=specials)
    else:
        converter = MistralConverter(str(file))
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", padding_side="left", chat_template=CHAT_MISTRAL, clean_up_tokenization_spaces=False)


def save_mistral_processor(folder: Path, content: dict[str, Any] | None = None) -> int:
    """FLUX.2's tokenizer/: transformers' PixtralProcessor, without tekken.json. Returns the size of the vocabulary."""
    from transformers import PixtralImageProcessor, PixtralProcessor

    tokenizer = mistral_tokenizer(content or tekken(), folder)
    (folder / "tekken.json").unlink()
    PixtralProcessor(PixtralImageProcessor(patch_size=14), tokenizer, patch_size=14, spatial_merge_size=2,
                     chat_template=CHAT_MISTRAL).save_pretrained(folder)
    return len(tokenizer)


def write(class_name: str, config: Any, folder: Path) -> None:
    """A model of these sizes with random BF16 weights, saved by transformers but for the bytes: see save_with_holes."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, class_name)(config)
    for name, parameter in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(_weight(name, parameter.shape), False))
    model.tie_weights()
    written, transformers.modeling_utils.safe_save_file = transformers.modeling_utils.safe_save_file, save_with_holes
    try:
        model.save_pretrained(folder, max_shard_size="20GB")
    finally:
        transformers.modeling_utils.safe_save_file = written


def save_with_holes(tensors: dict[str, torch.Tensor], path: str, metadata: dict[str, str] | None = None) -> None:
    """safetensors' save_file for BF16, less the pages of zeros: the file has all its length but not its size on disk."""
    header: dict[str, Any] = {"__metadata__": metadata or {}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        assert tensor.dtype == torch.bfloat16
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        for name, tensor in tensors.items():
            data = tensor.detach().contiguous().view(-1).view(torch.int16).numpy()
            page = 8192
            for at in range(0, len(data), page):
                part = data[at:at + page]
                if part.any():
                    file.seek(begin + header[name]["data_offsets"][0] + 2 * at)
                    file.write(part.tobytes())
        file.truncate(begin + end)


def _weight(name: str, shape: torch.Size) -> torch.Tensor:
    """Unit gain; norms around one; embeddings of a part of the words, and a sixteenth of the rows of the large ones."""
    # numpy's zeros take no memory until they are written
    out = torch.from_numpy(np.zeros(shape.numel(), np.uint16)).view(torch.bfloat16).view(shape)
    rows = torch.arange(shape[0])
    if "embed_tokens" in name and shape[0] > 100_000:
        chosen = (rows < 4096) | (rows >= 151640) | (rows // 64 % 16 == 0)
    elif "multi_modal_projector" in name or "visual" in name and len(shape) == 2 and shape[0] >= 1280:
        chosen = rows // 16 % 16 == 0
    elif shape[1:] == (5120,) and shape[0] == HEAD:  # Mistral's q, k and v
        chosen = rows // 16 % 2 == 0
    else:
        chosen = rows >= 0
    fan_in = shape[1:].numel()
    gain = 0.1 if len(shape) == 1 else 1 if "embed" in name else fan_in ** -0.5
    values = torch.randn(int(chosen.sum()), *shape[1:]) * gain
    if len(shape) == 1 and name.endswith("weight"):  # norms; the host adds Gemma's 1 in BF16, which has these and one more
        values = 1 + (values * 64).round() / 64
    out[chosen] = values.to(torch.bfloat16)
    return out


def ids(tokens: dict[str, Any]) -> list[int]:
    """The token ids that a host's tokenizer gave for one text."""
    batch, = next(iter(tokens.values()))
    return [token[0] for token in batch]
