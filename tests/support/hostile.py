"""Checkpoints made to take time, memory or the interpreter's lock from whoever reads them. Each is a file or a folder that
a model folder can hold; large ones are links to one file, under many names."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

CLASS = {"_class_name": "FluxTransformer2DModel", "num_layers": 2, "num_single_layers": 2, "in_channels": 64}
DEEP = b"[" * 100_000 + b"]" * 100_000


def header(path: Path, text: bytes, data: int = 0) -> Path:
    """A safetensors file with this header, and so many bytes of (sparse) data behind it."""
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + data)
    return path


def tensors(names, metadata: dict[str, str] | None = None, shape: str = "[1]") -> tuple[bytes, int]:
    """(header, bytes of data) of BF16 tensors of one value."""
    entries = [f'"{name}":{{"dtype":"BF16","shape":{shape},"data_offsets":[{2 * i},{2 * i + 2}]}}' for i, name in enumerate(names)]
    if metadata:
        entries.insert(0, f'"__metadata__":{json.dumps(metadata)}')
    return b"{" + ",".join(entries).encode() + b"}", 2 * (len(entries) - bool(metadata))


def gguf(path: Path, keys: int, count: int, key: bytes = b"", tail: bytes = b"") -> Path:
    """A GGUF file that says to have so many keys and tensors, with so many copies of a key."""
    text = b"GGUF" + struct.pack("<IQQ", 3, count, keys)
    path.write_bytes(text + key * (keys if key else 0) + tail)
    return path


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _files(folder: Path) -> list[Path]:
    """Single files, one a kind."""
    many = [f"transformer_blocks.{i}.attn.to_{part}.{kind}" for i in range(2250) for part in "qkv"
            for kind in ("weight", "weight_scale", "input_scale")]
    native = [f"double_blocks.{i}.img_attn.qkv.{kind}" for i in range(4_000) for kind in ("weight", "weight_scale", "bias")]
    quantization = {"quantization": json.dumps({"ignore": ["*" * 2000 + "x"] * 500, "x": {"y" * 30: {}}})}
    names = {
        "nested": (DEEP, 0), "objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 0),
        "flat": (b"[" + b"0," * 40_000_000 + b"0]", 0), "lists": (b"[" + b"[]," * 30_000_000 + b"[]]", 0),
        "limit": (b"{" + b'"a":"' + b"x" * 15_000_000 + b'"}', 0), "values": (b"[" + b"0," * 499_000 + b"0]", 0),
        "boxes": (b"[" + b"[]," * 249_000 + b"[]]", 0), "spaces": (b"{" + b" " * 99_000_000 + b"}", 0),
        "digits": (b'{"a":' + b"9" * 3_000_000 + b"}", 0), "escapes": (b'{"a":"' + b"\\u0041" * 2_500_000 + b'"}', 0),
        "twice": (b"{" + b'"a":1,' * 200_000 + b'"a":1}', 0), "keys": (b"{" + b",".join(b'"%d":1' % i for i in range(480_000)) + b"}", 0),
        "million": tensors(f"layer.{i}.weight" for i in range(1_000_000)),
        "blocks": tensors(many), "native": tensors(native),
        "gap": tensors([*many[:2000], "transformer_blocks.1000000000.attn.to_q.weight"]),
        "gap2": tensors(["double_blocks.999999999999.img_attn.qkv.weight", "single_blocks.5.linear1.weight"]),
        "dots": tensors([".".join(["a"] * 200) + f".{i}" for i in range(3000)]),
        "wildcards": tensors(many[:9000], quantization),
        "svdq": tensors([f"transformer_blocks.{i}.{part}.{kind}" for i in range(3000) for part in ("qkv_proj", "out_proj")
                         for kind in ("qweight", "wscales", "proj_down", "smooth")], {"config": DEEP.decode()[:100_000]}),
        "marks": tensors([f"x.{i}.comfy_quant" for i in range(10_000)]),
        "shapes": tensors(many[:9000], shape="[" + "1," * 60 + "1]"),
        "long": tensors("x" * 900 + str(i) for i in range(4000)),
        "random": (os.urandom(1_000_000), 0),
    }
    found = [header(folder / f"{name}.safetensors", text, data) for name, (text, data) in names.items()]
    number = _string(b"general.x") + struct.pack("<II", 4, 7)
    words = _string(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 1_000_000) + _string(b"") * 1_000_000
    found += [gguf(folder / "keys.gguf", 1_000_000, 1, number), gguf(folder / "claims.gguf", 1 << 60, 1 << 60),
              gguf(folder / "words.gguf", 1, 1, words), gguf(folder / "nested.gguf", 1, 1, tail=_string(b"a") + struct.pack("<IIQ", 9, 9, 1 << 40)),
              gguf(folder / "tensors.gguf", 0, 900_000, tail=b"".join(
                  _string(b"blk.%d.w" % i) + struct.pack("<IQIQ", 1, 32, 0, 128 * i) for i in range(300_000)))]
    return found


def _folders(folder: Path) -> list[Path]:
    """Folders, one a kind: of configurations, indexes and pipelines."""
    small, data = tensors(f"transformer_blocks.{i}.attn.to_q.weight" for i in range(4000))
    ignore = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["****************************x" * 20] * 300}
    index = {"weight_map": {f"layer.{i}.weight": f"shard-{i % 5000}.safetensors" for i in range(100_000)}}
    configs: dict[str, dict[str, bytes]] = {
        "deep": {"config.json": DEEP},
        "ignored": {"config.json": json.dumps({**CLASS, "quantization_config": ignore}).encode()},
        "layers": {"config.json": json.dumps({**CLASS, "num_layers": 10**12, "num_single_layers": -(10**30)}).encode()},
        "floats": {"config.json": b'{"_class_name": "FluxTransformer2DModel", "num_layers": 1e400}'},
        "flat": {"config.json": b'{"a": [' + b"0," * 1_900_000 + b"0]}"},
        "expressions": {"config.json": json.dumps({**CLASS, "quantization_config": {
            "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["re:(a+)+$", "re:(.*)*x" * 200],
            "config_groups": {str(i): {"targets": ["re:" + "(a|a)*" * 30], "weights": {"num_bits": 8, "type": "float"}}
                              for i in range(500)}}}).encode()},
        "index": {"diffusion_pytorch_model.safetensors.index.json": json.dumps(index).encode(), "config.json": json.dumps(CLASS).encode()},
        "slim": {"quant_model_description.json": json.dumps({f"blocks.{i}.attn.q.weight": "W8A8_DYNAMIC" for i in range(150_000)}).encode(),
                 "config.json": b'{"_class_name": "WanTransformer3DModel"}'},
        "pipeline": {"model_index.json": b'{"transformer": ' + DEEP[:60_000] + b"}"},
        "parts": {"model_index.json": json.dumps({"_class_name": "FluxPipeline", **{f"part_{i}": ["a", "b"] for i in range(50_000)}}).encode()},
    }
    found = []
    for name, files in configs.items():
        place = folder / name
        place.mkdir(parents=True)
        for file, text in files.items():
            (place / file).write_bytes(text)
        header(place / "model.safetensors", small, data)
        found.append(place)
    return found


def write(files: Path, folders: Path, count: int) -> list[str]:
    """So many references, of every kind about as many: files below `files`, folders below `folders`."""
    for folder in (files, folders):
        folder.mkdir(parents=True)
    made, names = [*_files(files), *_folders(folders)], []
    for number in range(count):
        source = made[number % len(made)]
        copy = source if number < len(made) else source.with_name(f"{number}-{source.name}")
        if copy != source and source.is_dir():
            copy.mkdir()
            for file in source.iterdir():
                os.link(file, copy / file.name)
        elif copy != source:
            os.link(source, copy)
        names.append(f"{copy.parent.name}/{copy.name}")
    return names
