"""optimum-quanto's and torchao's folders, as diffusers saves them: 8-bit weights with a scale a row
(quant/packed/rows.py), and quanto's of 2 and 4 bits (quant/packed/quanto.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...host.texts import Text
from ...quant.packed import quanto
from ...quant.packed.rows import Rows
from ..containers.checkpoint import Checkpoint
from ..plan import Group
from .packed import Packed, PackedFamily

_OF_QUANTO = {"weight._data": "weight", "weight._data._data": "weight", "weight._scale": "weight_scale",
              "weight._shift": "weight_shift"}
_OF_TORCHAO = {"_weight_qdata": "weight", "_weight_scale": "weight_scale", "_weight_zero_point": "weight_zero_point"}


class RowsFamily(PackedFamily):
    """See base.Family and packed.PackedFamily."""

    name = "rows"
    title = "optimum-quanto, torchao"
    words = {"rows": "quanto, torchao"}
    leaves = {**_OF_QUANTO, **_OF_TORCHAO}

    def recognise(self, checkpoint: Checkpoint) -> bool:
        ends = (".weight._data", ".weight._data._data", "._weight_qdata")
        return any(name.endswith(ends) for name in checkpoint.tensors)

    def layers(self, checkpoint: Checkpoint, claimed: Mapping[str, Any], groups: Mapping[str, Group],
               notes: list[str]) -> dict[str, Packed]:
        found = {}
        for name, leaves in groups.items():
            if "weight" not in leaves or checkpoint.stored(f"{name}.weight") == f"{name}.weight":
                continue
            dtype, shape = leaves["weight"].dtype, tuple(leaves["weight"].shape)
            if "weight_scale" not in leaves:
                found[name] = Packed(None, problem=Text("its scale is missing"))
            elif "weight_shift" in leaves:
                packed = quanto.format_of(leaves)
                found[name] = Packed(None, problem=packed) if isinstance(packed, str) else \
                    Packed(packed, packed.shape(leaves))
            elif dtype not in ("I8", "F8_E4M3") or len(shape) != 2:
                found[name] = Packed(None, problem=Text("{dtype} {shape} codes of optimum-quanto or torchao, of which "
                                                        "this version loads I8 and F8_E4M3 with a scale a row",
                                                        dtype=dtype, shape=list(shape)))
            else:
                found[name] = Packed(Rows(dtype), (shape[0], shape[1]))
        return found


FAMILY = RowsFamily()
