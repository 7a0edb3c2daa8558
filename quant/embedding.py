"""The host's operations for text encoders: embeddings of tiles, and layers that keep the dtype they are stored in.

A quantized embedding is a table that is looked up: only the rows of a prompt are dequantized. Layers that are not
quantized stay as they are in the file: the host would bring all to the one dtype that it computes in, F32 here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from ..host.texts import Text
from .codecs import codec
from .codecs.base import Damage
from .layouts import stored
from .layouts.tiled import is_tiled, parameter, params_of, tiles_of
from .marker import marker
from .scales import FINITE, damage

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def for_texts(operations: Any, dtype: torch.dtype | None) -> Any:
    """Subclass `operations` (of linear.with_tiles_of). Layers that are not quantized come in `dtype`; None: as stored.
    """

    class Linear(operations.Linear):
        factory_kwargs: dict[str, Any]

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            weight, usual = state_dict.get(f"{prefix}weight"), self.factory_kwargs
            if weight is not None and f"{prefix}comfy_quant" not in state_dict and weight.dtype in FLOATS:
                self.factory_kwargs = {**usual, "dtype": dtype or weight.dtype}
            super()._load_from_state_dict(state_dict, prefix, *rest)
            self.factory_kwargs = usual

    class Embedding(operations.Embedding):
        weight: Any
        refuse_rows: Callable[[Damage], None] | None = None  # where scales lie among codes: only rows that are read

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                  error_msgs):
            key, mark = f"{prefix}weight", state_dict.get(f"{prefix}comfy_quant")
            conf = json.loads(mark.numpy().tobytes()) if mark is not None else {}
            if conf.get("format") == stored.FORMAT:
                del state_dict[f"{prefix}comfy_quant"]
                shape = (self.num_embeddings, self.embedding_dim)
                tiles = stored.read(state_dict, prefix, conf, shape)
                if len(tiles) > 1:
                    raise ValueError(Text("{name}: a table of {count} tiles, rows are looked up in one",
                                          name=prefix.rstrip("."), count=len(tiles)))
                tiles = [tile.apply(self._placed) for tile in tiles]
                self.weight = parameter(*params_of(tiles, torch.float32, shape))
                self.quant_format = stored.FORMAT
            elif not conf and key in state_dict and state_dict[key].dtype in FLOATS:
                weight = state_dict.pop(key)
                if tuple(weight.shape) != (self.num_embeddings, self.embedding_dim):
                    raise ValueError(Text("size mismatch for {name}: {shape}", name=key, shape=list(weight.shape)))
                self.weight = torch.nn.Parameter(self._placed(weight.to(dtype or weight.dtype)), requires_grad=False)
            else:
                super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys,
                                              unexpected_keys, error_msgs)

        def _placed(self, tensor):
            """On the device that the host made the layer on, if it made it anywhere."""
            return tensor if self.weight.is_meta else tensor.to(self.weight.device)

        def state_dict(self, *args, destination=None, prefix="", **kwargs):
            sd = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
            if is_tiled(self.weight):
                sd[f"{prefix}comfy_quant"] = marker(stored.conf_of(tiles_of(self.weight)))
            return sd

        def forward_comfy_cast_weights(self, input, out_dtype=None):
            if not is_tiled(self.weight) or self.weight_function:
                return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)
            from .. import host

            weight, _, done = host.fetch_weight(self, torch.empty(0, device=input.device))
            try:
                tile, = tiles_of(weight)
                rows = codec(tile.place.codec).looked_up(tile, input.reshape(-1), torch.float32)
                if self.refuse_rows is not None and (found := damage(rows, FINITE)):
                    self.refuse_rows(Damage("codes", found, FINITE))
                return rows.view(*input.shape, -1).to(out_dtype or torch.float32)
            finally:
                done(weight, None)

    return type("TextOperations", (operations,), {"Linear": Linear, "Embedding": Embedding})
