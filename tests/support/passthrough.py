"""Files of the host's tiny models (host_models.py) in its own names and every format, and what stock ComfyUI makes of the
same numbers."""

from __future__ import annotations

import torch

from quantized_transformers.host import model_identity, passthrough
from quantized_transformers.loaders import model
from quantized_transformers.quant.marker import marker
from support import bitsandbytes, common, host_models

E4M3 = torch.float8_e4m3fn
WHOLE = "model.diffusion_model."


def fp8(weight, conf=None, leaf="weight_scale"):
    scale = weight.abs().max() / 448
    codes = (weight / scale).clamp(-448, 448).to(E4M3)
    return {"weight": codes, leaf: scale} | ({"comfy_quant": marker({"format": "float8_e4m3fn"})} if conf else {}), codes.float() * scale


def nvfp4(weight, comfy):
    from comfy_kitchen import quantize_nvfp4
    from comfy_kitchen.float_utils import from_blocked

    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return None
    scale = weight.abs().max() / 2688
    codes, block = quantize_nvfp4(weight.contiguous(), scale)
    linear = from_blocked(block.view(torch.uint8), *[codes.shape[0], codes.shape[1] // 8]).contiguous().view(E4M3)
    low = codes << 4 | codes >> 4
    truth = common.decode_nvfp4(low, linear, scale)
    if comfy:
        return {"weight": codes, "weight_scale": block, "weight_scale_2": scale, "comfy_quant": marker({"format": "nvfp4"})}, truth
    return {"weight": low, "weight_scale": linear, "weight_scale_2": scale, "input_scale": torch.tensor(0.004)}, truth


def int8(weight, group=0):
    from comfy_kitchen.tensor import TensorWiseINT8Layout

    if group and weight.shape[1] % group:
        return None
    codes, params = TensorWiseINT8Layout.quantize(weight, per_channel=True, convrot=bool(group), convrot_groupsize=group or 256)
    conf = {"format": "int8_tensorwise"} | ({"convrot": True, "convrot_groupsize": group} if group else {})
    return {"weight": codes, "weight_scale": params.scale, "comfy_quant": marker(conf)}, TensorWiseINT8Layout.dequantize(codes, params)


def mxfp8(weight):
    from comfy_kitchen.tensor import get_layout_class

    if weight.shape[0] % 32 or weight.shape[1] % 32:
        return None
    layout = get_layout_class("TensorCoreMXFP8Layout")
    codes, params = layout.quantize(weight)
    return {"weight": codes, "weight_scale": params.scale.view(torch.uint8), "comfy_quant": marker({"format": "mxfp8"})}, \
        layout.dequantize(codes, params)


FORMS = {"BF16": None, "cast": lambda w: ({"weight": w.to(E4M3)}, w.to(E4M3).float()), "FP8": fp8,
         "FP8, marked": lambda w: fp8(w, True), "FP8, first names": lambda w: fp8(w, leaf="scale_weight"),
         "NVFP4, ModelOpt": lambda w: nvfp4(w, False), "NVFP4, marked": lambda w: nvfp4(w, True),
         "MXFP8, marked": mxfp8, "INT8, marked": int8, "ConvRot": lambda w: int8(w, 16),
         "bitsandbytes": lambda w: bitsandbytes.llm_int8(w) if w.shape[1] % 8 or w.shape[0] > w.shape[1] else
         bitsandbytes.four_bits(w, double=True)}


def stored_as(name, tensors, form):
    """(stored, truth): every Linear that the format can hold, the rest in BF16."""
    stored = {key: t if t.dtype != torch.float32 else t.to(torch.bfloat16) for key, t in tensors.items()}
    truth = {key: t.float() if t.dtype == torch.bfloat16 else t for key, t in stored.items()}
    if FORMS[form] is None:
        return stored, truth
    with host_models.detected(name):
        net = passthrough.network({key: tuple(t.shape) for key, t in tensors.items()}, host_models.metadata_of(name))
    for key, target in net.becomes.items():
        layer = key.removesuffix(".weight")
        made = FORMS[form](tensors[key]) if target and target.removesuffix(".weight") in net.linears and key != layer else None
        if made:
            del stored[key]
            stored |= {f"{layer}.{leaf}": t for leaf, t in made[0].items()}
            truth[key] = made[1]
    return stored, truth


def load(path, **options):
    return model.load(model.Request(str(path), **{"dtype": "fp32", **options}), quiet=True)


def stock(truth, name):
    import comfy.sd

    with host_models.detected(name):
        return comfy.sd.load_diffusion_model_state_dict(dict(truth), model_options={"dtype": torch.float32},
                                                        metadata=host_models.metadata_of(name) or None).model


def stock_patcher(truth, metadata=None):
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(dict(truth), model_options={"dtype": torch.float32}, metadata=metadata)


def weights(net):
    """Name -> F32 numbers, of quantized weights what they mean; without what belongs to the quantization."""
    return {key: (p.dequantize() if hasattr(p, "_qdata") else p).float() for key, p in [*net.named_parameters(), *net.named_buffers()]
            if not key.endswith(".input_scale")}


def file_of(name, form, folder, prefix="", beside=None, rename=None):
    stored, truth = stored_as(name, host_models.make(name), form)
    tensors = {prefix + (rename(key) if rename else key): t for key, t in stored.items()} | (beside or {})
    common.save(folder, tensors, None, None, "model.safetensors")
    return folder / "model.safetensors", truth


def same_model(found, expected):
    """Every parameter and buffer, the noise schedule among them, and what the host takes it for."""
    numbers, wanted = weights(found), weights(expected)
    assert numbers.keys() == wanted.keys() and all(torch.allclose(numbers[key], wanted[key], rtol=2e-6, atol=1e-7) for key in wanted)
    assert model_identity(found) == model_identity(expected)


def agrees(path, given, name):
    """Load a file as stock does tensors of the same numbers: the MODEL, with its noise schedule."""
    with host_models.detected(name):
        loaded, expected = load(path).patcher.model, stock(given, name)
    same_model(loaded, expected)
    return loaded


RUN = ("SD3.5 M", "Wan VACE", "LongCat-Image")


def forward(patcher, name, load_it=True):
    """The velocity of one of RUN, whose forwards take few arguments."""
    g = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(*shape, generator=g)

    x, conds = {
        "SD3.5 M": lambda: (noise(1, 16, 8, 8), {"c_crossattn": noise(1, 7, 64), "y": noise(1, 32)}),
        "Wan VACE": lambda: (noise(1, 16, 1, 8, 8), {"c_crossattn": noise(1, 7, 4096), "vace_context": noise(1, 1, 96, 1, 8, 8),
                                                    "vace_strength": [1.0]}),
        "LongCat-Image": lambda: (noise(1, 16, 8, 8), {"c_crossattn": noise(1, 7, 3584)}),
    }[name]()
    return common.apply_model(patcher, x, torch.tensor([0.5]), load_it, **conds)
