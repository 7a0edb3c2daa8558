"""byT5 small with Glyph's tokens (T5EncoderModel, text_encoder_2 of HunyuanImage 2.1 and HunyuanVideo 1.5): it reads
the bytes of what stands in quotes in a prompt, and nothing looks at padding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ...errors import CheckpointError
from ...files.source import Source, read_json
from . import t5
from .base import Encoder, host_sizes

if TYPE_CHECKING:
    from torch import Tensor

# comfy/text_encoders/byt5_config_small_glyph.json
SIZES = {"d_ff": 3584, "d_kv": 64, "d_model": 1472, "num_heads": 6, "num_layers": 12}
VOCABULARY = 1510
BYTES = 259  # <pad>, </s>, <unk> and the 256 bytes; what is added has higher numbers
SPECIAL = {"<pad>": 0, "</s>": 1, "<unk>": 2}


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from the host's. Raises CheckpointError as t5.host_config does."""
    return host_sizes(config, {**SIZES, "vocab_size": VOCABULARY}, t5.FIXED)


def tokenizer(source: Source) -> dict[str, Tensor]:
    """The host has it: bytes need no vocabulary. Raises CheckpointError for a tokenizer of another kind."""
    path = Path(source.folder, "tokenizer_config.json")
    if not path.is_file():
        raise CheckpointError(Text("there is no tokenizer_config.json"), source.folder,
                              Text("finish the download of this folder"))
    config = read_json(str(path))
    added = {token["content"]: int(number) for number, token in (config.get("added_tokens_decoder") or {}).items()}
    wrong = [token for token, number in added.items() if number < BYTES and SPECIAL.get(token) != number]
    if config.get("tokenizer_class") != "ByT5Tokenizer" or wrong:
        raise CheckpointError(Text("the base has another tokenizer than ComfyUI's text encoder: {differences}",
                                   differences=", ".join(wrong) or config.get("tokenizer_class")), source.folder,
                              Text("use the base's own tokenizer; one of a finetune cannot be put into ComfyUI"))
    return {}


# ComfyUI does not name this encoder's options (comfy/text_encoders/hunyuan_image.py, ByT5SmallModel)
BYT5 = Encoder("byT5", ("T5EncoderModel",), "byt5_small", t5.KNOWN, t5.CALLED, t5.modules, host_config, tokenizer,
               t5.TWINS, set_by="")
