"""What the JSON files of checkpoints are: for each kind, the keys that this pack reads and what their values may be.

Keys that nothing here reads may have any value that strict.py takes. null is what a key has that is left out, as in
diffusers and transformers.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ...host import texts
from ...host.texts import Text
from ..errors import CheckpointError
from .strict import AGAIN, LARGEST, MOST

_NAME = 1000  # characters of a name
_TEXT = 100_000  # of any other text; a chat template has 10,000
_LIST = 1000  # entries of a list of settings
_LAYERS = 256  # published: 100
_NUMBER = 1 << 31


class Kind(NamedTuple):
    """What a value may be: `expected` in words, and where in it something is else: path below it (keys and numbers of
    entries) and what is there, or None."""

    expected: str
    wrong: Callable[[Any], Wrong | None]


class Wrong(NamedTuple):
    """A value that is none of its kind: its place, what is there, and what was expected."""

    path: tuple[str, ...]
    found: Any
    expected: str


def _simple(expected: str, fits: Callable[[Any], bool]) -> Kind:
    return Kind(expected, lambda value: None if fits(value) else Wrong((), value, expected))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


TEXT = _simple(Text("a text"), lambda value: isinstance(value, str) and len(value) <= _TEXT)
NAME = _simple(Text("a name"), lambda value: isinstance(value, str) and len(value) <= _NAME and value.isprintable())
FLAG = _simple(Text("true or false"), lambda value: isinstance(value, bool))
NUMBER = _simple(Text("a number"), _is_number)
COUNT = _simple(Text("a whole number"), lambda value: type(value) is int and 0 <= value < _NUMBER)
WHOLE = _simple(Text("a whole number"), lambda value: type(value) is int and -_NUMBER < value < _NUMBER)
LAYERS = _simple(Text("a number of layers, {most} at most", most=_LAYERS),
                 lambda value: type(value) is int and 0 <= value <= _LAYERS)
OBJECT = _simple(Text("an object"), lambda value: isinstance(value, dict))


def either(*kinds: Kind) -> Kind:
    """One of several."""
    expected = texts.either(kind.expected for kind in kinds)
    return Kind(expected, lambda value: None if any(kind.wrong(value) is None for kind in kinds)
                else Wrong((), value, expected))


def each(kind: Kind, most: int = _LIST) -> Kind:
    """A list of one kind, with `most` entries."""
    expected = Text("a list ({kind})", kind=kind.expected)

    def wrong(value: Any) -> Wrong | None:
        if not isinstance(value, list) or len(value) > most:
            return Wrong((), value, expected)
        return next((found._replace(path=(str(number), *found.path)) for number, one in enumerate(value)
                     if (found := kind.wrong(one)) is not None), None)

    return Kind(expected, wrong)


def table(known: Mapping[str, Kind], others: Kind | None = None, null: bool = True, keys: Kind = NAME,
          needs: tuple[str, ...] = ()) -> Kind:
    """An object whose `known` keys have these kinds, and its `others` another; `null` is what is left out, and nothing
    that it `needs` may be."""
    expected = OBJECT.expected

    def wrong(value: Any) -> Wrong | None:
        if not isinstance(value, dict):
            return Wrong((), value, expected)
        for key in needs:
            if value.get(key) is None:
                return Wrong((key,), None, known[key].expected)
        for key, one in value.items():
            if others is not None and keys.wrong(key):
                return Wrong((), key, keys.expected)
            kind = known.get(key, others)
            if kind is not None and not (null and one is None) and (found := kind.wrong(one)) is not None:
                return found._replace(path=(key, *found.path))
        return None

    return Kind(expected, wrong)


def _named(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


NULL = _simple(Text("null"), lambda value: value is None)
_COUNTS = either(COUNT, each(either(WHOLE, NULL, each(COUNT))))  # -1 and null: none of this level
_NAMES = each(TEXT, 100_000)
QUANTIZED = table({**_named(TEXT, "quant_method quant_algo activation_scheme"), "weight_block_size": each(COUNT),
                   **_named(_NAMES, "ignore ignored_layers modules_to_not_convert"),
                   "quantization": table({"quant_algo": TEXT, "exclude_modules": _NAMES})})
_TRANSFORMERS = {
    **_named(LAYERS, "num_hidden_layers num_layers num_decoder_layers depth"),
    **_named(COUNT, "hidden_size intermediate_size num_key_value_heads head_dim d_model d_kv d_ff num_heads vocab_size "
                    "projection_dim max_position_embeddings type_vocab_size relative_attention_num_buckets "
                    "relative_attention_max_distance out_hidden_size spatial_merge_size temporal_patch_size "
                    "window_size num_position_embeddings sliding_window image_token_id"),
    **_named(FLAG, "attention_bias mlp_bias is_gated_act tie_word_embeddings is_decoder"),
    **_named(each(COUNT), "fullatt_block_indexes deepstack_visual_indexes"),
    **_named(_COUNTS, "num_attention_heads image_size"),
    **_named(NUMBER, "rope_theta rms_norm_eps layer_norm_eps layer_norm_epsilon attn_logit_softcapping "
                     "query_pre_attn_scalar"),
    **_named(TEXT, "hidden_act hidden_activation dense_act_fn model_type feed_forward_proj position_embedding_type")}
CONFIG = table({
    "_class_name": TEXT, "architectures": each(TEXT), "quantization_config": QUANTIZED, "compression_config": OBJECT,
    **_TRANSFORMERS, "text_config": table({**_TRANSFORMERS, "quantization_config": QUANTIZED}),
    "vision_config": table(_TRANSFORMERS),
    **_named(LAYERS, "num_single_layers num_refiner_layers num_single_transformer_blocks n_refiner_layers n_layers"),
    **_named(each(COUNT), "axes_dims_rope axes_dims axes_lens rope_axes_dim vace_layers block_out_channels "
                          "encoder_block_out_channels decode_block_out_channels ch_mult dim_mult"),
    **_named(each(NUMBER), "latents_mean latents_std"),
    **_named(_COUNTS, "patch_size patch_size_t layers_per_block transformer_layers_per_block attention_head_dim "
                       "cross_attention_dim sample_size out_channels in_channels caption_channels"),
    **_named(each(either(TEXT, each(TEXT))), "down_block_types up_block_types block_types_per_layer"),
    **_named(COUNT, "joint_attention_dim pooled_projection_dim cap_feat_dim n_heads n_kv_heads dim "
                    "ffn_dim base_dim decoder_base_dim latent_channels image_dim text_dim"),
    **_named(NUMBER, "scaling_factor shift_factor"),
    "_connectors": OBJECT, "_scheduler": OBJECT})
_FOLDER = _simple(Text("a name of a folder"), lambda value: isinstance(value, str) and len(value) <= _NAME
                  and value.isprintable() and not set(value) & set("/\\:") and value not in (".", ".."))
_COMPONENT = _simple(Text("a library and a class"), lambda value: isinstance(value, list) and len(value) == 2 and all(
    one is None or isinstance(one, str) and len(one) <= _NAME for one in value))
_COMPONENTS = ("audio_vae", "connectors", "feature_extractor", "image_encoder", "image_processor", "processor",
               "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "tokenizer",
               "tokenizer_2", "tokenizer_3", "tokenizer_4", "transformer", "transformer_2", "unet", "vae", "vocoder")
PIPELINE = table({"_class_name": TEXT, **dict.fromkeys(_COMPONENTS, _COMPONENT)},
                 either(_COMPONENT, TEXT, FLAG, NUMBER, each(TEXT, 100), OBJECT), keys=_FOLDER)
INDEX = table({"weight_map": table({}, NAME, null=False), "metadata": OBJECT}, needs=("weight_map",))
# Of half a million entries: in one go.
_VOCABULARY = _simple(Text("pieces and their numbers"), lambda value: (
    isinstance(value, dict) and all(type(number) is int for number in value.values())
    or isinstance(value, list) and all(isinstance(one, list) and one and isinstance(one[0], str) for one in value)))
_MERGES = _simple(Text("a list of pairs of pieces"), lambda value: isinstance(value, list) and all(
    isinstance(one, str) or isinstance(one, list) and len(one) == 2 and isinstance(one[0], str)
    and isinstance(one[1], str) for one in value))
_STEP = table({"type": TEXT, "pattern": either(OBJECT, TEXT), "behavior": TEXT})
TOKENIZER = table({
    "model": table({"type": TEXT, "vocab": _VOCABULARY, "merges": _MERGES}),
    "added_tokens": each(table({"content": TEXT, "id": COUNT}, needs=("content", "id")), 100_000),
    "pre_tokenizer": table({"type": TEXT, "pretokenizers": each(_STEP)}), "normalizer": _STEP})
TOKENIZER_CONFIG = table({
    "tokenizer_class": TEXT,
    "added_tokens_decoder": table({}, table({"content": TEXT}, needs=("content",)), null=False, keys=_simple(
        Text("a number"), lambda value: value.isdecimal() and len(value) < 10))})
KINDS: tuple[tuple[str, Kind], ...] = (
    (r"tokenizer_config\.json", TOKENIZER_CONFIG), (r"config\.json", CONFIG), (r"model_index\.json", PIPELINE),
    (r"\.index(\.[^./]+)?\.json", INDEX), (r"tokenizer\.json", TOKENIZER), (r"vocab\.json", _VOCABULARY))
_TOKENIZERS = ("tokenizer.json", "tekken.json", "vocab.json")


def limits(path: str) -> tuple[int, int]:
    """How many bytes and values a file of this name may have: vocabularies of tokenizers are larger than other files
    (Gemma 3's: 33 MB, 1.9 million values)."""
    return (64_000_000, 4_000_000) if os.path.basename(path) in _TOKENIZERS else (LARGEST, MOST)


def check(value: Any, path: str, name: str) -> None:
    """Raise CheckpointError that says key, what is there and what was expected, where a JSON file is not of its kind,
    which its name says. Files of other names are left alone."""
    name = os.path.basename(name)
    kind = next((kind for end, kind in KINDS if re.search(rf"{end}\Z", name)), None)
    if kind is not None:
        require(value, kind, path)


def require(value: Any, kind: Kind, where: object, do: str = AGAIN) -> None:
    """Raise CheckpointError where a value is none of a kind."""
    wrong = kind.wrong(value)
    if wrong is not None:
        key = ".".join(wrong.path)[:200] or Text("this JSON")
        raise CheckpointError(Text("{key} is {found}, expected {expected}", key=key, found=_shown(wrong.found),
                                   expected=wrong.expected), where, do)


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return Text("an object") if isinstance(value, dict) else Text("a list of {count}", count=len(value))
    return repr(value[:80] if isinstance(value, str) else value)
