"""Comparing checkpoints and MODELs: weights by decoders and formulas of the tests, trajectories by the host's sampler."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from quantized_transformers.commands import compare as command
from quantized_transformers.loaders import model
from quantized_transformers.loaders.components import vae
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from quantized_transformers.makers.compare.models import compare_models
from quantized_transformers.makers.compare.plot import weights_figure
from quantized_transformers.makers.compare.weights import compare_weights
from quantized_transformers.makers.save import save
from support import common, flux, svdquant_models, vaes, wan
from support import modelslim as ms

pytestmark = pytest.mark.parity

STEPS = 3


def compared(reference: Path, candidate: Path) -> Any:
    return compare_weights(locate(str(reference)), locate(str(candidate)))


def decibels(reference: torch.Tensor, other: torch.Tensor) -> float:
    """10 log10 of the powers' ratio, in F64."""
    a, b = reference.double(), other.double()
    return 10 * math.log10(float(a.pow(2).mean() / (a - b).pow(2).mean()))


def holds(found: Any, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Every layer's figure is that of the two sets of dequantized weights, under diffusers' names; so is the total."""
    signal = noise = 0.0
    for layer in found.layers:
        a, b = before[f"{layer.name}.weight"].double(), after[f"{layer.name}.weight"].double()
        assert layer.shape == tuple(a.shape)
        signal, noise = signal + float(a.pow(2).sum()), noise + float((a - b).pow(2).sum())
        if torch.equal(a, b):
            assert layer.sums.noise == 0 and layer.to_json()["identical"]
        else:  # F32 arithmetic on both sides: 1e-6 of a weight whose error is 1e-3 of it or more
            assert layer.sums.snr == pytest.approx(decibels(a, b), abs=0.01), layer.name
    assert found.total.snr == pytest.approx(10 * math.log10(signal / noise), abs=0.01)


@pytest.mark.parametrize("export,worst,total", [("fp8", 31, 31.5), ("nvfp4", 20, 20.4), ("mixed", 31, None)])
def test_modelopt_exports(export, worst, total, tiny):
    """Against nvidia-modelopt's bytes decoded by the tests. FP8 loses 2.7 % and NVFP4 10 % at most, as the formats do."""
    found = compared(tiny.bf16, getattr(tiny, export))
    before = {name: t.float() for name, t in common.stored(tiny.bf16).items()}
    holds(found, before, common.dequantize(common.stored(getattr(tiny, export))))
    assert len(found.layers) == 50 and found.total.relative < (0.1 if export == "nvfp4" else 0.027)
    snrs = [layer.sums.snr for layer in found.worst_first]
    assert snrs == sorted(snrs) and snrs[0] > worst and (total is None or abs(found.total.snr - total) < 0.5)
    kinds = {layer.after for layer in found.layers}
    assert kinds == {"BF16", {"nvfp4": "NVFP4"}.get(export, "FP8")}
    report = found.report().splitlines()
    assert found.worst_first[0].name in report[5] and "all Linear weights" in report[-2]
    assert ("identical" in found.report()) and report[-1].startswith("other tensors") and " 0 differ" in report[-1]
    json.dumps(found.to_json(), allow_nan=False)


def test_a_saved_file_against_its_export(tiny, tmp_path):
    """Native names with fused layers against diffusers' names: the same weights, so nothing but "identical"."""
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    try:
        path, _ = save(model.load(model.Request(str(tiny.fp8)), quiet=True).patcher, "native", step=lambda n: None)
    finally:
        folder_paths.set_output_directory(before)
    for first, second in ((tiny.fp8, path), (path, tiny.fp8)):
        found = compared(first, second)
        assert all(layer.to_json()["identical"] for layer in found.layers) and not any(o.sums.noise for o in found.others)
        assert found.total.snr == math.inf and found.to_json()["total"]["identical"]
        assert "all Linear weights" in found.report() and found.report().count("identical") >= len(found.layers) + 1
        json.dumps(found.to_json(), allow_nan=False)
        weights_figure(found).savefig(tmp_path / "identical.png")
    names = [layer.name for layer in found.layers]
    assert "transformer_blocks.0.attn.to_k" in names and "single_transformer_blocks.0.proj_mlp" in names


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_svdquant_with_its_low_rank_branch(precision, tmp_path):
    made = svdquant_models.make_flux(precision)
    network, source = made.dequantized(), svdquant_models.make_flux(precision).model
    source.save_pretrained(tmp_path / "bf16")
    found = compared(tmp_path / "bf16", made.write(tmp_path / "svdq"))
    before = {name: t.float() for name, t in common.stored(tmp_path / "bf16").items()}
    holds(found, before, {name: t.float() for name, t in network.state_dict().items()})
    assert {layer.after for layer in found.layers} >= {f"SVDQ {precision.upper()}", "AWQ INT4"}
    for other in found.others:  # unsigned layers store another bias; compared is the one beside the effective weight
        if other.name.endswith(".bias"):
            expected = common.rel_l2(network.state_dict()[other.name], before[other.name])
            assert other.sums.relative == pytest.approx(expected, abs=1e-6), other.name


@pytest.mark.parametrize("name", ["w8a8", "mxfp4_smooth", "dual", "mixed"])
def test_modelslim(name, tmp_path):
    """Every scheme of msmodelslim, smoothing included, against the tests' decoding and the float source."""
    folder = ms.folder(name, tmp_path / name)
    reference = {n: t for n, t in ms.source(ms.EXPORTS[name]).state_dict().items()}
    key = "text_embedding.0.weight"
    reference[key] = torch.nn.functional.pad(reference[key], (0, ms.HOST_TEXT - ms.TEXT))
    common.save(tmp_path / "source", reference, None)
    decoded = ms.decode(ms.stored(folder), ms.described(folder))
    found = compared(tmp_path / "source" / "diffusion_pytorch_model.safetensors", folder)
    layers = {layer.name: layer for layer in found.layers}
    theirs = {"self_attn": "attn1", "cross_attn": "attn2", "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    quantized = 0
    for layer, weight in decoded.items():
        if not layer.startswith("blocks."):
            continue
        number, kind, part = layer.split(".")[1:]
        mine = layers[f"blocks.{number}.{theirs[kind]}.{theirs[part]}" if kind != "ffn" else
                      f"blocks.{number}.ffn.net.{'0.proj' if part == '0' else part}"]
        quantized += mine.after in ms.COUNTS[name]
        assert mine.sums.snr == pytest.approx(decibels(reference[f"{layer}.weight"], weight), abs=0.01), layer
    assert quantized == sum(count for kind, count in ms.COUNTS[name].items() if kind != "BF16")


def test_what_cannot_be_compared(tiny, tmp_path):
    wan.make().save_pretrained(tmp_path / "wan")
    with pytest.raises(CheckpointError, match="the reference is FLUX.1, the candidate is Wan"):
        compared(tiny.bf16, tmp_path / "wan")
    flux.make(double=1).save_pretrained(tmp_path / "short")
    with pytest.raises(CheckpointError, match="FLUX.1 of other sizes: .*2 and 1"):
        compared(tiny.bf16, tmp_path / "short")
    tensors = common.stored(tiny.fp8)
    del tensors["proj_out.bias"]
    with pytest.raises(CheckpointError, match="missing tensor proj_out.bias"):
        compared(tiny.bf16, common.save(tmp_path / "broken", tensors, common.config_of(tiny.fp8)))


def test_what_the_command_prints(tiny, tmp_path, capsys):
    def run(*arguments: object) -> int:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return command.run(parser.parse_args(list(map(str, arguments))))

    assert run(tiny.bf16, tiny.mixed) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("FLUX.1, 50 Linear layers") and "all Linear weights" in printed
    for plot, message in ((tmp_path / "nowhere" / "p.png", "the folder for the plot does not exist"),
                          (tmp_path / "p.mystery", "the plot cannot be written")):
        with pytest.raises(CheckpointError, match=message):
            run(tiny.bf16, tiny.mixed, "--plot", plot)


def conditioning(support: Any) -> list:
    g = torch.Generator().manual_seed(5)
    more = {"pooled_output": torch.randn(1, 32, generator=g), "guidance": 4.0} if support is flux else {}
    return [[torch.randn(1, 7, support.TEXT, generator=g), more]]


def options(support: Any, **changes: Any) -> dict[str, Any]:
    given = conditioning(support)
    return {"positive": given, "negative": given, "steps": STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
            "denoise": 1.0, "seed": 7, **changes}


def load(folder: Path) -> Any:
    return model.load(model.Request(str(folder)), quiet=True).patcher


def trajectory(patcher: Any, latent: torch.Tensor, given: dict[str, Any]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x0 at every step and the result, by the host's own KSampler path."""
    import comfy.sample

    seen: list[torch.Tensor] = []
    rest = {key: value for key, value in given.items() if key != "seed"}
    out = comfy.sample.sample(patcher, comfy.sample.prepare_noise(latent, given["seed"]), latent_image=latent,
                              callback=lambda step, x0, x, total: seen.append(x0.clone()), disable_pbar=True,
                              seed=given["seed"], **rest)
    return seen, out


def numbers(report: str) -> list[tuple[float, float]]:
    lines = report.splitlines()
    first = lines.index("step      cosine    relative L2") + 1
    return [tuple(map(float, line.split()[1:])) for line in lines[first:first + STEPS + 1]]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan")
    made = wan.make()
    made.save_pretrained(root / "bf16")
    return load(root / "bf16"), load(wan.export(made, root / "nvfp4", "NVFP4"))


@pytest.mark.parametrize("kind", ["picture", "video"])
def test_trajectories_are_the_samplers(kind, tiny, video):
    support, first, second, shape = (flux, load(tiny.bf16), load(tiny.fp8), (2, 16, 8, 10)) if kind == "picture" else \
        (wan, *video, (1, 16, 3, 6, 10))
    given = options(support)
    report, picture = compare_models(first, second, {"samples": torch.zeros(shape)}, **given)
    (a, end_a), (b, end_b) = (trajectory(p, torch.zeros(shape), given) for p in (first, second))
    expected = [(float(torch.nn.functional.cosine_similarity(x.double().flatten(), y.double().flatten(), 0)),
                 common.rel_l2(y, x)) for x, y in zip([*a, end_a], [*b, end_b], strict=True)]
    for (cosine, relative), (wanted, norm) in zip(numbers(report), expected, strict=True):
        assert cosine == pytest.approx(wanted, abs=1e-6) and relative == pytest.approx(norm, rel=1e-3)
    assert expected[-1][1] > 1e-3 and "final latents" in report and "PSNR" in report and "SSIM" in report
    assert picture.ndim == 4 and picture.shape[-1] == 3 and picture.dtype == torch.float32


def test_the_same_model_is_identical(tiny):
    patcher = load(tiny.fp8)
    report, _ = compare_models(patcher, patcher, {"samples": torch.zeros(1, 16, 8, 8)}, **options(flux))
    assert numbers(report) == [(1.0, 0.0)] * (STEPS + 1) and ": identical" in report and "inf" not in report


def test_with_a_vae(tiny, video, tmp_path):
    """Decoded as diffusers decodes; the pair stands above the curves, pixel for pixel."""
    from skimage.metrics import peak_signal_noise_ratio

    made = vaes.make("flux1")
    decoder = vae.load(vae.Request(str(vaes.save_base("flux1", tmp_path / "vae", made)), dtype="fp32")).vae
    given, shape = options(flux), (2, 16, 8, 10)
    first, second = load(tiny.bf16), load(tiny.fp8)
    report, picture = compare_models(first, second, {"samples": torch.zeros(shape)}, vae=decoder, **given)
    a, b = (vaes.diffusers_decode(made, (trajectory(p, torch.zeros(shape), given)[1] - made.config.shift_factor)
                                  * made.config.scaling_factor) for p in (first, second))
    wanted = peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1.0)
    assert abs(float(report.partition("PSNR ")[2].split()[0]) - wanted) < 0.05  # pixels of two decoders agree to 1e-5
    assert "2 decoded pictures 80 x 64" in report and "LPIPS: not measured" in report
    worst = int((a - b).square().flatten(1).sum(1).argmax())
    assert f"shown: picture {worst + 1}, which differs most" in report
    shown = picture[0, 24:24 + 64, :80]
    assert float((shown - a[worst]).abs().max()) < 1 / 255 and picture.shape[1] > 500
    wan_vae = vae.load(vae.Request(str(vaes.save_base("wan", tmp_path / "wan_vae")))).vae
    report, picture = compare_models(*video, {"samples": torch.zeros(1, 16, 2, 4, 6)}, vae=wan_vae, **options(wan, steps=1))
    assert "5 decoded pictures 48 x 32" in report and "of 5" not in report and "shown: picture" in report


def test_pairs_that_are_refused(tiny, video):
    import comfy.nested_tensor

    first = load(tiny.bf16)
    with pytest.raises(CheckpointError, match="the reference is Flux with Flux latents, the other MODEL WAN21"):
        compare_models(first, video[0], {"samples": torch.zeros(1, 16, 8, 8)}, **options(flux))
    nested = comfy.nested_tensor.NestedTensor([torch.zeros(1, 16, 8, 8), torch.zeros(1, 8, 4)])
    with pytest.raises(CheckpointError, match="a latent in several parts"):
        compare_models(first, first, {"samples": nested}, **options(flux))
    with pytest.raises(CheckpointError, match="nothing was sampled"):
        compare_models(first, first, {"samples": torch.zeros(1, 16, 8, 8)}, **options(flux, denoise=0.0))
    deferred = model.defer(model.Request(str(tiny.bf16))).patcher
    with pytest.raises(CheckpointError, match="has no weights yet"):
        compare_models(first, deferred, {"samples": torch.zeros(1, 16, 8, 8)}, **options(flux))
