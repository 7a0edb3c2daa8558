"""The tokenizer of Qwen2.5 and Qwen3, which the host bundles: is the folder's the same one?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ...errors import CheckpointError
from ...files.source import Source, read_json
from .vocabulary import refuse_another

if TYPE_CHECKING:
    from torch import Tensor

# How Qwen2Tokenizer (every version of transformers) splits text into words before merges apply.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|"
         r"\s+")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def same_as_bundled(source: Source) -> dict[str, Tensor]:
    """No tensors. Raises CheckpointError when the folder's tokenizer gives other token ids than the host's.

    Compared are pieces, numbers, merges, added tokens and, where there is a tokenizer.json, how words are split.
    The host's knows four tokens more than Qwen-Image's (<tool_response>, <think> and their ends): a prompt that spells
    one of them out is tokenized otherwise than by diffusers.
    """
    refuse_another(source, "text_encoders", "qwen25_tokenizer")
    file = Path(source.folder) / "tokenizer.json"
    if file.is_file() and not splits_alike(read_json(str(file))):
        raise CheckpointError(Text("the base's tokenizer splits text in another way than ComfyUI's text encoder"), file,
                              Text("use the base's own tokenizer; one of a finetune cannot be put into ComfyUI"))
    return {}


def splits_alike(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json normalizes text and splits it into words and added tokens as Qwen2Tokenizer does."""
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers") or []
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return False
    split, level = steps
    return ((content.get("normalizer") or {}).get("type") == "NFC"
            and (split.get("pattern") or {}).get("Regex") == WORDS
            and split.get("behavior") == "Isolated" and not split.get("invert")
            and not level.get("add_prefix_space") and not level.get("use_regex")
            and not any(token.get(flag) for token in content.get("added_tokens") or [] for flag in FLAGS))
