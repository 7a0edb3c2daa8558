"""Run llama.cpp's own converter on the models of text_gguf_models.py: what tests/data/exports/text_gguf was made with.

    python make_text_gguf.py          in an environment with auto-round 0.16.1 (it ships llama.cpp's conversion/), gguf
                                      0.19.0, transformers 5.23.0, sentencepiece, torch; CPU

Every file is as the converter writes it, outtype F16, but for one answer: it knows a BPE's pre-tokenizer by the hash of a
real vocabulary (`get_vocab_base_pre`), so that of a tiny one is given. T5's config.json is handed over as it is, since
transformers would add keys to it on reading.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

PRE = {"llama": "llama-bpe", "llava": "llama-bpe", "mistral": "tekken", "mistral3": "tekken", "qwen3": "qwen2",
       "qwen25vl": "qwen2", "gemma3": "default"}
SENTENCES = ["a red cat over the old river", "the boat in the rain", "two dogs near the city at night"]


class Newer:
    """A table of gguf's that lacks what the converter's newer models name; none of ours is among them."""

    def __init__(self, real: Any, other: Any) -> None:
        self.real, self.other = real, other

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name, self.other)

    def __iter__(self) -> Any:
        return iter(self.real)


def converter() -> Any:
    import auto_round
    import gguf

    for table in ("MODEL_ARCH", "MODEL_TENSOR", "VisionProjectorType"):
        real = getattr(gguf, table)
        setattr(gguf, table, Newer(real, None if table == "VisionProjectorType" else next(iter(real))))
    sys.path.insert(0, str(Path(auto_round.__file__).parent / "export" / "export_to_gguf"))
    import conversion

    return conversion


def unigram(folder: Path, vocab: int) -> None:
    """T5's and Gemma's kind of tokenizer, with a character map and fewer pieces than rows of the embedding."""
    import sentencepiece

    folder.mkdir(parents=True)
    rules = folder / "rules.tsv"
    rules.write_text("41\t61\nFB01\t66 69\n", encoding="utf-8")  # A -> a, the ligature fi -> f i
    with contextlib.chdir(folder), open("spiece.model", "wb") as model:  # paths would be written into it
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 20), model_writer=model, vocab_size=vocab - 8, pad_id=0, eos_id=1, unk_id=2,
            bos_id=-1, hard_vocab_limit=False, minloglevel=2, normalization_rule_tsv=rules.name)
    rules.unlink()


def bpe(folder: Path, vocab: int) -> None:
    """The others' kind: a byte-level BPE with special tokens after its pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    made.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=vocab - 8, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                            additional_special_tokens=["<|im_start|>"]).save_pretrained(folder)


def main() -> None:
    import gguf
    import torch

    from support import text_gguf_models as models

    tool = converter()
    shutil.rmtree(models.EXPORTS, ignore_errors=True)
    unigram(models.EXPORTS / "unigram", models.VOCAB)
    bpe(models.EXPORTS / "bpe", models.VOCAB)
    for kind in models.MODELS:
        with tempfile.TemporaryDirectory() as at, torch.inference_mode():
            source = Path(at) / "source"
            models.make(kind).save_pretrained(source)
            if folder := models.tokenizer(kind):
                shutil.copytree(folder, source, dirs_exist_ok=True)
                if kind.startswith("gemma") and (source / "spiece.model").is_file():
                    (source / "spiece.model").rename(source / "tokenizer.model")
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
            name = config["architectures"][0]
            vision = kind.endswith("mmproj")
            if vision:
                (source / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
            cls = tool.get_model_class(name, mmproj=vision)
            cls.get_vocab_base_pre = lambda self, tokenizer, kind=kind: PRE[kind]
            if hasattr(cls, "Ministral3Model"):
                cls.Ministral3Model.get_vocab_base_pre = cls.get_vocab_base_pre
            options = {"hparams": config} if "t5" in kind else {}
            cls(source, gguf.LlamaFileType.MOSTLY_F16, models.EXPORTS / f"{kind}.gguf", eager=True, **options).write()


if __name__ == "__main__":
    main()
