"""ModelOpt's exports, and every file whose layers say by themselves what they are: FP8, ComfyUI's markers, plain casts.

The last family: what no other recognises is described here, or refused by name.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ...host.texts import Text, both
from ...quant.formats import formats, identify, name_unsupported
from ...quant.stored import FP8_DTYPES, PLAIN, PLAIN_DTYPES, StoredFormat
from .. import plan as plans
from ..architectures import Architecture, Dims, Module
from ..architectures.base import tensor_name
from ..containers.checkpoint import Checkpoint
from ..containers.safetensors import TensorInfo
from ..description import CheckpointDescription
from ..patterns import Globs
from ..plan import Group, Layer, LoadPlan, ReadTensors
from ..words import first_ten
from . import nvfp4_order, repos
from .base import Family
from .declarations import ALGORITHMS, Declaration, read_declaration
from .names import NOTHING, Names, adopt
from .reading import described, refuse_packed, spellings

if TYPE_CHECKING:
    from torch import Tensor

    from ...quant.tile import Coded


class ModelOpt(Family):
    """See base.Family."""

    name = "modelopt"
    words = {**{family: f"ModelOpt {family.removeprefix('modelopt-').upper()}" for family in ALGORITHMS},
             "fp8": "FP8", "nvfp4": "NVFP4", "int8": "INT8", "mxfp8": "MXFP8"}

    published = (*repos.MODELOPT, *repos.FP8)

    def badge(self, reference: str) -> str:
        kind, = self.usual_formats(reference)
        return f"ModelOpt {kind}" if "modelopt" in reference else kind

    def usual_formats(self, reference: str) -> tuple[str, ...]:
        return ("NVFP4" if "nvfp4" in reference.lower() else "FP8",)

    def base_of(self, reference: str) -> str:
        """SGLang-Diffusion's compatibility path (pipelines/flux_2_nvfp4.py)."""
        quantized = "flux.2-dev-nvfp4" in reference.replace("\\", "/").lower()
        return "black-forest-labs/FLUX.2-dev" if quantized else ""

    def recognise(self, checkpoint: Checkpoint) -> bool:
        return True

    def read(self, checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> LoadPlan:
        names = adopt(checkpoint)
        architecture, description = described(checkpoint, "", base)
        declaration = read_declaration(checkpoint)
        description.producer, description.declared_in = declaration.producer, list(declaration.origins)
        try:
            description.byte_order = nvfp4_order.from_headers(checkpoint.tensors, declaration)
        except ValueError as error:
            description.problems.append(error.args[0])
        names_of_modelopt = any(name.endswith(".weight_scale_2") for name in checkpoint.tensors)
        if description.byte_order is nvfp4_order.LIGHT and names_of_modelopt:
            description.problems.append(Text("NVFP4 layers by ModelOpt's names and by LightX2V's, whose byte orders "
                                             "differ"))
        description.notes += names.notes
        scaled = bool(declaration.family) or names.marked or any(
            name.endswith((".weight_scale", ".weight_scale_inv")) for name in checkpoint.tensors)
        stored = StoredLayers(description, names, scaled, e4m3=declaration.family == "modelopt-fp8")
        plan = plans.make(LoadPlan(description, architecture), checkpoint.tensors, stored)
        if description.problems:
            refuse_packed(checkpoint)
        _compare_with_declaration(description, declaration)
        description.notes += stored.notes()
        return plan

    def settle(self, checkpoint: Checkpoint, plan: LoadPlan, byte_order: str) -> None:
        nvfp4_order.settle(checkpoint, plan.description, byte_order)


FAMILY = ModelOpt()


class StoredLayers:
    """Layers that say by their tensors what they are; a plan.ReadLayer.

    `scaled`: FP8 weights must have a scale, as others of the file have one or the file says so. `e4m3`: they must be
    E4M3, as its writer's are. `casts` are those found without a scale, `others` the FP8 tensors that are no weights of
    Linear layers.
    """

    def __init__(self, description: CheckpointDescription, names: Names = NOTHING, scaled: bool = True,
                 e4m3: bool = False) -> None:
        self.description, self.names, self.scaled, self.e4m3 = description, names, scaled, e4m3
        self.casts: list[str] = []
        self.others: list[str] = []
        self._readers: dict[StoredFormat, ReadTensors] = {}  # one for each format that layers have in common

    def __call__(self, module: Module, name: str, rows: int, group: Group, problems: list[str]) -> Layer | None:
        weight = plans.take_weight(module, name, group, problems)
        if weight is None:
            return None
        self.beside(module, name, weight, group)
        plans.take_bias(module, name, rows, group, problems)
        if not module.linear:
            return plans.plain(module, name, rows, weight, group, problems)
        leaves = {"weight": weight, **group}
        fmt = self.format_of(name, leaves, problems)
        if fmt is None:
            group.clear()
            return None
        return self.of_format(fmt, module, name, rows, weight, group, problems)

    def format_of(self, name: str, leaves: Group, problems: list[str]) -> StoredFormat | None:
        """The format of a Linear, or None for none of this version's, which is a problem then."""
        fmt = identify(leaves)
        if fmt is None:
            problems.append(Text("{name} is stored as {what}, which this version does not load", name=name,
                                 what=name_unsupported(leaves)))
        return fmt

    def beside(self, module: Module, name: str, weight: TensorInfo, group: Group) -> None:
        """Remember what of a layer is FP8 and no weight of a Linear."""
        if not module.linear and weight.dtype in FP8_DTYPES:
            self.others.append(tensor_name(name, module.stored_leaf))
        bias = group.get("bias")
        if bias is not None and bias.dtype in FP8_DTYPES:
            self.others.append(f"{name}.bias")

    def notes(self) -> list[str]:
        """What is worth saying of FP8 that is more, or less, than weights with scales."""
        notes: list[str] = []
        if self.casts:
            notes.append(Text("{count} FP8 layers have no scale: their values are the weight (a plain cast), and "
                              "activations are not quantized", count=len(self.casts)))
        if self.others:
            notes.append(Text("{count} tensors are FP8 that are no weights of Linear layers; they are read as the "
                              "numbers they are: {names}", count=len(self.others), names=first_ten(self.others)))
        return notes

    def of_format(self, fmt: StoredFormat, module: Module, name: str, rows: int, weight: TensorInfo, group: Group,
                  problems: list[str]) -> Layer:
        """A Linear in a format of quant.formats, its tensors taken out of `group`."""
        own = {leaf: group.pop(leaf) for leaf in sorted(fmt.companions & group.keys())}
        problem = fmt.problem({"weight": weight, **own}, rows, module.inner[0])
        if "comfy_quant" in own and own["comfy_quant"].dtype != "U8":
            problem = Text("comfy_quant is {dtype}, expected U8", dtype=own["comfy_quant"].dtype)
        if weight.dtype in FP8_DTYPES:
            if "weight_scale" not in own and "weight_scale_inv" not in own:
                if self.scaled and module.kind != "embedding":  # a table is cast where layers have scales
                    problem = Text("FP8 weight without weight_scale, without which its values mean nothing here")
                self.casts.append(name)
            if self.e4m3 and weight.dtype != "F8_E4M3":
                problem = Text("E5M2 weight, and the file declares ModelOpt's FP8, which is E4M3")
            if self.names.full_precision:
                self.description.full_precision.append(name)
        if problem:
            problems.append(Text("{name}: {problem}", name=name, problem=problem))
        leaves = plans.leaves(module.stored_leaf, *own, *plans.bias_of(module))
        if fmt is PLAIN and not own:
            return Layer(name, weight.dtype, leaves)
        read = self._readers.setdefault(fmt, partial(self._read, fmt))
        static = "input_scale" in own if "input_scale" in fmt.companions else None
        return Layer(name, weight.dtype if fmt is PLAIN else fmt.name, leaves, read, static, (fmt.codec,))

    def _read(self, fmt: StoredFormat, layer: Layer, part: dict[str, Tensor]) -> list[Coded]:
        if layer.name in self.names.renamed and "input_scale" in part and float(part["input_scale"]) == 1:
            del part["input_scale"]  # as that format's writers say that there is none
        made, asked = fmt.coded(layer.name, part, self.description.byte_order), self.description.full_precision
        return [made._replace(full_precision=made.full_precision or layer.name in asked)]


def _compare_with_declaration(description: CheckpointDescription, declaration: Declaration) -> None:
    """Hold the claims against the tensors: notes where only words differ, problems where numbers would."""
    quantized = [name for name, fmt in description.layers.items() if fmt not in PLAIN_DTYPES]
    kinds = {fmt for fmt in description.formats if fmt not in PLAIN_DTYPES}
    first = [kind.partition(" ")[0] for kind in kinds]  # without "(blocks)"
    described = next((kind.lower() for kind in ("FP8", "NVFP4", "MXFP8", "INT8") if kind in first), "")
    description.family = declaration.family if declaration.family and quantized else described if quantized else "none"
    if "NVFP4" in kinds:
        description.notes.append(nvfp4_order.note(description.byte_order))
    declared = declaration.family.partition("modelopt-")[2].upper()
    if quantized and declared and declared not in first:
        description.notes.append(Text("{family} is declared, but the tensors are {kinds}; the tensors are right",
                                      family=declaration.family, kinds=", ".join(sorted(kinds))))
    if quantized and not declaration.family:
        description.notes.append(Text("no quantization is declared; the formats are taken from the tensors"))
    if declaration.family and declared != "INT8" and "INT8" in first:  # codes of another type would fit
        description.problems += [Text("{name} is stored as INT8, and the file declares {family}", name=name,
                                      family=declaration.family)
                                 for name in quantized if description.layers[name].startswith("INT8")]
    if declaration.weights_only:
        description.full_precision += quantized
    if declaration.family and not quantized:
        description.notes.append(Text("{family} is declared in {origins}, but no tensor is quantized; it is loaded as "
                                      "it is", family=declaration.family, origins=both(declaration.origins)))
    # full match, `*` crosses dots (docs/sources/sglang.md, "Ignore lists")
    ignored = Globs(declaration.ignore, description.reference).among(quantized)
    if ignored:
        description.notes.append(Text("{count} layers are declared as left alone but stored quantized; the tensors are "
                                      "right: {names}", count=len(ignored), names=first_ten(ignored)))
    if declaration.activation_scheme == "dynamic" and description.static_activations:
        description.problems.append(Text("activation_scheme is declared dynamic, but {count} layers carry a static "
                                         "input_scale", count=description.static_activations))
    if description.dynamic_activations:
        reason = Text("as declared") if declaration.activation_scheme == "dynamic" else Text("input_scale is missing")
        description.notes.append(Text("dynamic activation scales in {count} layers ({reason})",
                                      count=description.dynamic_activations, reason=reason))
    words = {fmt.name: fmt.words for fmt in formats()}
    for declared_name, conf in declaration.layers.items():
        word = str(conf.get("format") or "")
        name = next((name for name in spellings(declared_name) if name in description.layers), "")
        stored = description.layers.get(name)
        if stored is not None and word and word not in words.get(stored, ()):
            description.problems.append(Text("the metadata declares {name} as {word}, but it is stored as {stored}",
                                             name=name, word=word, stored=stored))
        elif stored is not None and conf.get("full_precision_matrix_mult"):
            description.full_precision.append(name)
