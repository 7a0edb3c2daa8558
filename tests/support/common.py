"""What the tests of all architectures share: exports, files, and decoding that does not use the pack."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from packaging.version import Version


def randomise(model: Any) -> Any:
    """Random weights of unit gain, norms around one, and random biases; BF16, frozen."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.randn(p.shape) * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                p.copy_(torch.randn(p.shape) * p[0].numel() ** -0.5)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def diffusers_class(kind: str) -> Any:
    """A class of diffusers. Skips where it is older than the class."""
    import diffusers

    if not hasattr(diffusers, kind):
        assert Version(version("diffusers")) < Version("0.42"), "only older ones know fewer classes"
        pytest.skip("this diffusers has no such class")
    return getattr(diffusers, kind)


def apply_model(patcher: Any, x: torch.Tensor, sigma: torch.Tensor, load: bool = True, **conds: Any) -> torch.Tensor:
    """The velocity of a flow model through the host: load_models_gpu, apply_model, denoised = x - velocity * sigma."""
    import comfy.model_management

    if load:
        comfy.model_management.load_models_gpu([patcher])
    with torch.inference_mode():
        options = patcher.model_options["transformer_options"] | conds.pop("transformer_options", {})
        denoised = patcher.model.apply_model(x, sigma, transformer_options=options, **conds)
    return ((x - denoised) / sigma.view(-1, *[1] * (x.ndim - 1))).clone()


def export(model: Any, folder: Path, forward: Callable[[Any, int], Any], algorithm: str = "FP8",
           keep: list[str] | None = None, **kwargs: Any) -> Path:
    """The real nvidia-modelopt export of a model (docs/sources/modelopt.md, "Export"); `keep` are regexes left in BF16.

    `forward(model, seed)` runs it for calibration, `algorithm` is one of ALGORITHMS. Returns the component folder.
    The model given is not changed.
    """
    from modelopt.torch.export import export_hf_checkpoint

    export_hf_checkpoint(calibrated(model, forward, algorithm, keep), export_dir=str(folder), **kwargs)
    return folder


def calibrated(model: Any, forward: Callable[[Any, int], Any], algorithm: str, keep: list[str] | None = None) -> Any:
    """A copy of a model as nvidia-modelopt quantizes it, before its export; see there."""
    import modelopt.torch.quantization as mtq

    def loop(m: Any) -> None:
        with torch.no_grad():
            for seed in (3, 4):
                forward(m, seed)

    config = copy.deepcopy(getattr(mtq, ALGORITHMS[algorithm]))
    with nvfp4_without_cuda():
        model = mtq.quantize(copy.deepcopy(model), config, loop)
    if keep:
        mtq.disable_quantizer(model, lambda name: any(re.match(k, name) for k in keep))
    return model


@contextlib.contextmanager
def nvfp4_without_cuda() -> Iterator[None]:
    """ModelOpt's rounding to NVFP4 and back needs CUDA: here it is comfy-kitchen's eager code."""
    from modelopt.torch.quantization import tensor_quant

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_quant, "dynamic_block_quantize_op", _fake_nvfp4)
        yield


ALGORITHMS = {"FP8": "FP8_DEFAULT_CFG", "NVFP4": "NVFP4_DEFAULT_CFG", "NVFP4_AWQ": "NVFP4_AWQ_LITE_CFG",
              "NVFP4_SVD": "NVFP4_SVDQUANT_DEFAULT_CFG", "MXFP8": "MXFP8_DEFAULT_CFG",
              "FP8_PER_CHANNEL_PER_TOKEN": "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_PB_WO": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
              "W8A8_SQ_PER_CHANNEL": "INT8_SMOOTHQUANT_CFG", "W8A16": "INT8_WEIGHT_ONLY_CFG"}


def _fake_nvfp4(inputs: torch.Tensor, block_size: int, amax: torch.Tensor, *bits: int) -> torch.Tensor:
    """NVFP4 and back, by comfy-kitchen's eager code."""
    from comfy_kitchen import dequantize_nvfp4, quantize_nvfp4

    flat = inputs.reshape(-1, inputs.shape[-1])
    padded = torch.nn.functional.pad(flat, (0, 0, 0, -len(flat) % 16))
    scale = (amax.float().amax() / 2688).reshape(())
    codes, block = quantize_nvfp4(padded.contiguous(), scale)
    return dequantize_nvfp4(codes, scale, block, inputs.dtype)[:len(flat)].reshape(inputs.shape)


# Two F32 forwards of one network with the same weights, whose products are summed in another order: by_tiles.py sums for
# 256 rows at a time, ComfyUI for all. Measured: up to 7e-7.
SUMS = 2e-6


@contextlib.contextmanager
def model_folder(kind: str, folder: Path) -> Iterator[None]:
    """ComfyUI looks for models of a kind in this folder, too, which is gone afterwards."""
    import folder_paths

    known = folder_paths.folder_names_and_paths
    before = known[kind]
    known[kind] = ([*before[0], str(folder)], before[1])
    try:
        yield
    finally:
        known[kind] = before
        folder_paths.filename_list_cache.pop(kind, None)


def rel_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||, in F64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def quantized_fp8(x: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    """x in FP8 and back by the definition, clamp(x / scale, +-448) as E4M3, by both ways to divide in fp32."""
    return [part.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale for part in (x / scale, x * (1 / scale))]


def of_width(converter: Callable[..., Any], hidden: int) -> Callable[..., Any]:
    """A converter of diffusers' that hard-codes the width 3072; for any other its source with that one number replaced."""
    if hidden == 3072:
        return converter
    source = inspect.getsource(converter)
    assert source.count("3072") == 1
    scope: dict[str, Any] = {"torch": torch}
    exec(source.replace("3072", str(hidden)), scope)  # noqa: S102  # diffusers' own source
    return scope[converter.__name__]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a component folder, by safetensors itself."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(str(file)))
    return tensors


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None, metadata: dict | None = None,
         name: str = "diffusion_pytorch_model.safetensors") -> Path:
    """Write a component folder from tensors and a config."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(folder / name), metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def dequantize(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stored FP8 and (ModelOpt's) NVFP4 tensors -> F32 by their definitions; scales dropped. Independent of the pack.

    NVFP4_AWQ and NVFP4_SVD: y = W (x * p) + B (A (x * p)), as ModelOpt's SVDQuantLinear has it.
    """
    out = {}
    for name, tensor in tensors.items():
        if name.endswith((".weight_scale", ".weight_scale_2", ".input_scale", ".pre_quant_scale", ".svdquant_lora_a",
                          ".svdquant_lora_b")):
            continue
        layer = name.removesuffix(".weight")
        second = tensors.get(f"{layer}.weight_scale_2")
        if tensor.dtype == torch.uint8 and second is not None:
            out[name] = decode_nvfp4(tensor, tensors[f"{layer}.weight_scale"], second)
        if f"{layer}.svdquant_lora_a" in tensors:
            low = tensors[f"{layer}.svdquant_lora_b"].float() @ tensors[f"{layer}.svdquant_lora_a"].float()
            out[name] = out.get(name, tensor.float()) + low
        if f"{layer}.pre_quant_scale" in tensors and name.endswith(".weight"):
            out[name] = out.get(name, tensor.float()) * tensors[f"{layer}.pre_quant_scale"].float()
        if name in out:
            continue
        scale = tensors.get(name.replace(".weight", ".weight_scale"))
        fp8 = tensor.dtype == torch.float8_e4m3fn and scale is not None
        out[name] = tensor.float() * scale.float() if fp8 and scale is not None else tensor.float()
    return out


def emulate(model_class: Any, tensors: dict[str, torch.Tensor], config: dict, dynamic: bool = False,
            weight_only: tuple[str, ...] = ()) -> Any:
    """A diffusers model in F32 with the stored weights dequantized and quantized activations emulated by hooks.

    FP8 (docs/formats/fp8.md): clamp(x / input_scale, +-448) cast to E4M3, times input_scale; dynamic: input_scale =
    amax(x) / 448. NVFP4: fake_nvfp4; dynamic amax / 2688. Modules in `weight_only` keep their activations.
    """
    model = model_class.from_config({k: v for k, v in config.items() if k != "quantization_config"})
    model.load_state_dict(dequantize(tensors), strict=True)

    def hook(scale: torch.Tensor | None, nvfp4: bool):
        def quantize(_module: Any, args: tuple) -> tuple:
            x = args[0]
            s = x.abs().max() / (2688 if nvfp4 else 448) if scale is None else scale.float()
            if nvfp4:
                return (fake_nvfp4(x, s), *args[1:])
            return ((x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s, *args[1:])
        return quantize

    for name, module in model.named_modules():
        if f"{name}.weight_scale" in tensors and name not in weight_only:
            scale = None if dynamic else tensors.get(f"{name}.input_scale")
            module.register_forward_pre_hook(hook(scale, f"{name}.weight_scale_2" in tensors))
    return model.eval().requires_grad_(False)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def decode_nvfp4(codes: torch.Tensor, block: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """F32 [N, K] from ModelOpt's bytes: U8 [N, K/2] with even columns in the low nibble, E4M3 [N, K/16], F32 scalar.

    The two scales are multiplied first, as nvidia-modelopt and comfy-kitchen do.
    """
    pairs = torch.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1).long()
    total = block.float() * scale.float().reshape(())
    return (E2M1[pairs].view(codes.shape[0], -1, 16) * total[..., None]).reshape(codes.shape[0], -1)


def fake_nvfp4(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """An activation [..., K] through NVFP4 and back: block scales amax/6/scale as E4M3, codes rounded to nearest even."""
    blocks = x.float().reshape(-1, 16)
    block = (blocks.abs().amax(-1, keepdim=True) / 6 / scale).clamp(max=448).to(torch.float8_e4m3fn).float()
    total = block * scale
    scaled = torch.where(total == 0, torch.zeros_like(blocks), blocks / torch.where(total == 0, 1, total)).clamp(-6, 6)
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    low, high = torch.bucketize(scaled.abs(), midpoints), torch.bucketize(scaled.abs(), midpoints, right=True)
    code = torch.where((low != high) & (low % 2 == 1), high, low)  # a midpoint goes to the even code
    return (E2M1[code] * scaled.sign() * total).reshape(x.shape)


def swizzle(block: torch.Tensor) -> torch.Tensor:
    """Block scales into 128 x 4 tiles by the offset formula of docs/formats/nvfp4.md, "Tiles", padded with zeros."""
    rows, columns = block.shape
    tall, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    offset = ((r // 128) * (wide // 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    out = torch.zeros(tall * wide, dtype=torch.uint8)
    out[offset.flatten()] = block.view(torch.uint8).flatten()
    return out.view(tall, wide).view(block.dtype)


def comfy_order(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ModelOpt's NVFP4 layers in ComfyUI's byte order: high nibble first, tiled scales."""
    out = dict(tensors)
    for name in tensors:
        if name.endswith(".weight_scale_2"):
            layer = name.removesuffix(".weight_scale_2")
            codes = tensors[f"{layer}.weight"]
            out[f"{layer}.weight"] = (codes << 4) | (codes >> 4)
            out[f"{layer}.weight_scale"] = swizzle(tensors[f"{layer}.weight_scale"])
    return out


class Header(NamedTuple):
    """dtype (safetensors' name) and shape, as a file's header tells them."""

    dtype: str
    shape: tuple[int, ...]


def header_of(part: dict[str, torch.Tensor]) -> dict[str, Header]:
    """What the header of a file with these tensors would say."""
    from quantized_transformers.loaders.containers.safetensors import dtype_name

    return {leaf: Header(dtype_name(tensor.dtype), tuple(tensor.shape)) for leaf, tensor in part.items()}


def assembled(architecture, dims, naming, tensors: dict[str, torch.Tensor], order=None):
    """What a load makes of tensors in memory, which say by themselves what they are: a NativeStateDict."""
    from quantized_transformers.loaders import assemble, plan
    from quantized_transformers.loaders.containers.safetensors import TensorInfo
    from quantized_transformers.loaders.description import CheckpointDescription
    from quantized_transformers.loaders.families.modelopt import StoredLayers
    from quantized_transformers.quant.stored import MODELOPT_ORDER

    class InMemory(assemble.Tensors):
        def __init__(self):
            self.mapped, self.stored, self.in_file, self.copied = tensors, str, str, lambda: None

    def read(module, name, rows, group, problems):
        """As the last family, but tensors of any dtype may stand for weights: tests put marks where those go."""
        if group[module.stored_leaf].dtype == "I64":
            leaves = plan.leaves(module.stored_leaf, *plan.bias_of(module))
            for leaf in leaves:
                del group[leaf]
            return plan.Layer(name, "I64", leaves)
        return stored(module, name, rows, group, problems)

    description = CheckpointDescription("here", [], 0, architecture.name, naming, dims, "", order or MODELOPT_ORDER)
    stored = StoredLayers(description)
    infos = {name: TensorInfo(*header, 0, 0) for name, header in header_of(tensors).items()}
    made = plan.make(plan.LoadPlan(description, architecture), infos, read)
    description.require_loadable()
    return assemble.assemble(made, InMemory())
