"""What a native kernel refuses or throws is answered by the exact path, and said once.

A kernel says no by whatever its library raises: torch's scaled matmuls by ValueError since 2.12 and by RuntimeError
before, comfy-kitchen by NoCapableBackendError (a RuntimeError), a missing operator by NotImplementedError (one, too),
an argument that it does not take by TypeError. The exact path is the codec's definition: the weight dequantized.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, dequantize_args

REFUSALS = (RuntimeError, TypeError, ValueError)
logger = logging.getLogger(__name__)
_said: set[tuple[str, type]] = set()


def or_exact(native: Callable[[], torch.Tensor], exact: Callable[[], torch.Tensor], what: str) -> torch.Tensor:
    """`native()`, or `exact()` where that raises; the first time it does is logged as a warning.

    `what` names the multiply ("MXFP8", "SVDQuant int4 by comfy-kitchen"); its every kind of refusal is said once a
    process. Raises what `exact` raises, so that wrong shapes stay errors; and memory that ran out goes to the host,
    which makes room and tries again.
    """
    try:
        return native()
    except REFUSALS as error:
        from .. import host

        if host.is_out_of_memory(error):
            raise
        refusal = error
    out = exact()
    if (what, type(refusal)) not in _said:
        _said.add((what, type(refusal)))
        text = str(refusal).partition("\n")[0]
        logger.warning("%s: the native kernel does not take this (%s: %s); such layers are multiplied with dequantized "
                       "weights, exactly but slower", what, type(refusal).__name__, text)
    return out


def with_exact_answers(operations: Any) -> Any:
    """Subclass the host's mixed-precision `operations` (a class) with a Linear whose quantized weights always multiply.

    Nothing but the answer to a refusal is new: loading, forward, LoRA, offload and save are the host's. Every other
    Linear of this pack is made on top of this one; operations that have it already are given back.
    """
    if getattr(operations, "answers_refusals", False):
        return operations

    class Linear(operations.Linear):
        def forward(self, input, *args, **kwargs):
            native = super().forward
            if not isinstance(self.weight, QuantizedTensor):
                return native(input, *args, **kwargs)
            # For what comes before the matmul, as quantizing the activation; the matmul itself is answered below, where
            # the host still knows which memory to give back.
            return or_exact(lambda: native(input, *args, **kwargs),
                            lambda: self.forward_comfy_cast_weights(input, input.dtype), self._what())

        def _forward(self, input, weight, bias):
            native = super()._forward
            if not isinstance(weight, QuantizedTensor):
                return native(input, weight, bias)
            if (self._full_precision_mm or self._full_precision_mm_config) and not isinstance(input, QuantizedTensor):
                # The host leaves this to the layout, and its integer ones multiply quantized all the same.
                return native(input, weight.dequantize(), bias)
            return or_exact(lambda: native(input, weight, bias),
                            lambda: torch.nn.functional.linear(*dequantize_args((input, weight, bias))), self._what())

        def _what(self) -> str:
            return str(getattr(self, "quant_format", None) or type(self.weight).__name__)

    return type("ExactOperations", (operations,), {"Linear": Linear, "answers_refusals": True})
