"""Tiny models as Nunchaku publishes them, with what every layer (svdquant_layers.py) is in natural order. Nothing here
uses the pack."""

from __future__ import annotations

import copy
import json
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support import flux, flux2, qwen_image, svdquant, z_image
from support.common import rel_l2, save
from support.svdquant_layers import Natural, awq, w4a4
from support.svdquant_tables import (
    LEGACY,
    REFINERS,
    Cut,
    Table,
    flux2_table,
    flux_plain,
    flux_table,
    qwen_table,
    z_image_table,
)


@dataclass
class Made:
    """A tiny checkpoint: packed `tensors` with metadata, the diffusers `model` it was made of, and its numbers.

    `layers` are stored names → numbers; `linears` diffusers' Linear → its [(stored layer, first row, rows)], in the
    order of its columns, or of its rows for those in `below`. `config` is its config.json, if it has one.
    """

    model: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    layers: dict[str, Natural] = field(default_factory=dict)
    linears: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)
    file: str = ""
    below: set[str] = field(default_factory=set)
    config: dict[str, Any] | None = None

    def numbers(self, linear: str) -> list[Natural]:
        return [self.layers[name].rows(first, count) for name, first, count in self.linears[linear]]

    def weight(self, linear: str) -> Tensor:
        """The plain weight of a diffusers Linear, F32."""
        return torch.cat([part.weight for part in self.numbers(linear)], dim=0 if linear in self.below else 1)

    def bias(self, linear: str, plain: bool = True) -> Tensor:
        """Its bias: for the plain weight, or as stored."""
        parts = [part.plain_bias if plain else part.bias for part in self.numbers(linear)]
        return torch.cat(parts) if linear in self.below else torch.stack(parts).sum(0)

    def dequantized(self) -> Any:
        """The diffusers model in F32 on the plain weights."""
        model = copy.deepcopy(self.model).float()
        with torch.no_grad():
            for name in self.linears:
                module = model.get_submodule(name)
                module.weight.copy_(self.weight(name))
                if module.bias is not None:
                    module.bias.copy_(self.bias(name))
        return model

    def emulated(self, seen: list[Tensor]) -> Any:
        """The same with the exact int4 activation rule in every quantized Linear.

        `seen`: what the layers of another implementation were given. Here each takes the rows that are its own input but
        for rounding: a value on the other side of a step of the int4 grid would otherwise move all that follows.
        """
        model = self.dequantized()
        for name in self.linears:
            module = model.get_submodule(name)
            parts = self.numbers(name)

            def forward(_module: Any, x: Tensor, parts: list[Natural] = parts, below: bool = name in self.below
                        ) -> Tensor:
                rows = torch.cat([y.flatten(0, -2) for y in seen if y.shape[-1] == x.shape[-1]])
                nearest = rows[torch.cdist(x.flatten(0, -2), rows).argmin(-1)].view_as(x)
                assert rel_l2(nearest, x) < 1e-4
                if below:
                    return torch.cat([part.forward(nearest) for part in parts], dim=-1)
                split = nearest.split([part.residual.shape[1] for part in parts], dim=-1)
                return torch.stack([part.forward(columns) for part, columns in zip(parts, split, strict=True)]).sum(0)

            module.forward = types.MethodType(forward, module)
        return model

    def write(self, folder: Path, tensors: dict[str, Tensor] | None = None, metadata: dict | None = None,
              name: str = "") -> Path:
        """The file, or a changed one, in `folder`."""
        name = name or self.file
        save(folder, self.tensors if tensors is None else tensors, self.config,
             self.metadata if metadata is None else metadata, name=name)
        return folder / name


def given(patcher: Any) -> list[Tensor]:
    """What the quantized layers of a host's model are given, from now on; grows while it runs."""
    seen: list[Tensor] = []
    for module in patcher.model.diffusion_model.modules():
        if hasattr(getattr(module, "weight", None), "_layout_cls"):
            module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    return seen


def _make(model: Any, table: dict[str, tuple[list[str], Any]], precision: str, rank: int, file: str, class_name: str,
          rename: Callable[[str], str] = lambda name: name, legacy: bool = False, biases: bool = True) -> Made:
    """`table`: stored layer → (diffusers Linears whose rows it joins, how): an int is the number of interleaved vectors
    of a modulation, "unsigned" or "" a W4A4 layer, a slice the columns it takes of a Linear that two layers share."""
    torch.manual_seed(5)  # svd_lowrank draws, too
    g = torch.Generator().manual_seed(5)
    made, weights = Made(model, file=file), dict(model.named_parameters())
    left = dict(model.state_dict())
    shared: dict[str, Tensor] = {}
    for name, (linears, how) in table.items():
        parts = [weights[f"{linear}.weight"].float() for linear in linears]
        bias = [weights[f"{linear}.bias"].float() if f"{linear}.bias" in weights else torch.zeros(len(part))
                for linear, part in zip(linears, parts, strict=True)]
        if isinstance(how, slice):  # of two layers that add up, each has a share of the bias
            first = how.start == 0
            half = shared.setdefault(linears[0], bias[0] * torch.rand(len(bias[0]), generator=g))
            parts, bias = [parts[0][:, how]], [half if first else bias[0] - half]
        if isinstance(how, Cut):
            parts = [parts[0][how.rows, how.columns]]
            bias = [bias[0] if how.biased else torch.zeros(len(parts[0]))]
            made.below |= set(linears) if how.rows != slice(None) else set()
        joined, offsets = torch.cat(parts), torch.cat(bias)
        if isinstance(how, int):
            numbers, leaves = awq(joined, offsets, how)
        else:
            unsigned = how == "unsigned" or isinstance(how, slice) and how.start != 0
            numbers, leaves = w4a4(joined, offsets, precision, rank, unsigned, len(parts), g)
        made.layers[name] = numbers
        at = 0
        for linear, part in zip(linears, parts, strict=True):
            made.linears.setdefault(linear, []).append((name, at, len(part)))
            at += len(part)
            left.pop(f"{linear}.weight", None)
            left.pop(f"{linear}.bias", None)
        new = dict(LEGACY) if legacy else {}
        made.tensors |= {f"{name}.{new.get(leaf, leaf)}": tensor for leaf, tensor in leaves.items()}
    made.tensors |= {rename(name): tensor for name, tensor in left.items()}
    weight = {"int4": {"dtype": "int4", "scale_dtype": None, "group_size": 64},
              "nvfp4": {"dtype": "fp4_e2m1_all", "scale_dtype": [None, "fp8_e4m3_nan"], "group_size": 16}}[precision]
    config = {**dict(model.config), "_class_name": type(model).__name__}
    made.metadata = {"model_class": class_name, "config": json.dumps(config, default=str),
                     "quantization_config": json.dumps({"method": "svdquant", "weight": weight, "activation": weight,
                                                        "rank": rank})}
    return made


def file_name(precision: str, rank: int, model: str) -> str:
    return f"svdq-{'int4' if precision == 'int4' else 'fp4'}_r{rank}-{model}.safetensors"


def make_flux(precision: str = "int4", rank: int = 16, double: int = 1, single: int = 1, model: Any = None,
              **sizes: Any) -> Made:
    """FLUX.1 with legacy suffixes, as published: a random one of these sizes, or this diffusers `model`."""
    model = model or flux.make(double=double, single=single, **sizes)
    config = model.config
    table = flux_table(config.num_layers, config.num_single_layers, config.num_attention_heads * flux.HEAD)
    return _make(model, table, precision, rank, file_name(precision, rank, "flux.1-dev"),
                 "NunchakuFluxTransformer2dModel", flux_plain, legacy=True)


def make_qwen_image(precision: str = "int4", rank: int = 16, layers: int = 1, **sizes: Any) -> Made:
    """Qwen-Image with v2 suffixes, as published."""
    model = qwen_image.make(layers=layers, **sizes)
    return _make(model, qwen_table(layers), precision, rank, file_name(precision, rank, "qwen-image"),
                 "NunchakuQwenImageTransformer2DModel")


def make_z_image(precision: str = "int4", rank: int = 16, layers: int = 1, refiners: bool = False) -> Made:
    """Z-Image with v2 suffixes and biases of zero, as published; with quantized refiners or without."""
    made = _make(z_image.make(layers=layers), z_image_table(layers, refiners), precision, rank,
                 file_name(precision, rank, "z-image-turbo"), "NunchakuZImageTransformer2DModel")
    quantization = json.loads(made.metadata["quantization_config"])
    made.metadata["quantization_config"] = json.dumps({**quantization, "skip_refiners": not refiners})
    for at in [] if refiners else REFINERS:  # the unquantized feed-forward keeps its joined first layer
        w3, w1 = (made.tensors.pop(f"{at}.feed_forward.{w}.weight") for w in ("w3", "w1"))
        made.tensors[f"{at}.feed_forward.net.0.proj.weight"] = torch.cat([w3, w1])
        made.tensors[f"{at}.feed_forward.net.2.weight"] = made.tensors.pop(f"{at}.feed_forward.w2.weight")
    return made


def make_flux2(precision: str = "int4", rank: int = 16, names: int = 0, model: Any = None) -> Made:
    """FLUX.2 [klein] as community builds publish it: biases of zero, modulation in BF16; `names` as in flux2_table."""
    model = model or flux2.make(double=1, single=1, guidance=False)
    config = model.config
    table = flux2_table(config.num_layers, config.num_single_layers, config.num_attention_heads * flux2.HEAD, names)
    return _make(model, table, precision, rank, file_name(precision, rank, "flux.2-klein-9b"),
                 "NunchakuFlux2Transformer2DModel", str if names else flux_plain, legacy=not names)


# nunchaku_lite's layers end so in all its models, modulation apart.
_LITE = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out", "net.0.proj", "net.2",
         "proj_mlp", "w1", "w2", "w3", "linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out")


def make_lite(model: Any, awq: tuple[str, ...] = (), precision: str = "int4", rank: int = 16, split: str = "") -> Made:
    """A diffusers model as nunchaku_lite has it: its Linear layers in blocks, each apart; those of 4-bit weights with
    16-bit activations end with one of `awq`. `split` is what such a layer is called that is stored in two, its first
    columns, as many as it has rows, apart."""
    table: Table = {}
    for name, module in model.named_modules():
        if not hasattr(module, "in_features") or "blocks." not in name and "layers." not in name and not name.endswith(awq):
            continue
        if split and name.endswith(split):
            rows = module.out_features
            table |= {f"{name}.linears.0": ([name], Cut(columns=slice(0, rows))),
                      f"{name}.linears.1": ([name], Cut(columns=slice(rows, None), biased=True))}
        elif name.endswith((*_LITE, "single_transformer_blocks.0.proj_out")) or awq and name.endswith(awq):
            table[name] = ([name], 0 if awq and name.endswith(awq) else "")
    made = _make(model, table, precision, rank, "diffusion_pytorch_model.safetensors", "")
    targets: dict[str, list[str]] = {"svdq_w4a4": [], "awq_w4a16": []}
    for name, (linears, how) in table.items():
        targets["awq_w4a16" if how == 0 else "svdq_w4a4"].append(name)
        made.tensors.pop(f"{name}.smooth_factor_orig", None)
        if model.get_submodule(linears[0]).bias is None or isinstance(how, Cut) and not how.biased:
            del made.tensors[f"{name}.bias"]
        if precision == "nvfp4" and how != 0:  # diffusers' layer has both
            made.tensors.setdefault(f"{name}.wtscale", torch.ones(1, dtype=torch.bfloat16))
            made.tensors[f"{name}.wtscale"] = made.tensors[f"{name}.wtscale"].view(1)
            made.tensors.setdefault(f"{name}.wcscales", torch.ones(len(made.tensors[f"{name}.qweight"]),
                                                                   dtype=torch.bfloat16))
    quantization: dict[str, Any] = {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16", "svdq_w4a4": {
        "precision": precision, "group_size": 64 if precision == "int4" else 16, "rank": rank,
        "targets": targets["svdq_w4a4"]}}
    if targets["awq_w4a16"]:
        quantization["awq_w4a16"] = {"precision": "int4", "group_size": 64, "targets": targets["awq_w4a16"]}
    if split:
        quantization["patches"] = [{"type": "split_linear", "module": f"single_transformer_blocks.*.{split}",
                                    "args": {"splits": ["out_features"]}}]
    made.metadata = {}
    made.config = {**json.loads(json.dumps(dict(model.config), default=str)), "_class_name": type(model).__name__,
                   "quantization_config": quantization}
    return made


def row_major(made: Made, packed_vectors: bool) -> Made:
    """A Z-Image of Nunchaku's as vLLM-Omni's converter rewrites it: `packed_vectors` as its first version did, which
    left the vectors as they were."""
    out = Made(made.model, layers=made.layers, linears=made.linears, file="diffusion_pytorch_model.safetensors")
    rename = {"feed_forward.net.0.proj": "feed_forward.w13", "feed_forward.net.2": "feed_forward.w2"}
    swapped = []
    for name in made.layers:
        leaves = {leaf: made.tensors[f"{name}.{leaf}"] for leaf in (
            "qweight", "wscales", "proj_down", "proj_up", "smooth_factor", "wtscale", "wcscales", "bias")
            if f"{name}.{leaf}" in made.tensors}
        (k, rank), n = leaves["proj_down"].shape, len(leaves["qweight"])
        codes = svdquant.nibbles_of(leaves["qweight"])[svdquant.at_codes(0, n, k)]
        leaves |= {"wscales": svdquant.take(leaves["wscales"], svdquant.at_micro(n, k // 16)),
                   "proj_up": svdquant.take(leaves["proj_up"], svdquant.at_up(n, rank)),
                   "proj_down": svdquant.take(leaves["proj_down"], svdquant.at_down(k, rank)),
                   "wtscale": leaves.get("wtscale", torch.ones(1, dtype=torch.bfloat16)).view(1),
                   "wcscales": leaves.get("wcscales", torch.ones(n, dtype=torch.bfloat16))}
        for vector in () if packed_vectors else ("smooth_factor", "wcscales", "bias"):
            leaves[vector] = svdquant.take(leaves[vector], svdquant.at_scales(1, len(leaves[vector])))[0]
        if name.endswith("net.0.proj"):
            swapped.append(name)
            codes, *rest = (torch.cat(tuple(reversed(tensor.view(torch.uint8).chunk(2)))).view(tensor.dtype) for tensor in (
                codes, *(leaves[leaf] for leaf in ("wscales", "proj_up", "wcscales", "bias"))))
            leaves |= dict(zip(("wscales", "proj_up", "wcscales", "bias"), rest, strict=True))
        leaves |= {"qweight": codes[:, 0::2] | codes[:, 1::2] << 4,
                   "wscales": leaves["wscales"].view(torch.uint8).t().contiguous().view(torch.float8_e4m3fn)}
        for old, new in rename.items():
            name = name.replace(old, new)
        out.tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
    left = {name: tensor for name, tensor in made.tensors.items() if name.rpartition(".")[0] not in made.layers}
    out.tensors |= left
    out.metadata = {**made.metadata, "conversion": json.dumps({
        "tool": "vllm_omni.quantization.tools.convert_nunchaku_to_svdquant", "layout": "row_major",
        "half_swapped_layers": swapped})}
    out.config = {**json.loads(made.metadata["config"]), "quantization_config": {"model": None, "default": {
        "quant_method": "svdquant", "rank": rank, "precision": "nvfp4", "act_unsigned": False,
        "modules_to_not_convert": ["lm_head"]}}}
    return out
