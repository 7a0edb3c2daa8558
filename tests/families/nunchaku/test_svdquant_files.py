"""Other forms of Nunchaku's files, damaged ones, and what the nodes and the host do with the MODEL."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.families.nunchaku.files import Choice
from quantized_transformers.makers.save import save
from support import common, flux, qwen_image, z_image
from support import lora as lora_tools
from support import svdquant_models as models
from support import svdquant_tables as tables
from support.svdquant_case import FORWARD, Case

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory) -> Case:
    made = models.make_flux()
    return Case(made, made.write(tmp_path_factory.mktemp("flux")), flux)


def write(case: Case, folder: Path, change: Callable[[dict], Any] = lambda tensors: None, **kwargs: Any) -> Path:
    """A changed copy of the file; `change` edits the dict of its tensors, or returns another."""
    tensors = dict(case.made.tensors)
    return case.made.write(folder, change(tensors) or tensors, **kwargs)


def same_output(case: Case, path: Path, **request: Any) -> str:
    """Load another form of the file: it must run as the file itself does. Returns the report."""
    loaded = model.load(model.Request(str(path), **request), quiet=True)
    assert torch.equal(case.run(loaded.patcher), case.run(case.load().patcher))
    return loaded.report


def test_no_metadata(tiny_flux, tmp_path):
    assert "note: no metadata in the file" in same_output(tiny_flux, write(tiny_flux, tmp_path, metadata={}))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefixes(prefix, tiny_flux, tmp_path):
    same_output(tiny_flux, write(tiny_flux, tmp_path, lambda t: {prefix + k: v for k, v in t.items()}))


def test_todays_suffixes(tiny_flux, tmp_path):
    new = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth_orig": "smooth_factor_orig", "smooth": "smooth_factor"}

    def rename(tensors: dict) -> dict:
        split = [(*name.rpartition("."), tensor) for name, tensor in tensors.items()]
        return {f"{head}{dot}{new.get(leaf, leaf)}": tensor for head, dot, leaf, tensor in split}

    assert "Nunchaku's v2 names" in same_output(tiny_flux, write(tiny_flux, tmp_path, rename))


def test_legacy_folder(tiny_flux, tmp_path):
    folder = tmp_path / "svdq-fp4-flux.1-dev"  # and its name is wrong
    quantized = {k: v for k, v in tiny_flux.made.tensors.items() if "transformer_blocks." in k}
    rest = {k: v for k, v in tiny_flux.made.tensors.items() if k not in quantized}
    tiny_flux.made.write(folder, quantized, {}, "transformer_blocks.safetensors")
    tiny_flux.made.write(folder, rest, {}, "unquantized_layers.safetensors")
    (folder / "config.json").write_text(tiny_flux.made.metadata["config"], encoding="utf-8")
    report = same_output(tiny_flux, folder)
    assert "holds INT4 weights (wscales are bfloat16 or float16) but its name says fp4. Loading as INT4." in report
    with pytest.raises(CheckpointError, match="unquantized_layers"):
        model.load(model.Request(str(folder / "transformer_blocks.safetensors")), quiet=True)


def test_names_and_metadata_that_contradict_are_notes(tiny_flux, tmp_path):
    metadata = {"model_class": "NunchakuQwenImageTransformer2DModel", "config": "{",
                "quantization_config": json.dumps({"weight": {"dtype": "fp4_e2m1_all"}, "rank": 128})}
    path = write(tiny_flux, tmp_path, metadata=metadata, name="svdq-fp4_r64-flux.1-dev-lightning-4steps.safetensors")
    report = same_output(tiny_flux, path)
    for line in (f'"{path.name}" holds INT4 weights', "but its name says fp4. Loading as INT4.",
                 "of rank 16 but its name says r64. Loading with rank 16.", "set KSampler steps=4, cfg=1.0",
                 "says NunchakuQwenImageTransformer2DModel, but the tensors are FLUX.1", "config is no JSON object",
                 "says fp4_e2m1_all, but the file holds INT4", "says rank 128, but the tensors have 16"):
        assert line in report, (line, report)


def test_widgets_that_contradict_are_errors(tiny_flux):
    assert tiny_flux.load(choices=Choice("int4", 16)) and tiny_flux.load(choices=Choice(rank=10))  # ranks are stored padded
    for widgets, message in ((Choice("nvfp4"), "precision is set to nvfp4, but this file holds INT4"),
                             (Choice(rank=32), "rank is set to 32, but .* rank 16")):
        with pytest.raises(CheckpointError, match=message):
            tiny_flux.load(choices=widgets)


def test_mixed_ranks(tiny_flux, tmp_path):
    """A LoRA merged into one layer: its low-rank part is wider, with zeros here."""
    def widen(tensors: dict) -> None:
        layer = "single_transformer_blocks.0.mlp_fc2"
        from support import svdquant
        numbers = tiny_flux.made.layers[layer]
        down, up = (torch.cat([t, torch.zeros_like(t)], dim).to(torch.bfloat16)
                    for t, dim in ((numbers.down, 0), (numbers.up, 1)))
        tensors |= {f"{layer}.lora_down": svdquant.pack_down(down.T.contiguous()), f"{layer}.lora_up": svdquant.pack_up(up)}

    report = same_output(tiny_flux, write(tiny_flux, tmp_path, widen))
    assert "low rank: 16 and 32" in report


def damage(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[dict], None]:
    def edit(tensors: dict) -> None:
        new = change(tensors.pop(name))
        if new is not None:
            tensors[name] = new
    return edit


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A number put in the place of the first one, or a byte in that of an E4M3."""
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor).view(-1)[0] = value
        return tensor
    return change


FC1, AWQ = "transformer_blocks.0.mlp_fc1", "transformer_blocks.0.norm1.linear"
DAMAGED: dict[str, tuple[Callable[[dict], Any], str]] = {
    "missing codes": (damage(f"{FC1}.qweight", lambda t: None), f"{FC1}.qweight"),
    "missing scales": (damage(f"{FC1}.wscales", lambda t: None), f"missing tensor {FC1}.wscales"),
    "missing low rank": (damage(f"{FC1}.lora_up", lambda t: None), f"missing tensor {FC1}.proj_up"),
    "missing smoothing": (damage(f"{FC1}.smooth", lambda t: None), f"missing tensor {FC1}.smooth_factor"),
    "missing bias": (damage(f"{FC1}.bias", lambda t: None), f"missing tensor {FC1}.bias"),
    "missing embedder": (damage("x_embedder.weight", lambda t: None), "x_embedder.weight"),
    "missing norm": (damage("transformer_blocks.0.norm_q.weight", lambda t: None), "transformer_blocks.0.norm_q.weight"),
    "half of a composite": (lambda t: [t.pop(k) for k in list(t) if "single_transformer_blocks.0.out_proj." in k] and None,
                            "single_transformer_blocks.0.out_proj.qweight"),
    "scales of another size": (damage(f"{FC1}.wscales", lambda t: t[:2].clone()), f"{FC1}.wscales is"),
    "codes of another dtype": (damage(f"{FC1}.bias", lambda t: t.float()), f"{FC1}.bias is stored as F32"),
    "an unknown tensor": (lambda t: t.update({"mystery.weight": torch.ones(2)}), "unexpected tensors: mystery.weight"),
    "an nvfp4 scale in int4": (lambda t: t.update({f"{FC1}.wtscale": torch.ones(1)}), "unexpected tensors"),
    "a scale that is no number": (damage(f"{FC1}.wscales", first(torch.nan)), f"{FC1}.wscales holds NaN, expected finite numbers"),
    "an infinite scale": (damage(f"{FC1}.wscales", first(-torch.inf)), f"{FC1}.wscales holds infinite values"),
    "an infinite factor": (damage(f"{FC1}.lora_up", first(torch.inf)), f"{FC1}.lora_up holds infinite values"),
    "a factor that is no number": (damage(f"{FC1}.lora_down", first(torch.nan)), f"{FC1}.lora_down holds NaN"),
    "smoothing that is no number": (damage(f"{FC1}.smooth", first(torch.nan)), f"{FC1}.smooth holds NaN"),
    "a scale of a modulation": (damage(f"{AWQ}.wscales", first(torch.nan)), f"{AWQ}.wscales holds NaN"),
    "a zero point of a modulation": (damage(f"{AWQ}.wzeros", first(torch.inf)), f"{AWQ}.wzeros holds infinite values"),
    "a bias that is no number": (damage(f"{FC1}.bias", first(torch.nan)), f"{FC1}: bias holds NaN"),
    "zero smoothing": (damage(f"{FC1}.smooth", torch.zeros_like), "smooth_factor has zeros"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused(name, tiny_flux, tmp_path):
    change, message = DAMAGED[name]
    with pytest.raises(CheckpointError) as caught:
        model.load(model.Request(str(write(tiny_flux, tmp_path, change))), quiet=True)
    assert message in str(caught.value) and "what to do:" in str(caught.value), str(caught.value)


FP4_DAMAGED = {"NaN": ("wscales", 0x7F, "holds NaN"), "minus NaN": ("wscales", 0xFF, "holds NaN"),
               "negative": ("wscales", 0x81, "holds negative values, expected finite numbers from 0 on"),
               "a scale of a tensor": ("wtscale", torch.nan, "holds NaN"), "a negative one": ("wtscale", -1, "holds negative values"),
               "a scale of a row": ("wcscales", torch.inf, "holds infinite values")}


@pytest.fixture(scope="module")
def tiny_fp4(tmp_path_factory) -> Case:
    made = models.make_flux("nvfp4")
    return Case(made, made.write(tmp_path_factory.mktemp("fp4")), flux)


@pytest.mark.parametrize("name", FP4_DAMAGED)
def test_damaged_scales_of_nvfp4_are_refused(name, tiny_fp4, tmp_path):
    leaf, value, message = FP4_DAMAGED[name]
    layer = next(key for key in tiny_fp4.made.tensors if key.endswith(f".{leaf}") and "_blocks.0.norm" not in key)
    path = write(tiny_fp4, tmp_path, damage(layer, first(value)))
    with pytest.raises(CheckpointError, match=f"{layer} {message}.*\n.*where: {path}.*\n.*what to do:"):
        model.load(model.Request(str(path)), quiet=True)


def test_damaged_scales_of_a_saved_model_are_refused(tiny_fp4, output, tmp_path):
    """Of tiles, as they are saved."""
    saved = load_file(save(tiny_fp4.load().patcher, "svdq", "exact", step=lambda n: None)[0])
    layer = "double_blocks.0.img_mlp.0"
    for field, value, message in (("scale", 0x7F, "NaN"), ("scale", 0x90, "negative values"), ("down", torch.nan, "NaN"),
                                  ("smooth", torch.inf, "infinite values")):
        name = f"{layer}.weight_t0_{field}"
        save_file({**saved, name: first(value)(saved[name])}, str(tmp_path / "model.safetensors"))
        with pytest.raises(CheckpointError, match=f"{name} holds {message}"):
            model.load(model.Request(str(tmp_path / "model.safetensors")), quiet=True)


def test_a_cut_file_is_refused(tiny_flux, tmp_path):
    path = write(tiny_flux, tmp_path)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match="truncated"):
        model.load(model.Request(str(path)), quiet=True)


def test_a_bias_where_the_model_has_none_is_refused(tmp_path):
    from support import svdquant

    made = models.make_z_image()
    name = "layers.0.feed_forward.net.2.bias"
    assert not made.tensors[name].any()
    without = {k: v for k, v in made.tensors.items() if not (k.endswith(".bias") and k.startswith("layers.0.")
                                                             and "adaLN" not in k)}
    with z_image.small_widths():
        model.load(model.Request(str(made.write(tmp_path / "a", without))), quiet=True)  # files may leave them out
        made.tensors[name] = svdquant.pack_vector(torch.ones(z_image.DIM, dtype=torch.bfloat16))
        with pytest.raises(CheckpointError, match=r"net\.2 has a bias, and this model has none"):
            model.load(model.Request(str(made.write(tmp_path / "b"))), quiet=True)


def test_schnell_has_no_guidance(tmp_path):
    made = models.make_flux(guidance=False, heads=1)
    loaded = model.load(model.Request(str(made.write(tmp_path))), quiet=True)
    assert type(loaded.patcher.model.model_config).__name__ == "FluxSchnell"
    expected = flux.diffusers_velocity(made.dequantized(), **flux.inputs())
    assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), expected) < FORWARD


def test_zero_cond_t_comes_from_the_config(tmp_path):
    """Edit-2511: no tensor tells it."""
    made = models.make_qwen_image(zero_cond_t=True)
    with qwen_image.small_widths():
        inputs = qwen_image.inputs(references=1)
        loaded = model.load(model.Request(str(made.write(tmp_path))), quiet=True)
        expected = qwen_image.diffusers_velocity(made.dequantized(), **inputs)
        assert common.rel_l2(qwen_image.comfy_velocity(loaded.patcher, **inputs), expected) < FORWARD
        untold = model.load(model.Request(str(made.write(tmp_path / "untold", metadata={}))), quiet=True)
        assert "note: zero_cond_t is told by neither" in untold.report
        assert common.rel_l2(qwen_image.comfy_velocity(untold.patcher, **inputs), expected) > 1e-3


LORA = {"transformer_blocks.0.attn.to_q": (256, 256), "transformer_blocks.0.attn.add_v_proj": (256, 256),
        "transformer_blocks.0.ff.net.2": (256, 1024), "transformer_blocks.0.norm1.linear": (1536, 256),
        "single_transformer_blocks.0.attn.to_k": (256, 256), "single_transformer_blocks.0.proj_mlp": (1024, 256),
        "single_transformer_blocks.0.proj_out": (256, 1280), "proj_out": (64, 256)}


def merged(made: models.Made, lora: dict[str, torch.Tensor]) -> Any:
    """The dequantized diffusers model with a LoRA by its definition, W + B A."""
    network = made.dequantized()
    with torch.no_grad():
        for name in LORA:
            a, b = (lora[f"transformer.{name}.lora_{x}.weight"] for x in "AB")
            network.get_submodule(name).weight.add_(b @ a)
    return network


@pytest.mark.parametrize("low_vram", [False, True])
def test_override_of_a_deferred_base_and_a_lora(low_vram, tiny_flux, tmp_path):
    """A file as weights on a diffusers base that has only its config, with a LoRA by the host's node."""
    base = tmp_path / "base" / "transformer"
    tiny_flux.made.model.save_pretrained(base)
    shutil.rmtree(tmp_path / "weights", ignore_errors=True)
    next(base.glob("*.safetensors")).unlink()
    deferred = model.defer(model.Request(str(base))).patcher
    result = model.override(deferred, model.Request(str(tiny_flux.path), compute="dequantize"))
    assert "weights only" in result.report and "svdquant-int4" in result.report
    plain = tiny_flux.reference(tiny_flux.made.dequantized())
    assert common.rel_l2(tiny_flux.run(result.patcher), plain) < FORWARD
    lora = lora_tools.random_lora(LORA)
    patched = lora_tools.load_lora(result.patcher, lora, tmp_path)
    effect = tiny_flux.reference(merged(tiny_flux.made, lora)) - plain
    run = (lambda p: lora_tools.low_vram(p, lambda q: tiny_flux.run(q, load=False))) if low_vram else tiny_flux.run
    ours = run(patched) - run(result.patcher)
    assert effect.norm() > 0.3 * plain.norm() and common.rel_l2(ours, effect) < 1e-4
    assert common.rel_l2(run(result.patcher), plain) < FORWARD  # and it can be taken off


def test_as_component_and_on_another_base(tiny_flux, tmp_path):
    base = model.load(model.Request(str(save_base(tiny_flux, tmp_path / "base"))), quiet=True).patcher
    folder = tiny_flux.path.parent
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        model.override(base, model.Request(str(folder)), "component")
    smaller = flux.make(heads=1)
    smaller.save_pretrained(tmp_path / "one head")
    with pytest.raises(CheckpointError, match="hidden"):
        model.override(model.defer(model.Request(str(tmp_path / "one head"))).patcher, model.Request(str(tiny_flux.path)))
    lora = lora_tools.random_lora(LORA)
    before = lora_tools.load_lora(base, lora, tmp_path)  # a LoRA that is on the base comes along
    result = model.override(before, model.Request(str(tiny_flux.path), compute="dequantize"))
    assert common.rel_l2(tiny_flux.run(result.patcher), tiny_flux.reference(merged(tiny_flux.made, lora))) < FORWARD


def save_base(case: Case, folder: Path) -> Path:
    case.made.model.save_pretrained(folder)
    return folder


def test_the_host_can_rebuild_it(tiny_flux):
    patcher = tiny_flux.load(backend="comfy_kitchen").patcher
    factory, arguments = patcher.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert again.model is not patcher.model and torch.equal(tiny_flux.run(again), tiny_flux.run(patcher))


def test_saved_by_the_host_and_loaded_again(tiny_flux, tmp_path):
    """ComfyUI's own save keeps every byte; stock ComfyUI refuses the unknown marker aloud instead of making noise."""
    import comfy.sd
    from safetensors.torch import load_file

    patcher = tiny_flux.load(backend="comfy_kitchen").patcher
    path = str(tmp_path / "saved.safetensors")
    comfy.sd.save_checkpoint(path, patcher)
    for compute in ("native", "dequantize"):
        again = model.load(model.Request(path, compute=compute), quiet=True)
        assert "10 SVDQ INT4" in again.report and "3 AWQ INT4" in again.report
        expected = tiny_flux.load(compute=compute).patcher
        assert torch.equal(tiny_flux.run(again.patcher), tiny_flux.run(expected))
    lora = lora_tools.random_lora(LORA)
    patched = lora_tools.load_lora(again.patcher, lora, tmp_path)
    assert common.rel_l2(tiny_flux.run(patched), tiny_flux.reference(merged(tiny_flux.made, lora))) < FORWARD
    with pytest.raises(KeyError, match=r"qt\.tiles"):
        comfy.sd.load_diffusion_model(path)
    tensors = load_file(path)
    del tensors["model.diffusion_model.single_blocks.0.linear2.weight_t1_smooth"]
    common.save(tmp_path / "broken", tensors, None)
    with pytest.raises(CheckpointError, match="linear2"):
        model.load(model.Request(str(tmp_path / "broken")), quiet=True)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_layers_are_read_one_at_a_time(tmp_path):
    """FLUX.1's width: the pages of the source are not kept beside the result, and nothing else is in the way."""
    import gc
    import threading

    import comfy.sd  # noqa: F401  # no part of the load

    def resident(kind: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
        return int(line.split()[1]) * 1024

    with torch.device("meta"):
        network = type(flux.make())(num_layers=1, num_single_layers=2, guidance_embeds=True)
    path = tmp_path / "wide.safetensors"
    tables.header_only(path, {name: tuple(t.shape) for name, t in network.state_dict().items()},
                       tables.flux_table(1, 2, 3072), "int4", 32, tables.flux_plain, legacy=True)
    size = path.stat().st_size
    with open(path, "rb") as file:  # what is in the page cache comes in by large pages where one byte is touched
        while file.read(1 << 24):
            pass
    gc.collect()
    before, mapped, done = resident("VmRSS"), [resident("RssFile")], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            mapped.append(resident("RssFile"))

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins again
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        patcher = model.load(model.Request(str(path)), quiet=True).patcher
    finally:
        done.set()
        thread.join()
    upcast = sum(p.nbytes for p in patcher.model.parameters() if not hasattr(p, "_layout_cls")) / 2  # by the host, F32
    assert size > 400e6 and 100e6 < upcast < 200e6, (size, upcast)
    assert max(mapped) - mapped[0] < 70e6  # the one unquantized tensor that is laid out anew
    assert resident("VmHWM") - before < size + upcast + 80e6


def test_cancelled(tiny_flux):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            model.load(model.Request(str(tiny_flux.path)))
    finally:
        comfy.model_management.interrupt_current_processing(False)


def test_dtype_and_other_nodes(tiny_flux):
    """Load Base Model takes such a file, too."""
    loaded = tiny_flux.load(dtype="bf16")
    reference = tiny_flux.run(tiny_flux.load().patcher)
    assert loaded.patcher.object_patches["manual_cast_dtype"] == torch.bfloat16
    assert common.rel_l2(tiny_flux.run(loaded.patcher), reference) < 0.05


def test_nodes(tiny_flux, tmp_path):
    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import describe
    from quantized_transformers.loaders.locate import locate
    from quantized_transformers.loaders.report import describe_report
    from quantized_transformers.nodes.nunchaku import QT_NunchakuSVDQLoader as Node
    from quantized_transformers.views.layer_map import layer_map

    schema = Node.define_schema()
    assert [entry.id for entry in schema.inputs] == ["weights", "precision", "rank", "reference", "weights_name", "backend",
                                                     "revision", "download_missing"]
    patcher, report = Node.execute(weights="nowhere/at-all", reference=str(tiny_flux.path), backend="dequantize").args
    assert torch.equal(tiny_flux.run(patcher), tiny_flux.run(tiny_flux.load().patcher)) and "svdquant-int4" in report
    base = str(save_base(tiny_flux, tmp_path))
    stamp = Node.fingerprint_inputs(weights=str(tiny_flux.path))
    assert stamp == Node.fingerprint_inputs(weights=str(tiny_flux.path)) != Node.fingerprint_inputs(weights=base)
    with pytest.raises(CheckpointError, match=r"no SVDQuant file but FLUX\.1"):
        Node.execute(weights=base)
    with pytest.raises(CheckpointError, match="nunchaku"):
        Node.execute(weights=str(tiny_flux.path), backend="nunchaku")
    description = describe(Checkpoint(locate(str(tiny_flux.path))))
    assert "this checkpoint loads" in describe_report(description) and json.dumps(description.to_json())
    assert layer_map(description).size[0] > 100
