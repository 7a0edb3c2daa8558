"""Tiny models of the host that have experts, whose Linears are in every format by its tool's formula, and what they mean."""

from __future__ import annotations

import re
from functools import cache
from itertools import count

import torch

from quantized_transformers.host import passthrough
from support import ascend, bitsandbytes, common, gguf_files, host_models, modelslim, packed
from support.passthrough import FORMS, weights

MODELS = ("HiDream-I1", "Hunyuan3D 2.1")
EXPERT, ROUTER = re.compile(r"\.experts\.\d+\."), re.compile(r"(ff_i|moe)\.gate\.weight$")


def ct(bits, strategy, size=None, kind="int", tokens=False, clip=False):
    said = {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": size, "symmetric": True}
    token = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": [], "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": said, "activation_use_clip": clip} | (
            {"input_activations": token} if tokens else {})}}


def gptq(bits=4, version="gptq"):
    return {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}


# Form -> (a layer by the tool's formula, what config.json says, the format in reports, and by how many roundings to F32 the
# formula and its definition may differ: a scale that is a quotient on one side)
TOOLS = {
    "FP8": (lambda w: FORMS["FP8"](w), None, "FP8"),
    "NVFP4": (lambda w: FORMS["NVFP4, marked"](w), None, "NVFP4"),
    "MXFP8": (lambda w: FORMS["MXFP8, marked"](w), None, "MXFP8"),
    "INT8": (lambda w: FORMS["INT8, marked"](w), None, "INT8"),
    "GPTQ W4A16": (lambda w: packed.gptq(w, size=32, zeros=True), gptq(), "UINT4 (groups)"),
    "GPTQ W4A16, act order": (lambda w: packed.gptq(w, size=32, order=True), gptq(), "UINT4 (groups)"),
    "GPTQ W8A16": (lambda w: packed.gptq(w, 8, 32, 2), gptq(8, "gptq_v2"), "UINT8 (groups)"),
    "AutoRound W4A16": (lambda w: packed.gptq(w, size=32, index=False, negative=True),
                        gptq() | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, "UINT4 (groups)"),
    "AutoRound W8A16": (lambda w: packed.gptq(w, 8, 32, index=False),
                        gptq(8) | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, "UINT8 (groups)"),
    "AWQ W4A16": (lambda w: packed.awq(w, 32), {"quant_method": "awq", "bits": 4, "version": "gemm"}, "UINT4 (groups)"),
    "compressed-tensors W8A8": (packed.ct_int, ct(8, "channel", tokens=True), "INT8"),
    "compressed-tensors W4A16": (lambda w: packed.ct_packed(w, size=32), ct(4, "group", 32), "UINT4 (groups)"),
    "compressed-tensors W4A8": (lambda w: packed.ct_int(w, 4, 32), ct(4, "group", 32, tokens=True), "UINT4 (groups)"),
    "compressed-tensors W4A8, activation clip": (
        lambda w: packed.ct_int(w, 4), ct(4, "channel", tokens=True, clip=True), "UINT4 (groups)"),
    "compressed-tensors FP8_DYNAMIC": (lambda w: packed.ct_fp8(w, 1), ct(8, "channel", kind="float", tokens=True), "FP8 (blocks)"),
    "compressed-tensors NVFP4": (packed.ct_nvfp4, ct(4, "tensor_group", 16, "float", True), "NVFP4", 4),
    "compressed-tensors MXFP4": (lambda w: packed.ct_mx(w, 4), ct(4, "group", 32, "float"), "MXFP4"),
    "bitsandbytes NF4": (lambda w: bitsandbytes.four_bits(w, double=True), None, "NF4"),
    "bitsandbytes INT8": (bitsandbytes.llm_int8, None, "INT8 (LLM.int8)", 4),
}
GGUF = ("Q8_0", "Q5_1", "Q4_0", "MXFP4", "Q4_K", "Q6_K", "IQ4_XS")
SLIM = ("W4A4_DYNAMIC", "W4A8_DYNAMIC", "W8A8_DYNAMIC", "W8A8_MXFP8")


@cache
def tiny(name):
    """(a model's tensors in BF16, the names of its experts' weights)"""
    tensors = host_models.make(name)
    with host_models.detected(name):
        net = passthrough.network({key: tuple(t.shape) for key, t in tensors.items()}, host_models.metadata_of(name))
    return {key: t.to(torch.bfloat16) for key, t in tensors.items()}, {
        key for key, target in net.becomes.items() if target and target.removesuffix(".weight") in net.linears
        and key.endswith(".weight") and EXPERT.search(key)}


def stored_as(name, pack):
    """(what is stored, what it means, the experts' weights): those by `pack`, the rest as it is."""
    tensors, experts = tiny(name)
    stored = dict(tensors)
    truth = {key: t.float() for key, t in stored.items()}
    for key in experts:
        leaves, truth[key] = pack(stored.pop(key).float())
        stored |= {f"{key.removesuffix('.weight')}.{leaf}": t for leaf, t in leaves.items()}
    return stored, truth, experts


def by_tool(form, name, folder):
    """(the file or folder, what it means, the experts' weights)"""
    pack, said = TOOLS[form][:2]
    stored, truth, experts = stored_as(name, pack)
    common.save(folder, stored, said and {"quantization_config": said}, None, "model.safetensors")
    return folder if said else folder / "model.safetensors", truth, experts


def by_gguf(kind, name, folder):
    """As gguf-py writes and dequantizes them; the usual converter keeps the router in F32. The experts are those whose rows are
    of whole blocks."""
    def pack(weight):
        if weight.shape[1] % gguf_files.gguf.GGML_QUANT_SIZES[gguf_files.Kind[kind]][0]:
            return {"weight": weight.half()}, weight.half().float()
        raw, meant = gguf_files.blocks(weight, kind)
        return {"weight": (raw, kind)}, meant

    made, truth, experts = stored_as(name, pack)
    routers = {key: truth[key] for key in made if ROUTER.search(key)}
    folder.mkdir(parents=True, exist_ok=True)
    path = gguf_files.write(folder / "model.gguf", made | routers, "hidream")
    return path, truth, {key for key in experts if isinstance(made[key], tuple)}


def by_modelslim(kind, name, folder):
    """Random weights by msmodelslim's formulas, with its description."""
    turn = count()

    def pack(weight):
        part = ascend.make(kind, *weight.shape, seed=next(turn), bias=False)
        return part, torch.from_numpy(ascend.decode(kind, part))

    stored, truth, experts = stored_as(name, pack)
    layers = {key.removesuffix(".weight") for key in experts}
    entries = {key: kind if key.rpartition(".")[0] in layers and not key.endswith(".bias") else "FLOAT" for key in stored}
    return modelslim.write(folder, stored, entries | {"model_quant_type": kind}), truth, experts


def check(loaded, truth, experts, title, roundings=0):
    """Every tensor, and the bank itself with one token."""
    net = loaded.patcher.model.diffusion_model
    found = weights(net)
    assert len(experts) >= 6 and experts <= truth.keys() <= found.keys()
    for key, wanted in truth.items():
        bound = wanted.abs() * roundings * 2 ** -24 * (key in experts)
        assert bool(((found[key] - wanted).abs() <= bound).all()), key
    plain = {key for key, tensor in net.named_parameters() if not hasattr(tensor, "_qdata")}
    routers = {key for key in truth if ROUTER.search(key)}
    assert routers and routers <= plain and not experts & plain and loaded.description.formats[title] == len(experts)
    assert one_token(loaded, truth) < 1e-5


def one_token(loaded, truth, dtype=torch.float32):
    """How far a bank's output for one token is from what is expected, relative; most experts get none."""
    bank, prefix = next((module, key) for key, module in loaded.patcher.model.diffusion_model.named_modules()
                        if hasattr(module, "experts"))
    x = torch.randn(1, 1, truth[f"{prefix}.gate.weight"].shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        return common.rel_l2(bank(x), expected(x.float(), prefix, truth))


def expected(x, prefix, truth):
    """What the two best experts make of a token, weighted by the router, and the shared one."""
    def expert(name):
        def linear(leaf, given):
            return torch.nn.functional.linear(given, truth[f"{name}.{leaf}.weight"], truth.get(f"{name}.{leaf}.bias"))
        if f"{name}.w1.weight" in truth:  # SwiGLU
            return linear("w2", torch.nn.functional.silu(linear("w1", x)) * linear("w3", x))
        return linear("net.2", torch.nn.functional.gelu(linear("net.0.proj", x)))

    scores = torch.nn.functional.linear(x, truth[f"{prefix}.gate.weight"]).softmax(-1).flatten()
    return expert(f"{prefix}.shared_experts") + sum(scores[i] * expert(f"{prefix}.experts.{i}") for i in scores.topk(2).indices.tolist())
