"""The host's mixed-precision operations, plus Linears of this pack's SVDQuant layout (parts.py says what is stored)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear as matmul

from ..exact import with_exact_answers
from . import lora, run  # noqa: F401  (run registers the layout's matmuls)
from .held import Held, natural
from .layout import (
    SVDQuantLayout,
    check_held,
    codes_of,
    held_parts,
    is_svdquant,
    parameter,
    params_fields,
    plain_shift,
    residual,
)
from .parts import FIELDS, FORMAT, Place, check_tiling, leaf_name, marker, read_marker, stored_fields

BACKENDS = ("comfy_kitchen", "nunchaku", "dequantize")


def with_svdquant(operations: Any, backend: str, loaded: Callable[[], None] = lambda: None) -> Any:
    """Subclass the host's mixed-precision `operations` (a class) with a Linear that also loads SVDQuant parts.

    `backend` is one of BACKENDS, as backends.choose_backend gives it. Other layers go to `operations`. `loaded` is
    called whenever a Linear has its tensors. Loading raises ValueError for a back end or tensors that do not fit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{backend!r} is no SVDQuant back end, expected one of {', '.join(BACKENDS)}")
    operations = with_exact_answers(operations)

    class Linear(operations.Linear):
        awaits_patches = False  # the host has patched the weight, and lora.on_load is to put the patches in
        kept_factors: Any = None
        weight_function: list[Any]

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                  error_msgs):
            rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            stored = state_dict.get(f"{prefix}comfy_quant")
            places = read_marker(stored) if stored is not None else None
            if places is None:
                super()._load_from_state_dict(state_dict, prefix, *rest)
                loaded()
                return
            del state_dict[f"{prefix}comfy_quant"]
            device, dtype = self.factory_kwargs["device"], self.factory_kwargs["dtype"]
            own = "dequantize" if self._full_precision_mm else backend
            parts = read_parts(state_dict, prefix, places, tuple(self._orig_shape), own)
            parts = [held.apply(lambda tensor: tensor.to(device=device)) for held in parts]
            delta = state_dict.pop(f"{prefix}weight_delta", None)
            self.weight = parameter(parts[0].codes, SVDQuantLayout.Params(
                orig_dtype=dtype, orig_shape=tuple(self._orig_shape), backend=own,
                native_fp4="nvfp4" not in self._disabled_formats,
                delta=delta if delta is None else delta.to(device=device), **params_fields(parts)))
            self.quant_format = FORMAT
            missing: list[str] = []
            torch.nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing,
                                                  unexpected_keys, error_msgs)
            missing_keys.extend(key for key in missing if key != f"{prefix}weight")
            loaded()

        def __deepcopy__(self, memo):
            if is_svdquant(self.weight):  # torch wants to copy a storage that quantized tensors do not have
                memo[id(self.weight)] = torch.nn.Parameter(self.weight.clone(), requires_grad=False)
            new = memo[id(self)] = type(self).__new__(type(self))
            new.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return new

        def state_dict(self, *args, destination=None, prefix="", **kwargs):
            sd = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
            if is_svdquant(self.weight):
                sd[f"{prefix}comfy_quant"] = marker(self.weight._params.places)
                # Patches beside the weight get into the file as it is written (set_weight), but the host asks for the
                # sizes ahead. Meta tensors have no content that could be mistaken for the patched one.
                found = lora.factors(self._beside(), self.weight.shape)
                for field, tensor in (lora.longer_pairs(self.weight, found) if found else {}).items():
                    sd[f"{prefix}weight_{field}"] = tensor
            return sd

        def _functions(self) -> list[Any]:
            first = getattr(self, "weight_lowvram_function", None)
            return [*([] if first is None else [first]), *self.weight_function]

        def _beside(self) -> list[tuple]:
            """The patches that the host has left beside the weight."""
            return [patch for f in lora.pending(self._functions()) for patch in lora.patches_of(f)]

        def forward_comfy_cast_weights(self, input, *args, **kwargs):
            if not is_svdquant(self.weight):
                return super().forward_comfy_cast_weights(input, *args, **kwargs)
            if self.awaits_patches:
                raise RuntimeError("A LoRA was put on SVDQuant weights by something that is not the host's model "
                                   "loading. Use the LoRA nodes of ComfyUI on the MODEL of the Nunchaku loader.")
            functions = self._functions()
            weight, bias, done = self._fetch(input)
            try:
                if not functions:
                    return matmul(input, weight, bias)
                if len(lora.pending(functions)) < len(functions):  # others want to see the weight
                    return self._dense(input, weight, bias, functions)
                return self._patched(input, weight, bias, functions)
            finally:
                done(weight, bias)

        def _fetch(self, input: torch.Tensor) -> tuple[Any, Any, Any]:
            """Weight and bias on the device of `input`, the weight as it is: left to itself the host would dequantize
            it for its patches. And what to call after use."""
            from ... import host

            functions, first = self.weight_function, getattr(self, "weight_lowvram_function", None)
            if not functions and first is None:
                return host.fetch_weight(self, input)
            self.weight_function, self.weight_lowvram_function = [], None
            try:
                return host.fetch_weight(self, input)
            finally:
                self.weight_function, self.weight_lowvram_function = functions, first

        def _patched(self, input, weight, bias, functions):
            out = matmul(input, weight, bias)
            patches = self._beside()
            found = lora.factors(patches, weight.shape)
            if found is None:
                key = functions[0].key
                return out + matmul(input, lora.delta(weight, patches, key).to(input.dtype))
            return lora.side(input, out, self._on_device(input, found, functions))

        def _on_device(self, input, found, functions):
            """The factors where they are used. Kept there under dynamic VRAM, which makes room by itself."""
            if not hasattr(self, "_v") or any(f.prepared_patches is not None for f in functions):
                return [factor.to(input.device, input.dtype) for factor in found]
            key = (*(id(f) for f in functions), input.device, input.dtype)
            kept = self.kept_factors
            if kept is None or kept[0] != key:  # the functions are kept as well, so that no other gets their id
                kept = self.kept_factors = (key, functions, [f.to(input.device, input.dtype) for f in found])
            return kept[2]

        def _dense(self, input, weight, bias, functions):
            dense = weight.dequantize().to(input.dtype)
            for function in functions:
                dense = function(dense)
            return matmul(input, dense, plain_bias(weight, bias))

        def convert_weight(self, weight, inplace=False, **kwargs):
            if not is_svdquant(weight):
                return super().convert_weight(weight, inplace=inplace, **kwargs)
            from ... import host

            # Patching goes by lora.py, so what the host computes with this is thrown away: let it cost nothing.
            # Others (model merges) do want the weight.
            if host.is_patching(sys._getframe(1).f_code):
                return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            return weight.dequantize()

        def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
            if not is_svdquant(self.weight):
                return super().set_weight(weight, inplace_update=inplace_update, seed=seed,
                                          return_weight=return_weight, **kwargs)
            if inplace_update:
                raise NotImplementedError("LoRA hooks (scheduled LoRAs) do not work on SVDQuant weights; use the LoRA "
                                          "nodes without hooks")
            if not weight.is_meta:
                own = self.weight.to(weight.device)
                new = lora.add_delta(own, (weight.float() - own.dequantize().float()).to(own.dtype))
            elif return_weight:
                patches = self._beside()
                if patches and lora.factors(patches, self.weight.shape) is None:
                    raise NotImplementedError("Saving an SVDQuant model with patches that are no plain LoRA needs all "
                                              "of it in VRAM; take those patches off, or save without them")
                new = lora.patched(self.weight, patches, "weight") if patches else self.weight
            else:
                self.awaits_patches = True
                return None
            if return_weight:
                return new
            self.weight = new
            return None

    return type("SVDQuantOperations", (operations,), {"Linear": Linear})


def plain_bias(weight: Any, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The bias that goes with the dequantized weight: that of unsigned parts is corrected
    (docs/sources/nunchaku.md, "Unsigned activations")."""
    params = weight._params
    parts = [natural(held) for held in held_parts(weight._qdata, params)]
    if not any(part.unsigned for part in parts):
        return bias
    out = torch.zeros(params.orig_shape[0], device=weight.device) if bias is None else bias.float()
    for part in parts:
        if part.unsigned:
            out = out.index_add(0, torch.arange(part.row, part.row + part.rows, device=out.device),
                                plain_shift(residual(part)))
    return out.to(params.orig_dtype if bias is None else bias.dtype)


def read_parts(state_dict: dict[str, Any], prefix: str, places: list[Place], shape: tuple[int, ...],
               backend: str) -> list[Held]:
    """Take the parts that a marker lists out of a state dict, in the order that the back end needs.

    Raises ValueError for missing tensors, wrong dtypes or shapes, or parts that do not tile the weight.
    """
    check_tiling(places, (shape[0], shape[1]))
    parts = []
    for i, place in enumerate(places):
        fields: dict[str, Any] = {field: state_dict.pop(f"{prefix}{leaf_name(field, i)}", None) for field in FIELDS}
        if fields["codes"] is None:
            raise ValueError(f"{prefix}{leaf_name('codes', i)} is missing")
        fields["codes"] = codes_of(fields["codes"], place)
        held = Held(place, **fields)
        check_held(held, f"{prefix.rstrip('.')} (part {i})")
        packs = backend == "nunchaku" and not place.unsigned
        if place.packed and not packs:
            part = natural(held)
            fields = {**dict.fromkeys(FIELDS), **stored_fields(part)}
            held = Held(place._replace(packed=False, alpha=1.0), **fields)
        elif packs and not place.packed:
            from .held import packed

            held = packed(held)
        parts.append(held)
    return parts

