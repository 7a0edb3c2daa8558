"""A Linear of every quantized format in the host's ModelPatcher, its dense twin, and patches of every kind.

The twin has ComfyUI's own Linear with the weight that the codec defines (tests/quant/codecs hold those to comfy-kitchen
and to the packers' formulas), and gets the same patches by the same code of ComfyUI: what the two give has to be equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor

from quantized_transformers.quant.codecs.groups import tile
from quantized_transformers.quant.layouts.join import join
from quantized_transformers.quant.layouts.tiled import is_tiled, plain_bias
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.marker import marker
from quantized_transformers.quant.packed.gptq import AWQ, GPTQ
from quantized_transformers.quant.patches import loading
from quantized_transformers.quant.stored import ByteOrder
from quantized_transformers.quant.tile import Place, Tile
from support import ascend, ascend_net, gguf_files, packed
from support.svdquant import awq, w4a4
from support.svdquant_net import native_tensors, part_of, placed

ROWS = 192  # three of 64: to_q, to_k, to_v
KEY, NORM, PLAIN = (f"diffusion_model.{name}.weight" for name in ("layer", "norm", "plain"))
F32 = torch.float32


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _float(columns: int) -> torch.Tensor:
    return rand(ROWS, columns, seed=1, scale=columns ** -0.5)


def host(word: str, layout: str, columns: int = 128, conf: dict[str, Any] | None = None, full: bool = True,
         **options: Any) -> dict[str, torch.Tensor]:
    """A layer as ComfyUI's files have it, quantized by comfy-kitchen."""
    weight = QuantizedTensor.from_float(_float(columns), layout, **options)
    mark = {"format": word, **(conf or {}), **({"full_precision_matrix_mult": True} if full else {})}
    return {**weight.state_dict("weight"), "comfy_quant": marker(mark)}


def shards(name: str) -> dict[str, torch.Tensor]:
    """q, k and v in one Linear with a scale each."""
    tiles = []
    for i, part in enumerate(_float(128).chunk(3)):
        if name == "plain" or name == "mixed" and i == 1:
            tiles.append(Tile(Place("plain", 64, 128), {"codes": part}).at(64 * i))
        elif name == "fp8" or name == "mixed" and i == 0:
            scale = part.abs().amax() / (100 * (i + 1))
            tiles.append(Tile(Place("fp8", 64, 128), {"codes": (part / scale).to(torch.float8_e4m3fn), "scale": scale}
                              ).at(64 * i))
        else:
            weight = QuantizedTensor.from_float(part * (i + 1), "TensorCoreNVFP4Layout", scale="recalculate")
            tiles.append(Tile(Place("nvfp4", 64, 128), {
                "codes": weight._qdata, "block": weight._params.block_scale, "scale": weight._params.scale.reshape(())}
            ).at(64 * i))
    return join(tiles, ["q", "k", "v"], (ROWS, 128)).tensors


def fp8_blocks() -> dict[str, torch.Tensor]:
    weight = _float(128)
    codes = (weight / 0.001).clamp(-448, 448).to(torch.float8_e4m3fn)
    return join([Tile(Place("fp8_blocks", ROWS, 128), {"codes": codes, "scale": torch.full((ROWS, 1), 0.001)})],
                ["layer"], (ROWS, 128)).tensors


def ggml(kind: str) -> dict[str, torch.Tensor]:
    raw = gguf_files.blocks(_float(128), kind)[0]
    return join([Tile(Place(f"ggml_{kind.lower()}", ROWS, 128), {"codes": torch.from_numpy(raw)})], ["layer"],
                (ROWS, 128)).tensors


def codebook() -> dict[str, torch.Tensor]:
    codes = torch.randint(0, 256, (ROWS, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    fields = {"codes": codes, "scale": rand(ROWS, 2, seed=2, scale=0.2).abs(), "table": torch.linspace(-1, 1, 16)}
    return join([Tile(Place("codebook", ROWS, 128), fields)], ["layer"], (ROWS, 128)).tensors


def svdq(kind: str, unsigned: bool = False, beside: bool = False) -> dict[str, torch.Tensor]:
    if kind == "awq":
        made = [part_of(awq(ROWS, 128, seed=1))]
    elif beside:  # FLUX.1's linear2: two tiles next to each other, the second with unsigned activations
        made = [part_of(w4a4(ROWS, 64, 16, kind, seed=1)), part_of(w4a4(ROWS, 64, 16, kind, unsigned=unsigned, seed=2))]
    else:
        made = [part_of(w4a4(ROWS, 128, 16, kind, unsigned=unsigned, seed=1))]
    parts = [placed(part, 0, 64 * i) for i, (part, *_) in enumerate(made)]
    bias = sum(one[1].float() for one in made)
    return {k.removeprefix("x."): v for k, v in native_tensors("x", parts, bias, (ROWS, 128)).items()}


def groups(bits: int, **options: Any) -> dict[str, torch.Tensor]:
    codes, zero, scale, _ = packed.grouped(_float(128), bits, 32, zeros=True, **options)
    made = tile("layer", codes, scale, bits=bits, zero=zero, group=options.get("order"))
    return join([made], ["layer"], (ROWS, 128)).tensors


def slim(kind: str) -> dict[str, torch.Tensor]:
    part = ascend.make(kind, ROWS, 1024 if "DUAL" in kind else 128)
    tensors = ascend_net.native(kind, part).tensors
    conf = json.loads(bytes(tensors["comfy_quant"].tolist()))  # one of the host's, where it is its format
    return {**tensors, "comfy_quant": marker({**conf, "full_precision_matrix_mult": True})}


def words(leaves: packed.Layer, fmt: GPTQ | AWQ) -> dict[str, torch.Tensor]:
    part = {"weight" if leaf == "qweight" else leaf: tensor for leaf, tensor in leaves[0].items()}
    return join(fmt.coded("layer", part, ByteOrder()).tiles, ["layer"], (ROWS, 128)).tensors


FORMATS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "fp8": lambda: host("float8_e4m3fn", "TensorCoreFP8E4M3Layout", scale="recalculate"),
    "fp8 e5m2": lambda: host("float8_e5m2", "TensorCoreFP8E5M2Layout", scale="recalculate"),
    "nvfp4": lambda: host("nvfp4", "TensorCoreNVFP4Layout", scale="recalculate"),
    "mxfp8": lambda: host("mxfp8", "TensorCoreMXFP8Layout"),
    "int8": lambda: host("int8_tensorwise", "TensorWiseINT8Layout", per_channel=True),
    "int8 convrot": lambda: host("int8_tensorwise", "TensorWiseINT8Layout", per_channel=True, convrot=True,
                                 convrot_groupsize=64, conf={"convrot": True, "convrot_groupsize": 64}),
    "convrot w4a4": lambda: host("convrot_w4a4", "TensorCoreConvRotW4A4Layout", columns=256,
                                 conf={"convrot_groupsize": 256}),
    "fp8 shards": lambda: shards("fp8"),
    "nvfp4 shards": lambda: shards("nvfp4"),
    "mixed shards": lambda: shards("mixed"),
    "fp8 blocks": fp8_blocks,
    "codebook": codebook,
    "uint4 groups": lambda: groups(4),
    "uint8 groups": lambda: groups(8, order=packed.act_order(128, 32)),
    "gptq int4": lambda: words(packed.gptq(_float(128), 4, 32, zeros=True, order=True), GPTQ(4, 1, 32)),
    "gptq int8": lambda: words(packed.gptq(_float(128), 8, 32), GPTQ(8, 1, 32)),
    "awq int4": lambda: words(packed.awq(_float(128), 32), AWQ(32)),
    "svdq int4": lambda: svdq("int4"),
    "svdq int4 unsigned": lambda: svdq("int4", True),
    "svdq linear2": lambda: svdq("int4", True, beside=True),
    "svdq nvfp4": lambda: svdq("nvfp4"),
    "awq": lambda: svdq("awq"),
    "gguf q5_1": lambda: ggml("Q5_1"),
    **{kind: lambda kind=kind: slim(kind) for kind in sorted(ascend_net.SCHEMES) if kind not in ("MXFP4", "FLOAT")},
}


class Net(torch.nn.Module):
    def __init__(self, layer: Any, norm: Any, plain: Any) -> None:
        super().__init__()
        self.layer, self.norm, self.plain = layer, norm, plain
        self.rest = torch.nn.RMSNorm(64)  # never patched: the host's hooks go wrong where all of a model is

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(self.norm(self.layer(x)))


class Model(torch.nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.diffusion_model = net
        self.current_patcher = None


def patcher_of(net: Net) -> Any:
    import comfy.model_patcher

    return comfy.model_patcher.ModelPatcher(Model(net.eval().requires_grad_(False)), torch.device("cpu"),
                                            torch.device("cpu"))


def linear_of(tensors: dict[str, torch.Tensor], columns: int, bias: bool = True, operations: Any = None) -> Any:
    """A Linear with these leaves, loaded as a checkpoint load does it."""
    import comfy.ops

    operations = operations or with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, F32))
    module = operations.Linear(columns, ROWS, bias=bias, device="cpu", dtype=F32)
    missing, unexpected = module.load_state_dict(dict(tensors), strict=False)
    assert not missing and not unexpected
    return module


def rest(operations: Any) -> tuple[Any, Any]:
    """The norm and the plain layer behind the one that this is about."""
    norm = operations.RMSNorm(ROWS, device="cpu", dtype=F32)
    norm.load_state_dict({"weight": 1 + rand(ROWS, seed=3, scale=0.1)})
    plain = operations.Linear(ROWS, 64, bias=True, device="cpu", dtype=F32)
    plain.load_state_dict({"weight": rand(64, ROWS, seed=4, scale=ROWS ** -0.5), "bias": rand(64, seed=5)})
    return norm, plain


def columns_of(tensors: dict[str, torch.Tensor]) -> int:
    """Of the layer that these leaves make."""
    mark = json.loads(bytes(tensors["comfy_quant"].tolist()))
    if mark["format"] == "qt.tiles":
        return max(tile.get("column", 0) + tile["columns"] for tile in mark["tiles"])
    return tensors["weight"].shape[1] * (2 if tensors["weight"].dtype == torch.uint8 or "w4a4" in mark["format"] else 1)


def make(name: str) -> tuple[Any, Any, int]:
    """(the patcher of a format, that of its dense twin, columns)."""
    import comfy.ops

    tensors = FORMATS[name]()
    tensors = {"bias": rand(ROWS, seed=2, scale=0.3), **tensors}
    columns = columns_of(tensors)
    layer = linear_of(tensors, columns)
    weight = layer.weight.to(F32).dequantize()
    bias = plain_bias(layer.weight, layer.bias) if is_tiled(layer.weight) else layer.bias
    twin = comfy.ops.manual_cast.Linear(columns, ROWS, bias=True, device="cpu", dtype=F32)
    twin.load_state_dict({"weight": weight, "bias": bias.float()})
    mixed = with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, F32))
    ours, dense = patcher_of(Net(layer, *rest(mixed))), patcher_of(Net(twin, *rest(comfy.ops.manual_cast)))
    loading.attach(ours)
    return ours, dense, columns


def lora(columns: int, rows: int = ROWS, seed: int = 11, rank: int = 4) -> dict[str, torch.Tensor]:
    return {"up": rand(rows, rank, seed=seed, scale=rank ** -0.5),
            "down": rand(rank, columns, seed=seed + 1, scale=columns ** -0.5)}


def _pair(name: str, pair: dict[str, torch.Tensor], up: str, down: str) -> dict[str, torch.Tensor]:
    return {f"{name}.{up}": pair["up"], f"{name}.{down}": pair["down"]}


def files(columns: int) -> dict[str, dict[str, torch.Tensor]]:
    """Kind of LoRA -> its file, in the names that ComfyUI's loader gives the layer ("layer") and its rows ("k")."""
    kohya = _pair("layer", lora(columns), "lora_up.weight", "lora_down.weight")
    w1, w2 = rand(4, 4, seed=21, scale=0.3), rand(ROWS // 4, columns // 4, seed=22, scale=columns ** -0.5)
    dora = torch.rand(ROWS, 1, generator=torch.Generator().manual_seed(6)) + 0.5
    hada = {f"layer.hada_{leaf}": t for leaf, t in {
        "w1_a": rand(ROWS, 4, seed=31), "w1_b": rand(4, columns, seed=32, scale=columns ** -0.5),
        "w2_a": rand(ROWS, 4, seed=33, scale=0.5), "w2_b": rand(4, columns, seed=34, scale=0.5)}.items()}
    wide = {f"layer.hada_{leaf}": t for leaf, t in {
        "w1_a": rand(ROWS, 20, seed=31), "w1_b": rand(20, columns, seed=32, scale=columns ** -0.5),
        "w2_a": rand(ROWS, 20, seed=33, scale=0.2), "w2_b": rand(20, columns, seed=34, scale=0.2)}.items()}
    return {
        "kohya": {**kohya, "layer.alpha": torch.tensor(2.0)},
        "peft": _pair("layer", lora(columns, seed=12), "lora_B.weight", "lora_A.weight"),
        "rows": {**_pair("k", lora(columns, 64), "lora_B.weight", "lora_A.weight"),
                 **_pair("v", lora(columns, 64, seed=14), "lora_B.weight", "lora_A.weight")},
        "loha": {**hada, "layer.alpha": torch.tensor(2.0)},
        "loha, wide": wide,
        "lokr": {"layer.lokr_w1": w1, "layer.lokr_w2": w2},
        "lokr, factored": {"layer.lokr_w1": w1, "layer.lokr_w2_a": rand(ROWS // 4, 3, seed=23, scale=0.5),
                           "layer.lokr_w2_b": rand(3, columns // 4, seed=24, scale=0.2),
                           "layer.alpha": torch.tensor(2.0)},
        "dora": {**kohya, "layer.dora_scale": dora},
        "oft": {"layer.oft_blocks": rand(ROWS // 16, 16, 16, seed=41, scale=0.05), "layer.alpha": torch.tensor(0.05)},
        "glora": {"layer.a1.weight": rand(4, columns, seed=51, scale=0.05),
                  "layer.a2.weight": rand(columns, 4, seed=52, scale=0.05),
                  "layer.b1.weight": rand(4, columns, seed=53, scale=0.1),
                  "layer.b2.weight": rand(ROWS, 4, seed=54, scale=0.1)},
        "diff": {"layer.diff": rand(ROWS, columns, seed=61, scale=0.02), "layer.diff_b": rand(ROWS, seed=62, scale=0.1)},
        "bias and norm": {**kohya, "layer.diff_b": rand(ROWS, seed=62, scale=0.1),
                          "norm.w_norm": rand(ROWS, seed=63, scale=0.1), "plain.diff": rand(64, ROWS, seed=64, scale=0.02),
                          "plain.diff_b": rand(64, seed=65, scale=0.1)},
    }


KINDS = tuple(files(128))
_NAMES = {"layer": KEY, "k": (KEY, (0, 64, 64)), "v": (KEY, (0, 128, 64)), "norm": NORM, "plain": PLAIN}


def patches_of(file: dict[str, torch.Tensor]) -> Any:
    """The patches that ComfyUI reads out of a LoRA file; all of it is used."""
    import comfy.lora

    loaded = comfy.lora.load_lora(dict(file), _NAMES, log_missing=True)
    assert loaded
    return loaded


def add(patcher: Any, file: dict[str, torch.Tensor], strength: float = 1.0, strength_model: float = 1.0) -> Any:
    """A clone with a LoRA, as LoraLoader makes it."""
    clone = patcher.clone()
    assert set(clone.add_patches(patches_of(file), strength, strength_model))
    return clone


def run(patcher: Any, columns: int) -> torch.Tensor:
    """The net as it is loaded now."""
    with torch.inference_mode():
        return patcher.model.diffusion_model(rand(17, columns, seed=9))


def full(patcher: Any, columns: int) -> torch.Tensor:
    """Loaded completely."""
    patcher.patch_model(patcher.load_device)
    try:
        return run(patcher, columns)
    finally:
        patcher.unpatch_model(patcher.offload_device)


def low_vram(patcher: Any, columns: int) -> torch.Tensor:
    """Nothing loaded."""
    patcher.patch_model(patcher.load_device, lowvram_model_memory=1)
    assert patcher.model.model_lowvram
    try:
        return run(patcher, columns)
    finally:
        patcher.unpatch_model(patcher.offload_device)


def partial(patcher: Any, columns: int) -> torch.Tensor:
    """Loaded completely, then made to give all of it up again."""
    patcher.patch_model(patcher.load_device)
    patcher.partially_unload(patcher.offload_device, memory_to_free=1 << 30)
    try:
        return run(patcher, columns)
    finally:
        patcher.unpatch_model(patcher.offload_device)


def dynamic(patcher: Any, columns: int) -> torch.Tensor:
    """What a load under dynamic VRAM leaves: patches in `weight_lowvram_function`. (Its buffers need a GPU: on a CPU
    the host hands out what has `_v` dequantized, so the others keep to weight_function.)"""
    from comfy.model_patcher import LowVramPatch

    net = patcher.model.diffusion_model
    modules = [(f"diffusion_model.{name}", module) for name, module in net.named_children()]
    try:
        for name, module in modules:
            for leaf in ("weight", "bias"):
                key = f"{name}.{leaf}"
                found = LowVramPatch(key, patcher.patches) if key in patcher.patches else None
                if module is net.layer:
                    module._v = object()
                    setattr(module, f"{leaf}_lowvram_function", found)
                elif found is not None:
                    setattr(module, f"{leaf}_function", [found])
        for callback in patcher.get_all_callbacks("on_load"):
            callback(patcher, patcher.load_device)
        first = run(patcher, columns)
        assert torch.equal(run(patcher, columns), first)
        return first
    finally:
        for _, module in modules:
            vars(module).pop("_v", None)
            for leaf in ("weight", "bias"):
                setattr(module, f"{leaf}_lowvram_function", None)
                setattr(module, f"{leaf}_function", [])


STATES = {"full": full, "low VRAM": low_vram, "partial": partial, "dynamic": dynamic}


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def off(ours: torch.Tensor, ours_before: torch.Tensor, twin: torch.Tensor, twin_before: torch.Tensor) -> float:
    """How far a change is off the change of the twin, relative to it; which has to be one."""
    effect = twin.double() - twin_before.double()
    assert effect.norm() > 1e-3 * twin_before.norm()
    return ((ours.double() - ours_before.double() - effect).norm() / effect.norm()).item()
