"""Text encoders in GGUF as llama.cpp's converter writes them: any of transformers' models -> a file, and a file -> what
transformers' model is with the weights in it.

Names are gguf-py's own (`get_tensor_name_map`), the file is written and its blocks are made and read by gguf-py, special
tokens are found by its SpecialVocab. How values, tokens and keys are laid out follows convert_hf_to_gguf (its classes
LlamaModel, Qwen2VLVisionModel, Gemma2Model, T5EncoderModel, ...); tests/loaders/components/test_text_gguf_support.py
holds all of it to files which that converter wrote. Nothing here uses the pack.

Arguments that recur: `model` is one of transformers' (bare, for a language model, or with a vision tower), `arch` is
general.architecture: "t5encoder", "t5" (with a decoder), "llama", "mistral3", "qwen3", "qwen2vl", "gemma2", "gemma3", or
"clip" for the mmproj of a Qwen2.5-VL.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from support import gguf_files
from support.gguf_files import Kind
from support.transformers_versions import fast_tokenizer

PRE = {"llama": "llama-bpe", "mistral3": "tekken", "qwen3": "qwen2", "qwen2vl": "qwen2", "gemma3": "default"}
PERMUTED = ("llama", "mistral3")
LARGE = 1 << 22  # elements; larger ones are written with holes where they are zero


@dataclass
class Part:
    """One tensor of a file: parameter[at] + plus."""

    name: str
    parameter: str
    at: Any = ...
    plus: int = 0


# ------------------------------------------------------------------------------------------------- values and names
def parts(model: Any, arch: str, tokenizer: Path | None = None) -> list[Part]:
    """What a file of this architecture holds of a model's parameters."""
    config = text_config(model)
    vision = arch == "clip"
    blocks = model.config.vision_config.depth if vision else config["num_layers" if "t5" in arch else "num_hidden_layers"]
    if arch == "t5":
        blocks = max(blocks, config["num_decoder_layers"])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ if vision else architecture(arch), blocks)
    found = []
    for parameter, values in model.named_parameters():
        name = parameter.replace("language_model.", "")
        if ("visual." in name) != vision or "vision" in name or "projector" in name:
            continue
        name = "visual." + name.partition("visual.")[2] if vision else name
        if name.startswith(("layers.", "embed_tokens.", "norm.")):
            name = f"model.{name}"
        if name == "lm_head.weight" and arch.startswith("gemma"):
            continue
        found += list(_split(name, parameter, values, arch, config, table, tokenizer))
    return found


def _split(name: str, parameter: str, values: torch.Tensor, arch: str, config: dict[str, Any], table: Any,
           tokenizer: Path | None) -> Iterator[Part]:
    if arch == "clip" and "patch_embed.proj.weight" in name:
        for time, suffix in enumerate(("", ".1")):
            yield Part(f"v.patch_embd.weight{suffix}", parameter, np.s_[:, :, time])
        return
    if arch == "clip" and ".qkv." in name:
        third = len(values) // 3
        for i, letter in enumerate("qkv"):
            yield Part(_named(table, name.replace("qkv", letter)), parameter, slice(i * third, (i + 1) * third))
        return
    part = Part(_named(table, name), parameter)
    if arch in PERMUTED and ".self_attn." in name and name.split(".")[-2] in ("q_proj", "k_proj"):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        part.at = permutation(len(values), heads)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        part.plus = 1
    if arch == "gemma3" and "embed_tokens" in name and tokenizer and not (tokenizer / "tokenizer.model").is_file():
        part.at = slice(0, len(_tokens_of(tokenizer)))
    yield part


def _named(table: Any, name: str) -> str:
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found, f"gguf-py has no name for {name}"
    return found


def permutation(rows: int, heads: int) -> torch.Tensor:
    """Which row of transformers' q or k is each stored row: LlamaModel.permute of the converter."""
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)


def architecture(arch: str) -> Any:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)


def text_config(model: Any) -> dict[str, Any]:
    """config.json's keys of the text model, all on one level."""
    config = model.config.to_dict()
    return {**config, **config.get("text_config", {})}


# ------------------------------------------------------------------------------------------------- writing
def write(model: Any, path: Path, arch: str, types: str | Callable[[str], str] = "F16", tokenizer: Path | None = None,
          pre: str | None = None) -> Path:
    """A GGUF file of a model.

    `types`: a ggml type, or the type for a name in the file ("blk.0.attn_q.weight"); asked for weights of two dimensions
    other than attn_rel_b. Rows that are not whole blocks become F16, as llama.cpp does it; vectors and norms are F32.
    Types that only ggml's C code quantizes become random blocks of the same spread (see `blocks`), so that the
    weights meant are those of `dequantized`, not the model's. `tokenizer`: a folder with tokenizer.json, or spiece.model
    or tokenizer.model; without it the file has none. `pre`: tokenizer.ggml.pre, PRE's by default.
    """
    kinds: Counter[str] = Counter()
    writer = gguf.GGUFWriter(str(path), arch)
    parameters = dict(model.named_parameters())
    if freqs := rope_freqs(model):
        writer.add_tensor("rope_freqs.weight", np.array(freqs, np.float32))
    for part in parts(model, arch, tokenizer):
        values = parameters[part.parameter].detach()[part.at]
        kind = "F16"
        if values.ndim <= 1 or part.name.endswith("_norm.weight"):
            kind = "F32"
        elif values.ndim == 2 and "attn_rel_b" not in part.name:
            kind = types(part.name) if callable(types) else types
            if values.shape[1] % gguf.GGML_QUANT_SIZES[Kind[kind]][0]:
                kind = "F16"
            kinds[kind] += 1
        data = blocks(values if not part.plus else values.float() + part.plus, kind)
        writer.add_tensor(part.name, data.view(_Holes) if values.numel() > LARGE else data, raw_dtype=Kind[kind])
    writer.add_type("mmproj" if arch == "clip" else "model")
    writer.add_name("tiny")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(kinds.most_common(1)[0][0]))
    {"t5encoder": _t5_keys, "t5": _t5_keys, "clip": _vision_keys}.get(arch, _llm_keys)(writer, model, arch)
    if tokenizer:
        _tokenizer_keys(writer, tokenizer, arch, text_config(model), pre or PRE.get(arch, "default"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(values: torch.Tensor, kind: str) -> np.ndarray:
    """What is stored of values: F32, F16 as they are, else U8 [rows, bytes of a row]. A row of zeros is zero bytes, which
    means zeros in every type. Random blocks are given the spread of the weight, lest a layer's output be huge."""
    values = values.detach()
    if kind in ("F32", "F16") and values.numel() <= LARGE:
        return values.to(torch.float32 if kind == "F32" else torch.float16).numpy()
    rows = filled(values) if values.ndim == 2 else torch.ones(len(values), dtype=torch.bool)
    some = values[rows]
    if kind in ("F32", "F16"):
        raw = some.to(torch.float32 if kind == "F32" else torch.float16).numpy()
    else:
        raw, meant = gguf_files.blocks(some, kind)
        if kind not in QUANTIZED and (at := gguf_files.SCALES.get(kind, (0,))):
            cut = raw.reshape(-1, gguf.GGML_QUANT_SIZES[Kind[kind]][1]).copy()
            ratio = np.float32(some.float().std() / meant.std())
            for i in at:
                cut[:, i:i + 2] = (cut[:, i:i + 2].copy().view(np.float16) * ratio).astype(np.float16).view(np.uint8)
            raw = cut.reshape(raw.shape)
    if rows.all():
        return raw
    whole = np.zeros((len(values), *raw.shape[1:]), raw.dtype)
    whole[rows.numpy()] = raw
    return whole


# what gguf-py quantizes itself
QUANTIZED = ("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")


class _Holes(np.ndarray):
    """An array that is written without its pages of zeros: the file has all its length but not its size on disk."""

    def tofile(self, file: Any, *_args: Any) -> None:  # type: ignore[override]
        data, page = np.ascontiguousarray(self).view(np.ndarray).reshape(-1).view(np.uint8), 1 << 16
        for start in range(0, len(data), page):
            part = data[start:start + page]
            if part.any() or start + page >= len(data):
                file.write(part.tobytes())
            else:
                file.seek(len(part), 1)


def _file_type(kind: str) -> int:
    names = gguf.LlamaFileType.__members__
    known = [f"MOSTLY_{kind}", f"MOSTLY_{kind}_M", "GUESSED"] if kind != "F32" else ["ALL_F32"]
    return next(names[name] for name in known if name in names)


def rope_freqs(model: Any) -> list[float]:
    """Llama 3.1's frequency factors, by the converter's generate_extra_tensors."""
    config = text_config(model)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type") != "llama3":
        return []
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    base = rope.get("rope_theta", config.get("rope_theta"))
    freqs = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    out = []
    for wave in (2 * math.pi / freqs).tolist():
        smooth = (rope["original_max_position_embeddings"] / wave - low) / (high - low)
        out.append(1.0 if smooth > 1 else factor if smooth < 0 else 1 / ((1 - smooth) / factor + smooth))
    return out


# ------------------------------------------------------------------------------------------------- metadata
def _t5_keys(writer: gguf.GGUFWriter, model: Any, arch: str) -> None:
    config = text_config(model)
    writer.add_context_length(config.get("n_positions", 512))
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(config["d_ff"])
    writer.add_block_count(config["num_layers"])
    writer.add_head_count(config["num_heads"])
    writer.add_key_length(config["d_kv"])
    writer.add_value_length(config["d_kv"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_relative_attn_buckets_count(config["relative_attention_num_buckets"])
    if arch == "t5":
        writer.add_decoder_block_count(config["num_decoder_layers"])
        writer.add_decoder_start_token_id(config["decoder_start_token_id"])


def _llm_keys(writer: gguf.GGUFWriter, model: Any, arch: str) -> None:
    config = text_config(model)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    width = config.get("head_dim")
    if width:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if arch in PERMUTED:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(width or config["hidden_size"] // config["num_attention_heads"])
    if arch.startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        return
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    whole = rope.get("full_attention", rope)
    writer.add_rope_freq_base(whole["rope_theta"] if "rope_theta" in whole else config["rope_theta"])
    if arch == "gemma3":
        near = rope.get("sliding_attention", {})
        writer.add_rope_freq_base_swa(near["rope_theta"] if near else config["rope_local_base_freq"])


def _vision_keys(writer: gguf.GGUFWriter, model: Any, arch: str) -> None:
    vision = model.config.vision_config
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(text_config(model)["hidden_size"])
    writer.add_vision_image_size(560)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.depth)
    writer.add_vision_head_count(vision.num_heads)
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN25VL)
    writer.add_vision_use_silu(True)
    writer.add_vision_n_wa_pattern(vision.fullatt_block_indexes[0] + 1)
    writer.add_vision_attention_layernorm_eps(1e-6)


# ------------------------------------------------------------------------------------------------- tokenizers
def _tokenizer_keys(writer: gguf.GGUFWriter, folder: Path, arch: str, config: dict[str, Any], pre: str) -> None:
    vocab = config["vocab_size"]
    pieces = next((folder / name for name in ("tokenizer.model", "spiece.model") if (folder / name).is_file()), None)
    if pieces and arch not in ("qwen3", "qwen2vl"):
        _sentencepiece(writer, pieces, arch, vocab)
    else:
        tokens, kinds = _bpe(folder, vocab)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=vocab)
    for word in special.special_token_types:  # as where config.json lies beside the tokenizer
        special._set_special_token(word, config.get(f"{word}_token_id"))
    special.add_to_gguf(writer)


def _sentencepiece(writer: gguf.GGUFWriter, file: Path, arch: str, vocab: int) -> None:
    """Pieces and their scores, and rows without a piece as unused ones; T5's and UMT5's with how text is normalized."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokens, scores, kinds = [f"[PAD{i}]" for i in range(vocab)], [-10000.0] * vocab, [gguf.TokenType.UNUSED] * vocab
    for i in range(model.get_piece_size()):
        tokens[i], scores[i] = model.id_to_piece(i), model.get_score(i)
        kinds[i] = gguf.TokenType.UNKNOWN if model.is_unknown(i) else gguf.TokenType.CONTROL if model.is_control(i) \
            else gguf.TokenType.UNUSED if model.is_unused(i) else gguf.TokenType.BYTE if model.is_byte(i) \
            else gguf.TokenType.NORMAL
    t5 = arch.startswith("t5")
    writer.add_tokenizer_model("t5" if t5 else "llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    if t5:
        normal = fields(fields(file.read_bytes())[3])  # sentencepiece_model.proto: ModelProto.normalizer_spec
        writer.add_add_space_prefix(bool(normal.get(3, 1)))
        writer.add_remove_extra_whitespaces(bool(normal.get(4, 1)))
        if charsmap := normal.get(2):
            writer.add_precompiled_charsmap(charsmap)
    elif arch.startswith("gemma"):
        writer.add_add_space_prefix(False)


def fields(message: bytes) -> dict[int, Any]:
    """The last value of each field of a protobuf message: bytes, or an integer."""
    found: dict[int, Any] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = number()
        if key & 7 == 0:
            found[key >> 3] = number()
            continue
        size = number() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
        found[key >> 3], at = message[at:at + size], at + size
    return found


def _bpe(folder: Path, vocab: int) -> tuple[list[str], list[int]]:
    tokenizer = fast_tokenizer(folder)
    by_id, added = _tokens_of(folder), tokenizer.added_tokens_decoder
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab)], [gguf.TokenType.UNUSED] * vocab
    for i, token in by_id.items():
        tokens[i], kinds[i] = token, gguf.TokenType.NORMAL
        if i in added:
            tokens[i] = tokenizer.decode(tokenizer.encode(token, add_special_tokens=False)) if not added[i].normalized else token
            kinds[i] = gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED
    return tokens, kinds


def _tokens_of(folder: Path) -> dict[int, str]:
    return {i: token for token, i in fast_tokenizer(folder).get_vocab().items()}


# ------------------------------------------------------------------------------------------------- reading
def dequantized(model: Any, *paths: Path) -> Any:
    """The model itself, in F32, with the weights that files say (of a text model, of its mmproj, or both), by gguf-py.

    What no file has keeps its values. A file's tensors must all be used, but for rope_freqs and a decoder.
    """
    parameters, done = dict(model.named_parameters()), set()
    for path in paths:
        reader = gguf.GGUFReader(str(path))
        arch = str(reader.get_field("general.architecture").contents())  # type: ignore[union-attr]
        stored = {tensor.name: tensor for tensor in reader.tensors if tensor.name != "rope_freqs.weight"}
        for part in parts(model, arch):
            tensor = stored.pop(part.name)
            parameter = parameters[part.parameter]
            values = _read(tensor) - part.plus if part.plus else _read(tensor)
            if part.at is ... and values.shape == parameter.shape:
                parameter.data = values
            elif part.at is ...:  # Gemma 3: fewer words than rows
                parameter.data = as_float(parameter.detach())
                parameter.data[:len(values)] = values
            else:
                if part.parameter not in done:
                    parameter.data = torch.from_numpy(np.zeros(tuple(parameter.shape), np.float32))
                parameter.data[part.at] = values
            done.add(part.parameter)
        assert all(name.startswith("dec.") for name in stored), sorted(stored)
    for name, parameter in parameters.items():
        if name not in done:
            parameter.data = as_float(parameter.detach())
    return model.requires_grad_(False).eval()


def _read(tensor: Any) -> torch.Tensor:
    """A tensor's values in F32; rows of zeros take no time and no memory."""
    shape, kind = tuple(int(n) for n in reversed(tensor.shape)), tensor.tensor_type
    raw = tensor.data
    if raw.size <= LARGE or raw.ndim != 2:
        return torch.from_numpy(np.array(gguf.dequantize(np.array(raw), kind), np.float32).reshape(shape))
    rows, out = filled(raw), np.zeros(shape, np.float32)
    out[rows] = gguf.dequantize(np.array(raw[rows]), kind).reshape(-1, shape[1])
    return torch.from_numpy(out)


def filled(values: Any) -> Any:
    """Which rows of a matrix have anything but zero bits: BOOL [rows], an array's as an array."""
    if isinstance(values, torch.Tensor):
        return torch.from_numpy(filled(values.contiguous().view(torch.uint8).numpy()))
    data = np.ascontiguousarray(values).view(np.uint8)
    return (data.view(np.int64) if data.shape[1] % 8 == 0 else data).any(1)


def as_float(values: torch.Tensor) -> torch.Tensor:
    """F32; a large matrix without touching its rows of zeros."""
    if values.numel() <= LARGE or values.ndim != 2:
        return values.float().clone()
    rows, out = filled(values), torch.from_numpy(np.zeros(tuple(values.shape), np.float32))
    out[rows] = values[rows].float()
    return out
