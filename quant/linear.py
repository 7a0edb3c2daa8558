"""The host's mixed-precision operations with the one Linear of this pack: for weights of tiles of any codec.

Layers in the host's own formats load by the host's own code; kernels that take those, too, multiply them here, because
the host quantizes activations by other rules than an NPU.

LoRA and other patches: a weight whose codecs can all be coded again takes the host's ordinary path (dequantize, patch,
quantize), but where 4 bits would lose the patch the layer stays in the compute dtype until it is unpatched. Patches of
a weight that cannot be coded again stay beside it (lora.py). The host's dynamic VRAM and its save nodes do requantize
4-bit weights (stochastic rounding), as they must keep the format.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch.nn.functional import linear as matmul

from . import lora, multiply  # noqa: F401  (multiply registers the layout's matmuls)
from .codecs import codec
from .exact import or_exact, with_exact_answers
from .kernels import kernel
from .kernels.base import Activation
from .layouts import stored
from .layouts.tiled import (
    is_coarse,
    is_tiled,
    parameter,
    params_of,
    patches_stay_beside,
    plain_bias,
    tiles_of,
)
from .marker import marker


def with_tiles_of(operations: Any, kernels: Mapping[str, str] | None = None, *,
                  loaded: Callable[[], None] = lambda: None) -> Any:
    """Subclass the host's mixed-precision `operations` (a class) with a Linear that also loads and runs tiles.

    `kernels` (codec -> kernel of quant.kernels) says who multiplies; a codec that is not in it is dequantized for its
    matmul. A kernel that takes the host's own layouts gets the host's weights of its codecs, too. `loaded` is called
    whenever a Linear has its tensors. Loading raises ValueError for tensors that do not fit.
    """
    operations, chosen = with_exact_answers(operations), dict(kernels or {})
    found = {name: kernel(word) for name, word in chosen.items()}  # raises for one that is none
    of_host = {name: one for name, one in found.items() if one.takes_host_layouts and codec(name).word}

    class Linear(operations.Linear):
        weight: Any
        awaits_patches = False  # the host has patched the weight, and lora.on_load is to put the patches in
        kept_factors: Any = None
        weight_function: list[Any]
        bias_function: list[Any]
        _full_precision_mm_config: bool

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                  error_msgs):
            rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            mark = state_dict.get(f"{prefix}comfy_quant")
            conf = json.loads(mark.numpy().tobytes()) if mark is not None else {}
            if conf.get("format") != stored.FORMAT:
                super()._load_from_state_dict(state_dict, prefix, *rest)
                int8 = any(codec(name).word == "int8_tensorwise" for name in of_host)
                if int8 or self._full_precision_mm or self._full_precision_mm_config:
                    self._own_name()
                loaded()
                return
            del state_dict[f"{prefix}comfy_quant"]
            device, dtype, shape = self.factory_kwargs["device"], self.factory_kwargs["dtype"], tuple(self._orig_shape)
            self._full_precision_mm_config = bool(conf.get("full_precision_matrix_mult"))
            tiles = stored.read(state_dict, prefix, conf, shape)
            names = tuple(self._kernel_of(tile.place.codec) for tile in tiles)
            tiles = [codec(tile.place.codec).loaded(kernel(name).ordered(tile), dtype)
                     for tile, name in zip(tiles, names, strict=True)]
            moved = {id(tensor): tensor.to(device=device) for tile in tiles for tensor in tile.fields.values()}
            tiles = [tile.apply(lambda tensor: moved[id(tensor)]) for tile in tiles]  # a tensor of several stays one
            delta = state_dict.pop(f"{prefix}weight_delta", None)
            self.weight = parameter(*params_of(tiles, dtype, shape, names,
                                               delta=None if delta is None else delta.to(device=device)))
            self.quant_format = stored.FORMAT
            missing: list[str] = []
            torch.nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing,
                                                  unexpected_keys, error_msgs)
            missing_keys.extend(key for key in missing if key != f"{prefix}weight")
            loaded()

        def _own_name(self) -> None:
            """Keep the host from multiplying an INT8 weight past this Linear."""
            if getattr(self.weight, "_layout_cls", "") == "TensorWiseINT8Layout":
                from .layouts.int8 import renamed

                self.weight = renamed(self.weight)

        def _kernel_of(self, name: str) -> str:
            """The kernel for tiles of a codec in this layer."""
            found = chosen.get(name, "")
            off = self._full_precision_mm or self._full_precision_mm_config or \
                found and kernel(found).host_switches and codec(name).switch in self._disabled_formats
            return "" if off or found == "dequantize" else found

        def __deepcopy__(self, memo):  # torch wants to copy a storage that quantized tensors do not have
            if isinstance(self.weight, QuantizedTensor):
                twin = memo[id(self.weight)] = self.weight.clone()
                twin._is_param = True
            new = memo[id(self)] = type(self).__new__(type(self))
            new.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return new

        def state_dict(self, *args, destination=None, prefix="", **kwargs):
            sd = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
            if is_tiled(self.weight):
                full = {"full_precision_matrix_mult": True} if self._full_precision_mm_config else {}
                sd[f"{prefix}comfy_quant"] = marker(stored.conf_of(tiles_of(self.weight)) | full)
                if patches_stay_beside(self.weight):
                    # Patches beside the weight get into the file as it is written (set_weight), but the host asks for
                    # the sizes ahead. Meta tensors have no content that could be mistaken for the patched one.
                    found = lora.factors(self._beside(), self.weight.shape)
                    for leaf, tensor in (lora.longer_pairs(self.weight, found) if found else {}).items():
                        sd[f"{prefix}{leaf}"] = tensor
            return sd

        def forward(self, input, *args, **kwargs):
            if of_host and self._host_tile(input) is not None:
                return self.forward_comfy_cast_weights(input, input.dtype, weight_only_quant=True)
            return super().forward(input, *args, **kwargs)

        def _forward(self, input, weight, bias):
            native, tile = super()._forward, self._host_tile(input, weight) if of_host else None
            if tile is None:
                return native(input, weight, bias)
            run = of_host[tile.place.codec]

            def multiply_it() -> torch.Tensor:
                out = run.linear(Activation(input.reshape(-1, input.shape[-1])), tile, bias)
                return out.reshape(*input.shape[:-1], out.shape[-1])

            return or_exact(multiply_it, lambda: native(input, weight.dequantize(), bias),
                            f"{codec(tile.place.codec).title} by {run.title}")

        def _host_tile(self, x: Any, weight: Any = None) -> Any:
            """The weight as a tile where this layer is in the host's layout and multiplied by a kernel of this pack:
            quantized, unpatched, and not asked for otherwise."""
            takes = (isinstance(x, torch.Tensor) and not isinstance(x, QuantizedTensor)
                     and not x.requires_grad and not self._full_precision_mm_config
                     and not operations._full_precision_mm and not getattr(self, "comfy_force_cast_weights", False)
                     and not self.weight_function and not self.bias_function)
            from .layouts import host_tiles

            tile = host_tiles.tile_of(self.weight if weight is None else weight) if takes else None
            return tile if tile is not None and tile.place.codec in of_host else None

        def _functions(self) -> list[Any]:
            first = getattr(self, "weight_lowvram_function", None)
            return [*([] if first is None else [first]), *self.weight_function]

        def _beside(self) -> list[tuple]:
            """The patches that the host has left beside the weight."""
            return [patch for f in lora.pending(self._functions()) for patch in lora.patches_of(f)]

        def forward_comfy_cast_weights(self, input, *args, **kwargs):
            if not is_tiled(self.weight):
                return super().forward_comfy_cast_weights(input, *args, **kwargs)
            if self.awaits_patches:
                raise RuntimeError("A LoRA was put on quantized weights by something that is not the host's model "
                                   "loading. Use the LoRA nodes of ComfyUI on the MODEL of the loader.")
            beside = patches_stay_beside(self.weight)
            if not beside and (self.weight_function or self.bias_function):
                return super().forward_comfy_cast_weights(input, input.dtype)  # the host patches it dequantized
            forced = not beside and getattr(self, "comfy_force_cast_weights", False)
            functions = self._functions() if beside else []
            weight, bias, done = self._fetch(input, bare=beside)
            try:
                if not is_tiled(weight):
                    return matmul(input, weight.to(input.dtype), bias)
                if forced:
                    return self._dense(input, weight, bias, [])
                if not functions:
                    return _product(input, weight, bias)
                if len(lora.pending(functions)) < len(functions):  # others want to see the weight
                    return self._dense(input, weight, bias, functions)
                return self._patched(input, weight, bias, functions)
            finally:
                done(weight, bias)

        def _fetch(self, input: torch.Tensor, bare: bool) -> tuple[Any, Any, Any]:
            """Weight and bias on the device of `input`, and what to call after use. `bare`: without its patches, for
            which the host, left to itself, would dequantize it."""
            from .. import host

            functions, first = self.weight_function, getattr(self, "weight_lowvram_function", None)
            if not bare or not functions and first is None:
                # a patched weight is coded again only for a kernel that needs it so
                return host.fetch_weight(self, input, bare or any(self.weight._params.kernels))
            self.weight_function, self.weight_lowvram_function = [], None
            try:
                return host.fetch_weight(self, input)
            finally:
                self.weight_function, self.weight_lowvram_function = functions, first

        def _patched(self, input, weight, bias, functions):
            out = _product(input, weight, bias)
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
            if not is_tiled(weight) or not patches_stay_beside(weight):
                return super().convert_weight(weight, inplace=inplace, **kwargs)
            from .. import host

            # Patching goes by lora.py, so what the host computes with this is thrown away: let it cost nothing.
            # Others (model merges) do want the weight.
            if host.is_patching(sys._getframe(1).f_code):
                return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            return weight.dequantize()

        def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
            held, ours = self.weight, getattr(self, "quant_format", None) == stored.FORMAT
            if ours and inplace_update:  # the host would put back the first tensor of the weight alone
                raise NotImplementedError("LoRA hooks (scheduled LoRAs) do not work on weights of several tensors; use "
                                          "the LoRA nodes without hooks")
            if not ours:
                return super().set_weight(weight, inplace_update=inplace_update, seed=seed,
                                          return_weight=return_weight, **kwargs)
            if is_tiled(held) and patches_stay_beside(held):
                return self._set_beside(weight, return_weight)
            if not is_tiled(held) or is_coarse(held) and not return_weight:
                new = weight.to(held.dtype)
            else:
                new = held.requantize_from_float(weight, stochastic_rounding=seed, inplace_ops=True).to(held.dtype)
            if return_weight:
                return new
            self.weight = torch.nn.Parameter(new, requires_grad=False)
            return None

        def _set_beside(self, weight, return_weight):
            if not weight.is_meta:
                own = self.weight.to(weight.device)
                new = lora.add_delta(own, (weight.float() - own.dequantize().float()).to(own.dtype))
            elif return_weight:
                patches = self._beside()
                if patches and lora.factors(patches, self.weight.shape) is None:
                    raise NotImplementedError("Saving a model with patches that are no plain LoRA beside its weights "
                                              "needs all of it in VRAM; take those patches off, or save without them")
                new = lora.patched(self.weight, patches, "weight") if patches else self.weight
            else:
                self.awaits_patches = True
                return None
            if return_weight:
                return new
            self.weight = new
            return None

    return type("TileOperations", (operations,), {"Linear": Linear})


def _product(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times a weight, plus bias: in two dimensions, or outside inference mode torch may take a product of
    three apart, and the bias away from the layout."""
    return matmul(x.reshape(-1, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], weight.shape[0])
