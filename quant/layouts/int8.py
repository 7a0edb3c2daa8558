"""The host's INT8 layout under a name of this pack's own.

Hosts after 0.30 send a weight whose layout is called "TensorWiseINT8Layout" straight to comfy-kitchen where an
activation comes before the layer (comfy.ops.linear_input_act: the feed-forwards of Wan and LTX), past the Linear's
forward. What is to be multiplied otherwise (dequantized, or by an Ascend backend) must not have that name. Bytes,
markers and saved files are the host's all the same.
"""

from __future__ import annotations

from typing import Any

from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, TensorWiseINT8Layout, register_layout_class

from ..layout_names import INT8, OWN_INT8
from .tiled import as_parameter


class OwnINT8Layout(QuantizedLayout):
    """Weights as TensorWiseINT8Layout holds them. No operation is registered for it, nor any shortcut inherited: a
    matmul that linear.py does not send to a kernel is one of the dequantized weight."""

    Params = TensorWiseINT8Layout.Params
    quantize = TensorWiseINT8Layout.quantize
    dequantize = TensorWiseINT8Layout.dequantize
    get_plain_tensors = TensorWiseINT8Layout.get_plain_tensors
    state_dict_tensors = TensorWiseINT8Layout.state_dict_tensors
    requantize_kwargs = TensorWiseINT8Layout.requantize_kwargs

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        return False


def renamed(weight: Any) -> Any:
    """An INT8 weight of the host's (a torch Parameter) under this pack's name, on the same bytes; others as they are.
    """
    if not isinstance(weight, QuantizedTensor) or weight._layout_cls != INT8:
        return weight
    return as_parameter(QuantizedTensor(weight._qdata, OWN_INT8, weight._params))


def host_named(weight: Any) -> Any:
    """The other way round."""
    if not isinstance(weight, QuantizedTensor) or weight._layout_cls != OWN_INT8:
        return weight
    return as_parameter(QuantizedTensor(weight._qdata, INT8, weight._params))


register_layout_class(OWN_INT8, OwnINT8Layout)
