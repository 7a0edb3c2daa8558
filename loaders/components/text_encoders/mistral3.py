"""Mistral Small 3, the text encoder of FLUX.2.

FLUX.2 reads hidden states 10, 20 and 30 side by side; the host does the same, of the same token ids: its prompt is
diffusers' system message in Mistral's chat template. diffusers pads on the left to 512 tokens and keeps the states of
the padding; the host encodes the prompt alone, and its FLUX.2 model pads with zeros. diffusers cuts at 512 tokens.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .... import host
from ....host.texts import Text
from ...architectures.base import Module, count_blocks
from ...errors import CheckpointError
from ...files.source import Source, read_json
from .base import Encoder, Family, exchanging
from .llm import KNOWN, ORIGIN, UNNEEDED, sizes, text_part
from .llm import modules as llm_modules

if TYPE_CHECKING:
    from torch import Tensor

# comfy/text_encoders/llama.py, Mistral3Small24BConfig; the width is what the host knows the model by (comfy/sd.py)
HOST = {"vocab_size": 131072, "intermediate_size": 32768, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000000.0}
FIXED = {"hidden_size": 5120, "sliding_window": None, "attention_bias": False}
DEEPEST = 30  # the last hidden state that FLUX.2 reads
# in transformers 5's memory, and in its files and those of 4
PREFIXES = {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.": "model.",
            "model.": "model.", "": "model."}
# Prompts hold no pictures, and the logits nobody reads.
CALLED = exchanging(PREFIXES, r"^(model\.)?(vision_tower|multi_modal_projector)\.|"
                    r"^(language_model\.|model\.)?lm_head\.|" + UNNEEDED)
# What the host's prompt is made of, by number (None: any)
CONTROL = {"<s>": 1, "<pad>": 11, "[INST]": None, "[/INST]": None, "[SYSTEM_PROMPT]": None, "[/SYSTEM_PROMPT]": None}
OURS = "quantized_transformers"  # beside tekken's own keys: the rest of tokenizer.json


def modules(config: dict[str, Any], names: Collection[str]) -> Iterator[Module]:
    """See llm.modules; without the final norm, where there is none."""
    text = text_part(config)
    return (module for module in llm_modules(text) if module.native != "model.norm" or text.get("final_norm", True))


def told(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """ComfyUI's files of FLUX.2's text encoder end with the last layer that is read, and have no final norm."""
    layers = count_blocks(names, "model.layers")
    if any(name.startswith("model.norm.") for name in names) or layers < DEEPEST:
        return config
    text = text_part(config)
    return {**config, "text_config": {**text, "num_hidden_layers": layers, "final_norm": False}}


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from Mistral Small 3's. Raises CheckpointError for what the host's code fixes."""
    text = text_part(config)
    layers = text["num_hidden_layers"]
    if layers < DEEPEST:
        raise CheckpointError(Text("FLUX.2 reads hidden state {number}, but this text encoder has {layers} layers",
                                   number=DEEPEST, layers=layers), ORIGIN, Text("use the base's own text encoder"))
    different = sizes(text, HOST, FIXED)
    # below 40 layers the host leaves the final norm out, transformers does not
    last = text.get("final_norm", True)
    return different | {"final_norm": last} if layers < HOST["num_hidden_layers"] else different


def note(config: dict[str, Any]) -> str:
    """What of the folder goes unused."""
    return Text("the vision tower, its projector and lm_head are not part of FLUX.2's conditioning and were left out")


def tokenizer(source: Source) -> dict[str, Tensor]:
    """{"tekken_model": U8 [bytes]}, the form in which the host takes and saves this tokenizer: a tekken.json.

    It is made of the folder's tokenizer.json, which diffusers reads, or else of its tekken.json. What tekken has no
    place for (merges, patterns, flags) goes along in a key of its own, so that token ids are exactly the folder's.
    Raises CheckpointError when there is neither, or one that the host's prompt does not fit.
    """
    import torch

    folder = Path(source.folder)
    file = next((folder / name for name in ("tokenizer.json", "tekken.json") if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(Text("there is no tokenizer.json or tekken.json"), folder,
                              Text("finish the download of this folder"))
    content = read_json(str(file))
    try:
        tekken = to_tekken(content if "model" in content else from_tekken(content))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(Text("the tokenizer cannot be read: {error!r}", error=error), file,
                              Text("download this folder again")) from error
    special = {entry["token_str"]: entry["rank"] for entry in tekken["special_tokens"]}
    other = [token for token, number in CONTROL.items() if token not in special or number not in (None, special[token])]
    if other:
        raise CheckpointError(Text("the tokenizer lacks tokens of FLUX.2's prompt, or numbers them otherwise: {tokens}",
                                   tokens=", ".join(other)), file, Text("use the base's own tokenizer"))
    return {"tekken_model": torch.frombuffer(bytearray(json.dumps(tekken).encode()), dtype=torch.uint8)}


def to_tekken(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json (byte-level BPE) -> a tekken.json that holds all of it.

    tekken numbers the special tokens first and then the pieces; raises CheckpointError where tokenizer.json does not.
    """
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    vocab = content["model"]["vocab"]
    pieces = sorted((number, piece) for piece, number in vocab.items() if piece not in special)
    if content["model"].get("type") != "BPE" or sorted(special.values()) != list(range(len(special))) \
            or [number for number, _ in pieces] != list(range(len(special), len(special) + len(pieces))):
        raise CheckpointError(Text("this is no Mistral tokenizer: its special tokens are not numbered before its "
                                   "pieces"), "tokenizer.json", Text("use the base's own tokenizer"))
    to_byte = {character: byte for byte, character in _alphabet().items()}
    rest = {**content, "model": {key: value for key, value in content["model"].items() if key != "vocab"}}
    return {"config": {"pattern": _pattern(content), "num_vocab_tokens": len(pieces), "version": "v7",
                       "default_vocab_size": len(special) + len(pieces), "default_num_special_tokens": len(special)},
            "vocab": [{"rank": rank, "token_bytes": base64.b64encode(bytes(map(to_byte.__getitem__, piece))).decode(),
                       "token_str": None} for rank, (_, piece) in enumerate(pieces)],
            "special_tokens": [{"rank": number, "token_str": token, "is_control": True}
                               for token, number in sorted(special.items(), key=lambda item: item[1])],
            OURS: rest}


def from_tekken(tekken: dict[str, Any]) -> dict[str, Any]:
    """A tekken.json -> the tokenizer.json that transformers makes of it (specification: mistral-common's Tekkenizer).

    A piece is merged from every pair of pieces that spells it, those of low rank first.
    """
    config, given = tekken["config"], tekken.get("special_tokens")
    if not given:
        raise CheckpointError(Text("this tekken.json is of the old kind, without special_tokens"), "tekken.json",
                              Text("use the base's own tokenizer"))
    special = [entry["token_str"] for entry in sorted(given, key=lambda entry: entry["rank"])]
    count = config.get("default_num_special_tokens") or len(special)
    special += [f"<SPECIAL_{number}>" for number in range(len(special), count)]
    pieces = [base64.b64decode(entry["token_bytes"]) for entry in tekken["vocab"]]
    pieces = pieces[:config["default_vocab_size"] - count] if config.get("default_vocab_size") else pieces
    rank = {piece: number for number, piece in enumerate(pieces)}
    letters = _alphabet()
    spelled = ["".join(map(letters.__getitem__, piece)) for piece in pieces]
    merges = []
    for piece in pieces:
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        pairs = sorted((rank[a], rank[b]) for a, b in halves if a in rank and b in rank)
        merges += [[spelled[a], spelled[b]] for a, b in pairs]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "added_tokens": [{"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": True} for number, token in enumerate(special)],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated", "invert": False},
                byte_level]},
            "post_processor": byte_level, "decoder": byte_level,
            "model": {"type": "BPE", "ignore_merges": True, "merges": merges,
                      "vocab": {**{token: number for number, token in enumerate(special)},
                                **{piece: count + number for number, piece in enumerate(spelled)}}}}


def read(tekken: dict[str, Any]) -> str | None:
    """tokenizer.json's text from what `to_tekken` made; None for any other tekken.json."""
    rest = tekken.get(OURS)
    if rest is None:
        return None
    letters, special = _alphabet(), tekken["special_tokens"]
    vocab = {entry["token_str"]: entry["rank"] for entry in special}
    for entry in tekken["vocab"]:
        piece = "".join(map(letters.__getitem__, base64.b64decode(entry["token_bytes"])))
        vocab[piece] = entry["rank"] + len(special)
    return json.dumps({**rest, "model": {**rest["model"], "vocab": vocab}})


def _pattern(content: dict[str, Any]) -> str:
    """The pattern that splits words, for readers of tekken's own keys; "" where tokenizer.json has none."""
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers") or []
    return next((step["pattern"]["Regex"] for step in steps if "Regex" in (step.get("pattern") or {})), "")


def _alphabet() -> dict[int, str]:
    """Byte -> the printable character that byte-level BPE writes for it (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(others)}


MISTRAL3 = Encoder("Mistral 3", ("Mistral3ForConditionalGeneration",), "mistral3_24b", KNOWN, CALLED, modules,
                   host_config, tokenizer, told=told, note=note, during=lambda: host.tekken_read_by(read))
FAMILY = Family("FLUX.2", "FLUX2", (("text_encoder", "tokenizer", MISTRAL3),), "Flux2TEModel", ("Flux2",))
FAMILIES = (FAMILY,)
