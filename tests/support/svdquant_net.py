"""SVDQuant Linears in the host's operations, and a small net of them in the host's ModelPatcher."""

from __future__ import annotations

import torch

from quantized_transformers.quant.layouts.join import join
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.patches import loading
from quantized_transformers.quant.svdquant.parts import CODEC, awq_part, tile_of, w4a4_part
from support.svdquant import awq, w4a4


def placed(part, row, column):
    """A part at another place of the native weight than its start."""
    return part, row, column


def native_tensors(name, parts, bias, shape):
    """What a load makes of parts (or of what `placed` gives)."""
    tiles = [tile_of(one[0]).at(*one[1:]) if isinstance(one, tuple) else tile_of(one) for one in parts]
    made = join(tiles, [name], shape).tensors
    return {f"{name}.{leaf}": tensor for leaf, tensor in made.items()} | ({} if bias is None else {f"{name}.bias": bias})


def by(backend):
    """Codec -> kernel where this back end multiplies SVDQuant."""
    return dict.fromkeys(CODEC.values(), backend)


def linear_of(tensors, shape, backend="comfy_kitchen", dtype=torch.float32, disabled=(), bias=True, **options):
    """A Linear of the host's mixed-precision operations with native tensors loaded, as a checkpoint load does it."""
    import comfy.ops

    operations = with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, dtype, disabled=disabled, **options),
                               by(backend))
    module = operations.Linear(shape[1], shape[0], bias=bias, device="cpu", dtype=dtype)
    missing, unexpected = module.load_state_dict({k.removeprefix("x."): v for k, v in tensors.items()}, strict=False)
    assert not missing and not unexpected
    return module.eval().requires_grad_(False)


def part_of(layer):
    shape = tuple(layer.codes.shape)
    part, bias = awq_part(layer.leaves, *shape) if layer.kind == "awq" else \
        w4a4_part(layer.leaves, *shape, unsigned=layer.unsigned)
    return part, bias, shape


def linear(layer, **options):
    part, bias, shape = part_of(layer)
    return linear_of(native_tensors("x", [part], bias, shape), shape, **options)


def inputs(columns, rows=17, dtype=torch.float32, seed=9):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(module, x):
    with torch.inference_mode():
        return module(x)


KEYS = {"to_k": ("diffusion_model.qkv.weight", (0, 128, 128)), "to_v": ("diffusion_model.qkv.weight", (0, 256, 128)),
        "qkv": "diffusion_model.qkv.weight", "linear1": "diffusion_model.linear1.weight",
        "linear1.q": ("diffusion_model.linear1.weight", (0, 0, 128)),
        "linear1.mlp": ("diffusion_model.linear1.weight", (0, 384, 256)),
        "linear2": "diffusion_model.linear2.weight", "linear2.mlp": ("diffusion_model.linear2.weight", (1, 128, 256)),
        "mod": "diffusion_model.mod.weight", "plain": "diffusion_model.plain.weight"}
SIZES = {"to_k": (128, 128), "to_v": (128, 128), "qkv": (384, 128), "linear1": (640, 128), "linear1.q": (128, 128),
         "linear1.mlp": (256, 128), "linear2": (128, 384), "linear2.mlp": (128, 256), "mod": (128, 128),
         "plain": (128, 384)}


class Net(torch.nn.Module):
    """What a FLUX block has: fused rows, two parts stacked, two side by side with unsigned activations, a modulation."""

    def __init__(self, qkv, linear1, linear2, mod, plain):
        super().__init__()
        self.qkv, self.linear1, self.linear2, self.mod, self.plain = qkv, linear1, linear2, mod, plain

    def forward(self, x):
        h = self.linear1(x + self.mod(x))
        z = self.linear2(torch.cat([h[..., :128], torch.nn.functional.gelu(h[..., 384:], approximate="tanh")], -1))
        return self.plain(self.qkv(z))


class Model(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.diffusion_model = net


def layers():
    return {"qkv": [w4a4(384, 128, 16, seed=1)],
            "linear1": [w4a4(384, 128, 32, seed=2), w4a4(256, 128, 16, seed=3)],
            "linear2": [w4a4(128, 128, 16, seed=4), w4a4(128, 256, 32, unsigned=True, seed=5)],
            "mod": [awq(128, 128, seed=6)]}


def native(name, parts):
    made = [part_of(layer) for layer in parts]
    if name == "linear1":
        return native_tensors("x", [made[0][0], placed(made[1][0], 384, 0)], torch.cat([made[0][1], made[1][1]]),
                              (640, 128)), (640, 128)
    if name == "linear2":
        return native_tensors("x", [made[0][0], placed(made[1][0], 0, 128)], made[0][1].float() + made[1][1].float(),
                              (128, 384)), (128, 384)
    return native_tensors("x", [made[0][0]], made[0][1], made[0][2]), made[0][2]


def make(backend="dequantize", dtype=torch.float32):
    """A patcher on a net of SVDQuant layers, with the LoRA callback a loader attaches."""
    import comfy.model_patcher
    import comfy.ops

    modules = {name: linear_of(*native(name, parts), backend, dtype) for name, parts in layers().items()}
    operations = comfy.ops.mixed_precision_ops({"mixed_ops": True}, dtype)
    plain = operations.Linear(384, 128, bias=False, device="cpu", dtype=dtype)
    plain.load_state_dict({"weight": torch.randn(128, 384, generator=torch.Generator().manual_seed(8)) / 20})
    patcher = comfy.model_patcher.ModelPatcher(Model(Net(**modules, plain=plain)), torch.device("cpu"),
                                               torch.device("cpu"))
    loading.attach(patcher)
    return patcher


def dense(changes=()):
    """The net of effective weights in F32, with (key, delta) merged by definition."""
    weights, biases = {}, {}
    for name, parts in layers().items():
        axis = 1 if name == "linear2" else 0
        weights[name] = torch.cat([layer.weight for layer in parts], axis)
        every = [layer.plain_bias for layer in parts]
        biases[name] = sum(every) if name == "linear2" else torch.cat(every)
    weights["plain"] = torch.randn(128, 384, generator=torch.Generator().manual_seed(8)) / 20
    for key, change in changes:
        name = KEYS[key] if isinstance(KEYS[key], str) else KEYS[key][0]
        place = weights[name.split(".")[1]]
        if not isinstance(KEYS[key], str):
            place = place.narrow(*KEYS[key][1])
        place += change
    modules = {}
    for name, weight in weights.items():
        modules[name] = torch.nn.Linear(*reversed(weight.shape), bias=name in biases)
        modules[name].load_state_dict({"weight": weight, **({"bias": biases[name]} if name in biases else {})})
    return Net(**modules).requires_grad_(False)


def lora_file(*names, seed=11, rank=8, alpha=4.0):
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name in names:
        rows, columns = SIZES[name]
        out[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=g) * columns ** -0.5
        out[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=g) * rank ** -0.5
        out[f"{name}.alpha"] = torch.tensor(alpha)
    return out


def add(patcher, file, strength=1.0, strength_model=1.0):
    import comfy.lora

    new = patcher.clone()
    patches = comfy.lora.load_lora(file, KEYS)
    assert len(new.add_patches(patches, strength, strength_model)) == len(patches) > 0
    return new


def merged(file, strength=1.0):
    for name in {key.rsplit(".lora_", 1)[0] for key in file if ".lora_" in key}:
        a, b = file[f"{name}.lora_A.weight"], file[f"{name}.lora_B.weight"]
        yield name, strength * float(file[f"{name}.alpha"]) / a.shape[0] * b @ a
