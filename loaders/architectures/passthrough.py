"""Any model that the host knows, by the host's own names: an architecture without a table.

The host's detection says which model the logical shapes are, and the model it builds (without memory) which names,
sizes and Linear layers there are. Nothing is renamed or joined here; every parameter must be stored, and every stored
tensor used, which the host only logs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ... import host
from ...host.texts import Text, joined
from ...quant import host_formats
from ...quant.formats import formats
from ...quant.stored import FACTORS, PLAIN_DTYPES
from ..containers.safetensors import TensorInfo
from ..errors import CheckpointError
from .base import Dims, Inputs, Module, Naming

if TYPE_CHECKING:
    from torch import Tensor

# The host's classes of a table's very names and sizes, which only the header of a file tells.
BY_HEADER = frozenset({"WAN21_CausalAR_T2V", "WAN21_FlowRVS"})
PREFIXES = ("model.diffusion_model.", "model.model.", "net.")  # the host's, of a transformer in a whole checkpoint


class HostModel:
    """A model of the host's, as an Architecture. Dims: everything that the host's configuration says of it, numbers as
    they are and anything else in words. `metadata`: what its detection saw of a file's header; `made`: tensors that it
    is given and no file has."""

    class_names: frozenset[str] = frozenset()
    config_only: frozenset[str] = frozenset()

    def __init__(self, network: host.Network, prefix: str, metadata: Mapping[str, str]) -> None:
        self.network, self.name, self.prefix, self.metadata = network, network.name, prefix, dict(metadata)
        self.made: Mapping[str, Tensor] = {}

    def naming(self, names: Collection[str]) -> Naming | None:
        return Naming("native", self.prefix)

    def dims_from_tensors(self, tensors: Mapping[str, TensorInfo], naming: Naming) -> Dims:
        return sizes(self.network.identity)

    def dims_from_config(self, config: Mapping[str, Any]) -> Dims:
        raise ValueError(Text("a config.json says nothing that this version reads of {name}", name=self.name))

    def dims_from_model(self, unet_config: Mapping[str, Any]) -> Dims | None:
        return None

    def modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        net = self.network
        linears = {stored: name for stored, name in net.becomes.items()
                   if name and stored.endswith(".weight") and name.removesuffix(".weight") in net.linears}
        pairs = {f"{stored.removesuffix('.weight')}.bias": f"{name.removesuffix('.weight')}.bias"
                 for stored, name in linears.items()}
        biases = {stored for stored, name in pairs.items() if net.becomes.get(stored) == name}
        dropped = {stored.rpartition(".")[0]: stored for stored, name in net.becomes.items() if name is None}
        for stored, name in net.becomes.items():
            if stored in linears:
                module = stored.removesuffix(".weight")
                rows, columns = net.parameters[linears[stored]]
                yield Module(module, (self.prefix + module,), (rows,), (columns,), f"{module}.bias" in biases,
                             kind="linear", detected=stored in net.by_columns, by_rows=stored in net.by_rows)
            elif name and name in net.parameters and stored not in biases:
                yield self._plain(stored, net.parameters[name])
            elif stored in net.beside:
                yield self._plain(stored, net.beside[stored])
            elif name == "":
                yield self._plain(stored, (), "cut")
            elif name in net.buffers:
                yield self._plain(stored, (), "any")
        for stored in dropped.values():
            yield self._plain(stored, (), "dropped")
        for name in net.parameters.keys() - set(net.becomes.values()):
            yield self._plain(name, net.parameters[name])  # which is missing

    def _plain(self, stored: str, shape: tuple[int, ...], kind: str = "plain") -> Module:
        module, _, leaf = stored.rpartition(".")
        return Module(module, ((self.prefix + module).removesuffix("."),), shape[:1] or (0,), shape[1:], False, leaf,
                      leaf, kind=kind if shape or kind != "plain" else "any")

    def marks(self, dims: Dims) -> tuple[str, ...]:
        return ()

    def inputs(self, dims: Dims) -> Inputs:
        raise ValueError(Text("what {name} is given beside the latents is not known here", name=self.name))

    def confirm(self, patcher: Any) -> Dims:
        """The sizes of a loaded MODEL, with what only values tell. Raises CheckpointError unless it is the one that the
        names told."""
        loaded = sizes(host.model_identity(patcher.model))
        told = {"prediction": loaded["prediction"], **sizes(self.network.identity)}
        other = [Text("{key} {value} (from the names: {told})", key=key, value=loaded.get(key), told=told.get(key))
                 for key in sorted(told | loaded) if loaded.get(key) != told.get(key)]
        made = host.config_name(patcher.model)
        if made != self.name or other:
            what = Text("ComfyUI {version} made {made} of a {name}", version=host.version(), made=made, name=self.name)
            raise CheckpointError(Text("{what}: {other}", what=what, other=joined(", ", other[:10])) if other else what,
                                  "", Text("report this"))
        return loaded


class Named:
    """An architecture of which only the name is known: that of a base from another loader."""

    def __init__(self, name: str) -> None:
        self.name = name


def sizes(identity: Mapping[str, Any]) -> Dims:
    """What tells two models of the host's apart, as sizes: numbers, and anything else in words."""
    return {key: value if isinstance(value, int) else str(value)  # type: ignore[misc]
            for key, value in identity.items() if key != "class"}


def recognise(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> HostModel | None:
    """The host's model of a file's headers; None where the host knows none, or is not there.

    Raises ValueError with what the host tripped over, or for what is no diffusion model.
    """
    prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), "")
    shapes = {name.removeprefix(prefix): shape for name, shape in logical_shapes(tensors).items()}
    network = network_of(shapes, metadata)
    return None if network is None else HostModel(network, prefix, metadata)


def network_of(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> host.Network | None:
    """The host's model of tensors in its own names; None where it knows none, or is not there. Raises ValueError."""
    if not host.is_there() or host.lacking("native passthrough"):
        return None
    network = host.network(shapes, metadata)
    if network is None:
        return None
    if network.name in host.NO_DIFFUSION:
        raise ValueError(Text("{name} is no diffusion model", name=network.name))
    said = network.identity
    if network.name.startswith("Flux") and not said.get("vec_in_dim") and said.get("yak_mlp") is False:
        raise ValueError(Text("FLUX.1 without vector_in"))  # Ovis has none, and is known by another MLP
    return network


def by_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> HostModel | None:
    """The host's model of a file whose header makes another one of it than names and sizes do, which are all that a
    table knows."""
    if "config" not in metadata:  # all that the host reads of a header, of the tables' models
        return None
    try:
        told, plain = recognise(tensors, metadata), recognise(tensors, {})
    except ValueError:  # a config of someone else's
        return None
    return told if told and plain and told.network.identity != plain.network.identity else None


def logical_shapes(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """The shapes that a model's own tensors have, without what quantization adds or packs."""
    found, companions = {}, host_formats.LEAVES.union(*(fmt.companions for fmt in formats()))
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        weight = tensors.get(f"{module}.weight")
        if weight is not None and (leaf in companions or leaf.startswith("weight_")) and (
                weight.dtype not in PLAIN_DTYPES or leaf in FACTORS or f"{module}.comfy_quant" in tensors
                or leaf == "comfy_quant"):
            continue
        packed = leaf == "weight" and info.dtype == "U8" and len(info.shape) == 2
        found[name] = (info.shape[0], 2 * info.shape[1]) if packed else tuple(info.shape)
    return found
