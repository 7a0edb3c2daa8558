"""What a VAE class tells the loader: sizes in the host's terms, the claims about latents, and the native names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ....host.texts import Text
from ...architectures.base import check_fixed

if TYPE_CHECKING:
    import torch

Native = Callable[[dict[str, "torch.Tensor"]], dict[str, "torch.Tensor"]]
CHANNELS = [128, 256, 512, 512]  # what ComfyUI's constructor makes of AutoencoderKL's kin (comfy/sd.py, class VAE)
GROUPS = 32  # of every GroupNorm there


class Latents(NamedTuple):
    """What config.json says of latents: the decoder's input is slope * (sampler's latent) + offset, one a channel."""

    slope: tuple[float, ...]
    offset: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """A VAE of one config.json.

    `kind` and `sizes` name the host's network (host.vae_module), `published` its sizes in the host's own constructor,
    `inferred` says that the constructor finds these sizes by itself. `latent_format` is the class of
    comfy.latent_formats that the models of this VAE have, `channels` their number, `latents` the claims to compare
    with it (None: none made). `native` gives stored tensors, in order, their native names; as views. `finish` is called
    with the host's VAE, `metadata` is what the constructor looks for beside the tensors, `made` are tensors of the
    host's that are not stored, `marks` names that the constructor knows the network by and has no tensors for. `joined`
    are tensors that the host has as one: its name -> the native names of the pieces, one above the other.
    """

    family: str
    kind: str
    sizes: dict[str, Any]
    published: dict[str, Any]
    inferred: bool
    latent_format: str
    channels: int
    latents: Latents | None
    native: Native
    summary: str
    notes: tuple[str, ...] = ()
    finish: Callable[[Any], None] = lambda vae: None
    metadata: dict[str, str] | None = None
    made: Callable[[], dict[str, torch.Tensor]] = dict
    marks: tuple[str, ...] = ()
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def apart(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The host's tensors with the pieces of those that are joined; as views."""
        pieces = {piece: part for name, names in self.joined.items() if name in tensors
                  for piece, part in zip(names, tensors[name].chunk(len(names)), strict=True)}
        return {name: tensor for name, tensor in tensors.items() if name not in self.joined} | pieces

    def join(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The host's tensors, of pieces."""
        import torch

        whole = {name: torch.cat([tensors[piece] for piece in names]) for name, names in self.joined.items()}
        pieces = {piece for names in self.joined.values() for piece in names}
        return {name: tensor for name, tensor in tensors.items() if name not in pieces} | whole


@dataclass(frozen=True)
class VAEClass:
    """A diffusers class this pack can load.

    `fixed`: config.json keys with the only value that ComfyUI runs. `read`: keys that `make_plan` uses.
    `without_effect`: keys that do not change the numbers. `beside`: other components of the pipeline that ComfyUI has
    in one with it; their tensors come with its own, and their configurations in its own, as Checkpoint has them.
    """

    class_name: str
    fixed: Mapping[str, Any]
    read: frozenset[str]
    without_effect: frozenset[str]
    make_plan: Callable[[Mapping[str, Any]], Plan] = field(repr=False)
    beside: tuple[str, ...] = ()

    def plan(self, config: Mapping[str, Any]) -> Plan:
        """The VAE that config.json describes. Raises ValueError for values that ComfyUI would not honour."""
        check_fixed(config, self.fixed, self.class_name)
        known = self.fixed.keys() | self.read | self.without_effect
        other = {key: value for key, value in config.items()
                 if key not in known and not key.startswith("_") and value is not None and value is not False}
        if other:
            raise ValueError(Text("config.json has settings that this version does not know: {settings}",
                                  settings=", ".join(f"{key} {value}" for key, value in other.items())))
        return self.make_plan(config)


def scaled(config: Mapping[str, Any], scale: float, shift: float = 0.0) -> Latents:
    """The claims of scaling_factor and shift_factor, which default to `scale` and `shift` as in diffusers' class.

    Its pipelines decode latent / scaling_factor + shift_factor.
    """
    factor, offset = (config.get(key) for key in ("scaling_factor", "shift_factor"))
    factor, offset = scale if factor is None else factor, shift if offset is None else offset
    if not isinstance(factor, int | float) or not isinstance(offset, int | float) or factor == 0:
        raise ValueError(Text("config.json: scaling_factor {factor!r} and shift_factor {offset!r} are no usable "
                              "numbers", factor=factor, offset=offset))
    return Latents((1 / factor,), (float(offset),))


def normalised(config: Mapping[str, Any], channels: int) -> Latents | None:
    """The claims of latents_mean and latents_std, or None without them. Pipelines decode latent * std + mean."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return None
    for key, value in (("latents_mean", mean), ("latents_std", std)):
        if not isinstance(value, list) or len(value) != channels or not all(isinstance(v, int | float) for v in value):
            raise ValueError(Text("config.json: {key} is no list of {channels} numbers", key=key, channels=channels))
    return Latents(tuple(std or ()), tuple(mean or ()))


def levels(config: Mapping[str, Any], key: str, default: list[int]) -> list[int]:
    """The widths of the four levels of an AutoencoderKL. Raises ValueError for what its network cannot have."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, list) or len(value) != 4 or not all(isinstance(n, int) and n > 0 for n in value):
        raise ValueError(Text("config.json: {key} is {value!r}; ComfyUI's network has four levels", key=key,
                              value=value))
    if any(n % value[0] or n % GROUPS for n in value):
        raise ValueError(Text("config.json: {key} is {value}; ComfyUI has multiples of the first, and of {number}",
                              key=key, value=value, number=GROUPS))
    return value


def kl_sizes(channels: int, encoder: list[int], decoder: list[int], embed: bool = True, **more: Any) -> dict[str, Any]:
    """The arguments of host.vae_module("kl"): widths of both halves, `embed` for quant_conv and post_quant_conv."""
    def half(widths: list[int]) -> dict[str, Any]:
        return {"double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3,
                "ch": widths[0], "ch_mult": [n // widths[0] for n in widths], "num_res_blocks": 2,
                "attn_resolutions": [], "dropout": 0.0, **more}

    return {"encoder": half(encoder), "decoder": half(decoder), "embed": channels if embed else None}


def whole(config: Mapping[str, Any], key: str, default: int) -> int:
    """A positive whole number of config.json. Raises ValueError for anything else."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or value < 1:
        raise ValueError(Text("config.json: {key} is {value!r}, expected a positive number", key=key, value=value))
    return value
