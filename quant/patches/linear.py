"""A Linear whose quantized weight stays as it is under the host's patches.

The host leaves patches beside a weight (low VRAM, dynamic VRAM), puts them into it (a full load), or in and out of it
while it samples (hooks). It all becomes the same here: the product of the weight as it was, by whatever kernel, plus
what the factors give for the input. Patches that are no factors (DoRA, OFT, merges) make the layer dense: the host
evaluates them in F32 on the dequantized weight, at the load where it puts them in, else whenever the layer runs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor
from torch.nn.functional import linear as matmul

from ... import host
from ...host.texts import Text
from ..layouts.int8 import host_named, renamed
from ..layouts.tiled import as_parameter, is_tiled, plain_shift, shifts, tiles_of, with_delta
from . import saving
from .factors import Factors, added, append, factors, have_low_rank, joined, low_rank, side
from .loading import Hooked, patches_of, pending
from .stand_ins import StandIn, dense, plain_bias, stand_in

WEIGHT, BIAS = "weight", "bias"


@dataclass(frozen=True)
class Held:
    """What has been put into a weight: `factors` are to be added to its product, `shift` [rows] to the stored bias, for
    a weight that is dense. It is so while `weight` is the module's: the host takes patches off by putting another
    there."""

    weight: Tensor
    factors: Factors = ()
    shift: Tensor | None = None


@dataclass(frozen=True)
class Changes:
    """All that is to be done to a weight and bias at present: `weight` and `bias` are functions of the host's."""

    weight: list[Any]
    bias: list[Any]
    held: Held | None
    hooked: Hooked | None

    @property
    def patches(self) -> list[tuple] | None:
        """Of the weight; None where somebody else's function wants to see it."""
        if len(pending(self.weight)) < len(self.weight):
            return None
        found = [patch for function in self.weight for patch in patches_of(function)]
        return found + (self.hooked.weight if self.hooked else [])

    @property
    def alters_bias(self) -> bool:
        """Whether the bias is another than the stored one."""
        return bool(self.bias or self.held and self.held.shift is not None or self.hooked and self.hooked.bias)

    def factors(self, shape: Any) -> list[Any] | None:
        """All of them as factors, or None."""
        patches = self.patches
        found = None if patches is None else factors(patches, shape)
        return None if found is None else [*(self.held.factors if self.held else ()), *found]


def with_patches_beside(operations: Any) -> Any:
    """Subclass mixed-precision `operations` (a class) with a Linear that keeps patches beside its quantized weight."""

    class Linear(operations.Linear):
        weight: Any
        bias: Any
        held: Held | None = None
        hooked: Hooked | None = None
        kept_factors: Any = None
        shift_of: tuple[Any, Any] = (None, None)
        own_name = False  # whether the host must not know its INT8 in any case
        grown = 0  # bytes that patches have added since the host was told
        coming: Any = None  # what convert_weight has found for set_weight
        weight_lowvram_function: Any = None  # of the host's, which it sets where there is one
        bias_lowvram_function: Any = None

        def forward(self, input, *args, **kwargs):
            changes = self.changes()
            if changes is None:
                return super().forward(input, *args, **kwargs)
            if not isinstance(self.weight, QuantizedTensor):  # and no quantized activations
                out = super().forward_comfy_cast_weights(input, input.dtype)
                return out + self._bias_change(input, changes) if changes.alters_bias else out
            found = changes.factors(self.weight.shape)
            if found is None:
                return self._dense(input, changes)
            weight, named = self.weight, self.weight if self.own_name else host_named(self.weight)
            if not changes.weight and not changes.bias and named is weight:  # torch.compile wants nothing changed
                out = super().forward(input, *args, **kwargs)
            else:
                kept = self._take_off()
                try:
                    self.weight = named
                    out = super().forward(input, *args, **kwargs)
                finally:
                    self.weight = weight
                    self._put_on(kept)
            out = side(input, out, self._on_device(input, found, changes))
            return out + self._bias_change(input, changes) if changes.alters_bias else out

        def in_weight(self) -> Held | None:
            """What patches have put into the weight that the module has now."""
            return self.held if self.held is not None and self.held.weight is self.weight else None

        def changes(self) -> Changes | None:
            """What is to be done to the weight and bias that the host does not do, if anything."""
            held, hooked = self.in_weight(), self.hooked if self.hooked is not None and self.hooked.active else None
            weight, bias = self._functions()
            if not (weight or bias or held or hooked):
                return None
            if not isinstance(self.weight, QuantizedTensor):  # the host's functions go on with a dense weight
                return None if held is None else Changes([], [], held, hooked)
            return Changes(weight, bias, held, hooked)

        def _functions(self) -> tuple[list[Any], list[Any]]:
            """What the host has for the weight and for the bias."""
            weight, bias = self.weight_lowvram_function, self.bias_lowvram_function
            return ([*([] if weight is None else [weight]), *self.weight_function],
                    [*([] if bias is None else [bias]), *self.bias_function])

        def _take_off(self) -> tuple[Any, ...]:
            """Leave the weight and bias without functions; what they were."""
            kept = (self.weight_function, self.weight_lowvram_function, self.bias_function, self.bias_lowvram_function)
            self._put_on(([], None, [], None))
            return kept

        def _put_on(self, kept: tuple[Any, ...]) -> None:
            self.weight_function, self.weight_lowvram_function = kept[:2]
            self.bias_function, self.bias_lowvram_function = kept[2:]

        def _on_device(self, input: Tensor, found: list[Any], changes: Changes) -> list[Any]:
            """The factors where they are used. Kept there under dynamic VRAM, which makes room by itself."""
            if not changes.weight and changes.hooked is None:  # of a full load: there, and torch.compile reads no ids
                return [one.made(lambda tensor: tensor.to(input.device, input.dtype)) for one in found]
            key = (*(id(function) for function in changes.weight), id(changes.held), id(changes.hooked),
                   input.device, input.dtype)
            if self.kept_factors is not None and self.kept_factors[0] == key:
                return self.kept_factors[2]
            ready = any(function.prepared_patches is not None for function in changes.weight)
            moved = [one.made(lambda tensor: tensor.to(input.device, input.dtype)) for one in
                     (found if ready else joined(found))]
            if not ready and (hasattr(self, "_v") or changes.hooked):
                self.kept_factors = (key, changes, moved)  # with what it was made of, so that no other gets its id
            return moved

        def _dense(self, input: Tensor, changes: Changes) -> Tensor:
            """The product with the weight as the host's functions make it of the dequantized one, in F32."""
            kept = self._take_off()
            try:
                weight, bias, done = host.fetch_weight(self, input)
            finally:
                self._put_on(kept)
            try:
                effective = self._effective(weight, changes, input.dtype)
                plain = None if bias is None else self._shifted(bias, self._shift())
                plain = None if plain is None else self._bias(plain, changes)
                return matmul(input, effective.to(input.dtype), None if plain is None else plain.to(input.dtype))
            finally:
                done(weight, bias)

        def _effective(self, weight: Tensor, changes: Changes, dtype: torch.dtype = torch.float32) -> Tensor:
            """A weight as it came, with all changes: in F32; functions that are not the host's see it in `dtype`."""
            made = weight.to(torch.float32)
            made = made.dequantize() if isinstance(made, QuantizedTensor) else made.clone()
            made = added(made, changes.held.factors) if changes.held else made
            for function in changes.weight:
                made = function(made if pending([function]) else made.to(dtype))
            if changes.hooked and changes.hooked.weight:
                key = changes.hooked.key
                before = {key: [(made.clone(), None)]}
                made = host.calculate_weight(changes.hooked.weight, made.float(), key, before)
            return made

        def _bias(self, bias: Tensor, changes: Changes) -> Tensor:
            """A bias as it goes with a plain weight, with all changes."""
            bias = bias.clone()  # the host's functions change what they are given
            for function in changes.bias:
                bias = function(bias)
            if changes.hooked and changes.hooked.bias:
                key = changes.hooked.key.removesuffix(WEIGHT) + BIAS
                bias = host.calculate_weight(changes.hooked.bias, bias, key, {key: [(bias.clone(), None)]})
            return bias

        def _bias_change(self, input: Tensor, changes: Changes) -> Tensor:
            """What is to be added to the output for changes of the bias, and for a stored one that a dense weight does
            not go with."""
            stored = None if self.bias is None else self.bias.to(input.device, torch.float32)
            shift = self._shift()
            start = torch.zeros((), device=input.device) if stored is None else stored
            plain = self._shifted(start, shift)
            after = self._bias(plain, changes)
            return (after - (plain if isinstance(self.weight, QuantizedTensor) else start)).to(input.dtype)

        def _shift(self) -> Tensor | None:
            """What the bias that goes with the dequantized weight has more than the stored one, F32 [rows]."""
            held = self.in_weight()
            if held is not None and held.shift is not None:
                return held.shift
            if not is_tiled(self.weight):
                return None
            if self.shift_of[0] is not self.weight:
                self.shift_of = (self.weight, plain_shift(self.weight))
            return self.shift_of[1]

        @staticmethod
        def _shifted(bias: Tensor, shift: Tensor | None, sign: int = 1) -> Tensor:
            return bias if shift is None else (bias.float() + sign * shift.to(bias.device)).to(bias.dtype)

        def convert_weight(self, weight, inplace=False, **kwargs):
            if not isinstance(weight, QuantizedTensor):
                return super().convert_weight(weight, inplace=inplace, **kwargs)
            coming = None if host.lacking("LoRA beside the weight") else host.patching(sys._getframe(1))
            found = None if coming is None else factors(coming.patches or (), weight.shape)
            self.coming = None if coming is None else (coming, found, weight)
            if found is not None:
                return stand_in(weight)
            if coming is not None:  # the host would evaluate patches in the dtype of its device
                weight = weight.to(torch.float32)
            return weight.dequantize()

        def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
            (coming, found, moved), self.coming = self.coming or (None, None, None), None
            if not isinstance(self.weight, QuantizedTensor):
                if inplace_update:  # which hooks ask for, and the host's mixed-precision Linear does not have
                    self.weight.data.copy_(weight)
                    return None
                held = self.in_weight()
                if held is not None:  # the host takes it for a quantized one still
                    if return_weight:
                        return weight.to(self.weight.dtype)
                    self.weight = torch.nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
                    self.held = replace(held, weight=self.weight)
                    return None
                return super().set_weight(weight, inplace_update=inplace_update, seed=seed,
                                          return_weight=return_weight, **kwargs)
            if coming is not None and coming.hook:
                return None  # on_apply_hooks says which they are
            if inplace_update:
                raise host.CheckpointError(Text("patches cannot be written into a quantized weight in place"), "",
                                           Text("use the LoRA nodes of ComfyUI on the MODEL of the loader"))
            if return_weight:
                return self._made_dense(weight, self._shift()) if found is None else saving.with_factors(self, found)
            before = self._bytes()
            if found is None:
                shift = self._shift()
                self.weight = torch.nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
                self.held = Held(self.weight, (), shift)
            else:
                here = coming is None or coming.device in (None, self.weight.device)
                self._hold(self.weight if here else moved, joined(found))  # the host has made a copy in any case
            self.grown += self._bytes() - before
            return None

        def _bytes(self) -> int:
            return sum(tensor.nbytes for tensor in self.state_dict().values())

        def _made_dense(self, weight: Tensor, shift: Tensor | None) -> Tensor:
            """A dense weight where the host wants one to save, or to extract a LoRA of; with the bias that is stored it
            goes into a file only as a change of the quantized one."""
            if shift is None:
                return dense(weight.to(self.weight.dtype))
            own = self.weight.to(weight.device)
            change = (weight.float() - own.to(torch.float32).dequantize()).to(own.dtype)
            return dense(weight.to(own.dtype), with_delta(own, change).state_dict())

        def _hold(self, base: Any, found: list[Any]) -> None:
            if base.dtype != (dtype := self.weight.dtype):  # a copy is in the dtype that the host patches in
                base = QuantizedTensor(base._qdata, base._layout_cls, replace(base._params, orig_dtype=dtype))
            if found and is_tiled(base) and low_rank(found) and have_low_rank(tiles_of(base)):
                self.weight, self.held = append(base, found), None
                return
            new = as_parameter(renamed(QuantizedTensor(base._qdata, base._layout_cls, base._params)))
            self.weight = new
            self.held = Held(new, [one.made(lambda tensor: tensor.to(new.device, new.dtype)) for one in found]) \
                if found else None

        def convert_bias(self, bias, inplace=False, **kwargs):
            """The bias as it goes with the dequantized weight, for patches and merges."""
            shift = self._shift()
            if shift is None:
                return bias
            coming = None if host.lacking("LoRA beside the weight") else host.patching(sys._getframe(1))
            return stand_in(bias) if coming is not None and coming.hook else self._shifted(bias, shift)

        def set_bias(self, bias, inplace_update=False, seed=None, return_weight=False, **kwargs):
            """Store what convert_bias gave and patches have changed."""
            if isinstance(bias, StandIn):
                return None
            plain, bias = bias, self._shifted(bias, self._shift(), -1).to(self.bias.dtype)
            if return_weight:
                return plain_bias(plain, bias) if self.shifts() else bias
            if inplace_update:
                self.bias.data.copy_(bias)
            else:
                self.bias = torch.nn.Parameter(bias, requires_grad=False)
            return None

        def set_input_scale(self, scale, inplace_update=False, seed=None, return_weight=False, **kwargs):
            """A merge with another quantized model does not change how this one's activations are quantized."""
            return self.input_scale if return_weight else None

        def is_quantized(self) -> bool:
            """Whether the weight is quantized, or was before patches made it dense."""
            return isinstance(self.weight, QuantizedTensor) or self.in_weight() is not None

        def shifts(self) -> bool:
            """Whether the stored bias is not that of the dequantized weight."""
            if is_tiled(self.weight):
                return shifts(self.weight)
            held = self.in_weight()
            return held is not None and held.shift is not None

        def after_load(self) -> None:
            """The host has just loaded the model, or changed hooks: its INT8 is under this pack's name where the host
            would multiply it past this Linear, without what is beside it."""
            self.kept_factors = None
            if self.changes() is not None:
                self._same(renamed(self.weight))
            elif not self.own_name:
                self._same(host_named(self.weight))

        def _same(self, weight: Any) -> None:
            """Put the weight back under another name, with what is beside it."""
            held = self.in_weight()
            self.weight = weight
            self.held = None if held is None else replace(held, weight=self.weight)

        def effective(self) -> tuple[Tensor, Tensor | None]:
            """(weight, bias) of the plain Linear that this one stands for with its patches, F32 on the CPU."""
            changes = self.changes() or Changes(*self._functions(), None, None)
            weight = self._effective(self.weight.detach().to("cpu"), changes)
            if self.bias is None:
                return weight, None
            bias = self._shifted(self.bias.detach().to("cpu", torch.float32), self._shift())
            return weight, self._bias(bias, changes)

        def bare_state(self, weight: Any = None, bias: Any = None) -> dict[str, Tensor]:
            """Leaf -> tensor of the layer without patches. `weight` and `bias` are what the host has kept of those that
            it has patched."""
            now = self.weight, self.bias
            self.weight, self.bias = (mine if kept is None else torch.nn.Parameter(kept, requires_grad=False)
                                      for mine, kept in zip(now, (weight, bias), strict=True))
            try:
                return super().state_dict()
            finally:
                self.weight, self.bias = now

        def state_dict(self, *args, destination=None, prefix="", **kwargs):
            sd = destination if destination is not None else {}
            own = super().state_dict(*args, prefix="", **kwargs)
            leaves = saving.as_parameters(self, saving.state_of(self, own))
            sd.update({f"{prefix}{leaf}": tensor for leaf, tensor in leaves.items()})
            return sd

        def __getattr__(self, name):
            parameters = self.__dict__.get("_parameters", ())
            if name in parameters:  # in half of what torch takes: a forward asks for its weight ten times
                return parameters[name]
            if name != "comfy_quant" and not name.startswith(saving.PIECES):
                return super().__getattr__(name)
            try:
                return super().__getattr__(name)
            except AttributeError:
                # The host's merges ask modules for what their state_dict names.
                found = self.state_dict().get(name)
                if found is not None:
                    return found
                raise

        def _apply(self, fn, recurse=True):
            held, weight = self.in_weight(), self.weight
            if isinstance(weight, QuantizedTensor):  # the host's way copies every tensor in Params, moved or not
                self.weight = None
                super()._apply(fn, recurse)
                moved = fn(weight)
                self.weight = as_parameter(moved.clone() if moved.is_inference() and
                                           not torch.is_inference_mode_enabled() else moved)
            else:
                super()._apply(fn, recurse)
            self.held = None if held is None else Held(
                self.weight, [one.made(fn) for one in held.factors],
                None if held.shift is None else fn(held.shift))
            return self

    return type("PatchedOperations", (operations,), {"Linear": Linear})
