"""Two MODELs drawing the same: the same noise, conditioning and sampler, compared at every step and at the end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ... import host
from ...host.texts import Text, joined
from ...loaders.errors import CheckpointError
from .metrics import Sums, lpips, psnr, ssim, sums

if TYPE_CHECKING:
    import torch

PLOT_WIDTH = 1100


def compare_models(reference: Any, model: Any, latent: dict[str, Any], *, seed: int, vae: Any = None,
                   **options: Any) -> tuple[str, torch.Tensor]:
    """(report, picture F32 [1, H, W, 3] in 0..1); without matplotlib both say that the curves are left out.

    `options`: positive, negative, steps, cfg, sampler_name, scheduler, denoise, as the host's KSampler takes them. Of
    the reference's run the prediction at every step is kept, on the CPU; of the other run nothing but the numbers.

    Raises CheckpointError for two MODELs of other kinds, a latent in several parts, and a run without any step.
    """
    kinds = [(type(m.model).__name__, type(m.get_model_object("latent_format")).__name__) for m in (reference, model)]
    if kinds[0] != kinds[1]:
        said = [Text("{kind} with {latents} latents", kind=kind, latents=latents) for kind, latents in kinds]
        raise CheckpointError(Text("the reference is {first}, the other MODEL {second}", first=said[0], second=said[1]),
                              "", Text("compare two versions of one model"))
    try:
        start = host.start_of(reference, latent, seed)
    except TypeError as error:
        raise CheckpointError(Text("this is {error}", error=error), "",
                              Text("compare with a latent of pictures or video alone")) from error
    options |= {"seed": seed, "mask": latent.get("noise_mask")}
    kept: list[torch.Tensor] = []
    steps: list[Sums] = []

    def keep(step: int, x0: torch.Tensor) -> None:
        kept.append(x0.detach().float().to("cpu", copy=True))

    def measure(step: int, x0: torch.Tensor) -> None:
        if step < len(kept):
            steps.append(sums(kept[step], x0.detach().float().to("cpu")))

    first = host.sample(reference, start, keep, **options)
    second = host.sample(model, start, measure, **options)
    if not steps:
        raise CheckpointError(Text("nothing was sampled"), "", Text("set steps and denoise above 0"))
    final = sums(first, second)
    lines = [*_head(reference, model, first, options), *_table(steps, final)]
    if len(steps) != len(kept):
        lines.append(Text("note: the sampler took {count} steps with the reference; the first {compared} are "
                          "compared", count=len(kept), compared=len(steps)))
    return _finish(lines, steps, final, first, second, vae)


def _head(reference: Any, model: Any, latents: torch.Tensor, options: dict[str, Any]) -> list[str]:
    keys = ("steps", "cfg", "sampler_name", "scheduler", "denoise", "seed")
    settings = ", ".join(f"{key} {options[key]}" for key in keys)
    return [Text("reference: {name}", name=_name(reference)), Text("model: {name}", name=_name(model)),
            Text("sampled: {settings}, latent {shape}", settings=settings, shape=list(latents.shape)),
            Text("per step: the denoised prediction x0, each model going on from its own latent")]


def _name(model: Any) -> str:
    made_by = model.get_attachment(host.ATTACHMENT)
    name = f"{type(model.model).__name__} {getattr(made_by, 'reference', '')}".rstrip()
    return Text("{name}, {count} patched weights", name=name, count=len(model.patches)) if model.patches else name


def _table(steps: list[Sums], final: Sums) -> list[str]:
    rows = [(f"{i}/{len(steps)}", step) for i, step in enumerate(steps, 1)]
    return [Text("step      cosine    relative L2"),
            *(f"{name:8}  {row.cosine:.6f}  {row.relative:.3e}" for name, row in rows),
            Text("final     {cosine:.6f}  {relative:.3e}", cosine=final.cosine, relative=final.relative)]


def _finish(lines: list[str], steps: list[Sums], final: Sums, first: torch.Tensor, second: torch.Tensor,
            vae: Any) -> tuple[str, torch.Tensor]:
    import numpy
    import torch

    from .plot import beside, missing, trajectory_picture

    if without := missing():
        lines.append(Text("no plot: {why}", why=without))
    if vae is None:
        peak = float(first.float().max() - first.float().min())
        frames = [_frames(latents) for latents in (first, second)]
        lines += [_quality(Text("final latents, whose values span {peak:.3g}", peak=peak), final, first.numel(), peak,
                           *frames),
                  Text("connect a VAE to compare pictures")]
        return joined("\n", lines), torch.from_numpy(trajectory_picture(steps, final, PLOT_WIDTH))[None]
    a, b = (host.decode_latents(vae, latents) for latents in (first, second))
    found = sums(a, b)
    pictures = [side.movedim(-1, 1) for side in (a, b)]
    lines.append(_quality(Text("{count} decoded pictures {width} x {height}, 0..1", count=len(a), width=a.shape[2],
                               height=a.shape[1]), found, a.numel(), 1.0, *pictures))
    value, why = lpips(*pictures)
    lines.append(Text("LPIPS: not measured, {why}", why=why) if value is None else
                 Text("LPIPS (AlexNet) {value:.4f}", value=value))
    worst = int((a - b).square().flatten(1).sum(1).argmax())
    difference = (a[worst] - b[worst]).abs()
    gain = 1 / float(difference.max()) if bool(difference.any()) else 1.0
    number = f" {worst + 1} of {len(a)}" if len(a) > 1 else ""  # drawn, so in English
    shown = [(f"reference{number}", a[worst]), (f"model{number}", b[worst]),
             (f"difference x {gain:.1f}", difference * gain)]
    strip = beside([(title, picture[..., :3].expand(-1, -1, 3).numpy()) for title, picture in shown], PLOT_WIDTH)
    if len(a) > 1 and found.noise:
        lines.append(Text("shown: picture {number}, which differs most", number=worst + 1))
    plot = trajectory_picture(steps, final, strip.shape[1])
    return joined("\n", lines), torch.from_numpy(numpy.concatenate([strip, plot]))[None]


def _frames(latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, H, W] or [B, C, T, H, W] as pictures [B or B * T, C, H, W]."""
    return latents if latents.ndim == 4 else latents.movedim(2, 1).flatten(0, 1)


def _quality(what: str, found: Sums, count: int, peak: float, a: torch.Tensor, b: torch.Tensor) -> str:
    if not found.noise:
        return Text("{what}: identical", what=what)
    similar = ssim(a, b, peak)
    ratio = psnr(found, count, peak)
    return Text("{what}: {psnr}, {ssim}, max error {largest:.4g}", what=what, largest=found.largest,
                psnr=Text("PSNR {ratio:.2f} dB", ratio=ratio) if math.isfinite(ratio) else Text("PSNR cannot be told"),
                ssim=Text("SSIM cannot be told") if similar is None else Text("SSIM {similar:.5f}", similar=similar))
