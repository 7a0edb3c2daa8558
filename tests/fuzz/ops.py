"""Changes to a checkpoint's files: plain values, so that one that once went wrong is kept as it was drawn (found.py)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

RAW = "raw "  # before JSON that is written as it is


class Op(NamedTuple):
    """One change. `what` is the kind (see `apply`), `file` the path in the folder, `at` which entry, tensor, key or
    byte, `value` what it becomes."""

    what: str
    file: str
    at: Any = 0
    value: Any = None


# What changes the bytes of tensors, and nothing tells (docs/limits.md, "What no reader can detect").
OF_BYTES = {"swap", "bits", "poison", "put"}
# Leaves whose values nothing is expected of; others are scales, zero points and the like of quantized layers.
PLAIN = {"weight", "bias", "scale", "scale_shift_table", "modulation", "qweight", "lora_down", "lora_up"}


def files_of(folder: Path) -> list[str]:
    """All files, by name."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def header_of(data: bytes) -> tuple[list[tuple[str, Any]], bytes]:
    """(entries of a safetensors header, the bytes behind it)."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + length], object_pairs_hook=lambda pairs: pairs), data[8 + length:]


def entries_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The tensors of a safetensors header."""
    return [(name, dict(pairs)) for name, pairs in header_of(path.read_bytes())[0] if name != "__metadata__"]


def _written(entries: Iterable[tuple[str, Any]], data: bytes) -> bytes:
    parts = []
    for name, value in entries:
        text = value[len(RAW):] if isinstance(value, str) and value.startswith(RAW) else json.dumps(
            dict(value) if isinstance(value, list) else value)
        parts.append(f"{json.dumps(name)}:{text}")
    text = "{" + ",".join(parts) + "}"
    raw = text.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data


def apply(op: Op, folder: Path) -> None:
    """Make one change; one that does not apply, because of another before it, changes nothing."""
    path = folder / op.file
    with suppress(LookupError, ValueError, TypeError, RecursionError, FileNotFoundError, IsADirectoryError, struct.error):
        _DO[op.what](path, op)


def _cut(path: Path, op: Op) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:op.at % (len(data) + 1)])


def _grow(path: Path, op: Op) -> None:
    path.write_bytes(path.read_bytes() + bytes(op.value))


def _put(path: Path, op: Op) -> None:
    data = bytearray(path.read_bytes())
    at = op.at % max(len(data), 1)
    data[at:at + len(op.value)] = op.value
    path.write_bytes(bytes(data))


def _gone(path: Path, op: Op) -> None:
    path.unlink()


def _folder(path: Path, op: Op) -> None:
    path.unlink()
    path.mkdir()


def _whole(path: Path, op: Op) -> None:
    path.write_bytes(op.value if isinstance(op.value, bytes) else op.value.encode("utf-8", "surrogatepass"))


def _entry(path: Path, op: Op, change: Any) -> None:
    entries, data = header_of(path.read_bytes())
    places = [number for number, (name, _) in enumerate(entries) if name != "__metadata__"]
    made = change(entries, places[op.at % len(places)])
    path.write_bytes(_written(made if made is not None else entries, data))


def _rename(path: Path, op: Op) -> None:
    def change(entries: Any, at: int) -> None:
        entries[at] = (op.value, entries[at][1])

    _entry(path, op, change)


def _field(name: str) -> Any:
    def do(path: Path, op: Op) -> None:
        def change(entries: Any, at: int) -> None:
            entries[at] = (entries[at][0], [(key, op.value if key == name else value) for key, value in entries[at][1]])

        _entry(path, op, change)

    return do


def _swap(path: Path, op: Op) -> None:
    """Two tensors of one shape and dtype exchange their bytes: nothing in a file tells that."""
    entries, data = header_of(path.read_bytes())
    tensors = {number: dict(value) for number, (name, value) in enumerate(entries) if name != "__metadata__"}
    first = sorted(tensors)[op.at % len(tensors)]
    same = [number for number in tensors if number != first and all(
        tensors[number][key] == tensors[first][key] for key in ("dtype", "shape"))]
    if not same:
        return
    second = same[op.value % len(same)]
    for number, other in ((first, second), (second, first)):
        entries[number] = (entries[number][0], [(key, tensors[other][key] if key == "data_offsets" else value)
                                                for key, value in entries[number][1]])
    path.write_bytes(_written(entries, data))


def _lost(path: Path, op: Op) -> None:
    def change(entries: Any, at: int) -> None:
        del entries[at]

    _entry(path, op, change)


def _removed(path: Path, op: Op) -> None:
    """A tensor is taken out, with its bytes: the file is whole."""
    entries, data = header_of(path.read_bytes())
    kept = [(name, dict(value)) for name, value in entries if name != "__metadata__"]
    del kept[op.at % len(kept)]
    beside = [(name, value) for name, value in entries if name == "__metadata__"]
    at, parts, made = 0, [], []
    for name, value in kept:
        first, last = value["data_offsets"]
        parts.append(data[first:last])
        made.append((name, [(key, [at, at + last - first] if key == "data_offsets" else one) for key, one in value.items()]))
        at += last - first
    path.write_bytes(_written(beside + made, b"".join(parts)))


def _twice(path: Path, op: Op) -> None:
    def change(entries: Any, at: int) -> None:
        entries.append(entries[at])

    _entry(path, op, change)


def _metadata(path: Path, op: Op) -> None:
    entries, data = header_of(path.read_bytes())
    found = dict(next((value for name, value in entries if name == "__metadata__"), []))
    found[op.at] = op.value
    path.write_bytes(_written([("__metadata__", list(found.items())),
                               *(one for one in entries if one[0] != "__metadata__")], data))


def _bytes(path: Path, op: Op) -> None:
    """Bytes of a tensor, from an element on."""
    raw = path.read_bytes()
    entries, data = header_of(raw)
    tensors = [dict(value) for name, value in entries if name != "__metadata__"]
    first, last = tensors[op.at[0] % len(tensors)]["data_offsets"]
    value = bytes(op.value)
    if last - first < len(value):
        raise ValueError
    count = (last - first) // len(value)
    place = len(raw) - len(data) + first + op.at[1] % count * len(value)
    path.write_bytes(raw[:place] + value + raw[place + len(value):])


def _json(path: Path, op: Op) -> None:
    """A value in a JSON file, by its path (keys, numbers of entries); RAW text is written as it is."""
    value = json.loads(path.read_text(encoding="utf-8"))
    mark = "\0here"
    raw = op.value[len(RAW):] if isinstance(op.value, str) and op.value.startswith(RAW) else None
    put = mark if raw is not None else op.value
    if not op.at:
        value = put
    else:
        inside = value
        for key in op.at[:-1]:
            inside = inside[key]
        inside[op.at[-1]] = put
    text = json.dumps(value)
    path.write_text(text.replace(json.dumps(mark), raw) if raw is not None else text, encoding="utf-8")


def _key(path: Path, op: Op) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    inside = value
    for key in op.at[:-1]:
        inside = inside[key]
    del inside[op.at[-1]]
    path.write_text(json.dumps(value), encoding="utf-8")


_DO = {"cut": _cut, "grow": _grow, "put": _put, "gone": _gone, "folder": _folder, "whole": _whole, "rename": _rename,
       "dtype": _field("dtype"), "shape": _field("shape"), "offsets": _field("data_offsets"), "swap": _swap, "lost": _lost,
       "removed": _removed, "twice": _twice, "metadata": _metadata, "bits": _bytes, "poison": _bytes, "json": _json,
       "key": _key}
