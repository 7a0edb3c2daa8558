"""The checkpoints that are changed: one of every family, as small as its architecture allows, by the tests' own packers
and by the writers themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from support import (
    bitsandbytes,
    common,
    flux,
    gguf_files,
    modelslim,
    packed,
    real_files,
    svdquant_models,
    text_encoders,
    vaes,
    wan,
)

Make = Callable[[Path], Path]


def _small() -> Any:
    return flux.make(heads=1, double=1, single=1)


def _native(folder: Path) -> dict[str, torch.Tensor]:
    _small().save_pretrained(folder / "bf16")
    found = real_files.weights_of(SimpleNamespace(bf16=folder / "bf16"))["native"]
    shutil.rmtree(folder / "bf16")
    return found


def _plain(folder: Path) -> Path:
    _small().save_pretrained(folder)
    return folder


def _sharded(folder: Path) -> Path:
    _small().save_pretrained(folder, max_shard_size="1MB")
    return folder


def _exported(algorithm: str) -> Make:
    def make(folder: Path) -> Path:
        (flux.export_fp8 if algorithm == "FP8" else flux.export_nvfp4)(_small(), folder)
        return folder

    return make


def _linears(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in tensors if name.endswith(".weight") and tensors[name].ndim == 2 and "_blocks." in name]


def _comfy(format_name: str, layout: str) -> Make:
    """A single file of ComfyUI's own, quantized by comfy-kitchen."""
    def make(folder: Path) -> Path:
        from comfy_kitchen.tensor import QuantizedTensor

        marker = torch.tensor(list(json.dumps({"format": format_name}).encode()), dtype=torch.uint8)
        tensors = {name: t.to(torch.bfloat16) for name, t in _native(folder).items()}
        for name in _linears(tensors):
            made = QuantizedTensor.from_float(tensors[name], layout).state_dict(name)
            tensors |= {**made, f"{name.removesuffix('.weight')}.comfy_quant": marker.clone()}
        return _write(folder, tensors)

    return make


def _write(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    file = folder / "model.safetensors"
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, str(file), metadata)
    return file


def _scaled(folder: Path) -> Path:
    """ComfyUI's first scaled FP8."""
    tensors = {name: t.to(torch.bfloat16) for name, t in _native(folder).items()}
    for name in _linears(tensors):
        scale = tensors[name].float().abs().max() / 448
        tensors |= {name: (tensors[name].float() / scale).to(torch.float8_e4m3fn),
                    f"{name.removesuffix('.weight')}.scale_weight": scale}
    return _write(folder, tensors | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)})


def _of(layer: Callable[[torch.Tensor], Any], spec: dict[str, Any]) -> Make:
    """A diffusers folder whose blocks are packed by a packer's formula."""
    def make(folder: Path) -> Path:
        model = _small().float()
        tensors = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "blocks" in name:
                leaves, _ = layer(module.weight.detach())
                tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
        packed_layers = {name.rpartition(".")[0] for name in tensors}
        rest = {name: t for name, t in model.state_dict().items()
                if not (name.endswith(".weight") and name.removesuffix(".weight") in packed_layers)}
        config = {"_class_name": "FluxTransformer2DModel", **{k: v for k, v in model.config.items() if k[0] != "_"}}
        common.save(folder, rest | tensors, json.loads(json.dumps(config)) | {"quantization_config": spec})
        return folder

    return make


def _bitsandbytes(folder: Path) -> Path:
    model = _small()
    config = {"_class_name": "FluxTransformer2DModel", **{k: v for k, v in model.config.items() if k[0] != "_"}}
    tensors = bitsandbytes.quantized(model, bitsandbytes.four_bits, ("embed", "proj_out", "norm_out"), double=True)
    common.save(folder, tensors, json.loads(json.dumps(config)) | {"quantization_config": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}})
    return folder


def _gguf(kind: str) -> Make:
    def make(folder: Path) -> Path:
        tensors, _ = gguf_files.packed(_native(folder), kind, keep=lambda name: "_blocks." not in name)
        return gguf_files.write(folder / "model.gguf", tensors)

    return make


def _nunchaku(precision: str) -> Make:
    def make(folder: Path) -> Path:
        made = svdquant_models.make_flux(precision, 16, model=_small())
        return made.write(folder)

    return make


def _modelslim(name: str) -> Make:
    return lambda folder: modelslim.folder(name, folder)


_CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*proj_out", "x_embedder"],
       "config_groups": {"group_0": {"targets": ["Linear", "re:single.*"], "weights": {
           "num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}}}}
_TRANSFORMERS: dict[str, Make] = {
    "plain": _plain, "sharded": _sharded, "native": lambda folder: _write(folder, _native(folder)),
    "fp8": _exported("FP8"), "nvfp4": _exported("NVFP4"), "scaled fp8": _scaled,
    "comfy fp8": _comfy("float8_e4m3fn", "TensorCoreFP8E4M3Layout"),
    "comfy nvfp4": _comfy("nvfp4", "TensorCoreNVFP4Layout"), "comfy mxfp8": _comfy("mxfp8", "TensorCoreMXFP8Layout"),
    "compressed-tensors": _of(packed.ct_packed, _CT),
    "gptq": _of(packed.gptq, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"}),
    "awq": _of(packed.awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "sdnq": _of(lambda w: packed.sdnq(w, "uint4", 32), {
        "quant_method": "sdnq", "weights_dtype": "uint4", "group_size": 32,
        "modules_dtype_dict": {"minimum_6bit": ["no_such_layer", ".nothing.*"]}}),
    "quanto": _of(packed.quanto, {"quant_method": "quanto", "weights_dtype": "int4"}),
    "bitsandbytes": _bitsandbytes, "gguf q8_0": _gguf("Q8_0"), "gguf q4_0": _gguf("Q4_0"),
    "nunchaku int4": _nunchaku("int4"), "nunchaku fp4": _nunchaku("nvfp4"),
    "modelslim w8a8": _modelslim("w8a8"), "modelslim mxfp8": _modelslim("mxfp8"), "modelslim mxfp4": _modelslim("mxfp4")}


class Seed(NamedTuple):
    """How a checkpoint is made, of a node that loads it, and what comes out when it runs."""

    make: Make
    node: str
    run: Callable[[Path], torch.Tensor]


def _velocity(support: Any, inputs: Callable[[], dict[str, torch.Tensor]]) -> Callable[[Path], torch.Tensor]:
    def run(path: Path) -> torch.Tensor:
        from quantized_transformers.loaders import model

        patcher = model.load(model.Request(str(path), dtype="fp32"), quiet=True).patcher
        return support.comfy_velocity(patcher, **inputs())

    return run


def _numbers(patcher: Any) -> torch.Tensor:
    """All weights of a model, two numbers each."""
    return torch.stack([torch.stack((t.float().mean(), t.float().abs().max())) for t in patcher.model.state_dict().values()
                        if t.numel()])


def _weights(path: Path) -> torch.Tensor:
    from quantized_transformers.loaders import model

    return _numbers(model.load(model.Request(str(path)), quiet=True).patcher)


def _derived(table: str) -> Make:
    """A tiny model of a class with a derived table, as diffusers saves it."""
    def make(folder: Path) -> Path:
        from quantized_transformers.loaders.architectures.diffusers_classes import DERIVED
        from support.derived import CASES

        case, (one,) = CASES[table][0], [one for one in DERIVED if one.table == table]
        torch.manual_seed(3)
        common.randomise(common.diffusers_class(case.kind or one.classes[0])(**case.config)).save_pretrained(folder)
        return folder

    return make


def _deferred(path: Path) -> torch.Tensor:
    """Nothing is loaded, and config.json may well say another size."""
    from quantized_transformers.loaders import model

    model.defer(model.Request(str(path)))
    return torch.zeros(1)


def _config(folder: Path) -> Path:
    _plain(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    return folder


def _decoded(path: Path) -> torch.Tensor:
    from quantized_transformers.loaders.components import vae

    loaded = vae.load(vae.Request(str(path), dtype="fp32")).vae
    return torch.stack([t.float().sum() for t in loaded.first_stage_model.state_dict().values() if t.numel()])


def _encoded(path: Path) -> torch.Tensor:
    from quantized_transformers.loaders.components import text_encoder

    clip = text_encoder.load(text_encoder.Request(str(path), dtype="fp32")).clip
    return torch.cat([t.float().flatten() for t in clip.encode_from_tokens(clip.tokenize("a photo of a cat"), return_pooled=True)
                      if t is not None])


SEEDS = {name: Seed(make, "QT_LoadBaseModel", _velocity(wan, modelslim.inputs) if name.startswith("modelslim")
                    else _velocity(flux, flux.inputs)) for name, make in _TRANSFORMERS.items()} | {
    "config": Seed(_config, "QT_LoadBaseModel", _deferred),
    **{f"derived {table}": Seed(_derived(table), "QT_LoadBaseModel", _weights) for table in ("sd3",)},
    "vae flux1": Seed(lambda folder: vaes.save_base("flux1", folder), "QT_LoadBaseVAE", _decoded),
    "vae wan": Seed(lambda folder: vaes.save_base("wan", folder), "QT_LoadBaseVAE", _decoded),
    "text flux1": Seed(lambda folder: text_encoders.base("flux1", folder), "QT_LoadBaseTextEncoder", _encoded)}
