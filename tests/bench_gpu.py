"""Times on a GPU: `python3 dev.py bench-gpu [--tokens N]`. The Linear layers of one FLUX.1 double block, format by format.

Every format runs through the pack's and the host's own operations, as a loaded MODEL does. Weights are random: kernels
do not care. `--cpu` runs the same on the CPU with few tokens, to see that it works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

HIDDEN, RANK = 3072, 32
# the image stream's and the text stream's layers: qkv, proj, mlp.0, mlp.2 as [out, in]
LAYERS = [(3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN)]
TEXT = 512


def marker(format_name: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(b'{"format": "%s"}' % format_name.encode()), dtype=torch.uint8)


def bf16(rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {"x.weight": torch.randn(rows, columns, dtype=torch.bfloat16)}


def fp8(rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {"x.weight": torch.randn(rows, columns).to(torch.float8_e4m3fn), "x.weight_scale": torch.tensor(0.01),
            "x.input_scale": torch.tensor(0.02), "x.comfy_quant": marker("float8_e4m3fn")}


def nvfp4(rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {"x.weight": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8),
            "x.weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
            "x.weight_scale_2": torch.tensor(0.01), "x.input_scale": torch.tensor(0.01),
            "x.comfy_quant": marker("nvfp4")}


def svdq(kind: str) -> Callable[[int, int], dict[str, torch.Tensor]]:
    def tensors(rows: int, columns: int) -> dict[str, torch.Tensor]:
        from quantized_transformers.quant.layouts.join import join
        from quantized_transformers.quant.svdquant.parts import Part, tile_of

        scale = torch.full((columns // 64, rows), 0.01, dtype=torch.bfloat16) if kind == "int4" else \
            torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
        part = Part(kind, torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8), scale,
                    tensor_scale=None if kind == "int4" else torch.tensor(0.01),
                    smooth=torch.ones(columns, dtype=torch.bfloat16),
                    down=torch.randn(columns, RANK, dtype=torch.bfloat16) * 0.01,
                    up=torch.randn(rows, RANK, dtype=torch.bfloat16) * 0.01)
        return {f"x.{leaf}": tensor for leaf, tensor in join([tile_of(part)], ["x"], (rows, columns)).tensors.items()}
    return tensors


@contextmanager
def blocks(make: Callable[[int, int], dict[str, torch.Tensor]], backend: str, device: torch.device,
           layers: list[tuple[int, int]]) -> Iterator[list[torch.nn.Module]]:
    """Both streams' Linear layers on the device."""
    import comfy.model_management
    import comfy.ops

    from quantized_transformers.quant.linear import with_tiles_of
    from quantized_transformers.quant.svdquant.parts import CODEC

    disabled = [] if comfy.model_management.supports_nvfp4_compute(device) else ["nvfp4"]
    disabled += [] if comfy.model_management.supports_fp8_compute(device) else ["float8_e4m3fn"]
    operations = with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.bfloat16, disabled=disabled),
                               dict.fromkeys(CODEC.values(), backend))
    made = []
    for shape in layers * 2:
        module = operations.Linear(shape[1], shape[0], bias=False, device="cpu", dtype=torch.bfloat16)
        missing, unexpected = module.load_state_dict({k.removeprefix("x."): v for k, v in make(*shape).items()},
                                                     strict=False)
        assert not missing and not unexpected
        made.append(module.eval().requires_grad_(False).to(device))
    yield made


def step(modules: list[torch.nn.Module], inputs: list[torch.Tensor], device: torch.device, repeats: int) -> float:
    """Median seconds of one pass through all layers."""
    from time import perf_counter

    times = []
    with torch.inference_mode():
        for i in range(repeats + 3):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = perf_counter()
            for module, x in zip(modules, inputs, strict=True):
                module(x)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 3:
                times.append(perf_counter() - start)
    return median(times)


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py bench-gpu", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="image tokens (4096: 1024 x 1024 pixels)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cpu", action="store_true", help="only see that it runs")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print("there is no CUDA or HIP device here; --cpu only shows that the benchmark runs")
        return 2
    from support.pack import start_comfy
    start_comfy()
    from quantized_transformers import host
    from quantized_transformers.quant.kernels import nunchaku_wheel

    device = torch.device("cpu" if options.cpu else "cuda")
    tokens, layers = (options.tokens, LAYERS) if not options.cpu else (32, [(n // 4, k // 4) for n, k in LAYERS])
    inputs = [torch.randn(count, columns, dtype=torch.bfloat16, device=device)
              for count in (tokens, TEXT if not options.cpu else 8) for _, columns in layers]
    cases: list[tuple[str, Callable, str]] = [("bf16", bf16, "dequantize"), ("fp8", fp8, "dequantize"), ("nvfp4", nvfp4, "dequantize")]
    for kind in ("int4", "nvfp4"):
        cases += [(f"svdq {kind}, {backend}", svdq(kind), backend) for backend in ("comfy_kitchen", "dequantize", "nunchaku")]
    print(f"{host.device_name()}, {tokens} + {TEXT} tokens, Linear layers of one FLUX.1 double block, rank {RANK}")
    print(f"{'format':28} {'ms':>9} {'vs bf16':>8} {'weights MB':>11} {'peak MB':>9}")
    first = 0.0
    for name, make, backend in cases:
        problem = backend == "nunchaku" and (nunchaku_wheel.gate([name.split()[1].strip(",")], host.capability())
                                             or nunchaku_wheel.find().problem)
        if problem:
            print(f"{name:28} skipped: {problem}")
            continue
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        with blocks(make, backend, device, layers) as modules:
            held = (torch.cuda.memory_allocated() if device.type == "cuda" else 0) - before
            seconds = step(modules, inputs, device, options.repeats if not options.cpu else 1)
        peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
        first = first or seconds
        print(f"{name:28} {seconds * 1e3:9.2f} {first / seconds:7.2f}x {held / 1e6:11.0f} {peak / 1e6:9.0f}", flush=True)
        del modules
    return 0


if __name__ == "__main__":
    sys.exit(main())
