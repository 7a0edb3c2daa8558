"""Tiny text encoders and tokenizers as transformers saves them: CLIP, T5 in its kinds, Llama, Gemma."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from support.common import randomise
from support.pack import COMFYUI
from support.transformers_versions import rope

# Output widths; they are those of the tiny transformers in flux.py, wan.py and hunyuan_video.py.
FLUX_TEXT, FLUX_POOLED = 64, 32
WAN_TEXT = 4096
HUNYUAN_TEXT, HUNYUAN_POOLED = 64, 768
LUMINA_TEXT = 64
SDXL_TEXT, SDXL_POOLED = 2 * 48, 48
BUNDLED = COMFYUI / "comfy"
PIPELINES = {"flux1": "FluxPipeline", "wan": "WanPipeline", "hunyuan_video": "HunyuanVideoPipeline",
             "sdxl": "StableDiffusionXLPipeline", "lumina2": "Lumina2Pipeline", "sd15": "StableDiffusionPipeline",
             "sd3": "StableDiffusion3Pipeline", "hidream": "HiDreamImagePipeline", "chroma": "ChromaPipeline",
             "pixart": "PixArtSigmaPipeline", "ltx": "LTXPipeline", "mochi": "MochiPipeline",
             "cogvideox": "CogVideoXPipeline", "cosmos": "Cosmos2TextToImagePipeline", "aura_flow": "AuraFlowPipeline",
             "hunyuan_dit": "HunyuanDiTPipeline"}
T5_ALONE = ("chroma", "pixart", "ltx", "mochi", "cogvideox")
SD3_TEXT = 4096  # T5's width, by which the host pads CLIP's states
CLIP_VOCAB, CLIP_END = 49408, 49407
LLAMA_VOCAB = 128320
BERT_VOCAB, MT5_TEXT = 47020, 32


def clip(width: int, layers: int = 2) -> Any:
    """A CLIPTextModel of this width, BF16."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return seeded(CLIPTextModel, CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=width // 16,
        vocab_size=CLIP_VOCAB, bos_token_id=49406, eos_token_id=CLIP_END, projection_dim=width))


def clip_l_projected(identity: bool = True, **sizes: Any) -> Any:
    """A CLIPTextModelWithProjection, BF16, of CLIP-L's depth; SD3's projects by the identity, HiDream's does project."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    model = seeded(CLIPTextModelWithProjection, CLIPTextConfig(**{
        "hidden_size": SDXL_POOLED, "intermediate_size": 96, "num_hidden_layers": 12, "num_attention_heads": 3,
        "vocab_size": CLIP_VOCAB, "bos_token_id": 49406, "eos_token_id": CLIP_END, "projection_dim": SDXL_POOLED, **sizes}))
    if identity:
        model.text_projection.weight.data.copy_(torch.eye(SDXL_POOLED))
    return model


def clip_g(**sizes: Any) -> Any:
    """A CLIPTextModelWithProjection, BF16: as deep as published, by which the host knows it, and narrow."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return seeded(CLIPTextModelWithProjection, CLIPTextConfig(**{
        "hidden_size": SDXL_POOLED, "intermediate_size": 96, "num_hidden_layers": 32, "num_attention_heads": 3,
        "vocab_size": CLIP_VOCAB, "bos_token_id": 49406, "eos_token_id": CLIP_END, "hidden_act": "gelu",
        "projection_dim": SDXL_POOLED, **sizes}))


def t5(**sizes: int) -> Any:
    """A T5EncoderModel (v1.1), BF16."""
    from transformers import T5Config, T5EncoderModel

    return seeded(T5EncoderModel, T5Config(**{"vocab_size": 32128, **T5_SIZES, "d_model": FLUX_TEXT, **sizes}, **T5_KIND))


def t5_old(**sizes: int) -> Any:
    """The same of version 1.0: ReLU, no gate."""
    from transformers import T5Config, T5EncoderModel

    return seeded(T5EncoderModel, T5Config(**{"vocab_size": 32128, **T5_SIZES, "d_model": FLUX_TEXT, **sizes},
                                           feed_forward_proj="relu", dropout_rate=0.0))


def bert(**sizes: int) -> Any:
    """A BertModel, BF16, with all of Chinese RoBERTa's pieces."""
    from transformers import BertConfig, BertModel

    return seeded(BertModel, BertConfig(**{
        "vocab_size": BERT_VOCAB, "hidden_size": FLUX_TEXT, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "layer_norm_eps": 1e-12, **sizes}))


def umt5(vocab: int, **sizes: int) -> Any:
    """A UMT5EncoderModel, BF16."""
    from transformers import UMT5Config, UMT5EncoderModel

    return seeded(UMT5EncoderModel, UMT5Config(**{"vocab_size": vocab, **T5_SIZES, "d_model": WAN_TEXT, **sizes},
                                               **T5_KIND))


T5_SIZES = {"d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4}
T5_KIND = {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}


def llama_config(**sizes: int) -> Any:
    """Llama 3 with heads of 128, as the host fixes them, and more layers than the pipeline skips."""
    from transformers import LlamaConfig

    return LlamaConfig(**{"vocab_size": LLAMA_VOCAB, "hidden_size": HUNYUAN_TEXT, "intermediate_size": 96,
                          "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128,
                          **sizes}, rms_norm_eps=1e-5, **rope(500000.0),
                       bos_token_id=128000, eos_token_id=128001, pad_token_id=128258)


def llama(**sizes: int) -> Any:
    """A LlamaModel, BF16."""
    from transformers import LlamaModel

    return seeded(LlamaModel, llama_config(**sizes))


def llama_head(**sizes: int) -> Any:
    """A LlamaForCausalLM of Llama 3.1's vocabulary, BF16."""
    from transformers import LlamaForCausalLM

    config = llama_config(vocab_size=128256, tie_word_embeddings=True, **sizes)
    config.pad_token_id = None
    return seeded(LlamaForCausalLM, config)


def llava() -> Any:
    """A LlavaForConditionalGeneration, BF16."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=28, patch_size=14)
    return seeded(LlavaForConditionalGeneration, LlavaConfig(text_config=llama_config(), vision_config=vision,
                                                             image_token_index=128257))


def gemma2(**sizes: Any) -> Any:
    """A Gemma2Model, BF16, without the soft cap of attention that the host does not have."""
    from transformers import Gemma2Config, Gemma2Model

    return seeded(Gemma2Model, Gemma2Config(**{
        "vocab_size": 320, "hidden_size": LUMINA_TEXT, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, **sizes}))


def seeded(kind: Any, config: Any) -> Any:
    """Random weights of unit gain, the same in every run; T5's biases and embeddings, which it does not scale, too."""
    torch.manual_seed(11)
    return randomise(kind(config))


def tokenizer_clip(folder: Path) -> str:
    """CLIP's tokenizer by transformers, from the host's copy of it. Returns its class name."""
    from transformers import CLIPTokenizerFast

    return saved(CLIPTokenizerFast.from_pretrained(BUNDLED / "sd1_tokenizer", model_max_length=77), folder)


def tokenizer_clip_g(folder: Path) -> str:
    """The same, which pads with the first of its pieces, as SDXL's tokenizer_2 does."""
    from transformers import CLIPTokenizerFast

    return saved(CLIPTokenizerFast.from_pretrained(BUNDLED / "sd1_tokenizer", model_max_length=77, pad_token="!"), folder)


def tokenizer_bert(folder: Path) -> str:
    """Chinese RoBERTa's as the host has it."""
    from transformers import BertTokenizer

    return saved(BertTokenizer.from_pretrained(BUNDLED / "text_encoders" / "hydit_clip_tokenizer"), folder)


def tokenizer_t5(folder: Path) -> str:
    from transformers import T5TokenizerFast

    return saved(T5TokenizerFast.from_pretrained(BUNDLED / "text_encoders" / "t5_tokenizer"), folder)


def tokenizer_pile_t5(folder: Path) -> str:
    """Pile-T5's SentencePiece model as the host has it, and a tokenizer.json that is made of it."""
    import sentencepiece
    from tokenizers import Tokenizer, models, normalizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    source = BUNDLED / "text_encoders" / "t5_pile_tokenizer" / "tokenizer.model"
    shutil.copy(source, folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(source))
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    merges = [(piece[:at], piece[at:]) for piece in vocab for at in range(1, len(piece))
              if piece[:at] in vocab and piece[at:] in vocab]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore
    made.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])  # type: ignore
    made.add_special_tokens([f"<extra_id_{number}>" for number in range(3)])
    return saved(PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                         pad_token="<s>"), folder)


def tokenizer_llama31(folder: Path) -> str:
    """Llama 3.1's: the pieces of the host's, other special tokens."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast.from_pretrained(BUNDLED / "text_encoders" / "llama_tokenizer")
    content = json.loads(made.backend_tokenizer.to_str())
    renamed = {"<|reserved_special_token_0|>": "<|finetune_right_pad_id|>", "<|reserved_special_token_3|>": "<|eom_id|>"}
    for token in content["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    from tokenizers import Tokenizer

    return saved(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)),
                                         bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"), folder)


def tokenizer_llama(folder: Path) -> str:
    from transformers import PreTrainedTokenizerFast

    return saved(PreTrainedTokenizerFast.from_pretrained(BUNDLED / "text_encoders" / "llama_tokenizer"), folder)


def tokenizer_umt5(folder: Path) -> str:
    """A SentencePiece model trained here (UMT5's own cannot be had), with UMT5's special tokens; spiece.model and
    tokenizer.json as the repositories have them."""
    import sentencepiece
    from transformers import T5TokenizerFast

    _train(folder, "spiece", vocab_size=120, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    if "vocab_file" in inspect.signature(T5TokenizerFast).parameters:  # transformers 4
        return saved(T5TokenizerFast(str(folder / "spiece.model"), extra_ids=0, add_prefix_space=True), folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    return saved(T5TokenizerFast(vocab=pieces, extra_ids=0), folder)


def tokenizer_gemma(folder: Path) -> str:
    """The same of Gemma's kind: pairs of pieces and single bytes, no blank before a text."""
    import sentencepiece
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizerFast

    _train(folder, "tokenizer", vocab_size=316, pad_id=0, eos_id=1, bos_id=2, unk_id=3, model_type="bpe",
           byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, eos_piece="<eos>", bos_piece="<bos>")
    if "vocab_file" in inspect.signature(GemmaTokenizerFast).parameters:  # transformers 4
        return saved(GemmaTokenizerFast(str(folder / "tokenizer.model")), folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    merges = [(piece[:at], piece[at:]) for piece in vocab for at in range(1, len(piece))  # as transformers derives them
              if piece[:at] in vocab and piece[at:] in vocab]
    made = GemmaTokenizerFast(vocab=vocab, merges=merges)
    made.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])  # as published
    return saved(made, folder)


def _train(folder: Path, name: str, **options: Any) -> None:
    import sentencepiece

    folder.mkdir(parents=True)
    corpus = folder / "corpus.txt"
    words = ["a", "an", "the", "cat", "dog", "robot", "boat", "red", "blue", "old", "small", "running", "sitting", "over",
             "near", "river", "mountain", "city", "night", "light", "slowly", "camera", "moves", "rain", "market", ","]
    torch.manual_seed(0)
    corpus.write_text("\n".join(" ".join(words[i] for i in torch.randint(len(words), (9,))) for _ in range(400)))
    sentencepiece.SentencePieceTrainer.train(**{
        "input": str(corpus), "model_prefix": str(folder / name), "pad_piece": "<pad>", "eos_piece": "</s>",
        "unk_piece": "<unk>", "hard_vocab_limit": False, "minloglevel": 2, "normalization_rule_name": "identity", **options})
    corpus.unlink()
    (folder / f"{name}.vocab").unlink()


def saved(tokenizer: Any, folder: Path) -> str:
    tokenizer.save_pretrained(folder)
    return type(tokenizer).__name__


def save(family: str, folder: Path) -> dict[str, list[str]]:
    """Write the text encoders and tokenizers of a tiny base ("flux1", "wan", "hunyuan_video", "sdxl") below `folder`.

    Returns their entries for model_index.json. Output widths: the constants above.
    """
    if family == "flux1":
        encoders = {"text_encoder": clip(FLUX_POOLED), "text_encoder_2": t5()}
        tokenizers = {"tokenizer": tokenizer_clip, "tokenizer_2": tokenizer_t5}
    elif family == "wan":
        encoders, tokenizers = {"text_encoder": umt5(128, d_ff=64)}, {"tokenizer": tokenizer_umt5}
    elif family == "hunyuan_video":
        encoders = {"text_encoder": llama(), "text_encoder_2": clip(HUNYUAN_POOLED)}
        tokenizers = {"tokenizer": tokenizer_llama, "tokenizer_2": tokenizer_clip}
    elif family == "lumina2":
        encoders, tokenizers = {"text_encoder": gemma2()}, {"tokenizer": tokenizer_gemma}
    elif family == "sdxl":
        encoders = {"text_encoder": clip(SDXL_POOLED, layers=12), "text_encoder_2": clip_g()}
        tokenizers = {"tokenizer": tokenizer_clip, "tokenizer_2": tokenizer_clip_g}
    elif family == "sd15":
        encoders, tokenizers = {"text_encoder": clip(FLUX_POOLED)}, {"tokenizer": tokenizer_clip}
    elif family == "sd3":
        encoders = {"text_encoder": clip_l_projected(), "text_encoder_2": clip_g(), "text_encoder_3": t5(
            d_model=SD3_TEXT, num_layers=2, d_ff=32, vocab_size=8192)}  # the prompts' pieces are common ones
        tokenizers = {"tokenizer": tokenizer_clip, "tokenizer_2": tokenizer_clip_g, "tokenizer_3": tokenizer_t5}
    elif family == "hidream":
        long = {"max_position_embeddings": 248}
        encoders = {"text_encoder": clip_l_projected(False, **long), "text_encoder_2": clip_g(**long),
                    "text_encoder_3": t5(), "text_encoder_4": llama_head()}
        tokenizers = {"tokenizer": tokenizer_clip, "tokenizer_2": tokenizer_clip_g, "tokenizer_3": tokenizer_t5,
                      "tokenizer_4": tokenizer_llama31}
    elif family in T5_ALONE:
        encoders, tokenizers = {"text_encoder": t5()}, {"tokenizer": tokenizer_t5}
    elif family == "cosmos":
        encoders, tokenizers = {"text_encoder": t5_old()}, {"tokenizer": tokenizer_t5}
    elif family == "hunyuan_dit":
        encoders = {"text_encoder": bert(), "text_encoder_2": t5(vocab_size=128, d_model=MT5_TEXT)}
        tokenizers = {"tokenizer": tokenizer_bert, "tokenizer_2": tokenizer_umt5}
    elif family == "aura_flow":
        encoders, tokenizers = {"text_encoder": umt5(32128, d_model=FLUX_TEXT)}, {"tokenizer": tokenizer_pile_t5}
    else:
        raise ValueError(family)
    entries = {}
    for name, model in encoders.items():
        model.save_pretrained(folder / name)
        entries[name] = ["transformers", type(model).__name__]
    for name, write in tokenizers.items():
        entries[name] = ["transformers", write(folder / name)]
    return entries


def base(family: str, folder: Path, **encoders: Any) -> Path:
    """A base that has nothing but text encoders and tokenizers; `encoders` replaces some of them by other models."""
    entries = save(family, folder)
    for name, model in encoders.items():
        shutil.rmtree(folder / name)
        model.save_pretrained(folder / name)
        entries[name] = ["transformers", type(model).__name__]
    index = {"_class_name": PIPELINES[family], **entries}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
