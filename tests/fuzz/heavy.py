"""Files made to take long: as large, as many and as deep as what is read may be, or more. Each is what has to be refused, or
described, in SECONDS and MEMORY (judge.py)."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Make = Callable[[Path], Path]
FLUX = {"x_embedder.weight": [128, 64], "context_embedder.weight": [128, 64], "proj_out.weight": [64, 128],
        "time_text_embed.timestep_embedder.linear_1.weight": [128, 256], "norm_out.linear.weight": [256, 128],
        "time_text_embed.text_embedder.linear_1.weight": [128, 32], "single_transformer_blocks.0.proj_mlp.weight": [512, 128],
        "transformer_blocks.0.attn.to_q.weight": [128, 128]}


def header(folder: Path, tensors: Mapping[str, list[int]] | Iterable[str], metadata: Mapping[str, str] | None = None,
           dtype: str = "U8") -> Path:
    """A valid file of these tensors, of one byte an element, with holes on the disk for their bytes."""
    shapes = tensors if isinstance(tensors, Mapping) else dict.fromkeys(tensors, [1])
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, shape in shapes.items():
        count = 1
        for side in shape:
            count *= side
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


def _raw(text: bytes) -> Make:
    def make(folder: Path) -> Path:
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        return path

    return make


def _flux(names: Iterable[str], metadata: Mapping[str, str] | None = None) -> Make:
    return lambda folder: header(folder, {**FLUX, **dict.fromkeys(names, [1])}, metadata)


def _folder(config: Any, names: Iterable[str] = ()) -> Make:
    """A FLUX.1 with this config.json, text or a value."""
    def make(folder: Path) -> Path:
        header(folder, {**FLUX, **dict.fromkeys((f"transformer_blocks.0.attn.{name}" for name in names), [1])})
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
        return folder

    return make


def _quantized(**spec: Any) -> dict[str, Any]:
    return {"_class_name": "FluxTransformer2DModel", "quantization_config": spec}


def _gguf(tensors: int, keys: bytes, count: int) -> Make:
    def make(folder: Path) -> Path:
        path = folder / "model.gguf"
        names = b"".join(struct.pack("<Q", 8) + f"{n:08}".encode() + struct.pack("<IQIQ", 1, 0, 0, 0) for n in range(tensors))
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + keys + names + bytes(64))
        return path

    return make


def _key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def _modelslim(entries: Mapping[str, str]) -> Make:
    def make(folder: Path) -> Path:
        header(folder, dict.fromkeys(entries, [1])).rename(folder / "quant_model_weights.safetensors")
        (folder / "quant_model_description.json").write_text(json.dumps(entries), encoding="utf-8")
        return folder

    return make


def _sharded(names: Iterable[str]) -> Make:
    def make(folder: Path) -> Path:
        header(folder, {**FLUX})
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}), encoding="utf-8")
        return folder

    return make


def _crowd(name: str, text: str) -> Make:
    """A file that means many others, in a folder of many others."""
    def make(folder: Path) -> Path:
        for number in range(5000):
            (folder / f"{number}.txt").touch()
        (folder / name).write_text(text, encoding="utf-8")
        return folder if text else folder / name

    return make


_LONG = ".".join("a" * 3 for _ in range(120))
_BLOCK = "attn.to_q.weight"
HEAVY: dict[str, Make] = {
    "70,000 tensors": _flux(f"a.{n}.weight" for n in range(70_000)),
    "24,000 tensors": _flux(f"a.{n}.weight" for n in range(24_000)),
    "24,000 blocks": _flux(f"transformer_blocks.{n}.{_BLOCK}" for n in range(24_000)),
    "250 blocks": _flux(f"transformer_blocks.{n}.{_BLOCK}" for n in range(250)),
    "a billionth block": _flux(("transformer_blocks.0.x", "transformer_blocks.1000000000.x")),
    "a block of 400 digits": _flux((f"transformer_blocks.{'9' * 400}.x",)),
    "long names": _flux(f"{n}.{_LONG}" for n in range(5000)),
    "a name of 10 MB": _flux(("a" * 10_000_000,)),
    "names of numbers": _flux(".".join(str((n * 7 + k) % 10) for k in range(100)) + f".{n}" for n in range(11_000)),
    "names of LoRAs": _flux(f"{n}" + ".lora_A" * 60 for n in range(5500)),
    "markers": _flux(f"double_blocks.0.{n}.comfy_quant" for n in range(24_000)),
    "derived marks": lambda folder: header(folder, {
        **{f"joint_transformer_blocks.{n}.x": [1] for n in range(24_000)}, "pos_embed.proj.weight": [8, 8],
        "transformer_blocks.0.attn.to_q.weight": [8, 8], "time_text_embed.text_embedder.linear_1.weight": [8, 8]}),
    "a class with a table": lambda folder: _with(folder, "SD3Transformer2DModel", (
        f"transformer_blocks.{n // 40}.{n % 40}.attn.to_q.weight" for n in range(24_000))),
    "dimensions": _raw(b'{"a":{"dtype":"U8","shape":[' + b"9," * 400_000 + b'9],"data_offsets":[0,1]}}'),
    "empty objects": _raw(b'{"a":{}' + b',"":{}' * 900_000 + b"}"),
    "empty lists": _raw(b'{"a":[[]' + b",[]" * 900_000 + b"]}"),
    "a deep header": _raw(b'{"a":' * 200_000),
    "a header of 90 MB": lambda folder: _long_header(folder, 90_000_000),
    "metadata of 15 MB": _flux((), {"x": "y" * 15_000_000}),
    "metadata of JSON": _flux((), {"quantization_config": json.dumps({"layers": {f"l{n}": {"format": "x"} for n in range(100_000)}})}),
    "stars": _folder(_quantized(quant_method="modelopt", quant_algo="FP8", ignore=["*" * 300 + "x"]), [f"{n}.weight" for n in range(2000)]),
    "many stars": _folder(_quantized(quant_method="modelopt", quant_algo="FP8", ignore=[f"*{n}*" for n in range(90_000)]),
                          [f"{n}.weight" for n in range(2000)]),
    "many names": _folder(_quantized(quant_method="modelopt", quant_algo="FP8", ignore=[f"a{n}" for n in range(90_000)]),
                          [f"{n}.weight" for n in range(2000)]),
    "expressions": _folder(_quantized(quant_method="compressed-tensors", ignore=["re:(a+)+$", "re:(.*)*x"], config_groups={
        "group_0": {"targets": ["re:(.*)*y"], "weights": {"num_bits": 4}}}), [f"{n}.weight_packed" for n in range(2000)] + ["a.weight_scale"]),
    "config groups": _folder(_quantized(quant_method="compressed-tensors", config_groups={
        f"group_{n}": {"targets": ["re:a.*b"], "weights": {"num_bits": 4}} for n in range(50_000)}),
        [f"{n}.weight_packed" for n in range(1000)]),
    "SDNQ's lists": _folder(_quantized(quant_method="sdnq", weights_dtype="uint4", modules_dtype_dict={
        "int8": [f"*.{n}.*" for n in range(90_000)]}), [f"{n}.{leaf}" for n in range(1000) for leaf in ("weight", "scale")]),
    "layers of a config": _folder({"_class_name": "FluxTransformer2DModel", "num_layers": 10 ** 9}),
    "a deep config": _folder('{"a":' * 100_000 + "1" + "}" * 100_000),
    "a wide config": _folder({f"k{n}": n for n in range(240_000)}),
    "a config of 20 MB": _folder('{"a": "' + "x" * 20_000_000 + '"}'),
    "many shards": _crowd("model.safetensors.index.json", json.dumps({"weight_map": {f"a{n}": f"{n}.safetensors" for n in range(120_000)}})),
    "many parts": _crowd("m-00001-of-99999.safetensors", ""), "many parts of GGUF": _crowd("m-00001-of-99999.gguf", ""),
    "an index": _sharded(f"a{n}" for n in range(240_000)),
    "ModelSlim": _modelslim({f"blocks.{n}.weight": "W8A8" for n in range(24_000)}),
    "GGUF tensors": _gguf(24_000, b"", 0), "GGUF too many tensors": _gguf((1 << 17) + 1, b"", 0),
    "GGUF keys": _gguf(0, b"".join(_key(f"k{n}", 4, bytes(4)) for n in range(1 << 14)), 1 << 14),
    "GGUF too many keys": _gguf(0, b"".join(_key(f"k{n}", 4, bytes(4)) for n in range(200_000)), 200_000),
    "GGUF words": _gguf(0, _key("a", 9, struct.pack("<IQ", 8, 2_000_000) + bytes(16_000_000)), 1),
    "GGUF many words": _gguf(0, _key("a", 9, struct.pack("<IQ", 8, 4_000_000) + bytes(32_000_000)), 1),
    "GGUF text": _gguf(0, _key("a", 8, struct.pack("<Q", 30_000_000) + b"x" * 30_000_000), 1)}


def _with(folder: Path, class_name: str, names: Iterable[str]) -> Path:
    header(folder, {**dict.fromkeys(names, [1])})
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name}), encoding="utf-8")
    return folder


def _long_header(folder: Path, length: int) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":"' + b"x" * (length - 8) + b'"}')
    return path
