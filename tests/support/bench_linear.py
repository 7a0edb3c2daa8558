"""What a quantized Linear costs on a CPU beside a plain one, and decoding beside a copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.bench import Row, spent

# format -> (its codec, forward over plain at most, decoding over a copy at most, whether it is the host's layout)
FORMATS = {"FP8": ("fp8", 1.5, 3, "TensorCoreFP8E4M3Layout"), "NVFP4": ("nvfp4", 1.7, 4, "TensorCoreNVFP4Layout"),
           "MXFP8": ("w8a8_mxfp8", 1.5, 3, "TensorCoreMXFP8Layout"), "INT8 W8A16": ("w8a16", 1.5, 3, ""),
           "INT8 W8A8, F32 sums": ("w8a8_dynamic", 1.5, None, ""), "INT8 of ComfyUI": ("w8a8_dynamic", 1.5, None, "TensorWiseINT8Layout"),
           "SVDQ INT4": ("svdq_int4", 1.7, 4, ""), "FP8 rows": ("fp8_blocks", None, 3, ""),
           "UINT4 groups": ("u4_groups", None, 4, ""), "NF4": ("codebook", None, 4, ""), "MXFP4": ("w4a4_mxfp4", None, 4, ""),
           "GPTQ": ("u4_gptq", None, 4, ""), "AWQ": ("u4_awq", None, 4, ""), "GGUF Q8_0": ("ggml_q8_0", None, 3, ""),
           "GGUF Q4_0": ("ggml_q4_0", None, 4, ""), "GGUF Q4_K": ("ggml_q4_k", None, 4, ""), "GGUF Q5_K": ("ggml_q5_k", None, 5, ""),
           "GGUF Q6_K": ("ggml_q6_k", None, 5, ""), "GGUF IQ4_XS": ("ggml_iq4_xs", None, 5, "")}
KEPT = {"FP8": "fp8", "NVFP4": "nvfp4", "SVDQ INT4": "svdq_int4"}  # format -> its codec; with the decoded weight kept
SIZE, TOKENS = 3072, 64
LINUX = True
TITLE = (f"a Linear of {SIZE} x {SIZE} at {TOKENS} tokens over a plain one in F32; decoding over a copy (beside: ComfyUI's own "
         "layers and kitchen's decoding, the weight decoded whole, torch._int_mm; gguf-py's decoding)")


def cases(folder: Path) -> list[tuple[()]]:
    return [()]


def measure() -> list[Row]:
    import comfy.ops
    import torch
    from comfy_kitchen.tensor import QuantizedTensor

    from quantized_transformers.quant.codecs import codec
    from quantized_transformers.quant.kept import Kept
    from quantized_transformers.quant.kernels import by_tiles, int8, kernel
    from quantized_transformers.quant.kernels.base import DEQUANTIZE, Activation
    from quantized_transformers.quant.layouts import stored
    from quantized_transformers.quant.layouts.tiled import parameter, params_of
    from quantized_transformers.quant.linear import with_tiles_of
    from quantized_transformers.quant.marker import marker
    from quantized_transformers.quant.tile import Place, Tile
    from support.anon import Peak
    from support.gguf_files import Kind, blocks, gguf
    from support.tiles import usual

    takes = by_tiles.takes
    has_instructions = int8.has_instructions
    host = comfy.ops.mixed_precision_ops({}, torch.float32, disabled=["float8_e4m3fn", "nvfp4", "mxfp8"])
    ours = with_tiles_of(host)
    x, plain = torch.randn(TOKENS, SIZE), torch.randn(SIZE, SIZE)
    src, dst, rows = torch.randn(SIZE, SIZE), torch.empty(SIZE, SIZE), torch.empty(256, SIZE)

    def layer(ops: Any, tensors: dict[str, Any]) -> Any:
        made = ops.Linear(SIZE, SIZE, bias=False)
        made.load_state_dict(dict(tensors), strict=False, assign=True)
        return made

    def whole(forward: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            by_tiles.takes = lambda x: False
            forward()
            by_tiles.takes = takes
        return run

    def with_instructions(forward: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            int8.has_instructions = lambda: True
            forward()
            int8.has_instructions = lambda: False
        return run

    def one(name: str) -> list[Row]:
        word, forward_limit, decode_limit, layout = FORMATS[name]
        kind = codec(word)
        integers, ggml = word == "w8a8_dynamic", word.startswith("ggml_")
        int8.has_instructions = (lambda: False) if integers and not layout else has_instructions
        arms: dict[str, Callable[[], Any]] = {"dense": lambda: torch.nn.functional.linear(x, plain), "copy": lambda: dst.copy_(src)}
        if ggml:
            raw, _ = blocks(torch.randn(SIZE, SIZE) / 50, kind.kind.name)
            tile = Tile(Place(word, SIZE, SIZE), {"codes": torch.from_numpy(raw)})
            arms["gguf-py"] = lambda: gguf.quants.dequantize(raw, Kind[kind.kind.name])
        else:
            tile = usual(word, SIZE, SIZE, groups=1 if integers else SIZE // 32)
        if layout:
            options = {"per_channel": True} if integers else {} if "MX" in layout else {"scale": "recalculate"}
            weight = QuantizedTensor.from_float(torch.randn(SIZE, SIZE) / 50, layout, **options)
            tensors = {**weight.state_dict("weight"), "comfy_quant": marker({"format": kind.word})}
            mine, theirs = layer(ours, tensors), layer(host, tensors)
            tile = kind.of_host(mine.weight, None)
            arms |= {"forward": lambda: mine(x), "stock": lambda: theirs(x), "kitchen": lambda: theirs.weight.dequantize()}
        elif integers:
            arms["forward"] = lambda: kernel("comfy_kitchen").linear(Activation(x), tile, None)
            arms["int_mm"] = with_instructions(arms["forward"])
        else:
            arms["forward"] = lambda: DEQUANTIZE.linear(Activation(x), tile, None)
            arms["whole"] = whole(arms["forward"])

        def decode() -> None:
            for first in range(0, SIZE, 256):
                kind.decode_rows(tile, first, first + 256, rows)

        arms["decode"] = decode
        took = spent(arms, 5)
        return [Row(f"{name}: forward", took["forward"] / took["dense"], forward_limit,
                    {who: took[who] / took["dense"] for who in ("stock", "whole", "int_mm") if who in took}),
                Row(f"{name}: decode", took["decode"] / took["copy"], decode_limit,
                    {who: took[arm] / took["copy"] for arm, who in (("kitchen", "stock"), ("gguf-py", "gguf-py")) if arm in took})]

    def kept(name: str, word: str) -> Row:
        made = ours.Linear(SIZE, SIZE, bias=False)
        made.weight, made.quant_format = parameter(*params_of([usual(word, SIZE, SIZE)], torch.float32, (SIZE, SIZE))), stored.FORMAT
        made.kept = Kept()
        made(x)
        made.kept.decode(made)
        took = spent({"dense": lambda: torch.nn.functional.linear(x, plain), "forward": lambda: made(x)}, 5)
        return Row(f"{name}, kept: forward", took["forward"] / took["dense"], 1.1)

    with torch.inference_mode():
        tile = usual("nvfp4", 4 * SIZE, SIZE)
        DEQUANTIZE.linear(Activation(x[:, :128]), usual("fp8", 64, 128), None)  # what torch's first product takes
        with Peak() as peak:
            made = DEQUANTIZE.linear(Activation(x), tile, None)
        memory = Row(f"memory beside a layer of {4 * SIZE} x {SIZE}", (peak.more - made.nbytes) / 1e6, 16, unit="MB")
        return [row for name in FORMATS for row in one(name)] + [kept(*one) for one in KEPT.items()] + [memory]
