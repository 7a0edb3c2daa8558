"""MODELs whose layers are in every kind of format at once, through all that takes a MODEL: Ascend MXFP8 Quantize (twice,
too), overrides, LoRAs before and behind it, low VRAM, saving; and operations on top of each other.

Every layer is run alone and held to F64: weights by comfy-kitchen's eager operations and the packers' formulas,
activations by each format's rule. A layer's own rounding is some 1e-7; a wrong rule, scale or weight is above 2e-3.
"""

from __future__ import annotations

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers import online_mxfp8
from quantized_transformers.makers.decode import decoder
from quantized_transformers.makers.save import save
from quantized_transformers.quant.embedding import for_texts
from quantized_transformers.quant.exact import with_exact_answers
from quantized_transformers.quant.layouts.join import join
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.marker import marker
from quantized_transformers.quant.patches.linear import with_patches_beside
from quantized_transformers.quant.tile import Place, Tile
from support import flux, gguf_files
from support.mx import mx
from support.svdquant import w4a4
from support.svdquant_net import native_tensors, part_of

pytestmark = pytest.mark.parity

EXACT = 1e-5
CODES = 2e-3  # where an activation is rounded, a sum in another order now and then takes the next of 127 codes
HOST = ("fp8 static", "fp8", "fp8 full", "e5m2", "nvfp4", "mxfp8", "int8", "plain")
KINDS = (*HOST, "shards", "svdq", "svdq unsigned", "gguf", "mxfp8 shards")
BY_KITCHEN = {"e5m2": ("float8_e5m2", "TensorCoreFP8E5M2Layout", {"scale": "recalculate"}, {}),
              "convrot": ("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
                          {"convrot": True, "convrot_groupsize": 64})}


def layer(weight: torch.Tensor, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(a layer's tensors in a file, what they stand for)."""
    rows, columns = weight.shape
    if kind == "nvfp4":
        scale = weight.abs().amax() / (448 * 6)
        codes, block = comfy_kitchen.quantize_nvfp4(weight, scale)
        return ({"weight": codes, "weight_scale": block, "weight_scale_2": scale, "comfy_quant": marker({"format": kind})},
                comfy_kitchen.dequantize_nvfp4(codes, scale, block, torch.float32))
    if kind == "mxfp8":
        codes, scale = comfy_kitchen.quantize_mxfp8(weight)
        return ({"weight": codes, "weight_scale": scale.view(torch.uint8), "comfy_quant": marker({"format": kind})},
                comfy_kitchen.dequantize_mxfp8(codes, scale, torch.float32))
    if kind in BY_KITCHEN:
        word, layout, options, conf = BY_KITCHEN[kind]
        made = QuantizedTensor.from_float(weight, layout, **options)
        return {**made.state_dict("weight"), "comfy_quant": marker({"format": word, **conf})}, made.dequantize()
    if kind.startswith("fp8"):
        scale = weight.abs().amax() / 448
        codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        conf = {"format": "float8_e4m3fn", **({"full_precision_matrix_mult": True} if kind == "fp8 full" else {})}
        return ({"weight": codes, "weight_scale": scale, "comfy_quant": marker(conf),
                 **({"input_scale": torch.tensor(0.05)} if kind == "fp8 static" else {})}, codes.float() * scale)
    if kind == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        return {"weight": codes, "weight_scale": scale, "comfy_quant": marker({"format": "int8_tensorwise"})}, \
            codes.float() * scale
    if kind == "plain":
        return {"weight": weight.bfloat16()}, weight.bfloat16().float()
    if kind.startswith("svdq"):
        made = w4a4(rows, columns, 16, "int4", unsigned=kind == "svdq unsigned", seed=rows)
        tensors = native_tensors("x", [part_of(made)[0]], None, (rows, columns))
        return {name.removeprefix("x."): tensor for name, tensor in tensors.items()}, made.weight
    if kind == "gguf":
        raw, dense = gguf_files.blocks(weight, "Q4_K")
        tiles = [Tile(Place("ggml_q4_k", rows, columns), {"codes": torch.from_numpy(raw)})]
    else:
        tiles, parts = [], []
        for i, part in enumerate(weight.split([64, rows - 64])):
            scale = part.abs().amax() / (448 - 100 * i)
            codes = (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            made, values = ("fp8", {"codes": codes, "scale": scale}), codes.float() * scale
            if kind == "mxfp8 shards" and i:
                exponent = torch.frexp(part.unflatten(1, (-1, 32)).abs().amax(-1)).exponent - 1 - 8
                codes = (torch.ldexp(part.unflatten(1, (-1, 32)), -exponent[..., None])).clamp(-448, 448).flatten(1)
                codes = codes.to(torch.float8_e4m3fn)
                made = "w8a8_mxfp8", {"codes": codes, "scale": (exponent + 127).to(torch.uint8)}
                values = torch.ldexp(codes.float().unflatten(1, (-1, 32)), exponent[..., None]).flatten(1)
            tiles.append(Tile(Place(made[0], *part.shape), made[1]).at(64 * i))
            parts.append(values)
        dense = torch.cat(parts)
    return join(tiles, ["a", "b"][:len(tiles)], (rows, columns)).tensors, dense


class Mixed:
    """A native FLUX.1 whose block Linears take turns in `kinds`: its file, and layer -> (kind, weight, bias)."""

    def __init__(self, folder, kinds):
        self.path, self.layers, file = folder / "mixed.safetensors", {}, {}
        flux.make(double=1, single=2).float().save_pretrained(folder / "plain")
        plain = model.load(model.Request(str(folder / "plain"), dtype="fp32"), quiet=True).patcher.model.diffusion_model
        tensors = {name: tensor.detach().bfloat16() for name, tensor in plain.state_dict().items()}
        turns = 0
        for name, tensor in tensors.items():
            owner = plain.get_submodule(name.rpartition(".")[0])
            if not hasattr(owner, "in_features") or not name.endswith(".weight"):
                file[name] = tensor
                continue
            kind = kinds[turns % len(kinds)] if "_blocks." in name else "plain"
            turns += "_blocks." in name
            made, dense = layer(tensor.float(), kind)
            file |= {name.removesuffix("weight") + leaf: t for leaf, t in made.items()}
            name = name.removesuffix(".weight")
            bias = tensors.get(f"{name}.bias")
            shift = 0  # unsigned activations: what goes with the codes is another bias than with the weight
            if kind == "svdq unsigned":
                made = w4a4(*tensor.shape, 16, "int4", unsigned=True, seed=len(tensor))
                shift = made.plain_bias.double() - made.bias.double()
            self.layers[name] = kind, dense.double(), (0 if bias is None else bias.double()) + shift
        save_file({name: tensor.contiguous() for name, tensor in file.items()}, str(self.path))

    def load(self, path=None, **options):
        return model.load(model.Request(str(path or self.path), **options), quiet=True).patcher

    def check(self, patcher, rules, weights=None, lora=None, memory=0, within=None):
        """Every layer of a MODEL against F64. `rules`: kind -> what its activation goes through (else nothing);
        `weights`: kind -> what its weight has gone through; `lora`: layer -> what is added to its weight; `memory`: as
        much as the host may take (0: all); `within`: kind -> how far off what was rounded once more may be."""
        patcher.patch_model(patcher.load_device, lowvram_model_memory=memory)
        try:
            modules = dict(patcher.model.diffusion_model.named_modules())
            for name, (kind, weight, bias) in self.layers.items():
                x = torch.randn(2, 5, modules[name].in_features, generator=torch.Generator().manual_seed(len(name)))
                if change := (weights or {}).get(kind):
                    weight = change(weight.float()).double()
                flat = x.flatten(0, 1)
                expected, seen = flat.double() @ weight.t(), rules[kind](flat).double() if kind in rules else None
                if seen is not None:  # the first 64 rows of shards are FP8
                    first = 64 if "shards" in kind else 0
                    expected[:, first:] = seen @ weight[first:].t()
                expected += bias + (flat.double() @ lora[name].double().t() if lora else 0)
                with torch.inference_mode():
                    out = modules[name](x)
                assert out.shape == (2, 5, len(weight))
                off = (out.flatten(0, 1).double() - expected).norm() / expected.norm()
                limit = (within or {}).get(kind, CODES if kind in rules else EXACT)
                assert off < limit, (name, kind, float(off))
        finally:
            patcher.unpatch_model(patcher.offload_device)


def tokens(x: torch.Tensor) -> torch.Tensor:
    """Activations in INT8, a scale a token."""
    scale = x.double().abs().amax(1, keepdim=True) / 127
    return (x.double() / scale).round().clamp(-127, 127) * scale


INTEGER = {"int8": tokens}  # what a CPU multiplies natively
NPU = dict.fromkeys(("plain", "mxfp8", "mxfp8 shards"), mx)
BEHIND = {"plain": mx}  # weights of a MODEL that was quantized


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return Mixed(tmp_path_factory.mktemp("mixed"), KINDS)


@pytest.fixture(scope="module")
def of_host(tmp_path_factory):
    return Mixed(tmp_path_factory.mktemp("of host"), HOST)


def quantize(patcher, keep="^$", backend="auto"):
    return online_mxfp8.quantize(patcher, keep, backend, step=lambda: None)[0]


def lora_for(patcher, made):
    """A LoRA of rank 4 for every layer, and what it adds to each weight."""
    import comfy.sd

    file, changes, g = {}, {}, torch.Generator().manual_seed(3)
    for name, (_, weight, _) in made.layers.items():
        up, down = torch.randn(len(weight), 4, generator=g) / 8, torch.randn(4, weight.shape[1], generator=g) / 8
        file |= {f"diffusion_model.{name}.lora_up.weight": up, f"diffusion_model.{name}.lora_down.weight": down}
        changes[name] = up @ down
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, file, 1.0, 0.0)
    assert len(patched.patches) == len(made.layers)
    return patched, changes


@pytest.mark.parametrize("compute, rules", [("auto", INTEGER), ("dequantize", {})])
def test_every_layer_by_its_own_rule(compute, rules, mixed):
    base = mixed.load(compute=compute)
    mixed.check(base, rules)
    # what multiplies the new layers multiplies those that are in MXFP8 already, where the base does not say otherwise
    new = NPU if compute == "auto" else {"plain": mx}
    for backend, more in (("auto", {}), ("comfy_kitchen", {}), ("reference", new)):
        mixed.check(quantize(base, backend=backend), rules | more, BEHIND)
    mixed.check(base, rules)


@pytest.mark.parametrize("memory", [0, 1], ids=["full", "low VRAM"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_loras_before_and_behind(backend, memory, mixed):
    base = mixed.load()
    rules = INTEGER | (NPU if backend == "reference" else {})
    patched, changes = lora_for(base, mixed)
    mixed.check(patched, INTEGER, lora=changes, memory=memory)
    for made in (quantize(patched, backend=backend), lora_for(quantize(base, backend=backend), mixed)[0]):
        mixed.check(made, rules, BEHIND, changes, memory)
        mixed.check(made, rules, BEHIND, changes, memory)  # again, after it was off


def test_twice_in_a_row(mixed):
    """What the first left in high precision the second quantizes, and leaves the rest: by a backend of its own."""
    first = quantize(mixed.load(), "img_in|txt_in|time_in|vector_in|guidance_in|final_layer")
    mixed.check(quantize(first), INTEGER, BEHIND)
    mixed.check(quantize(first, backend="reference"), INTEGER | NPU, BEHIND)


def test_a_dtype_of_its_own(mixed):
    """Where a MODEL is told to compute in a dtype ComfyUI multiplies whole weights, whoever is asked for, but for its own
    INT8."""
    base = mixed.load(dtype="fp32")
    for patcher, rules, weights in ((base, INTEGER, {}), (quantize(base), INTEGER, BEHIND),
                                    (quantize(base, backend="reference"), {}, BEHIND)):
        patched, changes = lora_for(patcher, mixed)
        mixed.check(patched, rules, weights, changes)
        mixed.check(patcher, rules, weights)


def test_models_of_stock_comfyui(of_host):
    """Layers that ComfyUI's own operations hold, quantized ones left in place; as it runs them before."""
    import comfy.sd

    stock = comfy.sd.load_diffusion_model(str(of_host.path))
    of_host.check(stock, INTEGER)
    for backend, more in (("auto", {}), ("reference", NPU)):
        patched, changes = lora_for(quantize(stock, backend=backend), of_host)
        of_host.check(patched, INTEGER | more, BEHIND, changes)
    of_host.check(stock, INTEGER)


def test_behind_an_override(mixed, of_host):
    """Weights of a mixed file put into a MODEL of another, a quantized one, and quantized."""
    base, changes = lora_for(quantize(of_host.load()), of_host)
    made = model.override(base, model.Request(str(mixed.path))).patcher
    mixed.check(made, INTEGER, lora=changes)
    mixed.check(quantize(made), INTEGER, BEHIND, changes)


@pytest.mark.parametrize("form", ["exact", "stock", "baked"])
def test_saved(form, mixed, output):
    """With a LoRA beside every layer: what a file says is what the MODEL does, and nothing in it is quantized again."""
    import comfy.sd

    patched, changes = lora_for(quantize(mixed.load()), mixed)
    path, _ = save(patched, f"mixed {form}", form, step=lambda n: None)
    if form == "stock":
        again = comfy.sd.load_diffusion_model(str(path))
        mixed.check(again, {}, BEHIND, changes, within=dict.fromkeys(KINDS, 2 ** -7))  # BF16
        return
    again = mixed.load(path, compute="dequantize")
    # half a step of the format, where a LoRA goes into the weight
    rounded = {**dict.fromkeys(KINDS, 2 ** -4), "nvfp4": 2 ** -2, "e5m2": 2 ** -3} if form == "baked" else {}
    mixed.check(again, {}, BEHIND, changes, within=rounded)
    with pytest.raises(CheckpointError, match="no Linear weights to quantize: .* are quantized already"):
        quantize(again)


@pytest.mark.parametrize("name", [*KINDS, "convrot"])
def test_operations_on_top_of_each_other(name):
    """Whatever is put on top of what, the numbers are the layer's: no conversion knows who made a MODEL."""
    import comfy.ops

    weight, x = torch.randn(128, 256) / 16, torch.randn(5, 256)
    tensors, dense = layer(weight, name)
    shift = w4a4(128, 256, 16, "int4", unsigned=True, seed=128) if name == "svdq unsigned" else None
    expected = x.double() @ dense.double().t() + (0 if shift is None else shift.plain_bias - shift.bias)
    decoded, bias = decoder()("layer", tensors | {"bias": torch.zeros(128)}, 128, 256)  # as files are compared and saved
    assert torch.allclose(decoded, dense, rtol=1e-6, atol=0)
    assert torch.allclose(bias.double(), expected.new_zeros(128) if shift is None else (shift.plain_bias - shift.bias).double(), atol=1e-6)
    kernels = {"w8a8_dynamic": "reference", "w8a8_mxfp8": "reference", "fp8": "comfy_kitchen", "nvfp4": "comfy_kitchen"}
    for full in (True, False):
        host = comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32, full_precision_mm=full)
        ours = with_tiles_of(host)
        for operations in (ours, with_tiles_of(ours), with_exact_answers(ours), with_patches_beside(ours),
                           with_tiles_of(with_exact_answers(host)), for_texts(ours, None), for_texts(with_tiles_of(ours), None),
                           with_tiles_of(ours, kernels), with_tiles_of(with_tiles_of(host, kernels)),
                           for_texts(with_tiles_of(host, kernels), torch.float32)):
            made = operations.Linear(256, 128, bias=False, device="cpu", dtype=torch.float32)
            assert made.load_state_dict(dict(tensors), strict=False) == ([], [])
            with torch.inference_mode():
                off = float((made(x).double() - expected).norm() / expected.norm())
            assert off < (EXACT if full else 0.2), (off, full)  # NVFP4 activations are half a step of E2M1 off
            again = operations.Linear(256, 128, bias=False, device="cpu", dtype=torch.float32)
            assert again.load_state_dict(made.state_dict(), strict=False) == ([], [])
            with torch.inference_mode():
                assert torch.equal(again(x), made(x))
