"""Real msmodelslim 26.1.0 exports of a tiny Wan (tests/data/modelslim, written by make_modelslim.py), their float
sources, and an independent decoding of every scheme."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support import ascend
from support.common import E2M1

DATA = Path(__file__).resolve().parents[1] / "data" / "modelslim"
HIDDEN, FFN, TEXT, HOST_TEXT = 128, 512, 64, 4096
SEEDS = {"": 1, "low_noise_model": 1, "high_noise_model": 2}  # of the float sources


@dataclass(frozen=True)
class Export:
    """How a folder of tests/data/modelslim was made: blocks, latent channels, dtype of the source, its experts.

    `normal`: its blocks shift and scale nothing, so that what their norms put out is N(0, 1), as what the vendor's
    error bands were measured on (docs/sources/ascend.md, "Error bands").
    """

    layers: int = 1
    channels: int = 16
    dtype: torch.dtype = torch.bfloat16
    experts: tuple[str, ...] = ("",)
    normal: bool = False


EXPORTS = {
    "mxfp8": Export(experts=("high_noise_model", "low_noise_model")),  # MindIE, with q_rot and k_rot
    "mxfp8_ascendv1": Export(),  # a shard and its index
    "w8a8_dynamic": Export(channels=48),  # MindIE; a TI2V-5B: one model, 48 channels
    "w8a8": Export(normal=True),  # MindIE: deq_scale F32
    "w8a8_fp16": Export(dtype=torch.float16, normal=True),  # AscendV1: deq_scale as int64 bit patterns
    "w4a4_dynamic": Export(),
    "mxfp4": Export(layers=2),
    "mxfp4_smooth": Export(),  # iter_smooth: .linear. and .div.mul_scale
    "dual": Export(),  # W4A4_MXFP4_DUALSCALE in ffn.2 (a group takes 512 columns), W8A8_MXFP8 in the rest
    "mixed": Export(),  # AscendV1: W4A8_DYNAMIC, W8A16, WFP8AFP8_DYNAMIC and W4A8_MXFP in one model
}

# How many layers of each type an export has: 10 Linears a block, 6 around them.
COUNTS = {
    "mxfp8": {"BF16": 6, "W8A8_MXFP8": 10}, "mxfp8_ascendv1": {"BF16": 6, "W8A8_MXFP8": 10},
    "w8a8_dynamic": {"BF16": 7, "W8A8_DYNAMIC": 9}, "w8a8": {"BF16": 6, "W8A8": 10},
    "w8a8_fp16": {"F16": 6, "W8A8": 10}, "w4a4_dynamic": {"BF16": 6, "W4A4_DYNAMIC": 10},
    "mxfp4": {"BF16": 6, "W4A4_MXFP4": 20}, "mxfp4_smooth": {"BF16": 6, "W4A4_MXFP4": 10},
    "dual": {"BF16": 6, "W8A8_MXFP8": 9, "W4A4_MXFP4_DUALSCALE": 1},
    "mixed": {"BF16": 6, "W8A16": 4, "WFP8AFP8_DYNAMIC": 4, "W4A8_DYNAMIC": 1, "W4A8_MXFP": 1},
}


def source(export: Export, expert: str = "") -> Any:
    """The float WanModel that an export was made from (text of 64 features).

    Weights of the Linears that msmodelslim quantizes are N(0, 0.04); those it leaves alone are -0.05, 0 or 0.05
    (modulations ten times that), so that the files compress.
    """
    import comfy.ldm.wan.model
    import comfy.ops

    g = torch.Generator().manual_seed(SEEDS[expert])
    model = comfy.ldm.wan.model.WanModel(
        model_type="t2v", patch_size=(1, 2, 2), text_len=32, in_dim=export.channels, dim=HIDDEN, ffn_dim=FFN,
        freq_dim=256, text_dim=TEXT, out_dim=export.channels, num_heads=1, num_layers=export.layers,
        dtype=export.dtype, device="cpu", operations=comfy.ops.manual_cast)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("blocks.") and p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=g) * 0.04)
            elif p.ndim > 1:  # gates of a half let the blocks matter
                p.copy_(torch.randint(-1, 2, p.shape, generator=g) * (0.5 if p.ndim == 3 else 0.05))
            else:
                one = "norm" in name and name.endswith("weight")
                p.copy_(torch.randn(p.shape, generator=g) * 0.02 + (1.0 if one else 0.0))
        if export.normal:
            for block in model.blocks:
                block.modulation[:, [0, 1, 3, 4]] = 0  # 2 and 5 are the gates
    return model.eval().requires_grad_(False)


def folder(name: str, to: Path) -> Path:
    """A copy of an export in `to`, its text embedding padded with zeros to the 4096 features that ComfyUI has fixed.

    Nothing else is changed: the padded columns of text_embedding.0.weight meet zeros only in `inputs`.
    """
    for path in sorted((DATA / name).rglob("*")):
        target = to / path.relative_to(DATA / name)
        if path.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".safetensors":
            target.write_bytes(path.read_bytes())
            continue
        tensors = load_file(str(path))
        key = "text_embedding.0.weight"
        if key in tensors:
            tensors[key] = torch.nn.functional.pad(tensors[key], (0, HOST_TEXT - TEXT))
        save_file(tensors, str(target))
    return to


@dataclass
class Copied:
    """A copied export: what is stored and described in it (high_noise_model's, of two experts)."""

    export: Export
    folder: Path
    inner: Path
    tensors: dict[str, torch.Tensor]
    entries: dict[str, Any]

    @property
    def channels(self) -> int:
        return self.export.channels

    def source(self) -> Any:
        """The float network that it was made from."""
        return source(self.export, self.export.experts[0])


def copy_all(root: Path) -> dict[str, Copied]:
    """Every export, copied below `root`."""
    copied = {}
    for name, export in EXPORTS.items():
        inner = folder(name, root / name) / export.experts[0]
        copied[name] = Copied(export, root / name, inner, stored(inner), described(inner))
    return copied


def stored(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export, by safetensors itself."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(str(file)))
    return tensors


def described(path: Path) -> dict[str, Any]:
    """The description of an export."""
    file, = (file for file in path.glob("quant_model_description*.json"))
    return json.loads(file.read_text(encoding="utf-8"))


def write(path: Path, tensors: dict[str, torch.Tensor], entries: dict[str, Any]) -> Path:
    """An unsharded folder of these tensors and this description."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()},
              str(path / "quant_model_weights.safetensors"))
    (path / "quant_model_description.json").write_text(json.dumps(entries), encoding="utf-8")
    return path


def decode(tensors: dict[str, torch.Tensor], entries: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every weight of an export in F64 by native layer name, as docs/sources/ascend.md, "Stored tensors", has it.

    Written from that table alone; exact up to the one rounding of W8A8's quotient of two scales (to F32, as stored).
    """
    weights = {}
    for name, kind in entries.items():
        if not name.endswith(".weight") or name not in tensors or tensors[name].ndim != 2:
            continue
        layer = name.removesuffix(".weight")
        part = {leaf: tensors.get(f"{layer}.{leaf}") for leaf in (
            "weight", "weight_scale", "weight_offset", "weight_dual_scale", "deq_scale", "input_scale")}
        plain = layer.removesuffix(".linear")
        weight = _decode(kind, part)
        if f"{plain}.div.mul_scale" in tensors:
            weight = weight * tensors[f"{plain}.div.mul_scale"].double()
        weights[plain] = weight
    return weights


def _decode(kind: str, part: dict[str, Any]) -> torch.Tensor:
    w, scale = part["weight"], part["weight_scale"]
    if kind == "FLOAT":
        return w.double()
    if kind == "W8A8":
        deq = part["deq_scale"]
        if deq.dtype == torch.int64:
            deq = deq.to(torch.int32).view(torch.float32)
        return w.double() * (deq / part["input_scale"]).double()[:, None]
    if kind == "W4A8_DYNAMIC":  # rows 2i in the low nibble, 2i + 1 in the high one
        w = torch.stack([(w << 4) >> 4, w >> 4], 1).reshape(-1, w.shape[1])
    if kind in ("W8A8_DYNAMIC", "W8A16", "W4A4_DYNAMIC", "W4A8_DYNAMIC", "WFP8AFP8_DYNAMIC"):
        return (w.double() - part["weight_offset"].double()) * scale.double()
    if kind in ("W4A4_MXFP4", "W4A8_MXFP", "W4A4_MXFP4_DUALSCALE"):
        w = E2M1[torch.stack([w & 15, w >> 4], -1).reshape(w.shape[0], -1).long()]
    w = w.double() * (2.0 ** (scale.double() - 127)).repeat_interleave(32, 1)
    if kind == "W4A4_MXFP4_DUALSCALE":
        w = w * part["weight_dual_scale"].double().flatten(1).repeat_interleave(512, 1)
    return w


def layers(export: Copied) -> dict[str, tuple[str, dict[str, torch.Tensor]]]:
    """Every quantized layer of an export by native name: its type, and its stored tensors by leaf.

    quant_bias by its formula (docs/sources/ascend.md, "Static W8A8") where msmodelslim's quotient overflowed F16.
    """
    found, tensors = {}, export.tensors
    for name, kind in export.entries.items():
        if not name.endswith(".weight") or kind == "FLOAT":
            continue
        layer = name.removesuffix(".weight")
        part = {key.removeprefix(f"{layer}."): t for key, t in tensors.items() if key.startswith(f"{layer}.")}
        layer = layer.removesuffix(".linear")
        if f"{layer}.div.mul_scale" in tensors:
            part["mul_scale"] = tensors[f"{layer}.div.mul_scale"]
        if kind == "W8A8" and export.export.dtype == torch.float16:
            quotient = part["bias"] / part["deq_scale"].to(torch.int32).view(torch.float32)
            if bool((quotient.abs() > 65504).any()):
                part["quant_bias"] = (quotient - part["input_offset"] * part["weight"].sum(1)).round()
        found[layer] = kind, part
    return found


class Emulated(torch.nn.Module):
    """A quantized Linear in the arithmetic of ascend.forward, which knows nothing of this pack."""

    weight = None  # newer hosts look at it before they call a layer behind an activation

    def __init__(self, kind: str, part: dict[str, torch.Tensor], **rule: bool):
        super().__init__()
        self.kind, self.part, self.rule = kind, part, rule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = ascend.forward(self.kind, self.part, x.reshape(-1, x.shape[-1]), **self.rule)
        return torch.from_numpy(out).reshape(*x.shape[:-1], -1)


def decoded_source(export: Copied) -> torch.nn.Module:
    """The float source with every Linear of the export put in, decoded independently; F32."""
    network = export.source().float()
    for layer, weight in decode(export.tensors, export.entries).items():
        target = network.get_submodule(layer)
        target.weight = torch.nn.Parameter(weight[:, :target.in_features].float(), requires_grad=False)
    return network


# SGLang 0.5.23's tools/wan_repack.py: str.replace of every row, in this order.
REPACK = [
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"), ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"), ("modulation", "scale_shift_table"), ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"), ("norm2", "norm__placeholder"), ("norm3", "norm2"), ("norm__placeholder", "norm3"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("self_attn.q", "attn1.to_q"), ("self_attn.k", "attn1.to_k"), ("self_attn.v", "attn1.to_v"),
    ("self_attn.o", "attn1.to_out.0"), ("self_attn.norm_q", "attn1.norm_q"), ("self_attn.norm_k", "attn1.norm_k"),
    ("cross_attn.q", "attn2.to_q"), ("cross_attn.k", "attn2.to_k"), ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.o", "attn2.to_out.0"), ("cross_attn.norm_q", "attn2.norm_q"), ("cross_attn.norm_k", "attn2.norm_k"),
    ("attn2.to_k_img", "attn2.add_k_proj"), ("attn2.to_v_img", "attn2.add_v_proj"),
    ("attn2.norm_k_img", "attn2.norm_added_k"), (".linear.", "."), (".div.", ".")]


def repack(tensors: dict[str, torch.Tensor], entries: dict[str, Any], transformer: Path) -> Path:
    """A diffusers transformer folder as SGLang's tool writes it: names, one file, one description, diffusers' config.

    JSON-only keys keep their names, as there.
    """
    def rename(name: str) -> str:
        for old, new in REPACK:
            name = name.replace(old, new)
        return name

    transformer.mkdir(parents=True, exist_ok=True)
    save_file({rename(name): tensor for name, tensor in tensors.items()},
              str(transformer / "diffusion_pytorch_model.safetensors"))
    (transformer / "quant_model_description.json").write_text(
        json.dumps({rename(k) if k in tensors else k: v for k, v in entries.items()}, indent=2), encoding="utf-8")
    (transformer / "config.json").write_text(json.dumps(config()), encoding="utf-8")
    return transformer


def config(layers: int = 1) -> dict[str, Any]:
    """diffusers' config.json of these models (16 channels)."""
    return {"_class_name": "WanTransformer3DModel", "num_attention_heads": 1, "attention_head_dim": HIDDEN,
            "in_channels": 16, "out_channels": 16, "ffn_dim": FFN, "num_layers": layers, "text_dim": HOST_TEXT,
            "freq_dim": 256}


def inputs(channels: int = 16, batch: int = 2, seed: int = 5) -> dict[str, torch.Tensor]:
    """Latents, sigma and text whose features after the first 64 are zero."""
    g = torch.Generator().manual_seed(seed)
    text = torch.zeros(batch, 7, HOST_TEXT)
    text[..., :TEXT] = torch.randn(batch, 7, TEXT, generator=g)
    return {"x": torch.randn(batch, channels, 2, 6, 10, generator=g), "sigma": torch.tensor([0.5, 0.25])[:batch],
            "text": text}


def velocity(model: Any, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The forward of a `source` model, which is ComfyUI's WanModel with this pack out of the way, in F32."""
    with torch.no_grad():
        return model.float()(x, sigma * 1000, text[..., :TEXT])


def load(folder: Path, **request: Any) -> Any:
    """What this pack loads from a folder or file."""
    from quantized_transformers.loaders import model

    return model.load(model.Request(str(folder), **request), quiet=True)


def weights(patcher: Any) -> dict[str, torch.Tensor]:
    """Dequantized weights of every Linear of a MODEL by native layer name, and all else by tensor name."""
    out = {}
    for name, p in patcher.model.diffusion_model.named_parameters():
        layer = name.removesuffix(".weight")
        out[layer if name.endswith(".weight") and p.ndim == 2 else name] = (
            p.dequantize() if hasattr(p, "dequantize") and hasattr(p, "_layout_cls") else p.detach())
    return out


def same(patcher: Any, other: Any) -> bool:
    """Whether two models have the same tensors, bit for bit: integers that are kept as floats may look like NaN."""
    first, second = patcher.model.state_dict(), other.model.state_dict()
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and first[k].shape == second[k].shape
        and torch.equal(*(t[k].contiguous().reshape(-1).view(torch.uint8) for t in (first, second))) for k in first)
