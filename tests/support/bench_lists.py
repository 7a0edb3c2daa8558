"""What the nodes' lists cost where ComfyUI tells a page of its nodes (/object_info), beside its own Load Diffusion Model."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.bench import Row, spent

FILES, FOLDERS, LOADERS = 1000, 50, 6
TITLE = (f"one /object_info with {FILES:,} files in {FOLDERS} folders, over {LOADERS} of ComfyUI's Load Diffusion Model "
         "(it asks an old node's inputs twice, and copies the schema of a newer one piece by piece)")


def cases(folder: Path) -> list[tuple[Path]]:
    for i in range(FILES):
        file = folder / f"folder {i % FOLDERS:02d}" / f"some-model-{i:04d}-fp8.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.touch()
    for path in (*folder.iterdir(), folder):
        os.utime(path, (1e9, 1e9))  # long ago: fresh folders are read again
    return [(folder,)]


def measure(folder: str) -> list[Row]:
    import folder_paths

    from nodes import UNETLoader
    from quantized_transformers import host
    from quantized_transformers.loaders.files import scan
    from quantized_transformers.nodes import node_classes

    known, classes = folder_paths.folder_names_and_paths, node_classes()
    for key in (*host.MODEL_FOLDER_KEYS, "text_encoders"):
        known[key] = ([], set())

    def types() -> list[Any]:
        return [UNETLoader.INPUT_TYPES() for _ in range(2)]

    def forget() -> None:
        scan._walks.clear()
        scan._made.clear()
        folder_paths.filename_list_cache.clear()

    work = {"ours": lambda: [cls.define_schema() for cls in classes],
            "theirs": lambda: [types() for _ in range(LOADERS)],
            "ours, JSON": lambda: json.dumps([cls.GET_NODE_INFO_V1() for cls in classes]),
            "theirs, JSON": lambda: json.dumps([types() for _ in range(LOADERS)])}

    def once(do: Callable[[], Any]) -> Callable[[], Any]:
        def listed() -> None:
            with folder_paths.cache_helper:  # folders are looked at once for each list
                do()
        return listed

    arms = {f"{name}{how}": once(do) for name, do in work.items() for how in (", no files", ", changed", "")}

    def before(name: str) -> None:
        known["diffusion_models"] = ([] if name.endswith("no files") else [folder], {".safetensors"})
        forget()  # ComfyUI's own keeps what is in a folder that it has no more
        if not name.endswith("changed"):
            arms[name]()
        gc.collect()

    took = spent(arms, 15, before)
    return [Row("what the files add to our nodes' code", (took["ours"] - took["ours, no files"]) / took["theirs"], 1.25),
            Row("our nodes' code", took["ours"] / took["theirs"]),
            Row("with what ComfyUI does with it, and JSON", took["ours, JSON"] / took["theirs, JSON"]),
            Row("the same after a change", took["ours, JSON, changed"] / took["theirs, JSON, changed"])]
