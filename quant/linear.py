"""The host's mixed-precision operations with the one Linear of this pack: for weights of tiles of any codec.

Layers in the host's own formats load by the host's own code; kernels that take those, too, multiply them here, because
the host quantizes activations by other rules than an NPU.

LoRA and other patches never get here: patches/linear.py keeps them beside the weight.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch.nn.functional import linear as matmul

from .. import host
from . import multiply
from .codecs import codec, codecs
from .exact import or_exact, with_exact_answers
from .kept import Kept
from .kernels import by_tiles, int8, kernel
from .kernels.base import DEQUANTIZE, Activation
from .layout_names import INT8, OWN_INT8
from .layouts import stored
from .layouts.host_tiles import tile_of as host_tile
from .layouts.tiled import is_tiled, parameter, params_of, plain_bias, tiles_of
from .marker import marker
from .patches.linear import with_patches_beside
from .tile import Place, Tile


def with_tiles_of(operations: Any, kernels: Mapping[str, str] | None = None, *,
                  loaded: Callable[[], None] = lambda: None) -> Any:
    """Subclass the host's mixed-precision `operations` (a class) with a Linear that also loads and runs tiles, and
    keeps patches beside its quantized weight.

    `kernels` (codec -> kernel of quant.kernels) says who multiplies; a codec that is not in it is dequantized for its
    matmul. A kernel that takes the host's own layouts gets the host's weights of its codecs, too. `loaded` is called
    whenever a Linear has its tensors. Loading raises ValueError for tensors that do not fit.
    """
    operations, chosen = with_exact_answers(operations), dict(kernels or {})
    found = {name: kernel(word) for name, word in chosen.items()}  # raises for one that is none
    of_host = {name: one for name, one in found.items() if one.takes_host_layouts and codec(name).word}

    class Linear(operations.Linear):
        weight: Any
        kept: Kept | None = None  # while a MODEL samples whose decoded weights are kept
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
            if all(kernel(name).at_load for name in names):
                delta = state_dict.pop(f"{prefix}weight_delta", None)
                state_dict[f"{prefix}weight"] = parameter(*params_of(tiles, dtype, shape, delta=delta)).dequantize()
                super()._load_from_state_dict(state_dict, prefix, *rest)
                loaded()
                return
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
            if getattr(self.weight, "_layout_cls", "") == INT8:
                from .layouts.int8 import renamed

                self.weight, self.own_name = renamed(self.weight), True

        def _kernel_of(self, name: str) -> str:
            """The kernel for tiles of a codec in this layer."""
            found = chosen.get(name, "")
            if found and kernel(found).full_precision:
                return found
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
            return sd

        def forward(self, input, *args, **kwargs):
            weight = self.weight
            if not isinstance(weight, QuantizedTensor):
                return super().forward(input, *args, **kwargs)
            if not torch.compiler.is_compiling() and self.kept is not None:  # in this order: nothing to guard
                out = self.kept.times(self, input)
                if out is not None:
                    return out
            if is_tiled(weight):  # of which the host's forward knows nothing
                return self._fetched(input, lambda moved, bias: self._of_tiles(input, moved, bias))
            if of_host and (tile := self._host_tile(input)) is not None:
                return self._fetched(input, lambda moved, bias: _by_host_tile(
                    of_host[tile.place.codec], input, tile if moved is weight else host_tile(moved), moved, bias))
            if self._decoded_here(input, weight):
                return self._fetched(input, lambda moved, bias: _decoded(input, moved, bias))
            if self._multiplied_here(input):
                return self._fetched(input, lambda moved, bias: _flat(
                    input, lambda x: int8.linear(x, moved, bias)))
            return super().forward(input, *args, **kwargs)

        def decoding(self, like: torch.Tensor) -> list[tuple[Tile, Callable[[], torch.Tensor]]]:
            """Where a product with activations such as `like` (Kernel.decodes) is one with the decoded weight: its
            tiles (without fields: all of it at once), and what decodes each. Empty where it is not, or where somebody
            changes the weight before."""
            weight, forced = self.weight, bool(self.__dict__.get("comfy_force_cast_weights"))
            if self.weight_function or self.bias_function or self._parameters.get("pre_quant_scale") is not None:
                return []
            whole = Tile(Place("plain", *weight.shape))
            if is_tiled(weight):
                places = weight._params.tiles
                if forced and all(codec(place.codec).requantizes for place in places):
                    return [(whole, lambda: weight.dequantize().to(like.dtype))]
                found = list(zip(tiles_of(weight), map(kernel, weight._params.kernels), strict=True))
            elif of_host and (tile := self._host_tile(like)) is not None:
                found = [(tile, of_host[tile.place.codec])]
            elif not self._full_precision_mm:
                return []
            else:
                tile = host_tile(weight) if self._decoded_here(like, weight) else None
                if tile is None:  # by the host's way
                    return [(whole, lambda: weight.to(like.dtype).dequantize())]
                found = [(tile, DEQUANTIZE)]
            if not all(run.decodes(tile.place.codec, like) for tile, run in found):
                return []
            return [(tile, partial(run.decoded, tile, like)) for tile, run in found]

        def _apply(self, fn, recurse=True):
            if self.kept is not None:
                self.kept.forget()
                self.kept = None
            return super()._apply(fn, recurse)

        def _fetched(self, input, multiply):
            """What `multiply` makes of the weight and bias where the input is: past the host's forward."""
            host.before_layer()
            weight, bias, done = host.fetch_weight(self, input)
            try:
                return multiply(weight, bias)
            finally:
                done(weight, bias)

        def _host_tile(self, x: Any) -> Any:
            """The weight as a tile where this layer is in the host's layout and multiplied by a kernel of this pack:
            quantized, unpatched, and not asked for otherwise."""
            takes = (isinstance(x, torch.Tensor) and not isinstance(x, QuantizedTensor)
                     and not x.requires_grad and not self._full_precision_mm_config
                     and not operations._full_precision_mm and self._is_its_own())
            tile = host_tile(self.weight) if takes else None
            return tile if tile is not None and tile.place.codec in of_host else None

        def _decoded_here(self, x: Any, weight: Any) -> bool:
            """Whether the host would dequantize the weight of this layer, which is in its own layout, for a product
            that is made here (kernels/by_tiles.py)."""
            return self._full_precision_mm and by_tiles.takes(x) and weight._layout_cls in _known_layouts() \
                and self._is_its_own()

        def _multiplied_here(self, x: Any) -> bool:
            """Whether the host would multiply by INT8 codes on a CPU."""
            return not self._full_precision_mm and self.weight._layout_cls == INT8 and self._is_its_own() \
                and int8.takes(x, self.weight)

        def _is_its_own(self) -> bool:
            """Whether nobody else changes the weight, or the activation before it."""
            return not (self.__dict__.get("comfy_force_cast_weights") or self.weight_function or self.bias_function
                        or self._parameters.get("pre_quant_scale") is not None)

        def forward_comfy_cast_weights(self, input, *args, **kwargs):
            if not is_tiled(self.weight):
                return super().forward_comfy_cast_weights(input, *args, **kwargs)
            return self._fetched(input, lambda moved, bias: self._of_tiles(input, moved, bias))

        def _of_tiles(self, input, weight, bias):
            """x times what the host has fetched of this layer, which is made of tiles."""
            if not is_tiled(weight):  # what dynamic VRAM hands out on a CPU
                return matmul(input, weight.to(input.dtype), plain_bias(self.weight, bias))
            if self.__dict__.get("comfy_force_cast_weights") and \
                    all(codec(place.codec).requantizes for place in weight._params.tiles):
                return matmul(input, weight.dequantize().to(input.dtype), plain_bias(weight, bias))
            return _product(input, weight, bias)

    return with_patches_beside(type("TileOperations", (operations,), {"Linear": Linear}))


def _flat(x: torch.Tensor, multiply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What `multiply` makes of x [..., K] as [M, K], in the shape of x."""
    if x.ndim == 2:
        return multiply(x)
    out = multiply(x.reshape(-1, x.shape[-1]))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _by_host_tile(run: Any, x: torch.Tensor, tile: Any, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times a weight in the host's layout, which is this tile, by a kernel; plus bias."""
    return or_exact(lambda: _flat(x, lambda flat: run.linear(Activation(flat), tile, bias)),
                    lambda: matmul(x, weight.dequantize().to(x.dtype), bias),
                    f"{codec(tile.place.codec).title} by {run.title}")


def _decoded(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times a weight in the host's layout, which is decoded for it, plus bias."""
    tile = host_tile(weight)
    if tile is None:  # an INT8 that no codec has
        return matmul(x, weight.dequantize().to(x.dtype), bias)
    return _flat(x, lambda flat: DEQUANTIZE.linear(Activation(flat), tile, bias))


@cache
def _known_layouts() -> frozenset[str]:
    """Of the host's layouts, those whose numbers a codec has, too."""
    return frozenset({INT8, OWN_INT8, *(kind.layout for kind in codecs().values() if kind.layout)})


def _product(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times a weight of tiles, plus bias."""
    if type(x) is torch.Tensor and not x.requires_grad and not torch.compiler.is_compiling():
        return multiply.linear(x, weight, bias)  # past torch's way to it, which takes 15 us
    # In two dimensions, or outside inference mode torch may take a product of three apart, and the bias away from the
    # layout.
    return matmul(x.reshape(-1, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], weight.shape[0])
