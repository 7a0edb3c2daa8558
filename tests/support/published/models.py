"""Miniature transformers under ComfyUI's native names, F32, of numbers that BF16 has."""

from __future__ import annotations

import hashlib
from math import prod

import torch

from .files import Tensors
from .formats import BF16


def rand(*parts: object, shape: tuple[int, ...]) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:6], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(family: str, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Weights of unit gain, biases 0.1, norms about 1: every tensor moves the output. Rounded to BF16."""
    out = {}
    for name, shape in shapes.items():
        r, leaf = rand(family, name, shape=shape), name.rsplit(".", 1)[-1]
        if leaf == "bias":
            r = 0.1 * r
        elif leaf == "modulation":
            r = 0.3 * r
        elif "pad_token" in name:
            r = 0.7 * r
        elif len(shape) == 1:
            r = 1 + 0.25 * r
        else:
            r = r / prod(shape[1:]) ** 0.5
        out[name] = r.to(BF16).float()
    return out


def lin(out: dict, name: str, rows: int, cols: int, bias: bool = True) -> None:
    out[name + ".weight"] = (rows, cols)
    if bias:
        out[name + ".bias"] = (rows,)


def flux1(h: int = 128, channels: int = 64) -> Tensors:
    s: dict[str, tuple[int, ...]] = {}
    lin(s, "img_in", h, channels)
    lin(s, "txt_in", h, 64)
    for name, cols in (("time_in", 256), ("guidance_in", 256), ("vector_in", 32)):
        lin(s, f"{name}.in_layer", h, cols)
        lin(s, f"{name}.out_layer", h, h)
    for side in ("img", "txt"):
        p = f"double_blocks.0.{side}"
        lin(s, p + "_mod.lin", 6 * h, h)
        lin(s, p + "_attn.qkv", 3 * h, h)
        lin(s, p + "_attn.proj", h, h)
        lin(s, p + "_mlp.0", 4 * h, h)
        lin(s, p + "_mlp.2", h, 4 * h)
        s[p + "_attn.norm.query_norm.scale"] = s[p + "_attn.norm.key_norm.scale"] = (128,)
    lin(s, "single_blocks.0.modulation.lin", 3 * h, h)
    lin(s, "single_blocks.0.linear1", 7 * h, h)
    lin(s, "single_blocks.0.linear2", h, 5 * h)
    s["single_blocks.0.norm.query_norm.scale"] = s["single_blocks.0.norm.key_norm.scale"] = (128,)
    lin(s, "final_layer.linear", 64, h)
    lin(s, "final_layer.adaLN_modulation.1", 2 * h, h)
    return fill("flux1", s)


def flux2(h: int = 128) -> Tensors:
    s: dict[str, tuple[int, ...]] = {}
    lin(s, "img_in", h, 128, False)
    lin(s, "txt_in", h, 96, False)
    for name in ("time_in", "guidance_in"):
        lin(s, f"{name}.in_layer", h, 256, False)
        lin(s, f"{name}.out_layer", h, h, False)
    lin(s, "double_stream_modulation_img.lin", 6 * h, h, False)
    lin(s, "double_stream_modulation_txt.lin", 6 * h, h, False)
    lin(s, "single_stream_modulation.lin", 3 * h, h, False)
    for side in ("img", "txt"):
        p = f"double_blocks.0.{side}"
        lin(s, p + "_attn.qkv", 3 * h, h, False)
        lin(s, p + "_attn.proj", h, h, False)
        lin(s, p + "_mlp.0", 6 * h, h, False)
        lin(s, p + "_mlp.2", h, 3 * h, False)
        s[p + "_attn.norm.query_norm.scale"] = s[p + "_attn.norm.key_norm.scale"] = (128,)
    lin(s, "single_blocks.0.linear1", 9 * h, h, False)
    lin(s, "single_blocks.0.linear2", h, 4 * h, False)
    s["single_blocks.0.norm.query_norm.scale"] = s["single_blocks.0.norm.key_norm.scale"] = (128,)
    lin(s, "final_layer.linear", 128, h, False)
    lin(s, "final_layer.adaLN_modulation.1", 2 * h, h, False)
    return fill("flux2", s)


def wan(h: int = 128, ffn: int = 256, layers: int = 2, channels: int = 16, vace: int = 0) -> Tensors:
    s: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (h, channels, 1, 2, 2), "patch_embedding.bias": (h,)}
    lin(s, "text_embedding.0", h, 4096)
    lin(s, "text_embedding.2", h, h)
    lin(s, "time_embedding.0", h, 256)
    lin(s, "time_embedding.2", h, h)
    lin(s, "time_projection.1", 6 * h, h)

    def block(p: str) -> None:
        s[p + ".modulation"] = (1, 6, h)
        for a in ("self_attn", "cross_attn"):
            for x in "qkvo":
                lin(s, f"{p}.{a}.{x}", h, h)
            s[f"{p}.{a}.norm_q.weight"] = s[f"{p}.{a}.norm_k.weight"] = (h,)
        s[p + ".norm3.weight"] = s[p + ".norm3.bias"] = (h,)
        lin(s, p + ".ffn.0", ffn, h)
        lin(s, p + ".ffn.2", h, ffn)

    for i in range(layers):
        block(f"blocks.{i}")
    s["head.modulation"] = (1, 2, h)
    lin(s, "head.head", 64, h)
    if vace:
        s["vace_patch_embedding.weight"], s["vace_patch_embedding.bias"] = (h, 96, 1, 2, 2), (h,)
        for i in range(vace):
            block(f"vace_blocks.{i}")
            if not i:
                lin(s, "vace_blocks.0.before_proj", h, h)
            lin(s, f"vace_blocks.{i}.after_proj", h, h)
    return fill("wan", s)


def qwen(h: int = 128, layers: int = 2) -> Tensors:
    s: dict[str, tuple[int, ...]] = {"txt_norm.weight": (64,)}
    lin(s, "img_in", h, 64)
    lin(s, "txt_in", h, 64)
    lin(s, "time_text_embed.timestep_embedder.linear_1", h, 256)
    lin(s, "time_text_embed.timestep_embedder.linear_2", h, h)
    for i in range(layers):
        p = f"transformer_blocks.{i}"
        for side in ("img", "txt"):
            lin(s, f"{p}.{side}_mod.1", 6 * h, h)
            lin(s, f"{p}.{side}_mlp.net.0.proj", 4 * h, h)
            lin(s, f"{p}.{side}_mlp.net.2", h, 4 * h)
        for x in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
            lin(s, f"{p}.attn.{x}", h, h)
        for x in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            s[f"{p}.attn.{x}.weight"] = (128,)
    lin(s, "norm_out.linear", 2 * h, h)
    lin(s, "proj_out", 64, h)
    return fill("qwen", s)


def z_image(h: int = 1152) -> Tensors:
    """One layer; the Linears of the four refiner blocks and of the layer's feed-forward are zero, and seven of its nine heads
    (holes in the file). Two heads, modulation, embedders and head are real. 1152 is the least width that ComfyUI runs.
    """
    s: dict[str, tuple[int, ...]] = {"x_pad_token": (1, h), "cap_pad_token": (1, h), "cap_embedder.0.weight": (64,)}
    lin(s, "x_embedder", h, 64)
    lin(s, "t_embedder.mlp.0", 1024, 256)
    lin(s, "t_embedder.mlp.2", 256, 1024)
    lin(s, "cap_embedder.1", h, 64)
    for p, mod in (("noise_refiner.0", 1), ("noise_refiner.1", 1), ("context_refiner.0", 0), ("context_refiner.1", 0),
                   ("layers.0", 1)):
        lin(s, p + ".attention.qkv", 3 * h, h, False)
        lin(s, p + ".attention.out", h, h, False)
        for w, (rows, cols) in (("w1", (h * 8 // 3, h)), ("w2", (h, h * 8 // 3)), ("w3", (h * 8 // 3, h))):
            lin(s, f"{p}.feed_forward.{w}", rows, cols, False)
        s[p + ".attention.q_norm.weight"] = s[p + ".attention.k_norm.weight"] = (128,)
        for n in ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2"):
            s[f"{p}.{n}.weight"] = (h,)
        if mod:
            lin(s, p + ".adaLN_modulation.0", 4 * h, 256)
    lin(s, "final_layer.linear", 64, h)
    lin(s, "final_layer.adaLN_modulation.1", h, 256)

    def zero(name: str) -> bool:
        return name.endswith(".weight") and len(s[name]) == 2 and ("refiner" in name or ".feed_forward." in name)

    real = fill("z_image", {name: shape for name, shape in s.items() if not zero(name)})
    for part in real["layers.0.attention.qkv.weight"].chunk(3):
        part[256:] = 0
    return {name: torch.zeros(1, 1).expand(shape) if zero(name) else real[name] for name, shape in s.items()}


def linears(model: Tensors, *words: str) -> list[str]:
    """Names (without .weight) of 2-D weights that contain one of the words; all without words."""
    return [k[:-7] for k, v in model.items() if k.endswith(".weight") and v.dim() == 2 and not k.startswith("cap_pad")
            and (not words or any(w in k for w in words))]
