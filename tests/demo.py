"""The main job end to end in the real ComfyUI: `python3 dev.py demo [--out FOLDER] [--keep]`.

Quantizes the miniature of tests/data/miniature in every way the pack supports, starts a ComfyUI server with this pack,
draws each prompt with each format from the same noise, and writes one grid: rows are formats, columns prompts, with
PSNR against BF16, bytes of the transformer on disk and seconds of the picture under each. The workflow and the figures
are written beside it. Fails when a format is worse than its bound.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

SEED = 7
# Relative error of a normally distributed weight, RMS: the mantissa's of E4M3; NVFP4 (calculated); a 7th of the
# largest of 64 values as step; a 127th of the largest of a row
ERRORS = {"FP8": 0.026, "NVFP4": 0.095, "MXFP8": 0.026, "SVDQuant int4": 0.10, "INT8": 0.006}
# Mean PSNR against BF16 in dB: that error as a signal-to-noise ratio, and how much of it this model's pictures show
# (measured: 20 to 25 dB better than the weights; 14 asked). Two pictures in 8 bits differ by rounding above 50 dB.
BOUNDS = {name: min(48.0, 14 - 20 * math.log10(error)) for name, error in ERRORS.items()}
COARSE = ("NVFP4", "SVDQuant int4")  # four bits: must be worse than any of the others
CELL, LABEL, LINE = 144, 150, 34  # pixels of the grid


def say(text: str) -> None:
    print(f"[demo] {text}", flush=True)


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def loaders() -> dict[str, dict[str, Any]]:
    """Format → the nodes whose last, "model", is its MODEL. The pack's own loaders, as a user connects them."""
    base = node("QT_LoadBaseModel", base_model="miniature", component="transformer", weights="load")
    deferred = node("QT_LoadBaseModel", base_model="miniature", component="transformer", weights="defer to override")

    from support.miniature_formats import KEEP

    def override(name: str) -> dict[str, Any]:
        return {"base": deferred,
                "model": node("QT_ApplyTransformerOverride", model=["base", 0], override=name, kind="auto")}

    return {
        "BF16": {"model": base},
        "FP8": override("miniature-fp8"),
        "NVFP4": override("miniature-nvfp4"),
        "MXFP8": {"base": base, "model": node("QT_AscendMXFP8Quantize", model=["base", 0],
                                              keep_high_precision="^(" + KEEP + ")")},
        "SVDQuant int4": {"model": node("QT_NunchakuSVDQLoader", weights="svdq-int4_r16-miniature.safetensors",
                                        precision="auto", rank=0)},
        "INT8": override("miniature-int8.safetensors"),
    }


def picture(model: dict[str, Any], prompt: str) -> dict[str, Any]:
    """The workflow of one picture: ComfyUI's own nodes from prompt to file."""
    from support.miniature import SIZE, STEPS

    return {
        **model,
        "clip": node("QT_LoadBaseTextEncoder", base_model="miniature"),
        "vae": node("QT_LoadBaseVAE", base_model="miniature"),
        "prompt": node("CLIPTextEncode", clip=["clip", 0], text=prompt),
        "empty": node("EmptySD3LatentImage", width=SIZE, height=SIZE, batch_size=1),
        "sample": node("KSampler", model=["model", 0], seed=SEED, steps=STEPS, cfg=1.0, sampler_name="euler",
                       scheduler="simple", positive=["prompt", 0], negative=["prompt", 0], latent_image=["empty", 0],
                       denoise=1.0),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="miniature"),
    }


def run(server: Any, workflow: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """(history entry, seconds between start and end as the server tells them). Raises RuntimeError where it failed."""
    from support.server import error_of

    history = server.run(workflow)
    if error_of(history):
        raise RuntimeError(f"{error_of(history)}\n{server.text()[-3000:]}")
    at = {kind: data["timestamp"] for kind, data in history["status"]["messages"]}
    return history, (at["execution_success"] - at["execution_start"]) / 1e3


def quantize(models: Path) -> None:
    """The miniature below ComfyUI's model folders, and the exports that need no ComfyUI."""
    import torch
    from diffusers import FluxPipeline

    from support import miniature, miniature_formats

    base = miniature.complete(models / "diffusers" / "miniature")
    pipeline = FluxPipeline.from_pretrained(base, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    say("exporting it to FP8 and NVFP4 with nvidia-modelopt, calibrated on its prompts")
    for algorithm in ("FP8", "NVFP4"):
        miniature_formats.modelopt(pipeline, models / "diffusers" / f"miniature-{algorithm.lower()}", algorithm)
    say("packing it as Nunchaku does: int4 with low-rank branches")
    miniature_formats.nunchaku(pipeline.transformer, models / "diffusion_models")


def save_native(server: Any, name: str) -> Path:
    """A format's MODEL as one native file."""
    run(server, {**loaders()[name], "save": node("QT_SaveQuantizedModel", model=["model", 0], filename=f"native/{name}",
                                                 format="exact", overwrite=False)})
    return server.base / "output" / "native" / f"{name}.safetensors"


def draw(server: Any, models: Path) -> dict[str, Any]:
    """Format → {"bytes", "report", "pictures": [(image, seconds)] in the order of the prompts}."""
    from PIL import Image
    from safetensors.torch import load_file

    from support import miniature, miniature_formats
    from support.server import outputs

    say("saving it as one native file, and quantizing that to INT8 with comfy-kitchen")
    native = {name.removeprefix("model.diffusion_model."): tensor
              for name, tensor in load_file(save_native(server, "BF16")).items()}
    miniature_formats.int8(native, models / "diffusion_models" / "miniature-int8.safetensors")
    files = {"BF16": models / "diffusers" / "miniature" / "transformer", "FP8": models / "diffusers" / "miniature-fp8",
             "NVFP4": models / "diffusers" / "miniature-nvfp4", "MXFP8": save_native(server, "MXFP8"),
             "SVDQuant int4": models / "diffusion_models" / "svdq-int4_r16-miniature.safetensors",
             "INT8": models / "diffusion_models" / "miniature-int8.safetensors"}
    drawn = {}
    for name, model in loaders().items():
        history, _ = run(server, {**picture(model, "warm up"), "show": node("PreviewAny", source=["model", 1])})
        cells = []
        for prompt in miniature.PROMPTS:
            done, seconds = run(server, picture(model, prompt))
            cells.append((Image.open(outputs(server, done, "images")[0]).convert("RGB"), seconds))
        file = files[name]
        size = sum(f.stat().st_size for f in ([file] if file.is_file() else file.glob("*.safetensors")))
        drawn[name] = {"bytes": size, "report": history["outputs"]["show"]["text"][0], "pictures": cells}
        say(f"{name}: {size / 1e6:.2f} MB, {sum(s for _, s in cells):.1f} s for {len(cells)} pictures")
    return drawn


def grid(drawn: dict[str, Any], quality: dict[str, list[float]]) -> Any:
    """The picture: a row a format, a column a prompt, PSNR, bytes and seconds under each."""
    from PIL import Image, ImageDraw, ImageFont

    from support.miniature import PROMPTS

    small, large = ImageFont.load_default(11), ImageFont.load_default(15)
    step = CELL + 6
    sheet = Image.new("RGB", (LABEL + step * len(PROMPTS), 30 + (CELL + LINE) * len(drawn)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(PROMPTS):
        pen.text((LABEL + step * column + CELL / 2, 15), prompt, "#222222", large, anchor="mm")
    for row, (name, result) in enumerate(drawn.items()):
        top, size = 30 + (CELL + LINE) * row, f"{result['bytes'] / 1e6:.2f} MB"
        mean = sum(quality[name]) / len(PROMPTS)
        second = "reference" if name == "BF16" else f"mean {mean:.1f} dB"
        pen.text((10, top + CELL / 2 - 22), name, "#222222", large, anchor="lm")
        pen.multiline_text((10, top + CELL / 2), f"{size}\n{second}", "#555555", small, anchor="lm", spacing=4)
        for column, (image, seconds) in enumerate(result["pictures"]):
            left = LABEL + step * column
            sheet.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
            decibel = "" if name == "BF16" else f"{quality[name][column]:.1f} dB · "
            pen.text((left + CELL / 2, top + CELL + 10), f"{decibel}{size} · {seconds:.2f} s", "#555555", small,
                     anchor="mm")
    return sheet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/demo"), help="where picture, figures and workflow go")
    parser.add_argument("--keep", action="store_true", help="copy the models to --out too")
    arguments = parser.parse_args()
    started = time.time()
    say("importing torch and diffusers")
    import json
    import shutil

    from support.miniature import PROMPTS, STEPS, psnr
    from support.server import Server

    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qt-demo-") as temp:
        models = Path(temp) / "models"
        (models / "diffusion_models").mkdir(parents=True)
        quantize(models)
        say("starting ComfyUI")
        with Server(Path(temp)) as server:
            try:
                drawn = draw(server, models)
            except RuntimeError as error:
                say(f"failed: {error}")
                return 1
        if arguments.keep:
            shutil.copytree(models, out / "models", dirs_exist_ok=True)
    reference = [image for image, _ in drawn["BF16"]["pictures"]]
    quality = {name: [psnr(image, right, 255) for (image, _), right in zip(result["pictures"], reference, strict=True)]
               for name, result in drawn.items()}
    sheet = grid(drawn, quality)
    sheet.save(out / "grid.png", optimize=True)
    sheet.save(out / "grid.jpg", quality=92)  # docs/grid.jpg: a quarter of the bytes
    (out / "workflow_api.json").write_text(json.dumps(picture(loaders()["FP8"], PROMPTS[0]), indent=1), encoding="utf-8")
    figures = {name: {"bytes": result["bytes"], "report": result["report"], "pictures": [
        {"prompt": prompt, "psnr_db": None if name == "BF16" else round(decibel, 2), "seconds": seconds}
        for prompt, decibel, (_, seconds) in zip(PROMPTS, quality[name], result["pictures"], strict=True)]}
        for name, result in drawn.items()}
    (out / "figures.json").write_text(json.dumps({"seed": SEED, "steps": STEPS, "formats": figures}, indent=1) + "\n",
                                      encoding="utf-8")
    mean = {name: sum(values) / len(PROMPTS) for name, values in quality.items()}
    for name, bound in BOUNDS.items():
        say(f"{name}: mean PSNR {mean[name]:.1f} dB (at least {bound:.1f}), "
            f"{drawn[name]['bytes'] / drawn['BF16']['bytes']:.0%} of the bytes")
    say(f"picture: {out / 'grid.png'}; {time.time() - started:.0f} s in all")
    failed = [name for name, bound in BOUNDS.items() if not bound <= mean[name] < math.inf]
    if failed:
        say(f"worse than their bounds, or not quantized at all: {', '.join(failed)}")
    if max(mean[name] for name in COARSE) >= min(mean[name] for name in BOUNDS if name not in COARSE):
        failed.append("order")
        say("four bits are as good as eight: something is not what it is called")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
