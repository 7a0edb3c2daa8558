"""What a LoRA on one layer of each format costs on a CPU, beside its own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.bench import Row, spent

# format -> (its codec, ComfyUI's layout or tiles one below the other, ComfyUI's word for it)
FORMATS: dict[str, tuple[str, Any, str]] = {
    "FP8": ("fp8", "TensorCoreFP8E4M3Layout", "float8_e4m3fn"), "FP8 shards": ("fp8", 4, ""),
    "NVFP4": ("nvfp4", "TensorCoreNVFP4Layout", "nvfp4"), "MXFP8": ("", "TensorCoreMXFP8Layout", "mxfp8"),
    "INT8": ("", "TensorWiseINT8Layout", "int8_tensorwise"), "INT8 W8A16": ("w8a16", 1, ""),
    "INT8 W8A8": ("w8a8_dynamic", 1, ""), "SVDQ INT4": ("svdq_int4", 1, ""), "GPTQ INT4": ("u4_groups", 1, ""),
    "GGUF Q4_K": ("ggml_q4_k", 1, "")}
SIZE, TOKENS, RANK, COUNT, LAYERS = 3072, 64, 32, 2, 304  # layers: Linears of FLUX.1's blocks
TITLE = (f"a LoRA of rank {RANK} on {COUNT} Linears of {SIZE} x {SIZE}: loading with it over up @ down alone; a forward of {TOKENS} "
         "tokens with it over one without it and the two thin products")


def cases(folder: Path) -> list[tuple[()]]:
    return [()]


def measure() -> list[Row]:
    import comfy.lora
    import comfy.model_patcher
    import comfy.ops
    import torch
    from comfy_kitchen.tensor import QuantizedTensor

    from quantized_transformers.quant.layouts.join import join
    from quantized_transformers.quant.linear import with_tiles_of
    from quantized_transformers.quant.marker import marker
    from quantized_transformers.quant.patches import loading
    from support.tiles import usual

    operations = with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32))

    class Model(torch.nn.Module):
        def __init__(self, layers: list[Any]) -> None:
            super().__init__()
            self.diffusion_model, self.current_patcher = torch.nn.ModuleList(layers), None

    def tensors_of(codec: str, layout: Any, word: str) -> dict[str, Any]:
        if word:
            options = {"per_channel": True} if "INT8" in layout else {} if "MX" in layout else {"scale": "recalculate"}
            weight = QuantizedTensor.from_float(torch.randn(SIZE, SIZE) / 50, layout, **options)
            return {**weight.state_dict("weight"), "comfy_quant": marker({"format": word, "full_precision_matrix_mult": True})}
        rows = SIZE // layout
        tiles = [usual(codec, rows, SIZE, groups=SIZE // 32 if codec in ("w8a16", "u4_groups") else 1, seed=i).at(i * rows)
                 for i in range(layout)]
        if codec.startswith("svdq"):  # as its files are, with a branch of its own
            tiles = [tile.having(down=torch.randn(SIZE, RANK) / 50, up=torch.randn(rows, RANK) / 50) for tile in tiles]
        return join(tiles, ["layer"] * layout, (SIZE, SIZE)).tensors

    def patcher_of(layers: list[dict[str, Any]], size: int) -> Any:
        made = []
        for tensors in layers:
            layer = operations.Linear(size, size, bias=False, device="cpu", dtype=torch.float32)
            layer.load_state_dict(dict(tensors), strict=False, assign=True)
            made.append(layer)
        patcher = comfy.model_patcher.ModelPatcher(Model(made).eval().requires_grad_(False), *[torch.device("cpu")] * 2)
        loading.attach(patcher)
        return patcher

    def pair(size: int) -> tuple[Any, Any]:
        return (torch.randn(size, RANK) / 100).bfloat16(), (torch.randn(RANK, size) / 100).bfloat16()

    def with_lora(patcher: Any, pairs: list[tuple[Any, Any]]) -> Any:
        clone, names = patcher.clone(), {f"l{i}": f"diffusion_model.{i}.weight" for i in range(len(pairs))}
        file = {f"l{i}.{key}.weight": tensor for i, both in enumerate(pairs)
                for key, tensor in zip(("lora_up", "lora_down"), both, strict=True)}
        if len(clone.add_patches(comfy.lora.load_lora(file, names))) != len(pairs):
            raise RuntimeError("not every layer takes the LoRA")
        return clone

    loaded: list[Any] = []

    def load(patcher: Any, low: int = 0) -> None:
        patcher.patch_model(patcher.load_device, lowvram_model_memory=low)
        loaded.append(patcher)

    def off() -> None:
        while loaded:
            patcher = loaded.pop()
            patcher.unpatch_model(patcher.offload_device)

    def one_format(name: str) -> list[Row]:
        bare = patcher_of(COUNT * [tensors_of(*FORMATS[name])], SIZE)
        pairs = [[pair(SIZE) for _ in range(COUNT)] for _ in range(3)]
        one = with_lora(bare, pairs[0])
        three, x = with_lora(with_lora(one, pairs[1]), pairs[2]), torch.randn(TOKENS, SIZE)
        up, down = pairs[0][0]
        wide = up.float(), down.float()

        def forward() -> None:
            with torch.inference_mode():
                for layer in bare.model.diffusion_model:
                    layer(x)

        arms: dict[str, Callable[[], Any]] = {
            "product": lambda: [up.float() @ down.float() for _ in range(COUNT)],
            "thin": lambda: [(x @ wide[1].t()) @ wide[0].t() for _ in range(COUNT)],
            "apply": lambda: load(one), "apply three": lambda: load(three), "take off": off,
            "forward without": forward, "forward": forward, "forward, low VRAM": forward}
        state = {"take off": (one, 0), "forward without": (bare, 0), "forward": (one, 0), "forward, low VRAM": (one, 1)}

        def before(arm: str) -> None:
            off()
            if arm in state:
                load(*state[arm])

        took = spent(arms, 3, before)
        off()
        without = took["forward without"] + took["thin"]
        return [Row(f"{name}: apply", took["apply"] / took["product"], 3),
                Row(f"{name}: apply three", took["apply three"] / took["product"] / 3, 3),
                Row(f"{name}: take off", took["take off"] / took["product"], 3),
                Row(f"{name}: forward", took["forward"] / without, 1.25),
                Row(f"{name}: forward, low VRAM", took["forward, low VRAM"] / without)]

    def many() -> Row:
        """Where there is hardly any arithmetic: what of each layer is not arithmetic."""
        fp8 = {"weight": torch.zeros(64, 64, dtype=torch.float8_e4m3fn), "weight_scale": torch.tensor(0.01),
               "comfy_quant": marker({"format": "float8_e4m3fn"})}
        pairs = [pair(64)] * LAYERS
        models = {"quantized": with_lora(patcher_of([fp8] * LAYERS, 64), pairs),
                  "plain": with_lora(patcher_of([{"weight": torch.zeros(64, 64)}] * LAYERS, 64), pairs)}
        took = spent({name: lambda patched=patched: load(patched) for name, patched in models.items()}, before=lambda name: off())
        return Row(f"{LAYERS} tiny layers: apply, over the same to plain ones", took["quantized"] / took["plain"], 4)

    return [row for name in FORMATS for row in one_format(name)] + [many()]
