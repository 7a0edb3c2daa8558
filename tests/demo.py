"""The main job on tiny models, end to end in the real ComfyUI: `python3 dev.py demo [--out FOLDER] [--keep]`.

Makes a seeded tiny FLUX.1 with diffusers, exports it to FP8 with the real nvidia-modelopt, starts a ComfyUI server with
this pack, queues an API workflow that samples BF16 and FP8 (base deferred, transformer overridden) with one seed, and
writes a side-by-side PNG and a line of figures.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


def say(text: str) -> None:
    print(f"[demo] {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("output/demo"), help="where picture and workflow go")
    parser.add_argument("--keep", action="store_true", help="copy the tiny models to --out too")
    arguments = parser.parse_args()
    started = time.time()
    say("importing torch and diffusers")
    import json
    import shutil

    from PIL import Image
    from safetensors.torch import load_file

    from support import flux
    from support.server import Server, error_of, outputs
    from support.workflow import apply_override, load_base, text_to_image

    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qt-demo-") as temp:
        base = Path(temp) / "models" / "diffusers" / "tiny-flux"
        fp8 = Path(temp) / "models" / "diffusers" / "tiny-flux-modelopt-fp8"
        say("making a tiny FLUX.1 with diffusers (seeded)")
        model = flux.make()
        model.save_pretrained(base / "transformer")
        (base / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
        say("exporting it to FP8 with nvidia-modelopt on the CPU")
        flux.export_fp8(model, fp8)
        say("starting ComfyUI")
        with Server(Path(temp)) as server:
            workflow = {
                "1": load_base("", base_model="tiny-flux"), **text_to_image(["1", 0], "bf16_"),
                "2": load_base("", weights="defer to override", base_model="tiny-flux"),
                "3": apply_override(["2", 0], "", override="tiny-flux-modelopt-fp8"), **text_to_image(["3", 0], "fp8_"),
                "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}},
            }
            (out / "workflow_api.json").write_text(json.dumps(workflow, indent=1), encoding="utf-8")
            say("queueing the workflow: BF16, then FP8, same seed")
            history = server.run(workflow)
            if error_of(history):
                say(f"failed: {error_of(history)}\n{server.text()[-3000:]}")
                return 1
            seconds = load_seconds(server, fp8)
            pictures = {p.name.split("_")[0]: Image.open(p).convert("RGB") for p in outputs(server, history, "images")}
            latents = {p.name.split("_")[0]: load_file(p)["latent_tensor"] for p in outputs(server, history, "latents")}
            print(history["outputs"]["4"]["text"][0])
        left, right = pictures["bf16"], pictures["fp8"]
        side = Image.new("RGB", (left.width + right.width + 8, left.height), "white")
        side.paste(left, (0, 0))
        side.paste(right, (left.width + 8, 0))
        side.save(out / "bf16_fp8.png")
        bytes_of = {name: sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
                    for name, folder in (("bf16", base), ("fp8", fp8))}
        if arguments.keep:
            shutil.copytree(Path(temp) / "models", out / "models", dirs_exist_ok=True)
    difference = flux.rel_l2(latents["fp8"], latents["bf16"])
    say(f"FP8 against BF16, same seed: relative L2 {difference:.4f}, PSNR {psnr(left, right):.1f} dB, on disk "
        f"{bytes_of['fp8'] / 1e6:.2f} MB against {bytes_of['bf16'] / 1e6:.2f} MB, load {seconds * 1e3:.0f} ms")
    say(f"picture: {out / 'bf16_fp8.png'} (BF16 left, FP8 right); {time.time() - started:.0f} s in all")
    # Random weights quantize worse than trained ones; parity.md section 4 has FP8 FLUX.1 at 0.05 a forward.
    if not 0 < difference < 0.25:
        say("the difference is not that of FP8: something is wrong")
        return 1
    return 0


def load_seconds(server: object, folder: Path) -> float:
    """Load time of a folder in a process of its own, as the command line measures it."""
    import json
    import subprocess

    from support.pack import PACK

    done = subprocess.run([sys.executable, str(PACK), "load", str(folder), "--json"], capture_output=True, text=True,
                          check=True)
    return json.loads(done.stdout[done.stdout.index("{"):])["seconds"]


def psnr(left: object, right: object) -> float:
    """Peak signal-to-noise ratio of two RGB pictures, in dB."""
    import numpy

    a, b = (numpy.asarray(image, dtype=numpy.float64) for image in (left, right))
    mse = float(((a - b) ** 2).mean())
    return math.inf if mse == 0 else 10 * math.log10(255 ** 2 / mse)


if __name__ == "__main__":
    sys.exit(main())
