"""Where transformers 5 is another than 4.51, the lowest that the pack works with: the tests' models are written as 5 has
them, and made so that they are the same models on both.

Names are those of 5, because the exports beside the tests were made with it.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

FIVE = int(version("transformers").partition(".")[0]) >= 5


def rope(rope_theta: float, rope_type: str = "default", **scaling: Any) -> dict[str, Any]:
    """What a configuration takes for rotary embeddings: one key since 5; 4 passes over that one, and has the angle apart
    from the scaling."""
    if FIVE:
        return {"rope_parameters": {"rope_type": rope_type, "rope_theta": rope_theta, **scaling}}
    scaled = {"rope_scaling": {"rope_type": rope_type, **scaling}} if scaling else {}
    return {"rope_theta": rope_theta, **scaled}


def qwen25_vl_config(text: dict[str, Any], **rest: Any) -> Any:
    """Qwen2.5-VL's configuration. Before 4.52 the language model's values are not apart from the rest, and the tokens of
    pictures, which the model looks for, must be given: here as 5 has them by default."""
    from transformers import Qwen2_5_VLConfig as Config

    if "text_config" in Config.sub_configs:
        return Config(text_config=text, **rest)
    special = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
    return Config(**{**special, **text, **rest})


def loaded(cls: Any, folder: Path, dtype: Any) -> Any:
    """A model of this class as a folder has it; 4's word for dtype is another one."""
    return cls.from_pretrained(folder, **{"dtype" if FIVE else "torch_dtype": dtype})


def parameters(model: Any) -> dict[str, Any]:
    """A model's parameters by the names of 5, but for eyes other than Qwen's, which no file here has. Before 4.52 a language
    model with eyes is in language_model, its head too, or (Qwen2.5-VL) directly beside its eyes."""
    found = dict(model.named_parameters())
    moved = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    if any(name.startswith("visual.") for name in found):
        moved = {"model.": "model.language_model.", "visual.": "model.visual."}

    def called(name: str) -> str:
        old = next((old for old in moved if name.startswith(old)), "")
        return moved.get(old, "") + name.removeprefix(old)

    return {called(name): parameter for name, parameter in found.items()}


def fast_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. 5 saves its special tokens as a list, which 4 has by another name."""
    from transformers import PreTrainedTokenizerFast

    given = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("extra_special_tokens")
    renamed = not FIVE and isinstance(given, list)
    options = {"additional_special_tokens": given, "extra_special_tokens": {}} if renamed else {}
    return PreTrainedTokenizerFast.from_pretrained(folder, **options)
