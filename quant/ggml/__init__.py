"""ggml's types: how many values a block has and how many bytes it takes (ggml's ggml-common.h, gguf-py's constants)."""

from __future__ import annotations

from typing import NamedTuple


class Type(NamedTuple):
    """A type of ggml's: its number in files, values of a block, bytes of a block."""

    name: str
    number: int
    block: int
    size: int


# Unquantized ones by safetensors' names.
PLAIN = {0: Type("F32", 0, 1, 4), 1: Type("F16", 1, 1, 2), 30: Type("BF16", 30, 1, 2), 28: Type("F64", 28, 1, 8),
         24: Type("I8", 24, 1, 1), 25: Type("I16", 25, 1, 2), 26: Type("I32", 26, 1, 4), 27: Type("I64", 27, 1, 8)}
QUANTIZED = {number: Type(name, number, block, size) for name, number, block, size in (
    ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34),
    ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210), ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98),
    ("IQ1_S", 19, 256, 50), ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82),
    ("IQ4_XS", 23, 256, 136), ("IQ1_M", 29, 256, 56), ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66),
    ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36))}
# Of activations while ggml computes, or of no writer: nothing says in public what weights in them mean.
OTHERS = {9: "Q8_1", 15: "Q8_K", 41: "Q1_0"}
TYPES = {kind.name: kind for kind in (*PLAIN.values(), *QUANTIZED.values())}
