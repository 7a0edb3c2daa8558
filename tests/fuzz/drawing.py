"""What is drawn: changes that damage, a careless tool, or somebody hostile makes to a checkpoint's files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz.ops import RAW, Op, entries_of, files_of
from hypothesis import strategies as st

DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "I16", "I32", "I64", "U64", "BOOL",
          "F4", "C64", "", "F31", 7, None)
# Elements as they are stored: NaN, infinities, zeros, the largest and negative ones of every scale's type.
POISON = (b"\x7f", b"\xff", b"\x80", b"\x00", b"\xfe", b"\x00\x7c", b"\x00\xfc", b"\x00\x7e", b"\x00\xfe", b"\x80\x7f",
          b"\x80\xff", b"\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xbf",
          b"\x00\x00\x00\x00")
INTEGERS = st.one_of(st.integers(-3, 300), st.sampled_from((
    2 ** 31 - 1, 2 ** 31, 2 ** 32, 2 ** 40, 2 ** 62, 2 ** 63, 2 ** 64, 10 ** 9, 10 ** 18, 10 ** 40, -1, -2 ** 63)))
DEEP = [RAW + "[" * depth + "]" * depth for depth in (60, 70, 900, 100_000)] + [
    RAW + '{"a":' * depth + "1" + "}" * depth for depth in (60, 70, 900, 100_000)]
BROKEN = [RAW + text for text in (
    "NaN", "Infinity", "-Infinity", "1e400", "-1e999", "1" * 5000, "1" * 21, "{\"a\":1,\"a\":2}", "\"\\ud800\"", "tru",
    "", "[1,]", "'a'", "[" + "0," * 600_000 + "0]", "[" + "[]," * 300_000 + "[]]", "{" + ",".join(
        f'"{n:06}":{n}' for n in range(60_000)) + "}")]
TEXTS = st.one_of(st.text(max_size=40), st.sampled_from((
    "", "../../etc/passwd", "/etc/passwd", "C:\\windows", "a" * 300, "x" * 100_000, "*" * 300 + "x", "re:(a+)+$", "re:(.*)*x",
    "re:" + "(" * 300, "re:a{99999999999}", "nvfp4", "FLOAT", "W8A8", "\0", "a\nb", "\ud800", "transformer_blocks.0.attn")))
SCALARS = st.one_of(st.none(), st.booleans(), INTEGERS, st.floats(), TEXTS)
VALUES = st.one_of(
    st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(
        st.text(max_size=10), inner, max_size=4)), max_leaves=6),
    st.sampled_from(DEEP + BROKEN), st.lists(TEXTS, max_size=3), st.sampled_from(([], {}, [[]], [{}], {"a": {}}, [None])))
WHOLE = st.one_of(st.binary(max_size=64), st.sampled_from((
    b"", b"\xef\xbb\xbf{}", "{}".encode("utf-16"), "{}".encode("utf-32"), b"{}", b"[]", b"null", b"1", b"\x00" * 100, b"{\"a\":" * 2000,
    b"[" * 200_000, b"\xff\xfe{", b"{\"a\": \"\xff\"}", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04", b"GGUF",
    b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, b"\x10\x00\x00\x00\x00\x00\x00\x00{\"a\":1          }", b"\xff" * 8, b"\xff" * 7 + b"\x7f")))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a JSON value, its own first; of long objects and lists the first 40."""
    yield at
    if isinstance(value, dict):
        for key in list(value)[:40]:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for number in range(min(len(value), 40)):
            yield from places(value[number], (*at, number))


@st.composite
def names(draw: Any, known: list[str]) -> str:
    """What a tensor may be called instead of what it is called."""
    name = draw(st.sampled_from(known))
    kind = draw(st.integers(0, 7))
    if kind == 0:
        return draw(TEXTS)
    if kind == 1:  # another number
        parts = name.split(".")
        numbers = [at for at, part in enumerate(parts) if part.isdigit()]
        if numbers:
            parts[draw(st.sampled_from(numbers))] = draw(st.sampled_from(
                ("1", "2", "7", "00", "01", "1000000000", "9" * 100, "-1", "٣", "")))
        return ".".join(parts)
    if kind == 2:
        return draw(st.sampled_from(("model.diffusion_model.", "module.", "_orig_mod.", "transformer.", "vae.", "ema.", "."))) + name
    if kind == 3:
        return name + draw(st.sampled_from((".weight", "_scale", ".comfy_quant", ".lora_A.weight", ".scale_weight", ".")))
    if kind == 4:
        return draw(st.sampled_from(known)).rpartition(".")[0] + "." + draw(st.sampled_from(
            ("weight", "bias", "weight_scale", "weight_scale_2", "input_scale", "comfy_quant", "qweight", "qzeros", "scales", "wscales",
             "smooth_factor", "weight_offset", "deq_scale", "absmax", "SCB", "weight_packed", "weight_shape", "g_idx", "svd_up",
             "zero_point", "scale", "k_scale", "weight_scale_inv")))
    if kind == 5:
        return draw(st.sampled_from(("scaled_fp8", "x", "0", "norm_final.weight", "qt.version", "__metadata__", "global_step")))
    return draw(st.sampled_from(known))


@st.composite
def changes(draw: Any, folder: Path) -> tuple[Op, ...]:
    """One change to a folder, or two or three."""
    return tuple(draw(change(folder)) for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))))


@st.composite
def change(draw: Any, folder: Path) -> Op:
    file = draw(st.sampled_from(files_of(folder)))
    if draw(st.integers(0, 9)) == 0:
        what = draw(st.sampled_from(("cut", "grow", "put", "gone", "folder", "whole")))
        at = draw(st.integers(0, (folder / file).stat().st_size))
        return Op(what, file, at, draw(WHOLE) if what == "whole" else draw(st.binary(min_size=1, max_size=16)))
    if file.endswith(".json"):
        return draw(of_json(folder, file))
    if file.endswith(".safetensors"):
        return draw(of_header(folder, file))
    return Op("put", file, draw(st.integers(0, 20_000)), draw(st.one_of(
        st.binary(min_size=1, max_size=16), st.sampled_from((b"\xff" * 8, b"\x00" * 8, b"\xff" * 4, b"\x00" * 4)))))


@st.composite
def of_json(draw: Any, folder: Path, file: str) -> Op:
    value = json.loads((folder / file).read_text(encoding="utf-8"))
    at = draw(st.sampled_from(list(places(value))))
    if at and draw(st.integers(0, 5)) == 0:
        return Op("key", file, at)
    if draw(st.integers(0, 5)) == 0:
        at = (*at, draw(st.sampled_from(("quantization_config", "_class_name", "num_layers", "ignore", "weight_map", "x", "group_size",
                                         "architectures", "patch_size", "in_channels", "guidance_embeds", "text_config", "layers"))))
    return Op("json", file, at, draw(VALUES))


@st.composite
def of_header(draw: Any, folder: Path, file: str) -> Op:
    entries = entries_of(folder / file)
    at = draw(st.integers(0, len(entries) - 1))
    info = entries[at][1]
    what = draw(st.sampled_from(("rename", "rename", "dtype", "dtype", "shape", "shape", "offsets", "swap", "lost", "removed", "removed",
                                 "twice", "metadata", "metadata", "bits", "poison", "poison", "poison")))
    value: Any = None
    if what == "rename":
        value = draw(names([name for name, _ in entries]))
    elif what == "dtype":
        value = draw(st.sampled_from(DTYPES))
    elif what == "shape":
        shape = info["shape"]
        value = draw(st.one_of(st.sampled_from((shape[::-1], [*shape, 1], [1, *shape], shape[1:], [], [0], [0, 2 ** 40], [2 ** 62, 4],
                                                [9] * 1000, RAW + "[" + "9," * 200_000 + "9]")),
                               st.lists(st.one_of(INTEGERS, SCALARS), max_size=4), VALUES))
    elif what == "offsets":
        first, last = info["data_offsets"]
        value = draw(st.one_of(st.sampled_from(([last, first], [first, last + 1], [first + 1, last], [0, 0], [first], [first, last, 0])),
                               st.lists(INTEGERS, min_size=2, max_size=2), VALUES))
    elif what == "swap":
        value = draw(st.integers(0, 50))
    elif what == "metadata":
        return Op(what, file, draw(st.sampled_from(("format", "config", "quantization_config", "_quantization_metadata", "model_class",
                                                    "comfy_config", "x"))),
                  draw(st.one_of(TEXTS, SCALARS, VALUES.map(lambda one: one if isinstance(one, str) and not one.startswith(RAW) else (
                      one[len(RAW):] if isinstance(one, str) else json.dumps(one))))))
    elif what in ("bits", "poison"):
        at = (at, draw(st.integers(0, 10 ** 6)))
        value = draw(st.sampled_from(POISON) if what == "poison" else st.binary(min_size=1, max_size=4))
    return Op(what, file, at, value)
