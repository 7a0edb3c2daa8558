"""What was written is loaded again, layer by layer, before the file appears: every quantized layer that patches have
touched, by the code that loads checkpoints, and against what the MODEL computes with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ...loaders.assemble import Layers, NativeStateDict, Tensors, add
from ...loaders.damage import DamagedError
from ...loaders.errors import CheckpointError
from ..decode import decoder

if TYPE_CHECKING:
    from ...loaders.plan import LoadPlan

# Of a layer's weight, relative: both are the same numbers, but for 16 bits that a plain layer is rounded to.
WITHIN = 2 ** -7
EACH = 3  # layers of a kind whose numbers are compared; all of them are loaded


def touched(model: Any) -> dict[str, Any]:
    """Native name -> quantized Linear that patches have touched."""
    network, prefix = model.model.diffusion_model, "diffusion_model."
    return {name: module for name, module in network.named_modules()
            if hasattr(module, "bare_state") and f"{prefix}{name}.weight" in model.patches and module.is_quantized()}


def check_layers(plan: LoadPlan, read: Callable[[], Tensors], model: Any, exact: Callable[[str], bool]) -> None:
    """Load the touched layers of a file that has been written, and compare. `read` gives its tensors, `exact` says of a
    name whether the layer is to be what the MODEL has: others have been quantized again. Raises CheckpointError where
    they differ."""
    wanted, seen = touched(model), Counter[str]()
    if not wanted:
        return
    tensors, decode = read(), decoder()
    layers = Layers(tensors)
    with tensors.opened():
        for planned in plan.modules:
            name = planned.module.native
            if name not in wanted:
                continue
            native = NativeStateDict()
            try:
                add(native, planned, layers)
            except DamagedError as error:  # what is in the file is what the patches have made of it
                raise not_finite(name) from error
            except (ValueError, KeyError) as error:
                raise _wrong(name, Text("{error}", error=error)) from error
            kind = planned.pieces[0].layer.format
            seen[kind] += 1
            if seen[kind] > EACH or not exact(name):
                continue
            module = wanted[name]
            part = {leaf.rpartition(".")[2]: tensor for leaf, tensor in native.tensors.items()}
            weight, bias = decode(name, part, module.out_features, module.in_features)
            for mine, theirs in zip((weight, bias), module.effective(), strict=True):
                if mine is not None and theirs is not None and \
                        not float((mine - theirs).norm()) <= WITHIN * float(theirs.norm()):
                    raise _wrong(name, Text("the file has other numbers than the MODEL"))


def not_finite(name: str) -> CheckpointError:
    """For a layer of a MODEL that holds NaN or infinity."""
    return CheckpointError(Text("{name} has weights that are not finite", name=name), "",
                           Text("take the LoRAs and patches off the MODEL one by one to find the damaged one, or get "
                                "the model again"))


def _wrong(name: str, what: str) -> CheckpointError:
    return CheckpointError(Text("what was written of {name} does not load as the MODEL has it: {what}", name=name,
                                what=what), "", Text("nothing has been saved; report this"))
