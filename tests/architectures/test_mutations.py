"""Damage of every kind to real exports: each ends in the right numbers or in a named error, never in silent noise.

Run with -s to see the table. The few that no reader can tell from bytes are listed as such here and in docs/limits.md.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from support import common
from support.common import comfy_order
from support.families import FAMILIES

pytestmark = pytest.mark.parity

REFUSED, RIGHT, UNDETECTABLE, RIGHT_OR_REFUSED = "refused", "right", "undetectable", "right or refused"


def drop(*leaves):
    return lambda t, c, m, s, f: [t.pop(f"{f.q}.{leaf}") for leaf in leaves]


def put(leaf, change, layer="q"):
    def mutate(t, c, m, s, f):
        name = f"{getattr(f, layer)}.{leaf}"
        t[name] = change(t[name])
    return mutate


def exchange(a, b, *leaves):
    def swap(t, c, m, s, f):
        for leaf in leaves:
            x, y = f"{getattr(f, a)}.{leaf}", f"{getattr(f, b)}.{leaf}"
            t[x], t[y] = t[y], t[x]
    return swap


def declare(**entries):
    return lambda t, c, m, s, f: c["quantization_config"].update(entries)


def flip_bits(weight):
    weight = weight.clone()
    weight.view(torch.uint8)[:64] ^= 1
    return weight


def blank(weight):
    weight = weight.clone()
    weight.view(torch.uint8)[:64] = 0
    return weight


def bias(change):
    """A change of q's bias, or of a norm where the architecture has no biases."""
    def mutate(t, c, m, s, f):
        name = f"{f.q}.bias" if f"{f.q}.bias" in t else f.norm
        t[name] = change(t[name])
    return mutate


# name: (mutation of tensors, config, header metadata and the tensor-scale leaf; outcome)
MUTATIONS = {
    "weight dropped": (drop("weight"), REFUSED),
    "bias dropped": (lambda t, c, m, s, f: t.pop(f"{f.q}.bias" if f"{f.q}.bias" in t else f"{f.q}.weight"), REFUSED),
    "weight scale dropped": (drop("weight_scale"), REFUSED),
    "tensor scale dropped": (lambda t, c, m, s, f: t.pop(f"{f.q}.{s}"), REFUSED),
    "whole layer dropped": (lambda t, c, m, s, f: [t.pop(k) for k in list(t) if k.startswith(f"{f.q}.")], REFUSED),
    "first block dropped": (lambda t, c, m, s, f: [t.pop(k) for k in list(t) if k.startswith(f.first)], REFUSED),
    "last block dropped": (lambda t, c, m, s, f: [t.pop(k) for k in list(t) if k.startswith(f.last)], REFUSED),
    "embedder dropped": (lambda t, c, m, s, f: t.pop(f.embedder), REFUSED),
    "norm dropped": (lambda t, c, m, s, f: t.pop(f.norm), REFUSED),
    "weight renamed": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.wieght", t.pop(f"{f.q}.weight")), REFUSED),
    "layer renamed": (lambda t, c, m, s, f: [t.__setitem__(k.replace("to_q", "to_qq"), t.pop(k)) for k in list(t) if k.startswith(f"{f.q}.")], REFUSED),
    "extra tensor": (lambda t, c, m, s, f: t.__setitem__("extra.weight", torch.ones(4)), REFUSED),
    "weight as INT8": (put("weight", lambda w: w.view(torch.int8)), REFUSED),
    "weight as E5M2": (put("weight", lambda w: w.view(torch.float8_e5m2)), REFUSED),
    "weight cast to BF16 codes": (put("weight", lambda w: w.to(torch.bfloat16)), REFUSED),
    "scale as integers": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.{s}", t[f"{f.q}.{s}"].to(torch.int32)), REFUSED),
    "weight reshaped": (put("weight", lambda w: w.reshape(w.shape[0] // 2, -1)), REFUSED),
    "weight cut": (put("weight", lambda w: w[:-1]), REFUSED),
    "weight transposed": (put("weight", lambda w: w.t().contiguous(), "other"), REFUSED),
    "bias cut": (bias(lambda b: b[:-1]), REFUSED),
    "scale of three": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.{s}", t[f"{f.q}.{s}"].repeat(3)), REFUSED),
    "scale NaN": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.{s}", torch.tensor(float("nan"))), REFUSED),
    "scale zero": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.{s}", torch.tensor(0.0)), REFUSED),
    "scale negative": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.{s}", -t[f"{f.q}.{s}"].clone()), REFUSED),
    "scale infinite": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.{s}", torch.tensor(float("inf"))), REFUSED),
    "input scale NaN": (put("input_scale", lambda x: x * float("nan")), REFUSED),
    "input scale zero": (put("input_scale", lambda x: x * 0), REFUSED),
    "config of another width": (lambda t, c, m, s, f: c.update(f.config[0]), REFUSED),
    "config of another depth": (lambda t, c, m, s, f: c.update(f.config[1]), REFUSED),
    "config of another class": (lambda t, c, m, s, f: c.update(_class_name="SD3Transformer2DModel"), REFUSED),
    "config with another switch or size": (lambda t, c, m, s, f: c.update(f.config[2]), REFUSED),
    "declared W4A8": (declare(quant_algo="W4A8_AWQ"), REFUSED),
    "declared by another tool": (declare(quant_method="hqq"), REFUSED),
    "header contradicts config": (lambda t, c, m, s, f: m.update(quantization_config='{"quant_algo": "MXFP8"}'), REFUSED),
    "layer list contradicts bytes": (lambda t, c, m, s, f: m.update(_quantization_metadata=json.dumps(
        {"layers": {f.q: {"format": "mxfp8"}}})), REFUSED),
    "marker contradicts bytes": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.comfy_quant", torch.tensor(
        list(b'{"format": "mxfp8"}'), dtype=torch.uint8)), REFUSED),
    "two layers exchanged, other shapes": (exchange("q", "other", "weight"), REFUSED),
    "file truncated": ("truncate", REFUSED),
    "file empty": ("empty", REFUSED),
    "file with trailing bytes": ("append", REFUSED),
    "second file beside it": ("twin", REFUSED),
    "config that is no JSON": ("config", REFUSED),

    "extra LoRA": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.lora_A.weight", torch.ones(4, 256)), RIGHT),
    "state of a quantizer": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.weight_quantizer._amax", torch.ones(())), RIGHT),
    "all names below another": (lambda t, c, m, s, f: [t.__setitem__(f"module._orig_mod.{k}", t.pop(k)) for k in list(t)], RIGHT),
    "scales of shape [1]": (lambda t, c, m, s, f: t.update({k: v.reshape(1) for k, v in t.items() if v.ndim == 0}), RIGHT),
    "biases in F32": (lambda t, c, m, s, f: t.update({k: v.float() for k, v in t.items() if k.endswith(".bias")}), RIGHT),
    "norm in F32": (lambda t, c, m, s, f: t.update({k: v.float() for k, v in t.items() if "norm_q" in k}), RIGHT),
    "input scale dropped": (drop("input_scale"), RIGHT),
    "wrong ignore list": (declare(ignore=["*"]), RIGHT),
    "other producer": (declare(producer={"name": "somebody"}), RIGHT),
    "unknown metadata": (lambda t, c, m, s, f: m.update(something="else"), RIGHT),
    "tensors in another order": (lambda t, c, m, s, f: [t.__setitem__(k, t.pop(k)) for k in sorted(t, reverse=True)], RIGHT),

    "bias rounded to FP8": (bias(lambda b: b.to(torch.float8_e4m3fn)), UNDETECTABLE),
    "q and k exchanged": (exchange("q", "k", "weight", "weight_scale"), UNDETECTABLE),
    "scales of q and k exchanged": (exchange("q", "k", "weight_scale"), UNDETECTABLE),
    "rows in another order": (put("weight", lambda w: w.view(torch.uint8).roll(1, 0).view(w.dtype)), UNDETECTABLE),
    "a part of a weight never written": (put("weight", blank), UNDETECTABLE),
    "norm named F16": (lambda t, c, m, s, f: t.__setitem__(f.norm, t[f.norm].view(torch.float16)), UNDETECTABLE),
    "NaN in a norm": (lambda t, c, m, s, f: t.__setitem__(f.norm, t[f.norm] * float("nan")), UNDETECTABLE),
    "bits flipped in codes": (put("weight", flip_bits), UNDETECTABLE),
    # not q's: a norm behind it can take any scale back
    "scale doubled": (lambda t, c, m, s, f: t.__setitem__(f"{f.other}.{s}", t[f"{f.other}.{s}"] * 2), UNDETECTABLE),
    "norm doubled": (lambda t, c, m, s, f: t.__setitem__(f.norm, t[f.norm] * 2), UNDETECTABLE),
}


def rename_scale(t, c, m, s, f):
    t[f"{f.q}.scale_weight"] = t.pop(f"{f.q}.{s}")


def scale_per_row(t, c, m, s, f):
    t[f"{f.q}.{s}"] = t[f"{f.q}.{s}"].repeat(t[f"{f.q}.weight"].shape[0])


def factors(t, c, m, s, f):
    """pre_quant_scale of 2 and half the tensor scale: the same weight."""
    t[f"{f.q}.pre_quant_scale"] = torch.full((t[f"{f.q}.weight"].shape[1] * 2,), 2.0)
    t[f"{f.q}.{s}"] = t[f"{f.q}.{s}"] / 2
    if f"{f.q}.input_scale" in t:
        t[f"{f.q}.input_scale"] = t[f"{f.q}.input_scale"] * 2


def low_rank(t, f, leaves):
    rows, columns = t[f"{f.q}.weight"].shape[0], t[f"{f.q}.weight"].shape[1] * 2
    pair = {"a": torch.zeros(4, columns), "b": torch.ones(rows, 4)}
    t.update({f"{f.q}.svdquant_lora_{leaf}": pair[leaf] for leaf in leaves})


def one_byte(scales, byte):
    scales = scales.clone()
    scales.view(torch.uint8).view(-1)[37] = byte
    return scales


def block_scale(byte):
    return put("weight_scale", lambda scales: one_byte(scales, byte))


ONLY_FP8 = {
    "no config": (lambda t, c, m, s, f: c.clear(), RIGHT),
    "no declaration": (lambda t, c, m, s, f: c.pop("quantization_config"), RIGHT),
    "extra smoothing scale": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.pre_quant_scale", torch.ones(256)), REFUSED),
    "scale by ComfyUI's first name": (rename_scale, RIGHT),
    "scale by both names": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.scale_weight", t[f"{f.q}.{s}"].clone()), REFUSED),
    "scale per row": (scale_per_row, RIGHT),
    "one scale per row NaN": (lambda t, c, m, s, f: [scale_per_row(t, c, m, s, f),
                                                     t[f"{f.q}.{s}"][5:6].fill_(float("nan"))], REFUSED),
    "one scale per row negative": (lambda t, c, m, s, f: [scale_per_row(t, c, m, s, f), t[f"{f.q}.{s}"][5:6].mul_(-1)], REFUSED),
    "one scale per block infinite": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.weight_scale_inv", t.pop(f"{f.q}.{s}").expand(
        -(-t[f"{f.q}.weight"].shape[0] // 128), -(-t[f"{f.q}.weight"].shape[1] // 128)).clone().index_fill_(
            0, torch.tensor(0), torch.inf)), REFUSED),
    "scale per block": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.weight_scale_inv", t.pop(f"{f.q}.{s}").expand(
        -(-t[f"{f.q}.weight"].shape[0] // 128), -(-t[f"{f.q}.weight"].shape[1] // 128)).contiguous()), RIGHT),
    "no scale, and another layer has one": (lambda t, c, m, s, f: [c.pop("quantization_config"), t.pop(f"{f.q}.{s}")], REFUSED),
}
ONLY_NVFP4 = {
    "no config": (lambda t, c, m, s, f: c.clear(), RIGHT_OR_REFUSED),
    # random weights do not tell the order of their block scales, some shapes do
    "no declaration": (lambda t, c, m, s, f: c.pop("quantization_config"), RIGHT_OR_REFUSED),
    "scales in tiles, as enable_swizzle_layout has them": (lambda t, c, m, s, f: [
        t.update({k: v for k, v in comfy_order(t).items() if k.endswith(".weight_scale")}),
        m.update(quantization_config=json.dumps(c["quantization_config"]))], RIGHT_OR_REFUSED),
    "tensor scale by ComfyUI's first name": (rename_scale, REFUSED),
    "tensor scale per row": (scale_per_row, REFUSED),
    "block scales dropped to one": (put("weight_scale", lambda b: b[:1, :1].contiguous()), REFUSED),
    "block scales cut": (put("weight_scale", lambda b: b[:, :-1].contiguous()), REFUSED),
    "one block scale NaN": (block_scale(0x7F), REFUSED),
    "one block scale minus NaN": (block_scale(0xFF), REFUSED),
    "one block scale negative": (block_scale(0x81), REFUSED),
    "one block scale zero": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.weight_scale", one_byte(t[f"{f.q}.weight_scale"], 0)),
                             UNDETECTABLE),  # as a block of zeros has
    "one block scale NaN, as U8": (lambda t, c, m, s, f: t.__setitem__(f"{f.q}.weight_scale", one_byte(
        t[f"{f.q}.weight_scale"], 0x7F).view(torch.uint8)), REFUSED),
    "one block scale NaN, in ComfyUI's byte order": (lambda t, c, m, s, f: [block_scale(0x7F)(t, c, m, s, f), t.update(comfy_order(t)), t.update(
        {k.replace(s, "comfy_quant"): torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
         for k in list(t) if k.endswith(s)})], REFUSED),
    "one factor of the activation infinite": (lambda t, c, m, s, f: [factors(t, c, m, s, f), t[
        f"{f.q}.pre_quant_scale"][3:4].fill_(torch.inf)], REFUSED),
    "a low-rank pair with NaN": (lambda t, c, m, s, f: [low_rank(t, f, "ab"), t[f"{f.q}.svdquant_lora_b"][1].fill_(
        torch.nan)], REFUSED),
    "block scales as U8": (put("weight_scale", lambda b: b.view(torch.uint8)), RIGHT),
    "block scales as U8 without a tensor scale": (lambda t, c, m, s, f: [put("weight_scale", lambda b: b.view(torch.uint8))(
        t, c, m, s, f), t.pop(f"{f.q}.{s}")], REFUSED),
    "factors of the activation": (factors, RIGHT),
    "factors of the activation, one zero": (lambda t, c, m, s, f: [factors(t, c, m, s, f),
                                                                  t[f"{f.q}.pre_quant_scale"][3:4].zero_()], REFUSED),
    "factors of the activation for other columns": (lambda t, c, m, s, f: [factors(t, c, m, s, f), t.__setitem__(
        f"{f.q}.pre_quant_scale", t[f"{f.q}.pre_quant_scale"][1:].clone())], REFUSED),
    "a low-rank pair that is zero": (lambda t, c, m, s, f: low_rank(t, f, "ab"), RIGHT),
    "half of a low-rank pair": (lambda t, c, m, s, f: low_rank(t, f, "a"), REFUSED),
    "LightX2V's names in one layer": (lambda t, c, m, s, f: t.update({
        f"{f.q}.input_global_scale": 1 / t.pop(f"{f.q}.input_scale"), f"{f.q}.alpha": t.pop(f"{f.q}.{s}")}), REFUSED),
    "ComfyUI's byte order, with its markers": (lambda t, c, m, s, f: [t.update(comfy_order(t)), t.update(
        {k.replace(s, "comfy_quant"): torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
         for k in list(t) if k.endswith(s)})], RIGHT),
    "nibbles swapped, declared": (lambda t, c, m, s, f: [t.update({k: v for k, v in comfy_order(t).items()
                                  if k.endswith(".weight")}), c["quantization_config"].update(swap_weight_nibbles=True)], RIGHT),
    "nibbles swapped, undeclared": (lambda t, c, m, s, f: t.update(
        {k: v for k, v in comfy_order(t).items() if k.endswith(".weight")}), UNDETECTABLE),
}
FORMATS = {"FP8": ("weight_scale", {**MUTATIONS, **ONLY_FP8}), "NVFP4": ("weight_scale_2", {**MUTATIONS, **ONLY_NVFP4})}
# What an architecture's own table and sizes answer for, which is tried on all. The rest meets code that knows no
# architecture, but for whether the host has q, k and v in one weight: FLUX.1, where it has, and Wan, where not, have it all.
OF_A_TABLE = {
    "weight dropped", "bias dropped", "weight scale dropped", "whole layer dropped", "first block dropped", "last block dropped",
    "embedder dropped", "norm dropped", "weight renamed", "layer renamed", "extra tensor", "weight reshaped", "weight cut",
    "weight transposed", "bias cut", "two layers exchanged, other shapes", "config of another width", "config of another depth",
    "config of another class", "config with another switch or size", "all names below another", "norm in F32", "no config",
    "no declaration", "scale per row", "tensor scale per row", "scale per block", "scale by ComfyUI's first name"}
OF_ALL = ("flux1", "wan")
# Z-Image cannot be tiny (84 million parameters): its NVFP4 file goes the way its FP8 file goes.
CASES = [(name, algorithm) for name in FAMILIES for algorithm in FORMATS if (name, algorithm) != ("z_image", "NVFP4")]


def damage_file(how, folder):
    file = next(folder.glob("*.safetensors"))
    if how == "truncate":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "append":
        file.write_bytes(file.read_bytes() + b"1234")
    elif how == "twin":
        shutil.copy(file, folder / "another.safetensors")
    elif how == "config":
        (folder / "config.json").write_text("{")


SOME = (("flux1", "FP8"), ("wan", "NVFP4"), ("qwen_image", "FP8"), ("hunyuan_video", "NVFP4"))


@pytest.mark.parametrize(("name", "algorithm"), [pytest.param(*case, marks=() if case in SOME else [pytest.mark.full])
                                                 for case in CASES])
def test_every_mutation_ends_right_or_refused(name, algorithm, tmp_path):
    family, (scale, mutations) = FAMILIES[name], FORMATS[algorithm]
    assert {*MUTATIONS, *ONLY_FP8, *ONLY_NVFP4} >= OF_A_TABLE
    if name not in OF_ALL:
        mutations = {mutation: mutations[mutation] for mutation in mutations if mutation in OF_A_TABLE}
    assert len(mutations) >= 24
    table, wrong = [], []
    with family.ready():
        source = family.export(tmp_path / "undamaged", algorithm)
        baseline = family.run(model.load(model.Request(str(source)), quiet=True).patcher)
        exact = family.reference(common.dequantize(common.stored(source)), common.config_of(source))
        assert common.rel_l2(baseline, exact) < 1e-5
        for mutation, (mutate, expected) in mutations.items():
            tensors, config, metadata = common.stored(source), common.config_of(source), {}
            if not isinstance(mutate, str):
                mutate(tensors, config, metadata, scale, family)
            folder = common.save(tmp_path / mutation, tensors, config or None, {"format": "pt", **metadata})
            if isinstance(mutate, str):
                damage_file(mutate, folder)
            outcome, said = attempt(folder, family, baseline)
            if outcome == REFUSED and ("where:" not in said or "what to do:" not in said):
                wrong.append(f"{mutation}: the message lacks where or what to do: {said}")
            table.append(f"  {name:13} {algorithm:5} {mutation:40} {outcome:13} {' '.join(said.split())[:100]}")
            if outcome != expected and not (expected == RIGHT_OR_REFUSED and outcome in (RIGHT, REFUSED)):
                wrong.append(f"{mutation}: {outcome}, expected {expected} ({said})")
            shutil.rmtree(folder)
    print("\n" + "\n".join(table))
    assert not wrong, "\n".join(wrong)


def attempt(folder, family, baseline) -> tuple[str, str]:
    try:
        loaded = model.load(model.Request(str(folder)), quiet=True)
    except CheckpointError as error:
        return REFUSED, str(error)
    difference = common.rel_l2(family.run(loaded.patcher), baseline)
    return RIGHT if difference < 1e-6 else UNDETECTABLE, f"differs by {difference:.2g}"
