"""What a tokenizer folder holds, as far as it decides token ids: pieces, their numbers and their merges."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .... import host
from ....host.texts import Text, joined
from ...errors import CheckpointError
from ...files.source import Source, read_json
from ...words import first_ten

if TYPE_CHECKING:
    from torch import Tensor

SENTENCEPIECE = ("spiece.model", "tokenizer.model")
FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer_config.json", *SENTENCEPIECE)
# Digests of tokenizers that were compared with one of the host's, and are the same: it takes a third of a second.
_SAME: set[tuple[bytes, tuple[str, ...], bool]] = set()
Merges = list[tuple[str, ...]]


def refuse_another(source: Source, *bundled: str, added: bool = True) -> None:
    """Raises CheckpointError unless the folder's tokenizer has the pieces, numbers and merges of the host's.

    `bundled` is the path of the host's tokenizer folder. Tokens that only the host's tokenizer has are no difference:
    they are special ones, which the host's own prompts do not hold; nor are, without `added`, those added to the
    folder's.
    """
    asked = _digest(Path(source.folder)), bundled, added
    if asked in _SAME:
        return
    own, theirs = read(Path(source.folder)), read(Path(host.bundled_tokenizer(*bundled)))
    if own is None or theirs is None:
        raise CheckpointError(Text("there is no tokenizer.json, vocab.json, vocab.txt or spiece.model"), source.folder,
                              Text("finish the download of this folder"))
    (pieces, special, merges), (host_pieces, host_added, host_merges) = own, theirs
    everything, host_everything = {**pieces, **special}, {**host_pieces, **host_added}
    other = [piece for piece, number in everything.items() if host_everything.get(piece) != number
             and (added or piece not in special)]
    lost = [piece for piece in host_pieces if piece not in everything and piece not in host_added]
    reordered = [" ".join(a) for a, b in zip(merges, host_merges, strict=False) if a != b]
    if other or lost or reordered or merges and host_merges and len(merges) != len(host_merges):
        kinds = ((other, Text("other pieces")), (lost, Text("missing pieces")), (reordered, Text("other merges")))
        differences = [Text("{count} {kind} ({names})", count=len(names), kind=kind, names=first_ten(map(repr, names)))
                       for names, kind in kinds if names]
        raise CheckpointError(Text("the base has another tokenizer than ComfyUI's text encoder: {differences}",
                                   differences=joined(", ", differences) or Text("another number of merges")),
                              source.folder,
                              Text("use the base's own tokenizer; one of a finetune cannot be put into ComfyUI"))
    _SAME.add(asked)


def _digest(folder: Path) -> bytes:
    """Of the files that `read` may read, names and bytes."""
    found = hashlib.sha256()
    for file in (folder / name for name in FILES):
        if file.is_file():
            found.update(f"{file.name}\0".encode())
            found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.digest()


def sentencepiece(source: Source, name: str) -> dict[str, Tensor]:
    """The folder's SentencePiece model, U8 [bytes]: the host takes its tokenizer from there.

    Raises CheckpointError when there is none; tokenizer.json is not enough.
    """
    import torch

    path = Path(source.folder, name)
    if not path.is_file():
        raise CheckpointError(Text("the tokenizer has no {name}, from which ComfyUI makes its own", name=name),
                              source.folder,
                              Text("finish the download of this folder; tokenizer.json alone is not enough"))
    return {"spiece_model": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)}


def read(folder: Path) -> tuple[dict[str, int], dict[str, int], Merges] | None:
    """Pieces, added tokens (both piece -> number) and merges of a tokenizer folder; None where it holds none of the
    forms: tokenizer.json, vocab.json with merges.txt, BERT's vocab.txt, a SentencePiece model. Raises CheckpointError
    for a damaged file."""
    try:
        if (folder / "tokenizer.json").is_file():
            return _from_tokenizer_json(read_json(str(folder / "tokenizer.json")))
        if (folder / "vocab.json").is_file():
            return _from_vocab_json(folder)
        if (folder / "vocab.txt").is_file():
            return _from_vocab_txt(folder / "vocab.txt")
        for name in SENTENCEPIECE:
            if (folder / name).is_file():
                return _from_sentencepiece(folder / name)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(Text("the tokenizer cannot be read: {error!r}", error=error), folder,
                              Text("download this folder again")) from error
    return None


def _from_tokenizer_json(content: dict[str, Any]) -> tuple[dict[str, int], dict[str, int], Merges]:
    model = content["model"]
    vocab = model["vocab"]
    pieces = vocab if isinstance(vocab, dict) else {entry[0]: number for number, entry in enumerate(vocab)}
    if model.get("type") == "WordPiece":
        pieces = {piece.rstrip(): number for piece, number in pieces.items()}  # as in vocab.txt
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    # written as "a b" by older versions of tokenizers, as ["a", "b"] by newer ones
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model.get("merges") or []]
    return pieces, added, merges


def _from_vocab_json(folder: Path) -> tuple[dict[str, int], dict[str, int], Merges]:
    added: dict[str, int] = {}
    if (folder / "tokenizer_config.json").is_file():
        decoder = read_json(str(folder / "tokenizer_config.json")).get("added_tokens_decoder") or {}
        added = {token["content"]: int(number) for number, token in decoder.items()}
    file = folder / "merges.txt"
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return read_json(str(folder / "vocab.json")), added, merges


def _from_vocab_txt(path: Path) -> tuple[dict[str, int], dict[str, int], Merges]:
    """One piece a line. Text is split at blanks before, so that no piece has any; one library keeps them in this file,
    another does not."""
    with path.open(encoding="utf-8") as lines:
        return {line.rstrip(): number for number, line in enumerate(lines)}, {}, []


def _from_sentencepiece(path: Path) -> tuple[dict[str, int], dict[str, int], Merges]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return {model.id_to_piece(number): number for number in range(model.get_piece_size())}, {}, []
