"""What the host knows of a file with its own names, of whatever model: its class, and every name, size and kind.

Asked of the host at load time, so that a newer host brings new models. The model is built without memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .check import needs
from .models import model_identity
from .texts import Text

NO_DIFFUSION = frozenset({"RT_DETR_v4", "SAM3", "SAM31", "DepthAnything3"})  # in the host's list all the same
# Every class that this version was tried with (tests/architectures/test_passthrough.py), of ComfyUI 0.30.0.
TRIED = frozenset({
    "ACEStep", "ACEStep15", "Anima", "AuraFlow", "Boogu", "Chroma", "ChromaRadiance", "CogVideoX_I2V",
    "CogVideoX_Inpaint", "CogVideoX_T2V", "CosmosI2V", "CosmosI2VPredict2", "CosmosT2IPredict2", "CosmosT2V",
    "ErnieImage", "Flux", "Flux2", "FluxInpaint", "FluxSchnell", "GenmoMochi", "HiDream", "HiDreamO1",
    "Hunyuan3Dv2", "Hunyuan3Dv2_1", "Hunyuan3Dv2mini", "HunyuanDiT", "HunyuanDiT1", "HunyuanImage21",
    "HunyuanImage21Refiner", "HunyuanVideo", "HunyuanVideo15", "HunyuanVideo15_SR_Distilled", "HunyuanVideoI2V",
    "HunyuanVideoSkyreelsI2V", "Ideogram4", "JoyImage", "KOALA_1B", "KOALA_700M", "Kandinsky5", "Kandinsky5Image",
    "Krea2", "LTXAV", "LTXV", "Lens", "LongCatImage", "LotusD", "Lumina2", "MageFlow", "MiniMaxH3", "Omnigen2",
    "PiD", "PixArtAlpha", "PixArtSigma", "PixelDiTT2I", "QwenImage", "SD15", "SD15_instructpix2pix", "SD20",
    "SD21UnclipH", "SD21UnclipL", "SD3", "SDXL", "SDXLRefiner", "SDXL_instructpix2pix", "SD_X4Upscaler", "SSD1B",
    "SV3D_p", "SV3D_u", "SVD_img2vid", "SeedVR2", "Segmind_Vega", "StableAudio", "StableAudio3", "Stable_Cascade_B",
    "Stable_Cascade_C", "Stable_Zero123", "TripoSplat", "WAN21_Camera", "WAN21_CausalAR_T2V", "WAN21_FlowRVS",
    "WAN21_FunControl2V", "WAN21_HuMo", "WAN21_I2V", "WAN21_SCAIL", "WAN21_SCAIL2", "WAN21_T2V", "WAN21_Vace",
    "WAN22_Animate", "WAN22_Camera", "WAN22_S2V", "WAN22_T2V", "WAN22_WanDancer", "ZImage", "ZImagePixelSpace"})
VELOCITY = ("v_pred", "ztsnr")  # names in a saved MODEL that predicts velocity, which the host looks for in few classes


@dataclass(frozen=True)
class Network:
    """A model of the host's as its names tell it.

    `name` is the host's class, `identity` what tells two of its models apart (models.model_identity), without the kind
    of prediction where the host reads that from values. `parameters` and `buffers`: name -> shape; `linears` are the
    modules that the host's mixed-precision operations quantize as Linear. `becomes`: stored name -> the name it has in
    the model; "" for what is cut or computed, None for what is dropped. `by_columns` are the stored weights whose width
    the host's detection reads, `by_rows` those whose height. `beside`: stored names -> shapes of what has no place in
    the network and the host reads all the same: for its model around it (Stable Audio), or to tell what it is (PixArt's
    `pos_embed`, marks).
    """

    name: str
    identity: Mapping[str, Any]
    parameters: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, tuple[int, ...]]
    linears: frozenset[str]
    becomes: Mapping[str, str | None]
    by_columns: frozenset[str]
    by_rows: frozenset[str]
    beside: Mapping[str, tuple[int, ...]]


@needs("native passthrough")
def network(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Network | None:
    """The host's model for tensors of these names and logical shapes and a file's metadata; None where it knows none.

    Raises ValueError where its code cannot make sense of them, as for half a model.
    """
    import comfy.model_detection
    import torch

    columns: set[str] = set()
    rows: set[str] = set()
    tensors = stand_ins(shapes, columns, rows)
    detection = _Given(tensors.items())
    try:
        config = comfy.model_detection.model_config_from_unet(detection, "", metadata=dict(metadata))
        if config is None:
            return None
        operations = config.custom_operations = _operations()
        config.set_inference_dtype(torch.bfloat16, None)
        by_columns, by_rows = frozenset(columns), frozenset(rows)
        # no meta tensors: around its network the host makes modules with memory, and copies their weights
        given = _Given((name, _ones(shape)) for name, shape in shapes.items())
        model = config.get_model(given, "")
        made = config.process_unet_state_dict(dict(tensors))
    except Exception as error:  # whatever its code trips over: assertions, missing keys, sizes that make no model
        raise ValueError(f"{type(error).__name__}: {str(error)[:200]}") from error
    net = model.diffusion_model
    back = {id(tensor): name for name, tensor in tensors.items()}
    becomes: dict[str, str | None] = dict.fromkeys(tensors)
    new = {name for name, tensor in made.items() if id(tensor) not in back}
    for name, tensor in made.items():
        if id(tensor) in back:
            becomes[back[id(tensor)]] = name
    if new:  # something was cut or computed: what is gone may be what it was made of
        becomes = {name: "" if target is None else target for name, target in becomes.items()}
    parameters = {name: tuple(tensor.shape) for name, tensor in net.named_parameters()}
    buffers = {name: tuple(tensor.shape) for name, tensor in net.named_buffers()}
    for name in sorted(new & parameters.keys()):  # the host takes any shape
        if tuple(made[name].shape) != parameters[name]:
            raise ValueError(Text("{name} comes out as {shape}, expected {parameters}", name=name,
                                  shape=list(made[name].shape), parameters=list(parameters[name])))
    linears = frozenset(name for name, module in net.named_modules() if isinstance(module, operations.Linear))
    identity = model_identity(model)
    if not given.read.isdisjoint(parameters.keys() - new):
        del identity["prediction"]  # whether SD 2 predicts noise or velocity is a guess from a norm's bias
    marks = VELOCITY if identity.get("prediction", "V_PREDICTION") == "V_PREDICTION" else ()
    beside = {name: shapes[name] for name in given.read.union(given.found, marks, detection.read) & shapes.keys()
              if (place := becomes[name]) and place not in parameters and place not in buffers}
    return Network(_name(config), identity,
                   {name: shape for name, shape in parameters.items() if name not in new}, buffers, linears, becomes,
                   by_columns, by_rows, beside)


def header_of(model: Any) -> dict[str, str]:
    """The metadata that a file of this model's tensors needs for the host to make the same model of it again: some it
    knows by the header alone, or reads what has no shape (positions, precision) there. Empty where names and sizes say
    all, and where no header helps."""
    net, config = model.diffusion_model, model.model_config
    stored = net.state_dict().keys()
    shapes = {name: tuple(tensor.shape) for name, tensor in [*net.named_parameters(), *net.named_buffers()]
              if name in stored}
    identity = model_identity(model)

    def is_it(told: Network) -> bool:
        guessed = {"prediction": identity["prediction"], **told.identity}  # which only values tell of some
        return told.name == config_name(model) and guessed == identity

    try:
        plain = network(shapes, {})
        if plain is None or is_it(plain):
            return {}
        said = {key: value for key, value in identity.items()
                if key in config.unet_config and plain.identity.get(key) != value}
        header = {"config": json.dumps({"transformer": {**said, **type(config).unet_config}})}
        told = network(shapes, header)
    except (ValueError, TypeError):  # no model of the host's list, or with what is no JSON
        return {}
    return header if told is not None and is_it(told) else {}


def stand_ins(shapes: Mapping[str, tuple[int, ...]], columns: set[str] | None = None,
              rows: set[str] | None = None) -> dict[str, Any]:
    """Tensors without memory in the place of stored ones, for the host's detection; into `columns` and `rows` go the
    names of those whose columns and rows it reads."""
    looked = set() if rows is None else rows, set() if columns is None else columns
    return {name: _stand_in(name, shape, looked) for name, shape in shapes.items()}


def config_name(model: Any) -> str:
    """The host's class of a model, as `Network.name`."""
    return _name(model.model_config)


def _name(config: Any) -> str:
    """The host's class of a model; Ovis-Image, for which it has that of FLUX.1 schnell, is called as it is."""
    name = type(config).__name__
    return "OvisImage" if name == "FluxSchnell" and config.unet_config.get("yak_mlp") else name


class _Given(dict[str, Any]):
    """Tensors for the host; into `read` go the names of those that are taken out, into `found` of those looked for."""

    def __init__(self, tensors: Iterable[tuple[str, Any]]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()
        self.found: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.found.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self.read.add(name)
        return super().pop(name, *default)


def _ones(shape: tuple[int, ...]) -> Any:
    """Ones of any shape in the memory of one: a number whose logarithm can be taken."""
    import torch

    return torch.ones((), dtype=torch.bfloat16).expand(shape)


class _Shape(tuple[int, ...]):
    """A shape that says when its rows (dimension 0) or columns are looked at."""

    looked: Callable[..., None]

    def __getitem__(self, index: Any) -> Any:
        self.looked(*((0,) if index in (0, -len(self)) else (1,) if isinstance(index, int) else (0, 1)))
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[int]:
        self.looked(0, 1)
        return super().__iter__()

    def __eq__(self, other: object) -> bool:
        self.looked(0, 1)
        return super().__eq__(other)

    __hash__ = tuple.__hash__


@needs("UNets in diffusers' names")
def unet_names(sizes: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' name of every tensor that a UNet of these numbers of blocks may have -> the host's. `sizes` are
    `num_res_blocks` and `channel_mult` (one a level), and the `transformer_depth` of each way (also `_middle`,
    `_output`)."""
    import comfy.utils

    names: dict[str, str] = comfy.utils.unet_to_diffusers(dict(sizes))
    return names


def _stand_in(name: str, shape: tuple[int, ...], looked: tuple[set[str], set[str]]) -> Any:
    """A tensor without memory in the place of a stored one; what is read of its rows and columns goes into `looked`."""
    import torch

    if len(shape) < 2:  # has values: detection looks at some
        return _ones(shape)
    if len(shape) > 2:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    def look(*dimensions: int) -> None:
        for dimension in dimensions:
            looked[dimension].add(name)

    made = torch.empty(shape, dtype=torch.bfloat16, device="meta").as_subclass(_stand_in_class())
    made.stands_for = shape, look
    return made


@lru_cache(maxsize=1)
def _stand_in_class() -> Any:
    import torch

    class StandIn(torch.Tensor):
        # what is cut from one is a plain tensor
        __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
        stands_for: Any

        @property
        def shape(self) -> Any:  # type: ignore[override]
            found = _Shape(self.stands_for[0])
            found.looked = self.stands_for[1]
            return found

        def size(self, *args: Any) -> Any:
            self.stands_for[1](0, 1)
            return torch.Size(self.stands_for[0]) if not args else self.stands_for[0][args[0]]

    return StandIn


def _operations() -> Any:
    """The host's operations, whose layers have no memory. There is no device around them: some models compute with
    small tables while they are built."""
    import comfy.ops
    import torch

    def of(kind: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            with torch.device("meta"):
                kind.__init__(self, *args, **{**kwargs, "device": "meta"})

        return type(kind.__name__, (kind,), {"__init__": init})

    layers = {name: of(kind) for name, kind in vars(comfy.ops.disable_weight_init).items()
              if isinstance(kind, type) and issubclass(kind, torch.nn.Module)}
    return type("WithoutMemory", (comfy.ops.disable_weight_init,), layers)
