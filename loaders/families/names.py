"""What writers call tensors that others call otherwise, and what they leave in a file that is no transformer's.

Families that read layer by layer call `adopt` first: from then on a checkpoint's tensors go by the names that this pack
and ComfyUI know. Sources: ComfyUI's comfy/utils.py (convert_old_quants) for its first scaled FP8; the prefixes that
torch.compile, DDP and savers of whole pipelines leave; files as they are published (docs/formats/fp8.md).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from math import prod
from typing import NamedTuple

from ...host.texts import Text
from ..architectures import ARCHITECTURES
from ..architectures.passthrough import PREFIXES as WHOLES
from ..containers.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..words import first_ten

WHOLE = "model.diffusion_model."  # the transformer's in a checkpoint that ComfyUI saves whole
PREFIXES = ("module.", "_orig_mod.", "diffusion_model.", "transformer.", "model.", "net.")  # in any order
LEAVES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
MARK = "scaled_fp8"  # of a whole file: of two elements where it asks for full-precision matmul

_REST = "model."  # the host's for all others (AuraFlow, Hunyuan3D 2); too common to count without known parts beside it

# Beside a transformer under WHOLE; and wherever they are. Pattern -> what it is.
TEXTS, PICTURES = Text("text encoders"), Text("a VAE")
_BESIDE = {r"^(text_encoders?|cond_stage_model|conditioner)\.": TEXTS,
           r"^(vae|first_stage_model|pretransform\.model)\.": PICTURES}
# Beside it, too, but of the model (comfy/supported_models.py, `get_model`): Stable Audio's embedders, Stable Zero123's
# projection, and what SDXL is to predict.
_TAKEN = re.compile(r"^conditioner\.conditioners\.(seconds_(start|total)\.|prompt\.padding_embedding$)|^cc_projection\."
                    r"|^(v_pred|ztsnr|edm_mean|edm_std|edm_vpred\.sigma_(max|min))$")
# Of Lumina 2 and Z-Image (cap_embedder); others have one of this name.
_UNUSED = Text("a norm that the model does not use")
_LEFTOVERS = {
    r"^(model_ema|ema)\.": Text("an EMA copy"),
    r"(^|\.)(global_step|num_batches_tracked)$": Text("counters of a training"),
    r"^(?=.*\.weight$).*?\.(lora_[AB]|lora_up|lora_down)\.|\.lora_alpha$": Text("a LoRA that was not merged"),
    r"\.(weight|input|output|[qkv]_bmm|softmax)_quantizer\.|\.[kv]_scale$": Text("state of a quantizer"),
    r"(^|\.)norm_final\.weight$": _UNUSED}
# One of these is in every name that any of the above is about: searching for words is a scan in C for each.
_WORDS = ("text_encoder", "_stage_model.", "conditioner.", "vae.", "pretransform.", "ema.", "global_step",
          "num_batches_tracked", "lora_", "_quantizer.", "k_scale", "v_scale", "norm_final.weight", MARK, *LEAVES)


class Names(NamedTuple):
    """`notes` for the report. `marked`: there was a mark of ComfyUI's first scaled FP8, which `full_precision` asks for
    full-precision matmul. `renamed` are the layers whose scales had that format's names."""

    notes: tuple[str, ...] = ()
    marked: bool = False
    full_precision: bool = False
    renamed: frozenset[str] = frozenset()


NOTHING = Names()


def adopt(checkpoint: Checkpoint) -> Names:
    """Let a checkpoint's tensors go by known names, and leave out what is known to be foreign.

    Raises CheckpointError for two tensors that come out with one name.
    """
    stored = checkpoint.stored_tensors
    text = "\n".join(("", *stored))
    prefix_of_whole = "" if checkpoint.settled else whole(stored, text)
    if not prefix_of_whole and not any(word in text for word in _WORDS) and (
            checkpoint.settled or not _prefix(list(stored))):
        return NOTHING
    left = _foreign(stored, prefix_of_whole or WHOLE)
    known = {name for names in left.values() for name in names}
    taken = [name for name in stored if prefix_of_whole and _TAKEN.search(name)]
    others = [name for name in stored if prefix_of_whole and not name.startswith(prefix_of_whole)
              and name not in known and name != MARK and name not in taken]
    left |= {Text("other parts of a whole checkpoint"): others} if others else {}
    notes = [Text("left out, as no part of the transformer: {what} ({count} tensors: {names})", what=what,
                  count=len(names), names=first_ten(names)) for what, names in left.items()]
    gone = {name for names in left.values() for name in names}
    kept = [name for name in stored if name not in gone]
    prefix = prefix_of_whole if taken else "" if checkpoint.settled else _prefix(kept)
    if prefix and any(architecture.naming(kept) for architecture in ARCHITECTURES):
        prefix = ""  # one that an architecture's files are published with
    if prefix and not taken:
        notes.append(Text("all names begin with {prefix!r}, which is taken away", prefix=prefix))
    marks = [name for name in kept if name.removeprefix(prefix).removeprefix(WHOLE) == MARK
             and prod(stored[name].shape) <= 2]
    aliases: dict[str, str] = {}
    renamed = set()
    for name in kept:
        if name in marks:
            continue
        called = name.removeprefix(prefix)
        module, dot, leaf = called.rpartition(".")
        if leaf in LEAVES:
            renamed.add(module)
            called = f"{module}{dot}{LEAVES[leaf]}"
        if called in aliases:
            raise CheckpointError(Text("{name} and {other} say the same twice", name=aliases[called], other=name),
                                  checkpoint.source.reference,
                                  Text("download it again, or report it to its publisher"))
        aliases[called] = name
    checkpoint.call(aliases)
    full = any(prod(stored[name].shape) == 2 for name in marks)
    return Names(tuple(notes), bool(marks), full, frozenset(renamed))


def whole(names: Collection[str], text: str = "") -> str:
    """The transformer's prefix in a whole checkpoint, which has other parts, too; else "". As the host counts.

    `text` are the names as lines, an empty one first, where the caller has them.
    """
    text = text or "\n".join(("", *names))
    found = next((prefix for prefix in WHOLES if 5 < text.count(f"\n{prefix}") < len(names)), "")
    if found or not 5 < text.count(f"\n{_REST}") < len(names):
        return found
    others = [name for name in names if not name.startswith(_REST)]
    return _REST if all(any(re.search(part, name) for part in _BESIDE) for name in others) else ""


def beside(names: Collection[str]) -> dict[str, list[str]]:
    """The names in a whole checkpoint that are TEXTS and PICTURES."""
    found = _foreign(names, whole(names))
    return {what: found[what] for what in (TEXTS, PICTURES) if what in found}


def _foreign(names: Collection[str], prefix: str) -> dict[str, list[str]]:
    """What is foreign -> the stored names of it. `prefix` is the transformer's where there are other parts."""
    whole = any(name.startswith(prefix) for name in names)
    found: dict[str, list[str]] = {}
    used = not any("cap_embedder." in name for name in names)
    for name in names:
        known = _LEFTOVERS | (_BESIDE if whole and not name.startswith(prefix) and not _TAKEN.search(name) else {})
        what = next((what for pattern, what in known.items() if re.search(pattern, name)), "")
        if what and not (what == _UNUSED and used):
            found.setdefault(what, []).append(name)
    return found


def _prefix(names: list[str]) -> str:
    """What all names begin with and no architecture knows, dot included."""
    found = ""
    while names:
        rest = names[0][len(found):]
        step = next((p for p in PREFIXES if rest.startswith(p) and not rest.startswith(WHOLE)), "")
        if not step or not all(name.startswith(found + step) for name in names):
            return found
        found += step
    return found
