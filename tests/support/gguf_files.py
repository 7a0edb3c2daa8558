"""GGUF files by gguf-py, the format's own package: its writer, its quantizers where it has them, and its dequantization as
what a file means. Types that only ggml's C code quantizes are random blocks with scales of a weight's size."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

Kind = gguf.GGMLQuantizationType
PACKED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS",
          "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4")
# Where a block's F16 scales are (ggml-common.h), of the types that gguf-py does not quantize.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ1_M": (), "NVFP4": ()}


def blocks(weight: torch.Tensor, name: str) -> tuple[np.ndarray, torch.Tensor]:
    """(blocks U8 [rows, bytes of a row], what they mean) for a weight [rows, columns]."""
    kind, values = Kind[name], weight.float().numpy()
    try:
        raw = gguf.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(zlib.crc32(f"{name} {list(weight.shape)}".encode()))
        cut = rng.integers(0, 256, (values.size // block, size), dtype=np.uint8)
        for at in SCALES.get(name, (0,)):
            cut[:, at:at + 2] = (rng.uniform(0.5, 1, (len(cut), 1)) * 2e-4).astype(np.float16).view(np.uint8)
        if name == "IQ1_M":  # an F16 in the highest four bits of four words
            for i, digit in enumerate((0, 0, 0, 1)):
                cut[:, 49 + 2 * i] = cut[:, 49 + 2 * i] & 15 | digit << 4
        if name == "NVFP4":
            cut[:, :4] = rng.integers(1, 24, (len(cut), 4))
        raw = cut.reshape(len(values), -1)
    return raw, torch.from_numpy(gguf.dequantize(raw, kind).reshape(values.shape).copy())


def write(path: Path, tensors: dict[str, Any], arch: str = "flux", **keys: Any) -> Path:
    """A file of tensors: torch's of floats as they are, or (blocks, type). `keys`: method of GGUFWriter -> arguments, or
    "add_string:<key>" -> text."""
    writer = gguf.GGUFWriter(str(path), arch)
    for method, arguments in keys.items():
        call, _, key = method.partition(":")
        getattr(writer, call)(*((key, arguments) if key else arguments))
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=Kind[tensor[1]])
        elif tensor.dtype == torch.bfloat16:
            data = tensor.contiguous().view(torch.uint8).numpy().reshape(*tensor.shape[:-1], -1)
            writer.add_tensor(name, data, raw_dtype=Kind.BF16)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(tensors: dict[str, torch.Tensor], kind: str | tuple[str, ...], keep: Any = lambda name: False
           ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(tensors to write, what they mean in F32): weights of Linear layers in `kind`, or in these in turn, where their rows
    are made of whole blocks; the rest as the usual converter has it, vectors in F32 and what is larger in F16."""
    made, truth, kinds = {}, {}, (kind,) if isinstance(kind, str) else kind
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        wanted = kinds[i % len(kinds)]
        if name.endswith(".weight") and tensor.ndim == 2 and not keep(name) \
                and tensor.shape[1] % gguf.GGML_QUANT_SIZES[Kind[wanted]][0] == 0:
            raw, truth[name] = blocks(tensor, wanted)
            made[name] = raw, wanted
        else:
            made[name] = tensor.float() if tensor.ndim < 2 else tensor.half()
            truth[name] = made[name].float().clone()  # ComfyUI's converter writes into what it is given
    return made, truth
