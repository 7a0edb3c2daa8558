"""What a call of a Linear costs beside its arithmetic: the host's time, which a GPU waits for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.bench import Row, spent

# format -> (its codec, ComfyUI's layout or none for tiles, its kernel)
FORMATS = {"FP8": ("float8_e4m3fn", "TensorCoreFP8E4M3Layout", ""), "NVFP4": ("nvfp4", "TensorCoreNVFP4Layout", ""),
           "MXFP8": ("mxfp8", "TensorCoreMXFP8Layout", ""), "INT8 of ComfyUI": ("int8_tensorwise", "TensorWiseINT8Layout", ""),
           "FP8 tile": ("fp8", "", ""), "INT8 W8A16": ("w8a16", "", ""), "INT8 W8A8": ("w8a8_dynamic", "", "comfy_kitchen"),
           "SVDQ INT4": ("svdq_int4", "", ""), "UINT4 groups": ("u4_groups", "", ""), "GGUF Q8_0": ("ggml_q8_0", "", "")}
INTEGERS = ("INT8 of ComfyUI", "INT8 W8A8")  # multiplied, not decoded
SIZE, TOKENS, CALLS = 64, 4, 100
TITLE = (f"what a call of a Linear of {SIZE} x {SIZE} adds to torch's own product at {TOKENS} tokens, over what ComfyUI's dequantized "
         "FP8 adds; and the same in microseconds of this processor, less the decoding of the weight")
BUDGET = 40


def cases(folder: Path) -> list[tuple[()]]:
    return [()]


def measure() -> list[Row]:
    import comfy.ops
    import torch
    from comfy_kitchen.tensor import QuantizedTensor

    from quantized_transformers.quant.codecs import codec
    from quantized_transformers.quant.layouts import stored
    from quantized_transformers.quant.layouts.host_tiles import tile_of
    from quantized_transformers.quant.layouts.tiled import is_tiled, parameter, params_of, tiles_of
    from quantized_transformers.quant.linear import with_tiles_of
    from quantized_transformers.quant.marker import marker
    from support.tiles import usual

    host = comfy.ops.mixed_precision_ops({}, torch.float32, disabled=["float8_e4m3fn", "nvfp4", "mxfp8"])
    x, plain = torch.randn(TOKENS, SIZE), torch.randn(SIZE, SIZE)

    def layer(operations: Any, tensors: dict[str, Any]) -> Any:
        made = operations.Linear(SIZE, SIZE, bias=False)
        made.load_state_dict(dict(tensors), strict=False, assign=True)
        return made

    def of_host(word: str, layout: str) -> dict[str, Any]:
        options = {"per_channel": True} if "INT8" in layout else {} if "MX" in layout else {"scale": "recalculate"}
        return {**QuantizedTensor.from_float(plain / 50, layout, **options).state_dict("weight"), "comfy_quant": marker({"format": word})}

    def of_tiles(codec: str, kernel: str) -> Any:
        made = with_tiles_of(host, {codec: kernel} if kernel else {}).Linear(SIZE, SIZE, bias=False)
        tile = usual(codec, SIZE, SIZE, groups=1 if codec.startswith("w8") else 2)
        made.weight = parameter(*params_of([tile], torch.float32, (SIZE, SIZE), (kernel,)))
        made.quant_format = stored.FORMAT
        return made

    layers: dict[str, Any] = {"plain of ComfyUI": layer(host, {"weight": plain}),
                              "plain": layer(with_tiles_of(host), {"weight": plain})}
    for name, (word, layout, kernel) in FORMATS.items():
        if layout:
            tensors = of_host(word, layout)
            layers[f"{name} of stock"] = layer(host, tensors)
            layers[name] = layer(with_tiles_of(host), tensors)
        else:
            layers[name] = of_tiles(word, kernel)

    def many(call: Callable[[Any], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                call(x)
        return run

    room = torch.empty(SIZE, SIZE)

    def decoding(name: str) -> Callable[[Any], None]:
        weight = layers[name].weight
        tile = tiles_of(weight)[0] if is_tiled(weight) else tile_of(weight)
        kind = codec(tile.place.codec)
        return lambda x: kind.decode_rows(tile, 0, SIZE, room)

    decoded = [name for name in FORMATS if name not in INTEGERS]
    arms = {"torch": lambda x: torch.nn.functional.linear(x, plain), **layers, **{f"{name} decoded": decoding(name) for name in decoded}}
    with torch.inference_mode():
        took = spent({name: many(one) for name, one in arms.items()})

    def added(name: str) -> float:
        return (took[name] - took["torch"]) / (took["FP8 of stock"] - took["torch"])

    def own(name: str) -> float:
        return (took[name] - took["torch"] - took.get(f"{name} decoded", 0)) / CALLS * 1e6

    rows = [Row("a plain layer", added("plain"), None, {"stock": added("plain of ComfyUI")})]
    rows += [Row(name, added(name), None, {"stock": added(f"{name} of stock")} if f"{name} of stock" in took else {}) for name in FORMATS]
    return rows + [Row(f"{name}: but for decoding", own(name), BUDGET, unit="us") for name in ("plain", *decoded)]
