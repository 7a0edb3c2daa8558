"""The host's mixed-precision operations, plus loading of this pack's Ascend layout, multiplied by a chosen backend.

Layers in the host's own formats load by the host's own code. On the backend "comfy_kitchen" they also run there; the
others ("reference", "torch_npu") take them too, because the host quantizes activations by other rules than an NPU.

LoRA and other patches take the host's ordinary path: dequantize, patch, and where that is meaningful quantize again.
4-bit weights are not: a patch is mostly smaller than their step, so a patched layer stays in the compute dtype until it
is unpatched. The host's dynamic VRAM and its save nodes do requantize them (stochastic rounding), as they must keep the
format. A layer whose patch the host applies at run time is multiplied dequantized.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..exact import or_exact, with_exact_answers
from .backends import Backend, get_backend
from .int8 import renamed
from .kinds import KINDS, MARKER
from .layout import NAME, AscendLayout, as_ascend
from .native import OWN_LEAVES

FOUR_BIT = ("int4", "mxfp4", "mxfp4_dual")


def with_ascend(operations: Any, backend: str | Backend = "comfy_kitchen") -> Any:
    """Subclass the host's mixed-precision `operations` (a class) with a Linear that also loads Ascend layers.

    Keys of such a layer: weight, weight_scale, optional weight_<field> of AscendLayout.Params, optional bias, and
    comfy_quant with format "qt.ascend.<kind>". `backend` is a name of backends.BACKENDS, or one of its objects.
    """
    operations = with_exact_answers(operations)
    run = get_backend(backend) if isinstance(backend, str) else backend

    class Linear(operations.Linear):
        weight: Any
        _full_precision_mm_config: bool

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                  error_msgs):
            rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            marker = state_dict.get(f"{prefix}comfy_quant")
            conf = json.loads(marker.numpy().tobytes()) if marker is not None else {}
            kind = str(conf.get("format")).removeprefix(MARKER)
            if not str(conf.get("format")).startswith(MARKER):
                super()._load_from_state_dict(state_dict, prefix, *rest)
                if run.takes_host_layouts or self._full_precision_mm or self._full_precision_mm_config:
                    self.weight = renamed(self.weight)  # or the host may multiply it past this Linear
                return
            if kind not in KINDS:
                error_msgs.append(f"{prefix}comfy_quant says {conf['format']!r}, which this version does not know")
                return
            device, dtype = self.factory_kwargs["device"], self.factory_kwargs["dtype"]
            del state_dict[f"{prefix}comfy_quant"]
            data = state_dict.pop(f"{prefix}weight").to(device=device)
            own = {leaf: state_dict.pop(f"{prefix}weight_{leaf}").to(device=device) for leaf in OWN_LEAVES
                   if f"{prefix}weight_{leaf}" in state_dict}
            if "bias" in own:  # as the layer itself will hold it, so that the two cancel exactly
                own["bias"] = own["bias"].to(dtype)
            params = AscendLayout.Params(kind=kind, orig_dtype=dtype, orig_shape=tuple(self._orig_shape), **own)
            weight = QuantizedTensor(data, NAME, params)
            weight._is_param = True  # a torch Parameter, less the clone of every tensor in Params
            self.weight = weight
            self.quant_format, self.layout_type = f"{MARKER}{kind}", NAME
            self._full_precision_mm_config = bool(conf.get("full_precision_matrix_mult"))
            missing: list[str] = []
            torch.nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing,
                                                  unexpected_keys, error_msgs)
            missing_keys.extend(key for key in missing if key != f"{prefix}weight")

        def _takes(self, x: torch.Tensor) -> bool:
            """Whether this layer's multiply is the backend's: quantized, unpatched, and not asked for otherwise."""
            own = getattr(self, "layout_type", None) == NAME
            return ((own or run.takes_host_layouts) and isinstance(x, torch.Tensor)
                    and not isinstance(x, QuantizedTensor) and not x.requires_grad
                    and not self._full_precision_mm_config and not operations._full_precision_mm
                    and not getattr(self, "comfy_force_cast_weights", False)
                    and not self.weight_function and not self.bias_function and as_ascend(self.weight) is not None)

        def forward(self, input, *args, **kwargs):
            if self._takes(input):
                return self.forward_comfy_cast_weights(input, input.dtype, weight_only_quant=True)
            if getattr(self, "layout_type", None) == NAME:  # the host would quantize the activation by the layout
                return self.forward_comfy_cast_weights(input, input.dtype)
            return super().forward(input, *args, **kwargs)

        def _forward(self, input, weight, bias):
            found = as_ascend(weight)
            if found is None or not self._takes(input):
                return super()._forward(input, weight, bias)
            native = super()._forward

            def multiply() -> torch.Tensor:
                out = run.linear(input.reshape(-1, input.shape[-1]), *found, bias)
                return out.reshape(*input.shape[:-1], out.shape[-1])

            return or_exact(multiply, lambda: native(input, weight.dequantize(), bias),
                            f"{found[1].kind.upper()} by {run.name}")

        def __deepcopy__(self, memo):  # torch cannot deepcopy a QuantizedTensor
            if isinstance(self.weight, QuantizedTensor):
                twin = memo[id(self.weight)] = self.weight.clone()
                twin._is_param = True
            new = memo[id(self)] = self.__class__.__new__(self.__class__)
            new.__dict__ = copy.deepcopy(self.__dict__, memo)
            return new

        def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
            held = self.weight
            quantized = isinstance(held, QuantizedTensor)
            four_bit = quantized and held._layout_cls == NAME and KINDS[held._params.kind].codec in FOUR_BIT
            if getattr(self, "layout_type", None) == NAME and (not quantized or four_bit and not return_weight):
                weight = weight.to(held.dtype)
                if not return_weight:
                    self.weight = torch.nn.Parameter(weight, requires_grad=False)
                return weight if return_weight else None
            return super().set_weight(weight, inplace_update=inplace_update, seed=seed, return_weight=return_weight,
                                      **kwargs)

    return type("AscendOperations", (operations,), {"Linear": Linear})
