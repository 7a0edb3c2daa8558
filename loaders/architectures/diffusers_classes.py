"""The diffusers classes that load by a derived table (derived.py): a new one is a file in classes/ and a line."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ... import host
from ...host.texts import Text, joined
from ..containers.safetensors import TensorInfo
from .classes import (
    anima,
    auraflow,
    cascade_b,
    cascade_c,
    chroma,
    cogvideox,
    cosmos1,
    cosmos2,
    ernie_image,
    hidream,
    hunyuan_image,
    hunyuan_video15,
    hunyuandit,
    ideogram4,
    joyimage,
    kandinsky5,
    krea2,
    longcat,
    ltx2,
    ltxv,
    lumina2,
    minimax_h3,
    mochi,
    ovis,
    pixart,
    sd3,
    svd,
    unet,
    wan_animate,
    wan_vace,
)
from .derived import Companion, Derived, Translated
from .passthrough import logical_shapes

DERIVED: tuple[Derived, ...] = (
    anima.CLASS,
    auraflow.CLASS,
    cascade_b.CLASS,
    cascade_c.CLASS,
    chroma.CLASS,
    cogvideox.CLASS,
    cosmos1.CLASS,
    cosmos2.CLASS,
    ernie_image.CLASS,
    hidream.CLASS,
    hunyuan_image.CLASS,
    hunyuan_video15.CLASS,
    hunyuandit.CLASS,
    ideogram4.CLASS,
    joyimage.CLASS,
    kandinsky5.CLASS,
    krea2.CLASS,
    longcat.CLASS,
    ltx2.CLASS,
    ltxv.CLASS,
    lumina2.CLASS,
    minimax_h3.CLASS,
    mochi.CLASS,
    ovis.CLASS,
    pixart.CLASS,
    sd3.CLASS,
    svd.CLASS,
    unet.CLASS,
    wan_animate.CLASS,
    wan_vace.CLASS,
)
_LARGEST = 1 << 20  # of any size of a model; the largest published one is of a vocabulary


def of_class(name: str) -> list[Derived]:
    """Those that a `_class_name` of config.json may be."""
    return [one for one in DERIVED if name in one.classes]


def told(config: Mapping[str, Any]) -> Derived:
    """The one of its class that a config.json describes. Raises ValueError where the host runs none like it, with what
    each of them says."""
    refused: list[ValueError] = []
    for one in of_class(class_of(config)):
        try:
            one.check(config)
        except ValueError as error:
            refused.append(error)
        else:
            return one
    raise refused[0] if len(refused) == 1 else ValueError(joined("; ", (error.args[0] for error in refused)))


def companions(config: Mapping[str, Any] | None) -> dict[str, Companion]:
    """The components of its pipeline that the host's model of this config.json may have in it."""
    return {name: one for derived in of_class(class_of(config)) for name, one in derived.companions.items()}


def class_of(config: Mapping[str, Any] | None) -> str:
    """What a config.json says its model is, or empty."""
    return str((config or {}).get("_class_name") or "")


def recognise(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str],
              config: Mapping[str, Any]) -> Translated | None:
    """The host's model of tensors in diffusers' names: by config.json's class and by marks. None for any other, for
    names without a config.json that are the host's as well, and where there is no host.

    Raises ValueError for those of a class that has a table where they are not all of a model, or config.json says what
    the host does not run.
    """
    text, claim = "\n".join(tensors), class_of(config)
    asked = of_class(claim) if claim else [one for one in DERIVED if one.renames]
    derived = next((one for one in asked if one.is_named(text)), None)
    if derived is None or not host.is_there() or host.lacking("native passthrough"):
        return None
    model = Translated(derived, logical_shapes(tensors), metadata, config)
    if claim:
        derived.check(config)
    return model


def of_config(config: Mapping[str, Any]) -> Translated:
    """The model that a config.json describes, without its weights: by diffusers' own class.

    Raises ValueError where the package diffusers is not there, or the host does not run such a model.
    """
    derived, claim = told(config), class_of(config)
    try:
        import torch
        from diffusers import __version__, models
    except ImportError as error:
        raise ValueError(Text("what a {model} without weights is made of is asked of the package diffusers, which does "
                              "not import ({error}): set weights to 'load', or install it", model=derived.title,
                              error=error)) from error
    kind = getattr(models, claim, None)
    if kind is None:
        raise ValueError(Text("what a {model} without weights is made of is asked of the package diffusers, whose "
                              "version {version} does not have it: set weights to 'load', or update it",
                              model=derived.title, version=__version__))
    large = next((key for key, value in config.items() if type(value) is int and abs(value) > _LARGEST), "")
    if large:
        raise ValueError(Text("config.json: {key} is {value!r}, expected a number", key=large, value=config[large]))
    try:
        with torch.device("meta"):
            parts = [kind.from_config(dict(config))]
            for name, one in derived.companions.items():
                if one.place:
                    own = config[f"_{name}"]
                    parts.append(getattr(import_module(one.place), class_of(own)).from_config(own))
    except Exception as error:  # what is in it is not what the class was written for
        raise ValueError(Text("diffusers makes no {model} of this config.json ({kind}: {error})", model=derived.title,
                              kind=type(error).__name__, error=str(error)[:200])) from error
    shapes = {name: tuple(tensor.shape) for net in parts for name, tensor in net.state_dict().items()}
    return Translated(derived, shapes, {}, config)
