"""Who wrote a file of SVDQuant layers, told by what it says of itself: shapes are the same in every writer's order.

`nunchaku_lite`: a config.json for diffusers' quantizer of that name (diffusers/quantizers/nunchaku), or the manifest
that diffuse-compressor puts into the header. `vLLM-Omni`: the header's `conversion`, which its converter writes, or a
config.json as its runtime wants it (docs/sources/nunchaku.md, "Other writers").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ....host.texts import Text
from ...containers.checkpoint import Checkpoint
from ...errors import CheckpointError
from ...files.strict import decode
from ...words import first_ten

NUNCHAKU, LITE, VLLM = "Nunchaku", Text("diffusers' nunchaku_lite"), Text("vLLM-Omni's converter")
ROW_MAJOR = "row_major"
OFFICIAL = Text("use Nunchaku's own svdq-* file of the model")
_JOINED = ".feed_forward.w13.qweight"  # the gate and the values as one, which vLLM-Omni alone calls so
_APART = (".to_k.qweight", ".to_v.qweight", ".add_k_proj.qweight")  # Nunchaku has q, k and v in one layer


def writer_of(checkpoint: Checkpoint) -> str:
    """NUNCHAKU, LITE or VLLM. Raises CheckpointError for a file whose names or dtypes are another writer's than it
    says, and for an order that nobody here knows."""
    where, spec, manifest = checkpoint.source.reference, quantization(checkpoint), runtime_manifest(checkpoint)
    if spec.get("quant_method") == "nunchaku_lite" or manifest:
        return LITE
    conversion = _json(checkpoint.metadata.get("conversion"))
    if conversion:
        tool, layout = str(conversion.get("tool") or ""), str(conversion.get("layout") or "")
        if not tool.startswith("vllm_omni.") or layout != ROW_MAJOR:
            raise CheckpointError(Text("the header says that {tool} has converted this file to {layout}, an order of "
                                       "its bytes that this version does not know", tool=tool or Text("no tool"),
                                       layout=layout or Text("no layout")), where, OFFICIAL)
        return VLLM
    if spec.get("quant_method") == "svdquant" and "precision" in spec and \
            "quantization_config" not in checkpoint.metadata:
        return VLLM
    rows = [name for name, info in checkpoint.tensors.items() if name.endswith(_JOINED)
            or name.endswith(".qweight") and info.dtype == "U8"]
    if rows:
        raise CheckpointError(Text("this is SVDQuant in row-major order, as vLLM-Omni's converter writes it, but "
                                   "neither header nor config.json says who wrote it: {names}",
                                   names=first_ten(rows[:3])), where,
                              Text("keep the file as it was written, in its folder with config.json, or {otherwise}",
                                   otherwise=OFFICIAL))
    apart = [name for name in checkpoint.tensors if name.endswith(_APART)]
    if apart:
        raise CheckpointError(Text("q, k and v are quantized apart, as diffusers' nunchaku_lite has them, but neither "
                                   "header nor config.json says who wrote the file: {names}",
                                   names=first_ten(apart[:3])), where,
                              Text("give its folder with config.json, or {otherwise}", otherwise=OFFICIAL))
    return NUNCHAKU


def quantization(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The quantization_config of config.json, or of the header where that is for diffusers, too: the part for the
    transformer of those that are by component."""
    for found in (checkpoint.config or {}).get("quantization_config"), _json(checkpoint.metadata.get(
            "quantization_config")):
        if isinstance(found, dict):
            own = found.get("default") if "quant_method" not in found else found
            if isinstance(own, dict) and "quant_method" in own:
                return own
    return {}


def runtime_manifest(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """diffuse-compressor's manifest in the header; empty where there is none."""
    found = _json(checkpoint.metadata.get("quantization_config")).get("runtime_manifest")
    return found if isinstance(found, dict) else {}


def patches(checkpoint: Checkpoint) -> Iterator[str]:
    """What config.json or the manifest want done to the model before its layers are replaced, by name."""
    for found in (*listed(quantization(checkpoint).get("patches")),
                  *listed(runtime_manifest(checkpoint).get("structural_patches"))):
        yield str(found.get("type") if isinstance(found, dict) else found)


def listed(value: Any) -> list[Any]:
    """A list of a config; empty where it is none."""
    return value if isinstance(value, list) else []


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = decode(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
