"""Text encoders in packed formats, as transformers' users have them: a folder that transformers saved -> the same with its
Linears packed and the tool's quantization_config, and what transformers' model is with the weights that this means.

How a layer is packed is in packed.py and bitsandbytes.py; quantization_config is the one that the tool wrote into the
exports beside these tests, with other sizes and names where a model has others. What the tools themselves make of whole
tiny encoders is in tests/data/exports/text_packed (make_text_packed.py); test_text_packed_support.py holds this to it.
Nothing here uses the pack.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support import bitsandbytes, packed, transformers_versions
from support.pack import PACK
from support.text_gguf import as_float

EXPORTS = PACK / "tests" / "data" / "exports"
RECORDS = EXPORTS / "text_packed"
IDS = torch.arange(1, 9)[None]  # what the records' hidden states are of
LARGE = 1 << 26  # bytes; a larger file is written without its pages of zeros
VISION = ("visual", "vision_tower", "multi_modal_projector")

Tensors = dict[str, torch.Tensor]
Layer = Callable[..., tuple[Tensors, torch.Tensor]]


# ------------------------------------------------------------------------------------------------- layers
def fp8_blocks(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Qwen3-*-FP8's: blocks of 128 x 128, their scales by DeepSeek's name, which multiply."""
    made, meant = packed.ct_fp8(weight, 128, 128)
    return {"weight": made["weight"], "weight_scale_inv": made["weight_scale"]}, meant


def nvfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' NVFP4 with the activations' global scale, a divisor: 2688 over the largest value seen."""
    made, meant = packed.ct_nvfp4(weight)
    return made | {"input_global_scale": torch.tensor([2688 / 16.0])}, meant


def scaled(weight: torch.Tensor, scale: str, given: str = "") -> tuple[Tensors, torch.Tensor]:
    """E4M3 with one F32 scale by this name; `given`: the activations' scale by that name, which weights do not depend on."""
    step = weight.abs().amax() / 448
    codes = (weight / step).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, scale: step} | ({given: torch.tensor(0.03125)} if given else {}), codes.float() * step


def int8_rows(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """ComfyUI's int8_tensorwise with a scale for each row."""
    step = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / step).round().to(torch.int8)
    mark = torch.tensor(list(json.dumps({"format": "int8_tensorwise"}).encode()), dtype=torch.uint8)
    return {"weight": codes, "weight_scale": step, "comfy_quant": mark}, codes.float() * step


def tinychat(weight: torch.Tensor, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
             ) -> tuple[Tensors, torch.Tensor]:
    """Nunchaku's awq-int4 T5 (its W4Linear): groups of 128, w = code * scale - zero, by its formula for both when they are
    not given [N, groups]. `scales` and `scaled_zeros` (minus the zeros) are [groups, N], groups padded to eights. Words are
    docs/formats/awq-w4a16.md's: number n // 4 * K + k // 64 * 64 + n % 4 * 16 + k % 64 // 32 * 8 + k % 8 has k in nibble
    k % 32 // 8."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, 128)
    if scale is None or zero is None:
        scale = ((groups.amax(-1) - groups.amin(-1)) / 15).bfloat16()
        zero = (-groups.amin(-1)).clamp(min=0).bfloat16()
    step, low = scale.float()[..., None], zero.float()[..., None]
    codes = ((groups + low) / step).round().clamp(0, 15)
    meant = (codes * step - low).view(rows, columns)
    n, k = torch.arange(rows)[:, None], torch.arange(columns)
    word = n // 4 * columns + k // 64 * 64 + n % 4 * 16 + k % 64 // 32 * 8 + k % 8
    words = torch.zeros(rows * columns // 4, dtype=torch.int64).scatter_add_(
        0, word.flatten(), (codes.view(rows, columns).long() << 4 * (k % 32 // 8)).flatten())
    made = {name: torch.nn.functional.pad(values.t(), (0, 0, 0, -groups.shape[1] % 8)).contiguous()
            for name, values in (("scales", scale), ("scaled_zeros", -zero))}
    return made | {"qweight": (words - (words >> 15 << 16)).to(torch.int16).view(rows // 4, columns)}, meant


# ------------------------------------------------------------------------------------------------- formats
@dataclass(frozen=True)
class Format:
    """`config`: the export whose quantization_config it is, or the config; `ignored`: its key for layers left alone;
    `skip`: whole parts of names whose layers are left alone."""

    layer: Layer
    config: Path | dict[str, Any]
    ignored: str = ""
    skip: tuple[str, ...] = ("lm_head", *VISION)
    sizes: dict[str, Any] = field(default_factory=dict)


def _ct(scheme: str, layer: Layer) -> Format:
    return Format(layer, EXPORTS / "compressed-tensors" / scheme, "ignore")


FORMATS = {
    "gptq": Format(packed.gptq, EXPORTS / "gptqmodel" / "w4_sym", sizes={"bits": "bits", "size": "group_size", "order": "desc_act"}),
    # autoawq's own, as in Qwen's repositories
    "awq": Format(packed.awq, {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
                               "modules_to_not_convert": None}, "modules_to_not_convert", sizes={"size": "group_size"}),
    "ct_w4a16": _ct("w4a16", packed.ct_packed),
    "ct_w8a8": _ct("w8a8", packed.ct_int),
    "ct_fp8_dynamic": _ct("fp8_dynamic", partial(packed.ct_fp8, rows=1)),
    "ct_fp8_block": _ct("fp8_block", partial(packed.ct_fp8, rows=128, columns=128)),
    "ct_nvfp4": _ct("nvfp4", nvfp4),
    "fp8_block": Format(fp8_blocks, {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                     "weight_block_size": [128, 128]}, "modules_to_not_convert"),
    "bnb_nf4": Format(bitsandbytes.four_bits, RECORDS / "bnb_nf4", "llm_int8_skip_modules", ("lm_head", "wo"),
                      {"double": "bnb_4bit_use_double_quant"}),
    "bnb_int8": Format(bitsandbytes.llm_int8, RECORDS / "bnb_int8", "llm_int8_skip_modules", ("lm_head", "wo")),
    "modelopt_fp8": Format(partial(scaled, scale="weight_scale", given="input_scale"), RECORDS / "modelopt_fp8", "ignore"),
}
# Single files of ComfyUI and of Nunchaku; the latter is for T5 with widths of whole 128s.
FILES: dict[str, Layer] = {"scaled_fp8": partial(scaled, scale="scale_weight"), "int8_tensorwise": int8_rows,
                           "nunchaku_t5": tinychat}


def write(model: Any, folder: Path, kind: str, skip: tuple[str, ...] = (), **options: Any) -> Any:
    """A folder in one of FORMATS: config.json and model.safetensors.

    `model`: transformers' model, or a folder that it was saved to. `skip`: more parts of names ("visual") whose Linears
    stay as they are, listed as the tool lists them. `options`: the packer's (packed.gptq's size and order, ...).
    Returns transformers' model with exactly the weights that the folder means, F32.
    """
    form = FORMATS[kind]
    with _saved(model, folder) as source:
        reference, tensors = _packed(source, partial(form.layer, **options), (*form.skip, *skip))
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    ignored = sorted(name for name, (leaves, _) in tensors.layers.items() if not leaves)
    config["quantization_config"] = _config(form, kind, ignored, skip, options)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if kind == "modelopt_fp8":
        claims = json.loads((RECORDS / kind / "hf_quant_config.json").read_text(encoding="utf-8"))
        claims["quantization"]["exclude_modules"] = config["quantization_config"]["ignore"]
        (folder / "hf_quant_config.json").write_text(json.dumps(claims), encoding="utf-8")
    _store(tensors.stored, folder / "model.safetensors", {"format": "pt"})
    return reference


def write_file(model: Any, path: Path, kind: str, skip: tuple[str, ...] = (), **options: Any) -> Any:
    """A single file in one of FILES; else as `write`. ComfyUI's have the text model alone, under names without a nested
    model's prefix."""
    with _saved(model, path.with_suffix("")) as source:
        apart = () if kind == "nunchaku_t5" else ("lm_head", *VISION)
        reference, tensors = _packed(source, partial(FILES[kind], **options), (*apart, *skip))
        config = (source / "config.json").read_text(encoding="utf-8")
    stored = tensors.stored
    if kind != "nunchaku_t5":
        stored = {name.removeprefix("language_model.").replace("model.language_model.", "model."): tensor for name, tensor
                  in stored.items() if not any(part in name.split(".") for part in ("vision_tower", "multi_modal_projector"))}
    if kind == "scaled_fp8":
        stored["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    _store(stored, path, {"config": config} if kind == "nunchaku_t5" else {})
    return reference


class _saved:
    """A folder as it is, or a model's, saved for the time being."""

    def __init__(self, model: Any, beside: Path) -> None:
        self.model, self.folder = model, beside.parent / f"{beside.name}.source"

    def __enter__(self) -> Path:
        if isinstance(self.model, Path):
            return self.model
        self.model.save_pretrained(self.folder)
        return self.folder

    def __exit__(self, *_: Any) -> None:
        if not isinstance(self.model, Path):
            shutil.rmtree(self.folder)


@dataclass
class _Tensors:
    stored: Tensors
    layers: dict[str, tuple[Tensors, torch.Tensor]]  # every Linear by its name in the file; no leaves: left alone


def _packed(source: Path, layer: Layer, skip: tuple[str, ...]) -> tuple[Any, _Tensors]:
    import transformers

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    reference = transformers_versions.loaded(getattr(transformers, config["architectures"][0]), source, "auto").eval()
    reference.requires_grad_(False)
    linears = {plain(name): module for name, module in reference.named_modules() if isinstance(module, torch.nn.Linear)}
    stored: Tensors = {}
    layers: dict[str, tuple[Tensors, torch.Tensor]] = {}
    meant = {}
    with safe_open(str(source / "model.safetensors"), "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor, (owner, _, leaf) = file.get_tensor(name), name.rpartition(".")
            module = linears.get(plain(owner))
            if leaf != "weight" or module is None:
                stored[name] = tensor
            elif any(part in owner.split(".") for part in skip):
                stored[name], layers[owner] = tensor, ({}, tensor)
            else:
                leaves, values = layers[owner] = layer(alive(tensor.float()))
                stored |= {f"{owner}.{leaf}": made.contiguous() for leaf, made in leaves.items()}
                meant[id(module.weight)] = values
    for parameter in reference.parameters():
        parameter.data = meant.pop(id(parameter), None) if id(parameter) in meant else as_float(parameter.detach())
    assert not meant
    return reference, _Tensors(stored, layers)


def plain(name: str) -> str:
    """A name without what versions of transformers nest differently."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def alive(weight: torch.Tensor) -> torch.Tensor:
    """No row of zeros: the tools give those a smallest scale each, the packers here divide by their largest value."""
    weight[~weight.any(1), 0] = 2.0 ** -10
    return weight


def _config(form: Format, kind: str, ignored: list[str], skip: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    if isinstance(form.config, dict):
        config = copy.deepcopy(form.config)
    else:
        config = json.loads((form.config / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        config.pop("meta", None)  # gptqmodel's: paths of the machine that made it
    for option, key in form.sizes.items():
        if option in options:
            config[key] = options[option]
    if kind == "gptq":
        version = {"checkpoint_format": "gptq_v2", "format": "gptq_v2"} if options.get("version") == 2 else {}
        config |= version | ({"sym": False} if options.get("zeros") else {})
    if kind == "ct_w4a16":
        weights = config["config_groups"]["group_0"]["weights"]
        weights |= {"group_size": options.get("size", 128), "num_bits": options.get("bits", 4),
                    "symmetric": not options.get("zeros"), "actorder": "group" if options.get("order") else None}
    if kind.startswith("ct") and ignored:
        config["ignore"] = ignored if "lm_head" in ignored else [*ignored, "lm_head"]
    elif kind == "modelopt_fp8":
        config["ignore"] = sorted({*config["ignore"], *ignored})
    elif form.ignored and kind.startswith("bnb"):
        config[form.ignored] = list(skip) or None
    elif form.ignored:
        names = sorted({part for name in ignored for part in form.skip + skip if part in name.split(".")} - {"lm_head"})
        if names:
            config[form.ignored] = names
    return config


# ------------------------------------------------------------------------------------------------- files
def _store(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
    """safetensors' save_file; a large file less the pages of zeros, as text_encoders_llm.save_with_holes."""
    if sum(tensor.nbytes for tensor in tensors.values()) < LARGE:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, str(path), metadata)
        return
    kinds = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8", torch.uint8: "U8",
             torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3"}
    header: dict[str, Any] = {"__metadata__": metadata}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    end = 0
    for name, tensor in ordered:
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(data), 1 << 16):
                part = data[start:start + (1 << 16)]
                if part.any():
                    file.write(part.tobytes())
                else:
                    file.seek(len(part), 1)
        file.truncate(8 + len(text) + end)


# ------------------------------------------------------------------------------------------------- records
def record(name: str) -> tuple[Path, torch.Tensor, Tensors]:
    """(folder as the tool saved it, hidden states of IDS [layers + 1, 1, 8, width] that transformers computes in F32 with
    the weights that the tool dequantizes, some of those weights by transformers' names) of one of RECORDS. The weights
    are in the tool's output dtype, BF16 or (GPTQ, AWQ) F16, and the hidden states are those of rounded weights."""
    expected = load_file(str(RECORDS / name / "expected.safetensors"))
    return RECORDS / name, expected.pop("hidden"), expected


def hidden(model: Any) -> torch.Tensor:
    """All hidden states of IDS."""
    with torch.no_grad():
        return torch.stack(model.eval()(input_ids=IDS, output_hidden_states=True).hidden_states)
