"""The host's mixed-precision operations, plus loading of this pack's row shards.

Only the load branch of Linear is new; formats of the host go to the host's own code, so mixed checkpoints work, and
forward, LoRA, offload and save are inherited.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor

from .exact import with_exact_answers
from .row_shards import FP8_NAME, NVFP4_NAME, RowShardsLayout, shard_fields
from .shards import BLOCK_LEAVES, ROW_SHARDS, SHARD_LEAVES


def with_row_shards(operations: Any, nvfp4_layout: str = NVFP4_NAME) -> Any:
    """Subclass the host's mixed-precision `operations` (a class) with a Linear that also loads row shards.

    `nvfp4_layout` names the layout of shards that are all NVFP4 (row_shards.py's, or one of flashinfer_fp4.py).
    Keys of such a layer: weight and weight_shard_1.. (rows in order), weight_scale F32 [shards], weight_block_0.. for
    NVFP4 shards, comfy_quant with format "qt.row_shards", optional input_scale and bias.
    """
    operations = with_exact_answers(operations)

    class Linear(operations.Linear):
        def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                  error_msgs):
            rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            marker = state_dict.get(f"{prefix}comfy_quant")
            conf = json.loads(marker.numpy().tobytes()) if marker is not None else {}
            if conf.get("format") != ROW_SHARDS:
                super()._load_from_state_dict(state_dict, prefix, *rest)
                return
            device, dtype = self.factory_kwargs["device"], self.factory_kwargs["dtype"]
            keys = [f"{prefix}{leaf}" for leaf in ("weight", *SHARD_LEAVES)]
            data = [state_dict.pop(key).to(device=device) for key in keys if key in state_dict]
            blocks = [state_dict.pop(f"{prefix}{leaf}", None) for leaf in BLOCK_LEAVES[:len(data)]]
            blocks = [block if block is None else block.to(device=device) for block in blocks]
            scale = state_dict.pop(f"{prefix}weight_scale").to(device=device)
            del state_dict[f"{prefix}comfy_quant"]
            params = RowShardsLayout.Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(self._orig_shape),
                                            **shard_fields(data, blocks))
            nvfp4 = all(block is not None for block in blocks)
            name = nvfp4_layout if nvfp4 else FP8_NAME
            weight = QuantizedTensor(data[0], name, params)
            # What torch.nn.Parameter() does for tensor subclasses, less the detach(): kitchen's detach clones every
            # tensor in Params, which would copy three quarters of the memory-mapped weight.
            weight._is_param = True
            self.weight = weight
            self.quant_format, self.layout_type = ROW_SHARDS, name
            self._full_precision_mm_config = bool(conf.get("full_precision_matrix_mult"))
            # Where the host has disabled its own GEMM of this kind, ours is disabled too.
            kind = "nvfp4" if nvfp4 else "float8_e4m3fn"
            self._full_precision_mm: bool = (self._full_precision_mm or self._full_precision_mm_config
                                             or kind in self._disabled_formats)
            input_scale = state_dict.pop(f"{prefix}input_scale", None)
            if input_scale is not None:
                self.register_parameter("input_scale", torch.nn.Parameter(input_scale.to(device=device),
                                                                          requires_grad=False))
            missing: list[str] = []
            torch.nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing,
                                                  unexpected_keys, error_msgs)
            read = {f"{prefix}weight", f"{prefix}input_scale"}
            missing_keys.extend(key for key in missing if key not in read)

    return type("RowShardOperations", (operations,), {"Linear": Linear})
