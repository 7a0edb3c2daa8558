"""Files in Nunchaku's format that Nunchaku's own team does not write: FLUX.2 [klein], diffusers' nunchaku_lite and
vLLM-Omni's row-major order, each against diffusers' forward on the weights that its numbers stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from quantized_transformers.loaders.report import describe_report
from quantized_transformers.quant.svdquant import row_major
from support import common, flux, flux2, qwen_image, svdquant, z_image
from support import lora as lora_tools
from support import svdquant_models as models
from support.svdquant_case import FORWARD, Case

pytestmark = [pytest.mark.parity, pytest.mark.full]

FLUX_MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")


def tiny_flux() -> Any:
    return flux.make(double=1, single=1)


CASES: dict[str, tuple[Callable[[], models.Made], Any, Any]] = {
    "klein int4": (lambda: models.make_flux2(), flux2, nullcontext),
    "klein int4, the runtime's names": (lambda: models.make_flux2(names=1), flux2, nullcontext),
    "klein nvfp4": (lambda: models.make_flux2("nvfp4", rank=32), flux2, nullcontext),
    # norm_out's halves are exchanged in the host
    "lite flux int4": (lambda: models.make_lite(tiny_flux(), FLUX_MODULATION), flux, nullcontext),
    "lite flux nvfp4": (lambda: models.make_lite(tiny_flux(), FLUX_MODULATION[:3], "nvfp4", split="proj_out"), flux,
                        nullcontext),
    "lite qwen int4": (lambda: models.make_lite(qwen_image.make(layers=2), ("img_mod.1", "txt_mod.1"), rank=48), qwen_image,
                       qwen_image.small_widths),
    "lite z int4": (lambda: models.make_lite(z_image.make()), z_image, z_image.small_widths),
    "lite z nvfp4": (lambda: models.make_lite(z_image.make(), precision="nvfp4"), z_image, z_image.small_widths),
    "lite klein int4": (lambda: models.make_lite(flux2.make(double=1, single=1, guidance=False)), flux2, nullcontext),
    "vllm-omni z, packed vectors": (lambda: models.row_major(models.make_z_image("nvfp4", refiners=True), True), z_image,
                                    z_image.small_widths),
    "vllm-omni z": (lambda: models.row_major(models.make_z_image("nvfp4", refiners=True), False), z_image,
                    z_image.small_widths),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Iterator[Case]:
    make, support, context = CASES[request.param]
    made = make()
    with context():
        path = made.write(tmp_path_factory.mktemp("relative"))
        yield Case(made, path.parent if made.config else path, support)


INT4 = pytest.mark.parametrize("case", [name for name in CASES if "int4" in name], indirect=True)  # the CPU has no NVFP4


def test_dequantized_forward_equals_diffusers(case):
    loaded = case.load(backend="dequantize")
    assert common.rel_l2(case.run(loaded.patcher), case.reference(case.made.dequantized())) < FORWARD


@INT4
def test_int4_forward_is_the_activation_rule(case):
    """Signed activations in every layer, as the writers' runtimes have them."""
    loaded = case.load(backend="comfy_kitchen")
    seen = models.given(loaded.patcher)
    out = case.run(loaded.patcher)
    assert common.rel_l2(out, case.reference(case.made.emulated(seen))) < FORWARD
    assert common.rel_l2(out, case.reference(case.made.dequantized())) > 0.02


def test_the_report_says_which_writer(case, request):
    name = request.node.callspec.params["case"]
    text = describe_report(describe(Checkpoint(locate(str(case.path)))))
    writer = {"klein": "Nunchaku's", "lite": "written for diffusers' nunchaku_lite",
              "vllm-omni": "written by vLLM-Omni's converter"}[name.split()[0]]
    assert writer in text and f"svdquant-{'int4' if 'int4' in name else 'nvfp4'}" in text
    assert "this checkpoint loads" in text and "the tensors are right" not in text, text


def test_both_nodes_take_the_folder(case, tmp_path):
    """A folder reference in the SVDQ loader, in Load Base Model, and in Apply Transformer Override behind its base."""
    from quantized_transformers.nodes.apply_override import QT_ApplyTransformerOverride
    from quantized_transformers.nodes.load_base import QT_LoadBaseModel
    from quantized_transformers.nodes.nunchaku import QT_NunchakuSVDQLoader

    wanted = case.run(case.load(backend="dequantize").patcher)
    ours = QT_NunchakuSVDQLoader.execute(weights="", reference=str(case.path), backend="dequantize").args[0]
    base = QT_LoadBaseModel.execute(base_model="", reference=str(case.path)).args[0]
    case.made.model.save_pretrained(tmp_path)
    plain = QT_LoadBaseModel.execute(base_model="", reference=str(tmp_path)).args[0]
    override = QT_ApplyTransformerOverride.execute(model=plain, override="", reference=str(case.path)).args[0]
    for patcher in (ours, base, override):
        assert torch.equal(case.run(patcher), wanted)


@pytest.fixture(scope="module")
def lite(tmp_path_factory) -> Case:
    made = models.make_lite(tiny_flux(), FLUX_MODULATION)
    return Case(made, made.write(tmp_path_factory.mktemp("lite")).parent, flux)


def folder(case: Case, where: Path, change: Callable[[dict], Any] = lambda tensors: None,
           config: Callable[[dict], Any] = lambda config: None) -> Path:
    """A copy of a case's folder, its tensors and its quantization_config changed in place."""
    tensors, told = dict(case.made.tensors), json.loads(json.dumps(case.made.config))
    change(tensors)
    config(told["quantization_config"])
    common.save(where, tensors, told, case.made.metadata)
    return where


def lora_targets(made: models.Made) -> dict[str, tuple[int, int]]:
    """Every third quantized layer, by diffusers' names."""
    return {name: tuple(made.model.get_submodule(name).weight.shape) for name in list(made.linears)[::3]}


@pytest.mark.parametrize("kind", ["lite", "klein"])
def test_a_lora_and_a_saved_file(kind, lite, tmp_path):
    """By the host's own node and save: beside parts that have a low-rank branch each, and after another load."""
    import comfy.sd

    case = lite
    if kind == "klein":
        made = models.make_flux2()
        case = Case(made, made.write(tmp_path), flux2)
    lora = lora_tools.random_lora(lora_targets(case.made))
    network = case.made.dequantized()
    plain = case.reference(network)
    with torch.no_grad():
        for name in lora_targets(case.made):
            a, b = (lora[f"transformer.{name}.lora_{x}.weight"] for x in "AB")
            network.get_submodule(name).weight.add_(b @ a)
    wanted = case.reference(network)
    patcher = case.load(backend="dequantize").patcher
    assert common.rel_l2(plain, wanted) > 0.1
    assert common.rel_l2(case.run(lora_tools.load_lora(patcher, lora, tmp_path)), wanted) < FORWARD
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), patcher)
    again = model.load(model.Request(str(tmp_path / "saved.safetensors"), compute="dequantize"), quiet=True).patcher
    assert torch.equal(case.run(again), case.run(patcher))
    assert common.rel_l2(case.run(lora_tools.load_lora(again, lora, tmp_path)), wanted) < FORWARD


def test_diffusers_takes_the_config(lite):
    """Its own class checks the compact configuration."""
    import diffusers

    if not hasattr(diffusers, "NunchakuLiteQuantizationConfig"):
        pytest.skip("this diffusers has no nunchaku_lite")
    spec = dict(lite.made.config["quantization_config"])
    assert diffusers.NunchakuLiteQuantizationConfig(**spec).svdq_w4a4["targets"]


FC1 = "transformer_blocks.0.ff.net.0.proj"
LITE_DAMAGED: dict[str, tuple[Callable[[dict], Any], str]] = {
    "no scales": (lambda t: t.pop(f"{FC1}.wscales"), f"missing tensor {FC1}.wscales"),
    "no bias": (lambda t: t.pop(f"{FC1}.bias"), f"missing tensor {FC1}.bias"),
    "a shape": (lambda t: t.update({f"{FC1}.proj_up": t[f"{FC1}.proj_up"][:-16].clone()}), "proj_up is"),
    "a scale that is no number": (lambda t: t.update({f"{FC1}.wscales": t[f"{FC1}.wscales"] * torch.nan}), f"{FC1}.wscales holds NaN"),
    "another tensor": (lambda t: t.update({f"{FC1}.qzeros": torch.zeros(1)}), f"unexpected tensors: {FC1}.qzeros"),
    "FP8 scales": (lambda t: t.update({f"{FC1}.wscales": t[f"{FC1}.wscales"].to(torch.float8_e4m3fn)}), "neither all int4"),
    "NVFP4's scale": (lambda t: t.update({f"{FC1}.wtscale": torch.ones(1)}), f"unexpected tensor {FC1}.wtscale"),
}


@pytest.mark.parametrize("name", LITE_DAMAGED)
def test_damaged_lite_folders_are_refused(name, lite, tmp_path):
    change, message = LITE_DAMAGED[name]
    with pytest.raises(CheckpointError) as caught:
        model.load(model.Request(str(folder(lite, tmp_path, change))), quiet=True)
    assert message in str(caught.value), str(caught.value)


def test_what_a_lite_config_says_otherwise(lite, tmp_path):
    def change(spec: dict) -> None:
        spec["svdq_w4a4"] |= {"precision": "nvfp4", "rank": 128, "targets": spec["svdq_w4a4"]["targets"][1:]}

    text = model.load(model.Request(str(folder(lite, tmp_path, config=change))), quiet=True).report
    for line in ("says nvfp4, but the tensors are int4", "says rank 128, but the tensors have 16",
                 "1 layers are quantized as the config does not say"):
        assert line in text, text


REFUSED: dict[str, tuple[str, Callable[[dict], Any], str]] = {
    "patches": ("nunchaku_lite", lambda config: config["quantization_config"].update(patches=[{"type": "fused_gelu_mlp"}]),
                "changes of the model that this version does not know: fused_gelu_mlp"),
    "another model": ("nunchaku_lite", lambda config: config.update(_class_name="ErnieImageTransformer2DModel"),
                      "ErnieImageTransformer2DModel in the format of diffusers' nunchaku_lite"),
    "nobody says": ("", lambda config: config.pop("quantization_config"), "q, k and v are quantized apart"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_lite_folders_that_are_refused(name, lite, tmp_path):
    _, change, message = REFUSED[name]
    told = json.loads(json.dumps(lite.made.config))
    change(told)
    common.save(tmp_path, lite.made.tensors, told)
    with pytest.raises(CheckpointError) as caught:
        model.load(model.Request(str(tmp_path)), quiet=True)
    assert message in str(caught.value) and "what to do:" in str(caught.value), str(caught.value)


def test_a_lite_file_by_its_manifest(lite, tmp_path):
    """diffuse-compressor's file before it is put into a folder: its header says what config.json would."""
    targets = [{"nunchaku_op": op, "checkpoint_prefix": name, "source_modules": [name]}
               for op in ("svdq_w4a4", "awq_w4a16") for name in lite.made.config["quantization_config"][op]["targets"]]
    manifest = {"schema": "nunchaku_lite.runtime_manifest", "version": 1, "structural_patches": [], "targets": targets}

    def load(manifest: dict) -> Any:
        common.save(tmp_path, lite.made.tensors, None,
                    {"quantization_config": json.dumps({"method": "svdquant", "runtime_manifest": manifest})})
        return model.load(model.Request(str(tmp_path / lite.made.file), backend="dequantize"), quiet=True)

    assert torch.equal(lite.run(load(manifest).patcher), lite.run(lite.load(backend="dequantize").patcher))
    targets[-1]["nunchaku_op"] = "adanorm_awq_w4a16"  # interleaved, as Nunchaku's own
    with pytest.raises(CheckpointError, match="does not read: adanorm_awq_w4a16"):
        load(manifest)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Iterator[Case]:
    made = models.row_major(models.make_z_image("nvfp4", refiners=True), True)
    with z_image.small_widths():
        yield Case(made, made.write(tmp_path_factory.mktemp("rows")), z_image)


def test_the_values_tell_the_order_of_vectors(rows, tmp_path):
    assert "beside the row-major weights are in Nunchaku's order, by their values" in rows.load().report

    def flat(tensors: dict) -> None:  # smooth factors that have nothing to do with the weights
        g = torch.Generator().manual_seed(2)
        for name in [name for name in tensors if name.endswith("smooth_factor")]:
            tensors[name] = torch.rand(len(tensors[name]), generator=g).add(0.5).to(torch.bfloat16)

    with pytest.raises(CheckpointError, match=r"nothing tells whether the vectors .* channel order or still in Nunchaku's"):
        model.load(model.Request(str(folder(rows, tmp_path, flat))), quiet=True)


def test_row_major_files_of_nobody(rows, tmp_path):
    """Their shapes are those of Nunchaku's order, in which they would be noise."""
    bare = dict(rows.made.config)
    del bare["quantization_config"]
    by_others = {"tool": "another.converter", "layout": "column_major"}
    for metadata, message in (({}, "row-major order, as vLLM-Omni's converter writes it, but neither"),
                              ({"conversion": json.dumps(by_others)}, "another.converter has converted this file")):
        common.save(tmp_path, rows.made.tensors, bare, metadata)
        with pytest.raises(CheckpointError, match=message):
            model.load(model.Request(str(tmp_path)), quiet=True)
    common.save(tmp_path, rows.made.tensors, rows.made.config)  # config.json alone says it as well
    assert "vLLM-Omni" in describe_report(describe(Checkpoint(locate(str(tmp_path)))))


def test_row_major_int4_and_other_models_are_refused(rows, tmp_path):
    def int4(tensors: dict) -> None:
        for name in [name for name in tensors if name.endswith("wscales")]:
            tensors[name] = torch.zeros(tensors[name].shape[0] // 4, tensors[name].shape[1], dtype=torch.bfloat16)

    def other(tensors: dict) -> None:
        for name in [name for name in tensors if ".feed_forward.w13." in name]:
            tensors[name.replace(".w13.", ".fc1.")] = tensors.pop(name)

    for change, message in ((int4, "SVDQuant INT4 by vLLM-Omni's converter"), (other, "of another model than Z-Image")):
        with pytest.raises(CheckpointError, match=message):
            model.load(model.Request(str(folder(rows, tmp_path, change))), quiet=True)


def test_evidence_is_for_one_order_only():
    """A smooth factor in its channel's place, and in Nunchaku's order; a score without evidence is a chi-squared."""
    g = torch.Generator().manual_seed(1)
    smooth = (torch.rand(1024, generator=g) + 0.5).to(torch.bfloat16)
    weight = torch.randn(256, 1024, generator=g) * smooth.float()
    blocks = weight.view(256, -1, 16)
    scale = (blocks.abs().amax(-1) / 6).to(torch.float8_e4m3fn)
    codes = torch.bucketize((blocks / scale.float()[..., None]).abs(), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]))
    codes = codes.view(256, 1024).to(torch.uint8)
    stored, scales = codes[:, 0::2] | codes[:, 1::2] << 4, scale.view(torch.uint8).t().contiguous().view(scale.dtype)
    natural = row_major.evidence(stored, scales, smooth)
    packed = row_major.evidence(stored, scales, svdquant.pack_vector(smooth))
    # a quarter of the channels are in the same place in both orders: 1 / 16 of the evidence
    assert natural[0] > 1000 > 16 * natural[1] and packed[1] > 1000 > 16 * packed[0]
    assert row_major.packed_vectors([(stored, scales, smooth)]) is False
    assert row_major.packed_vectors([(stored, scales, svdquant.pack_vector(smooth))]) is True
    assert row_major.packed_vectors([(stored, scales, smooth[torch.randperm(1024, generator=g)])]) is None
