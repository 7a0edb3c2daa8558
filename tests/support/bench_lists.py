"""What the nodes' lists cost where ComfyUI tells a page of its nodes (/object_info), beside its own Load Diffusion Model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from support.pack import PACK

FILES, FOLDERS, LOADERS = 1000, 50, 6
# Processor time, all in turns, of which the best counts (others on the machine can only make it worse): `own` is the code of
# the nodes themselves (ComfyUI asks an old node's inputs twice), `all` what ComfyUI does with it as well, JSON included;
# `first` is after a change, with nothing kept.
SCRIPT = r"""
import gc, json, os, sys, time
sys.path.insert(0, os.path.join(os.environ["PACK"], "tests"))
from support.pack import start_comfy
start_comfy()
import folder_paths
from nodes import UNETLoader
from quantized_transformers import host
from quantized_transformers.loaders.files import scan
from quantized_transformers.nodes import node_classes
folder, loaders, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
known, classes = folder_paths.folder_names_and_paths, node_classes()
for key in (*host.MODEL_FOLDER_KEYS, "text_encoders"):
    known[key] = ([], set())

def types():
    return [UNETLoader.INPUT_TYPES() for _ in range(2)]
def forget():
    scan._walks.clear(), scan._made.clear(), folder_paths.filename_list_cache.clear()
work = {
    ("ours", "own"): lambda: [cls.define_schema() for cls in classes],
    ("ours", "all"): lambda: json.dumps([cls.GET_NODE_INFO_V1() for cls in classes]),
    ("theirs", "own"): lambda: [types() for _ in range(loaders)],
    ("theirs", "all"): lambda: json.dumps([types() for _ in range(loaders)]),
}
spent = {}
def timed(name, do):
    with folder_paths.cache_helper:
        start = time.process_time()
        do()
        spent.setdefault(name, []).append((time.process_time() - start) * 1e3)
for _ in range(rounds):
    for there in ([folder], []):
        known["diffusion_models"] = (there, {".safetensors"})
        for (who, what), do in work.items():
            gc.collect()
            gc.disable()  # whoever happens to fill its first generation
            forget()  # ComfyUI's own keeps what is in a folder that it has no more
            timed(f"{who} {what} first {len(there)}", do)
            timed(f"{who} {what} {len(there)}", do)
            gc.enable()
print(json.dumps(spent))
"""


def listing(folder: Path, budget: Callable[[str, float, float, str], None], rounds: int = 31) -> None:
    """The lists of all nodes with many files, warm, against six of ComfyUI's loaders."""
    models = folder / "lists"
    for i in range(FILES):
        file = models / f"folder {i % FOLDERS:02d}" / f"some-model-{i:04d}-fp8.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for path in (*models.iterdir(), models):
        os.utime(path, (1e9, 1e9))  # long ago: fresh folders are read again
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(models), str(LOADERS), str(rounds)], capture_output=True, text=True,
                          env={**os.environ, "PACK": str(PACK)}, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    ms = {key: min(values) for key, values in json.loads(done.stdout.splitlines()[-1]).items()}
    print(f"lists of {FILES:,} files in {FOLDERS} folders, processor time of one /object_info, best of {rounds}, beside "
          f"{LOADERS} of ComfyUI's Load Diffusion Model\n"
          f"  code of the nodes: ours {ms['ours own 1']:.2f} ms (without files {ms['ours own 0']:.2f}), theirs {ms['theirs own 1']:.2f}\n"
          f"  with what ComfyUI does, and JSON: ours {ms['ours all 1']:.1f} ms (without files {ms['ours all 0']:.1f}: ComfyUI copies the "
          f"schema of a node of its newer kind piece by piece), theirs {ms['theirs all 1']:.1f}\n"
          f"  the same after a change: ours {ms['ours all first 1']:.1f} ms, theirs {ms['theirs all first 1']:.1f}")
    budget("what the files add to our nodes' code, beside what they cost theirs", (ms["ours own 1"] - ms["ours own 0"]) / ms["theirs own 1"],
           1, "x")
