"""Relatives of NVFP4: ModelOpt's AWQ and SVDQuant, LightX2V's names and byte order, block scales as U8.

The oracle is nvidia-modelopt: its real exports mean its own model's weights. For what it does not write (other names,
markers) the truth is a formula of this file's; a forward is held against stock ComfyUI on that truth in F32.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.quant.kernels.base import Activation
from quantized_transformers.quant.kernels.comfy_kitchen import KERNEL
from quantized_transformers.quant.layouts.tiled import tiles_of
from quantized_transformers.quant.marker import marker
from support import common, flux
from support.real_files import BESIDE, EXACT, NAMES, expected, linears, load, lora_agrees, weights_of, write

pytestmark = [pytest.mark.parity, pytest.mark.full]

AWQ, SVD = "NVFP4_AWQ", "NVFP4_SVD"
LAYER = "single_transformer_blocks.0.attn.to_q"
NATIVE = "double_blocks.0.img_mlp.0"


@pytest.fixture(scope="module")
def weights(tiny):
    return weights_of(tiny)


@pytest.fixture(scope="module")
def of_kind(weights):
    """(kind, style) -> (stored, truth), each made once; dicts of the test's own, of tensors that nobody writes into."""
    @cache
    def once(kind, style):
        return KINDS[kind](weights[style])

    return lambda kind, style: tuple(map(dict, once(kind, style)))


@pytest.fixture(scope="module")
def wanted(of_kind):
    """(kind, style) -> what stock ComfyUI gives on the weights that such a file means, run once."""
    return cache(lambda kind, style: expected(of_kind(kind, style)[1]))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Algorithm -> (the folder of nvidia-modelopt's export, the weights that its own layers multiply by: F32, those of
    q, k and v left out, which the export brings to one scale)."""
    from modelopt.torch.export import export_hf_checkpoint

    root, made = tmp_path_factory.mktemp("relatives"), {}
    for algorithm in (AWQ, SVD):
        net = common.calibrated(flux.make(double=1, single=1), lambda m, seed: flux.diffusers_velocity(m, **flux.inputs(seed=seed)), algorithm,
                                [r".*ff_context.*"])
        seen = {}
        with common.nvfp4_without_cuda(), torch.no_grad():
            for name, module in net.named_modules():
                if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled and "attn" not in name:
                    twin = copy.deepcopy(module).float()
                    twin.input_quantizer.disable()  # which still multiplies by pre_quant_scale
                    twin.bias = None
                    seen[name] = twin(torch.eye(module.weight.shape[1])).T
        export_hf_checkpoint(net, export_dir=str(root / algorithm))
        made[algorithm] = root / algorithm, seen
    return made


def pack(weight, *, high_first=False, tiles=False):
    """(codes, block scales, tensor scale): comfy-kitchen's quantizer, in this byte order."""
    from comfy_kitchen import quantize_nvfp4

    scale = weight.abs().max() / 2688
    codes, block = quantize_nvfp4(weight.contiguous(), scale, hi_first=high_first)
    from comfy_kitchen.float_utils import from_blocked

    block = block.view(torch.uint8)
    return codes, (block if tiles else from_blocked(block, *[codes.shape[0], codes.shape[1] // 8])).contiguous().view(
        torch.float8_e4m3fn), scale


def made(tensors, layer_of, *, high_first=False, tiles=False, every=1):
    """(stored, truth): Linear layers by `layer_of`(name, weight, packer), the others in BF16."""
    stored = {name: t.to(torch.bfloat16) for name, t in tensors.items()}
    truth = {name: t.float() for name, t in stored.items()}
    for i, layer in enumerate(linears(tensors)):
        rows, columns = tensors[f"{layer}.weight"].shape
        if i % every or columns % 64 or rows % 128:
            continue
        leaves, weight = layer_of(layer, tensors[f"{layer}.weight"],
                                  lambda w: pack(w, high_first=high_first, tiles=tiles))
        del stored[f"{layer}.weight"]
        stored |= {f"{layer}.{leaf}": t for leaf, t in leaves.items()}
        truth[f"{layer}.weight"] = weight
    return stored, truth


def decode(codes, block, scale, high_first=False, tiles=False):
    from comfy_kitchen.float_utils import from_blocked

    if tiles:
        block = from_blocked(block.view(torch.uint8), codes.shape[0], codes.shape[1] // 8).view(torch.float8_e4m3fn)
    return common.decode_nvfp4(codes << 4 | codes >> 4 if high_first else codes, block, scale)


def factors(layer, shape, rank=16):
    g = torch.Generator().manual_seed(sum(map(ord, layer)))
    smooth = (0.5 + torch.rand(shape[1], generator=g)).to(torch.bfloat16)
    a = (torch.randn(rank, shape[1], generator=g) * shape[1] ** -0.5).to(torch.bfloat16)
    return smooth, a, (0.3 * torch.randn(shape[0], rank, generator=g)).to(torch.bfloat16)


def modelopt(dtype=torch.bfloat16, low_rank=False, marked=False, as_bytes=False, smoothed=True):
    order = {}

    def layer_of(layer, weight, packed):
        smooth, a, b = factors(layer, weight.shape)
        smooth = smooth.to(dtype) if smoothed else torch.ones(weight.shape[1])
        rest = b.float() @ a.float() if low_rank else torch.zeros(())
        codes, block, scale = packed(weight / smooth.float() - rest)
        leaves = {"weight": codes, "weight_scale": block.view(torch.uint8) if as_bytes else block, "weight_scale_2": scale,
                  "input_scale": torch.tensor(0.004)}
        leaves |= {"pre_quant_scale": smooth} if smoothed else {}
        leaves |= {"svdquant_lora_a": a, "svdquant_lora_b": b} if low_rank else {}
        leaves |= {"comfy_quant": marker({"format": "nvfp4"})} if marked else {}
        return leaves, (decode(codes, block, scale, **order) + rest) * smooth.float()

    def kind(tensors):
        packed = "img_in.weight" in tensors  # q, k and v in one layer, as Black Forest Labs packs them: their byte order
        order.update(high_first=packed or marked, tiles=packed or marked)
        return made(tensors, layer_of, **order)

    return kind


def lightx2v(tensors):
    def layer_of(layer, weight, packed):
        codes, block, scale = packed(weight)
        whole = torch.tensor(100. + len(layer))
        return ({"weight": codes, "weight_scale": block, "alpha": scale / whole, "input_global_scale": whole},
                decode(codes, block, scale, tiles=True))

    return made(tensors, layer_of, tiles=True)


KINDS = {"AWQ": modelopt(), "AWQ, F32": modelopt(torch.float32), "AWQ, marked": modelopt(marked=True),
         "SVDQuant": modelopt(low_rank=True), "SVDQuant, marked": modelopt(low_rank=True, marked=True),
         "low rank alone": modelopt(low_rank=True, smoothed=False), "scales as U8": modelopt(as_bytes=True, smoothed=False),
         "LightX2V": lightx2v}


@pytest.mark.parametrize("algorithm", [AWQ, SVD])
def test_real_exports(exports, algorithm):
    """The weights are those that ModelOpt's own layers multiply by."""
    folder, seen = exports[algorithm]
    stored = common.stored(folder)
    truth = common.dequantize(stored)
    layers = [name.removesuffix(".pre_quant_scale") for name in stored if name.endswith(".pre_quant_scale")]
    smoothed = [name for name in layers if bool((stored[f"{name}.pre_quant_scale"] != 1).any())]
    assert len(layers) > 20 and len(smoothed) > 5 and len(seen.keys() & set(smoothed)) > 3
    errors = sorted(common.rel_l2(truth[f"{layer}.weight"], weight) for layer, weight in seen.items())
    # ModelOpt computes block scales in its model's BF16 as it exports, in F32 as it runs: few fall to another code.
    assert errors[len(errors) * 3 // 4] < 1e-6 and errors[-1] < 0.03
    loaded = load(folder, compute="dequantize")
    assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), expected(truth)) < EXACT
    # Switched off after its calibration, as in ModelOpt's examples, a layer keeps its factors beside BF16.
    off = [name for name in layers if "ff_context" in name]
    assert len(off) == 2 and all(stored[f"{name}.weight"].dtype == torch.bfloat16 for name in off)
    formats = loaded.description.formats
    assert loaded.description.family == "modelopt-nvfp4" and formats["NVFP4"] == len(layers) - len(off)
    assert loaded.description.static_activations == formats["NVFP4"]


def order_of(kind, style):
    """What a user says of random weights with no word on their order."""
    return "modelopt" if style == "diffusers" and kind != "LightX2V" and "marked" not in kind else "auto"


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_under_every_name(of_kind, wanted, tmp_path, kind, names):
    style = names.split(",")[0]
    stored, _ = of_kind(kind, style)
    loaded = load(write(tmp_path, stored, NAMES[names]), compute="dequantize", byte_order=order_of(kind, style))
    assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), wanted(kind, style)) < EXACT
    assert loaded.description.formats["NVFP4"] > 20


@pytest.mark.parametrize("style", ["native", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_shards_and_in_company(of_kind, wanted, tmp_path, kind, style):
    stored, _ = of_kind(kind, style)
    paths = [write(tmp_path / "shards", stored, shards=3)]
    if style == "native":
        paths.append(write(tmp_path / "whole", stored, "model.diffusion_model.", BESIDE))
    for path in paths:
        loaded = load(path, compute="dequantize", byte_order=order_of(kind, style))
        assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), wanted(kind, style)) < EXACT


@pytest.mark.parametrize("kind", ["AWQ", "SVDQuant", "low rank alone", "LightX2V"])
def test_quantized_activations(of_kind, tmp_path, kind):
    """y = W q(x p) + B (A (x p)): the product with quantized activations, at the stored scale."""
    stored, truth = of_kind(kind, "native")
    loaded = load(write(tmp_path, stored))
    weight = loaded.patcher.get_model_object(f"diffusion_model.{NATIVE}").weight
    x = torch.randn(32, weight.shape[1], generator=torch.Generator().manual_seed(2))
    part = {leaf: stored.get(f"{NATIVE}.{leaf}") for leaf in ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")}
    smooth = torch.ones(()) if part["pre_quant_scale"] is None else part["pre_quant_scale"].float()
    scale = torch.tensor(0.004) if kind != "LightX2V" else 1 / stored[f"{NATIVE}.input_global_scale"]
    low = torch.zeros(truth[f"{NATIVE}.weight"].shape)
    if part["svdquant_lora_a"] is not None:
        low = part["svdquant_lora_b"].float() @ part["svdquant_lora_a"].float()
    codes = truth[f"{NATIVE}.weight"] / smooth - low
    wanted = common.fake_nvfp4(x * smooth, scale) @ codes.T + (x * smooth) @ low.T
    if kind == "LightX2V":  # in the host's own layout
        assert type(weight._params).__qualname__.startswith("TensorCoreNVFP4")
        assert float(loaded.patcher.get_model_object(f"diffusion_model.{NATIVE}.input_scale")) == pytest.approx(float(scale))
        return
    tile, = tiles_of(weight)
    assert common.rel_l2(KERNEL.exact(Activation(x), tile, None), wanted) < 1e-3
    assert common.rel_l2(x @ truth[f"{NATIVE}.weight"].T, wanted) > 0.05  # it is no product in full precision


@pytest.mark.parametrize("kind", ["AWQ", "SVDQuant", "AWQ, marked", "LightX2V"])
def test_lora(of_kind, tmp_path, kind):
    stored, truth = of_kind(kind, "native")
    lora_agrees(load(write(tmp_path, stored), dtype="default", compute="dequantize"), truth, tmp_path / "lora")


@pytest.mark.parametrize("kind", ["SVDQuant", "LightX2V"])
def test_saved_and_loaded_again(of_kind, tmp_path, kind):
    import comfy.sd

    stored, _ = of_kind(kind, "native")
    first = load(write(tmp_path, stored), compute="dequantize")
    before = flux.comfy_velocity(first.patcher, **flux.inputs())
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), first.patcher)
    again = load(tmp_path / "saved.safetensors", compute="dequantize")
    assert torch.equal(flux.comfy_velocity(again.patcher, **flux.inputs()), before)


def test_weights_only(weights, tmp_path):
    """W4A16_NVFP4: activations stay as they are."""
    stored, _ = modelopt(smoothed=False)(weights["diffusers"])
    stored = {name: t for name, t in stored.items() if not name.endswith(".input_scale")}
    folder = common.save(tmp_path, stored, {
        "_class_name": "FluxTransformer2DModel", **dict(flux.make().config),
        "quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}})
    module = load(folder).patcher.get_model_object(f"diffusion_model.{NATIVE}")
    assert module._full_precision_mm_config


REFUSED = {
    "one of the pair": (lambda t: t.pop(f"{NATIVE}.svdquant_lora_a"), "belong together"),
    "another rank": (lambda t: t.update({f"{NATIVE}.svdquant_lora_a": torch.ones(8, 256)}), r"svdquant_lora_b is BF16 \[1024, 16\]"),
    "a factor too many": (lambda t: t.update({f"{NATIVE}.pre_quant_scale": torch.ones(257)}), r"pre_quant_scale is F32 \[257\]"),
    "a factor of zero": (lambda t: t.update({f"{NATIVE}.pre_quant_scale": torch.zeros(256)}), "pre_quant_scale holds zeros"),
    "no number": (lambda t: t.update({f"{NATIVE}.svdquant_lora_b": torch.full((1024, 16), torch.nan)}), "svdquant_lora_b holds NaN"),
    "both writers' scales": (lambda t: t.update({f"{NATIVE}.alpha": torch.ones(()), f"{NATIVE}.input_global_scale": torch.ones(())}),
                             "one of them is enough"),
    "half of LightX2V's": (lambda t: [t.pop(f"{NATIVE}.weight_scale_2"), t.update({f"{NATIVE}.alpha": torch.ones(())})],
                           "without weight_scale_2"),
    "a factor beside FP8": (lambda t: t.update({f"{NATIVE}.weight": torch.ones(1024, 256).to(torch.float8_e4m3fn),
                                                f"{NATIVE}.weight_scale": torch.ones(())}), "unexpected tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(of_kind, tmp_path, name):
    change, message = REFUSED[name]
    stored, _ = of_kind("SVDQuant", "native")
    change(stored)
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path, stored))
