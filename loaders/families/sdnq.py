"""SDNQ's folders (Disty0's and others'): `quant_method: sdnq` in config.json. A layer's type and groups follow from its
tensors and the lists of types in the configuration (quant/packed/sdnq.py), as several types have the same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import translate
from typing import Any

from ...host.texts import Text
from ...quant.packed.sdnq import TYPES, bits_of, format_of
from ..containers.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..patterns import refuse_long, refuse_many
from ..plan import Group
from . import repos
from .declarations import claims
from .packed import Packed, PackedFamily

_REFUSED = ("use_hadamard", "use_codebook", "modules_quant_config")  # what would change the numbers


class SDNQFamily(PackedFamily):
    """See base.Family and packed.PackedFamily."""

    name = "sdnq"
    title = "SDNQ"
    words = {"sdnq": "SDNQ"}
    published = repos.SDNQ

    def usual_formats(self, reference: str) -> tuple[str, ...]:
        return ("UINT4 (groups)",)

    def recognise(self, checkpoint: Checkpoint) -> bool:
        return claims(checkpoint)[0].get("quant_method") == "sdnq"

    def layers(self, checkpoint: Checkpoint, claimed: Mapping[str, Any], groups: Mapping[str, Group],
               notes: list[str]) -> dict[str, Packed]:
        where, asked = checkpoint.source.reference, [key for key in _REFUSED if claimed.get(key)]
        default, lists = str(claimed.get("weights_dtype")).lower(), _lists(claimed, where)
        types = {default, *(_type(key, default) or default for key in lists)}
        if asked or types - set(TYPES):
            raise CheckpointError(Text("SDNQ's {names}, which this version does not load",
                                       names=", ".join([*sorted(types - set(TYPES)), *asked])), where,
                                  Text("take another checkpoint of this model; supported: {types}, with or without SVD",
                                       types=", ".join(TYPES)))
        found = {}
        refuse_many(sum(map(len, lists.values())), len(groups), where)
        refuse_long([one for wanted in lists.values() for one in wanted], where)
        listed = {key: [_listed(one) for one in wanted] for key, wanted in lists.items()}
        for name, leaves in groups.items():
            if {"weight", "scale"} <= leaves.keys():
                stored = checkpoint.in_file(f"{name}.weight")
                said = (_type(key, default) for key, wanted in listed.items() if any(one(stored) for one in wanted))
                fmt = format_of(leaves, next(filter(None, said), default), frozenset(types))
                found[name] = Packed(None, problem=fmt) if isinstance(fmt, str) else Packed(fmt, fmt.shape(leaves))
        return found


def _lists(claimed: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    """modules_dtype_dict: a type, or a least number of bits -> what layers of it are called."""
    lists = claimed.get("modules_dtype_dict") or {}
    if not isinstance(lists, dict) or not all(isinstance(names, (str, list)) for names in lists.values()):
        raise CheckpointError(Text("modules_dtype_dict is no object of types and lists of names"), where,
                              Text("download config.json again"))
    return {key: [str(name) for name in ([names] if isinstance(names, str) else names)] for key, names in lists.items()}


def _type(key: str, default: str) -> str:
    """A layer's type by the key of its list in modules_dtype_dict, and the type of all others; "" where the key is a
    least number of bits, such as minimum_6bit, that the others have, too (sdnq/utils.py, `get_minimum_dtype`)."""
    key = key.lower()
    least = re.fullmatch(r"(?:minimum[-_]?)?(u?)(?:int)?(\d+)(?:[-_]?bits?)?", key)
    if not least or not (key.startswith("minimum") or key.endswith(("bit", "bits"))):
        return key
    bits = int(least[2])
    if default not in TYPES or bits_of(default) >= bits:
        return ""
    return f"{'u' if least[1] or bits <= 4 else ''}int{bits}"


def _listed(wanted: str) -> Callable[[str], object]:
    """Whether a stored name is meant by one of a list: its start, after a point, one of its parts, the whole of it, or
    a pattern (sdnq/utils.py, `check_param_name_in`)."""
    if wanted.startswith("."):
        return lambda name: name.startswith(wanted[1:])
    if "*" not in wanted:
        return lambda name: name == wanted or wanted in name.split(".")
    # there as an expression, in which a point is any character but before a star
    signs = {".*": ".*", ".": "?", "?": "[?]", "[": "[[]"}
    return re.compile(translate(re.sub(r"\.\*|.", lambda part: signs.get(part[0], part[0]), wanted) + "*")).match


FAMILY = SDNQFamily()
