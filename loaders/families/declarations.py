"""What the files claim about their quantization, merged from config.json and safetensors metadata.

Tensors are the truth (see describe.py); a declaration names the family and producer, lists what was left alone, and
must not contradict itself. The order and the recursive merge are SGLang-Diffusion's (`resolve_override`): config.json
first, then `_quantization_metadata` and `quantization_config` of every file header; two different values under one key
are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ...host.texts import Text
from ..containers.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..files import kinds, strict
from ..files.source import read_json

METADATA_KEYS = ("_quantization_metadata", "quantization_config")
# Family -> ModelOpt's quant_algo (its export/quant_utils.py). What AWQ, SVDQuant and SmoothQuant add, and whether a
# scale is a row's or a block's, is seen in the tensors.
ALGORITHMS = {"modelopt-fp8": ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL"),
              "modelopt-nvfp4": ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_NVFP4"),
              "modelopt-mxfp8": ("MXFP8",), "modelopt-int8": ("W8A8_SQ_PER_CHANNEL", "W8A16")}
WEIGHTS_ONLY = ("FP8_PB_WO", "W4A16_NVFP4", "W8A16")
SUPPORTED = Text("supported: modelopt FP8, INT8, MXFP8 and NVFP4 (with AWQ or SVDQuant, or weights only), and fp8")


@dataclass(frozen=True)
class Declaration:
    """The merged claim.

    `family` is one of ALGORITHMS, "fp8", "nvfp4" or "" (nothing declared). `swap_weight_nibbles`: True
    says that even columns are in the high nibble, False in the low one, None says nothing. `comfy`: layers are listed
    as ComfyUI lists them, without a quantization method. `weights_only`: activations are not to be quantized.
    """

    family: str = ""
    producer: str = ""
    activation_scheme: str = ""
    ignore: tuple[str, ...] = ()
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    swap_weight_nibbles: bool | None = None
    comfy: bool = False
    weights_only: bool = False
    origins: tuple[str, ...] = ()


def merge(into: dict[str, Any], other: dict[str, Any], where: str, path: str = "") -> None:
    """Add claims to others. Raises CheckpointError for two values under one key; `path`: of the keys above."""
    for key, value in other.items():
        old = into.setdefault(key, value)
        if isinstance(old, dict) and isinstance(value, dict):
            if old is not value:
                merge(old, value, where, f"{path}{key}.")
        elif old != value:
            raise CheckpointError(
                Text("conflicting quantization declarations: {key} is {value!r} in one place and {other!r} in another",
                     key=f"{path}{key}", value=str(old)[:80], other=str(value)[:80]), where,
                Text("config.json and weights come from different exports; download both again"))


def _config_spec(config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization block of a config.json, wherever the usual writers put it."""
    text = config.get("text_config")
    for spec in (config.get("quantization_config"), text.get("quantization_config") if isinstance(text, dict) else None,
                 config.get("compression_config")):
        if spec is not None:
            return spec
    return None


def read_declaration(checkpoint: Checkpoint) -> Declaration:
    """Merge every quantization claim of a checkpoint.

    Raises CheckpointError for invalid JSON, contradictory claims, and methods that this pack does not know.
    """
    merged, origins = claims(checkpoint)
    return _interpret(merged, origins, checkpoint.source.folder) if merged else Declaration()


def claims(checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(every quantization claim of a checkpoint as one, where they are). Raises CheckpointError for invalid JSON, and
    for claims that contradict each other."""
    if checkpoint.claimed is None:
        checkpoint.claimed = _claims(checkpoint)
    return checkpoint.claimed


def _claims(checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
    merged: dict[str, Any] = {}
    origins: list[str] = []

    def add(spec: Any, name: str, where: str) -> None:
        if not isinstance(spec, dict):
            raise CheckpointError(Text("{name} is no JSON object", name=name), where, Text("download the file again"))
        kinds.require(spec, kinds.QUANTIZED, where)
        merge(merged, json.loads(json.dumps(spec)), where)
        if name not in origins:
            origins.append(name)

    path = checkpoint.source.config or checkpoint.source.beside
    config = checkpoint.config if checkpoint.source.config else read_json(path) if path else None
    if config and path:
        spec = _config_spec(config)
        if spec is not None:
            add(spec, "config.json", path)
    for header in checkpoint.headers:
        for key in METADATA_KEYS:
            if key in header.metadata:
                try:
                    spec = strict.decode(header.metadata[key])
                except ValueError as error:
                    raise CheckpointError(Text("invalid {key} in the file's metadata: {error}", key=key, error=error),
                                          header.path, Text("download the file again")) from error
                add(spec, Text("metadata {key}", key=key), header.path)
    return merged, tuple(origins)


def _interpret(spec: dict[str, Any], origins: tuple[str, ...], where: str) -> Declaration:
    nested = spec.get("quantization")
    nested = nested if isinstance(nested, dict) else {}
    layers = spec.get("layers")
    layers = layers if isinstance(layers, dict) and all(isinstance(v, dict) for v in layers.values()) else {}
    producer = spec.get("producer")
    producer = producer if isinstance(producer, dict) else {}
    ignore = spec.get("ignore") or spec.get("ignored_layers") or spec.get("modules_to_not_convert") \
        or nested.get("exclude_modules") or ()
    scheme = spec.get("activation_scheme") or ""
    if scheme not in ("", "static", "dynamic"):
        raise CheckpointError(Text("unknown activation_scheme {scheme!r}", scheme=scheme), where,
                              Text("supported: static, dynamic"))
    block = spec.get("weight_block_size")
    if block and not (isinstance(block, list) and len(block) == 2 and all(
            isinstance(size, int) and size > 0 and not size & (size - 1) for size in block)):
        raise CheckpointError(Text("weight_block_size {block} is not supported", block=block), where,
                              Text("supported: two powers of two, such as [128, 128]"))
    swap = spec.get("swap_weight_nibbles", nested.get("swap_weight_nibbles"))
    if swap is not None and not isinstance(swap, bool):
        raise CheckpointError(Text("swap_weight_nibbles is {swap!r}, expected true or false", swap=swap), where,
                              Text("correct config.json; true means that even columns are in the high nibble"))
    family = _family(spec, nested, layers, where)
    comfy = bool(layers) and not (spec.get("quant_method") or spec.get("quant_algo") or nested.get("quant_algo"))
    return Declaration(family, " ".join(str(producer[key]) for key in ("name", "version") if key in producer),
                       scheme, tuple(ignore), layers, swap, comfy, _algorithm(spec, nested) in WEIGHTS_ONLY,
                       origins)


def _algorithm(spec: dict[str, Any], nested: dict[str, Any]) -> str:
    return str(spec.get("quant_algo") or nested.get("quant_algo") or "").upper()


def _family(spec: dict[str, Any], nested: dict[str, Any], layers: dict[str, Any], where: str) -> str:
    """Name the family from quant_method and quant_algo (the table of SGLang's `_resolve_quant_method_name`)."""
    method = str(spec.get("quant_method") or "").lower()
    algo = _algorithm(spec, nested)
    if method.startswith("modelopt") or (not method and algo):
        declared = {"modelopt_fp8": "FP8", "modelopt_fp4": "NVFP4"}.get(method, "")
        if declared and algo and algo not in ALGORITHMS[f"modelopt-{declared.lower()}"]:
            raise CheckpointError(Text("conflicting declarations: quant_method is {method!r} but quant_algo is "
                                       "{algo!r}", method=method, algo=algo), where,
                                  Text("download config.json again, or ask its publisher"))
        algo = algo or declared
        family = next((name for name, algorithms in ALGORITHMS.items() if algo in algorithms), "")
        if family:
            return family
        what = Text("ModelOpt {algo} is not supported by this version", algo=algo) if algo else \
            Text("ModelOpt without a quant_algo is not supported by this version")
        raise CheckpointError(what, where, SUPPORTED)
    if method == "fp8":
        return "fp8"
    if method:
        raise CheckpointError(Text("the quantization method {method!r} is not supported by this version",
                                   method=method), where, SUPPORTED)
    words = {str(conf.get("format")) for conf in layers.values()}
    return "" if not layers else "nvfp4" if "nvfp4" in words else "fp8"
