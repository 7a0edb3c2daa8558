"""Nunchaku's SDXL against diffusers' UNet: names by the host's own map, weights by value, forwards last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures import Naming
from quantized_transformers.loaders.architectures.sdxl import SDXL
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from quantized_transformers.loaders.report import describe_report
from quantized_transformers.views.layer_map import layer_map
from support import common, svdquant
from support import lora as lora_tools
from support import svdquant_models as models
from support import svdquant_sdxl as sdxl
from support import svdquant_tables as tables

pytestmark = pytest.mark.parity

FORWARD = 1e-5  # two fp32 implementations of one network
ROUNDING = 1e-6  # F32 arithmetic of a weight's definition
BLOCK = "down_blocks.2.attentions.1.transformer_blocks.1"


@pytest.fixture(scope="module", autouse=True)
def widths() -> Iterator[None]:
    """Small widths for all; before, the sizes that the pack itself has are held against the published ones."""
    import comfy.supported_models

    from quantized_transformers.loaders.architectures.sdxl import SIZES

    theirs = comfy.supported_models.SDXL.unet_config
    assert SIZES == sdxl.PUBLISHED
    with sdxl.small_widths(sdxl.PUBLISHED):
        assert comfy.supported_models.SDXL.unet_config == theirs  # the host's own
    with sdxl.small_widths():
        yield


@pytest.fixture(scope="module")
def made() -> models.Made:
    return sdxl.make()


@pytest.fixture(scope="module")
def path(made, tmp_path_factory) -> Path:
    return made.write(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def plain(made) -> torch.Tensor:
    """The output of diffusers' UNet on the dequantized weights."""
    return reference(made.dequantized())


def load(path: Path, **request: Any) -> Any:
    return model.load(model.Request(str(path), **request), quiet=True)


def run(patcher: Any, **kwargs: Any) -> torch.Tensor:
    return sdxl.comfy_eps(patcher, **sdxl.inputs(), **kwargs)


def reference(unet: Any) -> torch.Tensor:
    return sdxl.diffusers_eps(unet, **sdxl.inputs())


def host_map(patcher: Any) -> dict[str, str]:
    """The host's own map, diffusers' tensor -> its tensor."""
    import comfy.utils

    return comfy.utils.unet_to_diffusers(patcher.model.model_config.unet_config)


def native_dict(patcher: Any, unet: Any) -> dict[str, torch.Tensor]:
    """A diffusers UNet's tensors under the host's names."""
    return {host_map(patcher)[name]: tensor for name, tensor in unet.state_dict().items()}


def empty(dims: dict[str, int]) -> Any:
    """The host's model of these sizes, without memory."""
    return model._to_host(model._empty_tensors(SDXL, dims), "default", None, False, deferred=True)


@pytest.mark.parametrize("sizes", [sdxl.SMALL, sdxl.PUBLISHED], ids=["small", "published"])
def test_names_and_shapes_are_those_of_diffusers_and_of_the_host(sizes):
    with sdxl.small_widths(sizes):  # the published ones are the host's own, see `widths`
        patcher = empty(sizes)
    assert type(patcher.model).__name__ == "SDXL" and patcher.model.model_type.name == "EPS"
    config = patcher.model.model_config.unet_config
    middle, deep = sizes["middle"], sizes["deep"]
    assert config["transformer_depth"] == [0, 0, middle, middle, deep, deep]
    assert config["context_dim"] == sizes["text"] and SDXL.dims_from_model(config) == sizes
    ours: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module in SDXL.modules(sizes, Naming("diffusers")):
        stored, = module.stored
        ours[f"{stored}.weight"] = f"{module.native}.weight", (*module.rows, *module.inner)
        if module.bias:
            ours[f"{stored}.bias"] = f"{module.native}.bias", module.rows
    with torch.device("meta"):
        unet = sdxl.network(sizes)
    wanted = host_map(patcher)
    assert ours == {name: (wanted[name], tuple(tensor.shape)) for name, tensor in unet.state_dict().items()}
    assert sorted(native for native, _ in ours.values()) == sorted(
        name for name, _ in patcher.model.diffusion_model.named_parameters())


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_published_sizes_and_counts(precision, tmp_path):
    """Every transformer block of the published UNet has six quantized layers, and no tensor is left."""
    shapes, table = sdxl.published_shapes()
    tables.header_only(tmp_path / "renamed.safetensors", shapes, table, precision, 32, legacy=True)
    with sdxl.small_widths(sdxl.PUBLISHED):
        description = describe(Checkpoint(locate(str(tmp_path / "renamed.safetensors"))))
    assert not description.problems and description.architecture == "SDXL" and description.dims == sdxl.PUBLISHED
    blocks = {name.split(".norm1.")[0] for name in shapes if ".transformer_blocks." in name and ".norm1." in name}
    kind = {"int4": "SVDQ INT4", "nvfp4": "SVDQ NVFP4"}[precision]
    linears = [name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]
    assert len(blocks) == 70 and len(table) == 420
    # a block has ten Linears; eight of them are in the six quantized layers
    assert description.formats == {kind: 420, "BF16": len(linears) - 8 * len(blocks)}
    text = describe_report(description)
    assert "this checkpoint loads" in text and layer_map(description).size[0] > 400


def test_every_tensor_is_its_definition(made, path):
    patcher = load(path).patcher
    expected = native_dict(patcher, made.dequantized())
    there = dict(patcher.model.diffusion_model.named_parameters())
    assert there.keys() == expected.keys()
    quantized = [name for name, tensor in there.items() if hasattr(tensor, "_layout_cls")]
    assert len(quantized) == len(made.linears) == 8 * 17
    for name, tensor in there.items():
        if name in quantized:
            assert common.rel_l2(tensor.dequantize(), expected[name]) < ROUNDING, name
        elif name.replace(".bias", ".weight") in quantized:
            assert common.rel_l2(tensor, expected[name]) < ROUNDING, name
        else:
            assert torch.equal(tensor.float(), expected[name]), name


def test_dequantized_forward_equals_diffusers(path, plain):
    loaded = load(path, backend="dequantize")
    assert common.rel_l2(run(loaded.patcher), plain) < FORWARD
    assert type(loaded.patcher.model).__name__ == "SDXL" and "note:" not in loaded.report, loaded.report
    assert "SDXL · svdquant-int4" in loaded.report and "102 SVDQ INT4" in loaded.report
    again = load(path, backend="dequantize", dtype="bf16").patcher
    assert again.object_patches["manual_cast_dtype"] == torch.bfloat16
    assert common.rel_l2(run(again), plain) < 0.05


def test_int4_layers_and_forward_are_the_activation_rule(made, path):
    """comfy-kitchen's kernels against the exact emulation, layer by layer and over the UNet."""
    import comfy.model_management

    patcher = load(path, backend="comfy_kitchen").patcher
    comfy.model_management.load_models_gpu([patcher])
    g = torch.Generator().manual_seed(3)
    for name in made.linears:
        numbers, = made.numbers(name)
        x = torch.randn(5, numbers.residual.shape[1], generator=g)
        module = patcher.model.diffusion_model.get_submodule(host_map(patcher)[f"{name}.weight"].removesuffix(".weight"))
        with torch.inference_mode():
            assert common.rel_l2(module(x), numbers.forward(x)) < FORWARD, name
    seen = models.given(patcher)
    out = run(patcher)
    assert common.rel_l2(out, reference(made.emulated(seen))) < FORWARD


def test_nvfp4(tmp_path):
    """Not published by Nunchaku, but by others: the same names."""
    sizes = {**sdxl.SMALL, "deep": 1}
    fp4 = sdxl.make("nvfp4", rank=32, sizes=sizes)
    with sdxl.small_widths(sizes):
        patcher = load(fp4.write(tmp_path), backend="dequantize").patcher
    assert common.rel_l2(run(patcher), reference(fp4.dequantized())) < FORWARD


# diffusers' layer, rows, columns: quantized ones, and two that are not (a Linear and a convolution's middle)
LORA = {f"{BLOCK}.attn1.to_q": (256, 256), f"{BLOCK}.attn1.to_v": (256, 256), f"{BLOCK}.attn2.to_out.0": (256, 256),
        f"{BLOCK}.ff.net.0.proj": (2048, 256), "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (256, 96),
        "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2": (128, 512),
        "up_blocks.1.attentions.0.proj_in": (128, 128)}
ALPHA = 4.0


def diffusers_names(pairs: dict) -> dict[str, torch.Tensor]:
    """Attention processors' names, the ones of diffusers that the host's node knows."""
    out = {}
    for name, (up, down) in pairs.items():
        layer = f"unet.{name}".replace(".to_", ".processor.to_").removesuffix(".0")
        out |= {f"{layer}_lora.up.weight": up * (ALPHA / 8), f"{layer}_lora.down.weight": down}
    return out


def kohya(pairs: dict, rename: Callable[[str], str] = lambda name: name) -> dict[str, torch.Tensor]:
    out = {}
    for name, (up, down) in pairs.items():
        layer = "lora_unet_" + rename(name).replace(".", "_")
        out |= {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down, f"{layer}.alpha": torch.tensor(ALPHA)}
    return out


@pytest.mark.parametrize("style", ["diffusers", "kohya", "kohya native"])
def test_lora(style, made, path, plain, tmp_path):
    patcher = load(path, backend="dequantize").patcher
    g = torch.Generator().manual_seed(11)
    pairs = {name: (torch.randn(rows, 8, generator=g) * 8 ** -0.5, torch.randn(8, columns, generator=g) * columns ** -0.5)
             for name, (rows, columns) in LORA.items()}
    native = {name: host_map(patcher)[f"{name}.weight"].removesuffix(".weight") for name in LORA}
    lora = diffusers_names(pairs) if style == "diffusers" else kohya(pairs) if style == "kohya" else \
        kohya(pairs, native.__getitem__)
    unet = made.dequantized()
    for name, (up, down) in pairs.items():
        unet.get_submodule(name).weight.add_(up @ down, alpha=ALPHA / 8)
    effect = reference(unet) - plain
    patched = lora_tools.load_lora(patcher, lora, tmp_path)
    assert len(patched.patches) == len(LORA) and effect.norm() > 0.2 * plain.norm()
    assert common.rel_l2(run(patched) - run(patcher), effect) < 1e-4
    if style == "kohya":
        low = [lora_tools.low_vram(p, lambda q: run(q, load=False)) for p in (patched, patcher)]
        assert common.rel_l2(low[0] - low[1], effect) < 1e-4
    assert common.rel_l2(run(patcher), plain) < FORWARD  # and it can be taken off


def test_override_of_the_hosts_own_sdxl(made, path, plain, tmp_path):
    """A MODEL of Load Checkpoint or Load Diffusion Model takes the file, and keeps its LoRAs."""
    import comfy.sd

    tensors = {name: tensor.clone() for name, tensor in native_dict(empty(sdxl.SMALL), made.model).items()}
    base = comfy.sd.load_diffusion_model_state_dict(tensors)
    assert common.rel_l2(run(base), plain) > 0.01  # other weights
    name = f"{BLOCK}.attn1.to_q"
    up, down = torch.randn(256, 8), torch.randn(8, 256) / 16
    result = model.override(lora_tools.load_lora(base, kohya({name: (up, down)}), tmp_path),
                            model.Request(str(path), compute="dequantize"))
    assert "weights only" in result.report and "patches carried over from the base MODEL: 1" in result.report
    unet = made.dequantized()
    unet.get_submodule(name).weight.add_(up @ down, alpha=ALPHA / 8)
    assert common.rel_l2(run(result.patcher), reference(unet)) < FORWARD
    config = base.model.model_config.unet_config
    for change in ({"transformer_depth_middle": -1}, {"transformer_depth_output": [0, 0, 0, 1, 1, 2, 2, 2, 2]},
                   {"num_res_blocks": [1, 1, 1]}, {"adm_in_channels": None}, {"use_temporal_attention": True}):
        assert SDXL.dims_from_model({**config, **change}) is None  # pruned UNets, Stable Diffusion, video models
    base.model.model_config.unet_config = {**config, "in_channels": 9}
    with pytest.raises(CheckpointError, match="the base model has in = 9, but the tensors have 4"):
        model.override(base, model.Request(str(path)))


def test_saved_by_the_host_and_loaded_again(path, tmp_path):
    import comfy.sd

    patcher = load(path, backend="dequantize").patcher
    saved = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(saved), patcher)
    again = load(saved, compute="dequantize")
    assert "136 SVDQ " in again.report and torch.equal(run(again.patcher), run(patcher))
    factory, arguments = again.patcher.cached_patcher_init
    assert torch.equal(run(factory(*arguments, disable_dynamic=True)), run(patcher))


def test_unquantized_unets(made, tmp_path):
    """In ComfyUI's own names and in diffusers'."""
    import comfy.sd

    made.model.save_pretrained(tmp_path / "unet")
    native = native_dict(empty(sdxl.SMALL), made.model)
    common.save(tmp_path / "native", native, None)
    loaded, stock = load(tmp_path / "native"), comfy.sd.load_diffusion_model_state_dict(dict(native))
    assert loaded.description.architecture == "SDXL" and torch.equal(run(loaded.patcher), run(stock))
    assert torch.equal(run(load(tmp_path / "unet").patcher), run(stock))


def drop(name: str) -> Callable[[dict], Any]:
    return lambda tensors: tensors.pop(name) is None


DAMAGED: dict[str, tuple[Callable[[dict], Any], str]] = {
    "no codes": (drop(f"{BLOCK}.attn1.to_qkv.qweight"), f"missing tensor {BLOCK}.attn1.to_qkv.qweight"),
    "no scales": (drop(f"{BLOCK}.ff.net.2.wscales"), f"missing tensor {BLOCK}.ff.net.2.wscales"),
    "no low rank": (drop(f"{BLOCK}.attn2.to_q.lora_up"), f"missing tensor {BLOCK}.attn2.to_q.proj_up"),
    "no bias": (drop(f"{BLOCK}.ff.net.0.proj.bias"), f"missing tensor {BLOCK}.ff.net.0.proj.bias"),
    "no plain Linear": (drop(f"{BLOCK}.attn2.to_v.weight"), f"missing tensor {BLOCK}.attn2.to_v.weight"),
    "no convolution": (drop("up_blocks.0.resnets.2.conv_shortcut.weight"), "up_blocks.0.resnets.2.conv_shortcut.weight"),
    "no norm": (drop("conv_norm_out.bias"), "missing tensor conv_norm_out.bias"),
    "no embedding": (drop("add_embedding.linear_1.weight"), "add_embedding.linear_1.weight"),
    "a mark for another prediction": (lambda t: t.update(v_pred=torch.zeros(0)), "unexpected tensors: v_pred"),
    "a block too many": (lambda t: t.update({k.replace("blocks.1.", "blocks.2."): v.clone() for k, v in t.items()
                                             if k.startswith(BLOCK)}), "unexpected tensors"),
    "another text encoder": (lambda t: t.update({k: torch.cat([v, v], 1) for k, v in t.items() if "attn2.to_k" in k}),
                             "not of SDXL's sizes, which are all that ComfyUI knows: text 192 (SDXL: 96)"),
    "a bias of the attention": (lambda t: t.update({f"{BLOCK}.attn1.to_qkv.bias": svdquant.pack_vector(
        torch.ones(768, dtype=torch.bfloat16))}), "to_qkv has a bias, and this model has none there"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused(name, made, tmp_path):
    change, message = DAMAGED[name]
    tensors = dict(made.tensors)
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        load(made.write(tmp_path, tensors))
    assert message in str(caught.value) and "what to do:" in str(caught.value), str(caught.value)


def test_no_metadata_and_claims(made, path, tmp_path):
    """Without metadata; and in a folder with the config.json of the UNet, or one that contradicts."""
    def notes(reference: Path) -> list[str]:
        description = describe(Checkpoint(locate(str(reference))))
        assert not description.problems
        return description.notes

    assert notes(path) == []
    bare, = notes(made.write(tmp_path / "bare", metadata={}))
    assert "no metadata in the file" in bare
    folder = tmp_path / "with config"
    folder.mkdir()
    shutil.copy(path, folder)
    config = json.loads(made.metadata["config"])
    for change, expected in (({}, None), ({"cross_attention_dim": 2048}, "text 2048 (tensors: 96)"),
                             ({"attention_head_dim": 8}, "are not an SDXL UNet"), ({"freq_shift": 1}, "freq_shift 0 only"),
                             ({"_class_name": "FluxTransformer2DModel"}, "says FluxTransformer2DModel, but the tensors")):
        (folder / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
        found = notes(folder)
        assert len(found) == (expected is not None) and all(expected in note for note in found), found
