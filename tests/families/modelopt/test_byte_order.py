"""The order of NVFP4's block scales where nothing in a file tells it: by shapes and by values, or by the user.

A real weight is needed for the values: the miniature (tests/data/miniature), trained and 128 wide, exported by
nvidia-modelopt with and without `enable_swizzle_layout`; and full-width weights whose rows and columns differ in size
by a tenth, less than trained ones do.
"""

from __future__ import annotations

import json

import pytest
import torch

from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from quantized_transformers.quant.nvfp4_order import MARGIN, Score, decide, score
from support import common, flux, miniature
from support.real_files import load

pytestmark = pytest.mark.parity

EXPORTS = {"plain": {}, "tiles": {"enable_swizzle_layout": True}, "padded": {"padding_strategy": "row"},
           "padded, in tiles": {"padding_strategy": "row", "enable_swizzle_layout": True},
           "in tiles, with metadata": {"enable_swizzle_layout": True, "enable_layerwise_quant_metadata": True},
           "shards": {"max_shard_size": "300KB"}, "shards in tiles": {"max_shard_size": "300KB", "enable_swizzle_layout": True},
           "mixed": {"keep": [r".*attn.*", r"norm_out.*"]}, "mixed, in tiles": {"keep": [r".*attn.*"], "enable_swizzle_layout": True}}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    from diffusers import FluxTransformer2DModel

    net, root = FluxTransformer2DModel.from_pretrained(miniature.FOLDER / "transformer", torch_dtype=torch.bfloat16), \
        tmp_path_factory.mktemp("orders")

    def draw(model, seed):
        flux.diffusers_velocity(model, **flux.inputs(seed=seed))

    # its even columns of 64 fit neither tiles nor blocks of 16: left in BF16
    return {name: common.export(net, root / name.replace(", ", "-"), draw, "NVFP4",
                                [*options.pop("keep", []), "proj_out", "x_embedder", "context_embedder", ".*text_embedder.linear_1"],
                                **options)
            for name, options in ((name, dict(options)) for name, options in EXPORTS.items())}


@pytest.fixture(scope="module")
def truth(exports):
    return common.dequantize(common.stored(exports["plain"]))


def weights(loaded):
    return {name: (p.dequantize() if hasattr(p, "_qdata") else p).float()
            for name, p in loaded.patcher.model.diffusion_model.named_parameters() if name.endswith("weight")}


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", EXPORTS)
def test_exports_of_a_trained_model(exports, truth, name, bare, tmp_path):
    """With config.json, and with nothing beside the tensors."""
    import comfy.model_detection

    loaded = load(exports[name])
    if bare:
        stored, config = common.stored(exports[name]), common.config_of(exports[name])
        config.pop("quantization_config")
        loaded = load(common.save(tmp_path, stored, config))
    order = loaded.description.byte_order
    assert order.low_first and order.swizzled is ("tiles" in name) and "even columns in the low nibble" in loaded.report
    if "mixed" in name:
        kept = common.stored(exports[name])
        expected = {key: truth[key] if kept[key].dtype == torch.uint8 else kept[key].float() for key in truth}
    else:
        expected = truth
    native = comfy.model_detection.convert_diffusers_mmdit({key: t.clone() for key, t in expected.items()})
    found = weights(loaded)
    assert all(torch.allclose(found[key], native[key].float(), rtol=1e-5, atol=1e-7) for key in found if key in native)
    assert sum(hasattr(p, "_qdata") for p in loaded.patcher.model.diffusion_model.parameters()) > 5


def test_by_a_wide_margin(exports):
    """What the values of the smallest trained model say, in both orders."""
    for name, sign in (("plain", -1), ("tiles", 1), ("mixed", -1), ("mixed, in tiles", 1)):
        stored = common.stored(exports[name])
        layers = [key.removesuffix("_2") for key in stored if key.endswith(".weight_scale_2")]
        tiles, value = decide(score(stored[key]) for key in layers if not stored[key].shape[0] % 128)
        assert tiles is (sign > 0) and sign * value > 4 * MARGIN, (name, value)


@pytest.mark.parametrize(("rows", "columns"), [(3072, 3072), (12288, 3072), (3072, 12288), (1024, 512)])
def test_full_widths(rows, columns):
    """Rows and columns that differ by a tenth: one layer is enough, or a few of the smaller ones."""
    from comfy_kitchen import quantize_nvfp4
    from comfy_kitchen.float_utils import from_blocked

    g, both = torch.Generator().manual_seed(rows + columns), ([], [])
    for _ in range(1 if columns > 1000 else 4):
        weight = torch.randn(rows, columns, generator=g) * (1 + 0.1 * torch.randn(rows, 1, generator=g)) \
            * (1 + 0.1 * torch.randn(1, columns, generator=g))
        _, tiles = quantize_nvfp4(weight, weight.abs().max() / 2688)
        linear = from_blocked(tiles.view(torch.uint8), rows, columns // 16).contiguous().view(tiles.dtype)
        both[0].append(score(tiles))
        both[1].append(score(linear))
    assert decide(both[0])[0] is True and decide(both[1])[0] is False


def test_chance_does_not_decide():
    """Random weights: scores as if of a standard normal distribution."""
    from comfy_kitchen import quantize_nvfp4

    g, found = torch.Generator().manual_seed(1), []
    for _ in range(150):
        weight = torch.randn(256, 512, generator=g)
        found.append(score(quantize_nvfp4(weight, weight.abs().max() / 2688)[1]).value)
    found = torch.tensor(found)
    assert float(found.abs().max()) < 5 < MARGIN / 2 and 0.5 < float(found.std()) < 1.5 and abs(float(found.mean())) < 0.5
    assert decide([])[0] is None and score(torch.ones(128, 4).to(torch.float8_e4m3fn)) == Score()
    assert decide([score(torch.ones(128, 8).to(torch.float8_e4m3fn))])[0] is None  # all equal


@pytest.fixture(scope="module")
def random_file(tmp_path_factory):
    """A bare file of random weights whose shapes do not tell, and the folder it is from."""
    model = flux.make()
    folder = tmp_path_factory.mktemp("random")
    flux.export_nvfp4(model, folder / "export", keep=["proj_out", "x_embedder", ".*context_embedder", ".*embedder.linear_1"])
    config = common.config_of(folder / "export")
    config.pop("quantization_config")
    common.save(folder / "bare", common.stored(folder / "export"), config)
    return folder


def test_random_weights_are_refused_and_settled_by_the_user(random_file, tmp_path):
    with pytest.raises(CheckpointError, match="nothing tells in which order") as refused:
        load(random_file / "bare")
    assert "'modelopt'" in str(refused.value) and "'modelopt_tiled'" in str(refused.value) and "where:" in str(refused.value)
    stored = common.stored(random_file / "bare")
    truth = common.dequantize(stored)
    key, native = "transformer_blocks.0.ff.net.2.weight", "double_blocks.0.img_mlp.2.weight"
    tiled = {name: common.swizzle(t) if name.endswith(".weight_scale") else t for name, t in stored.items()}
    for byte_order, tensors in (("modelopt", stored), ("modelopt_tiled", tiled), ("comfyui", common.comfy_order(stored))):
        folder = common.save(tmp_path / byte_order, tensors, common.config_of(random_file / "bare"))
        loaded = load(folder, byte_order=byte_order)
        assert torch.allclose(weights(loaded)[native], truth[key], rtol=1e-5) and f"byte_order {byte_order}, as chosen" in loaded.report


def test_modelopts_own_word_is_taken(random_file):
    """Its export writes into the files' headers only where it rearranges: a config.json beside bare headers says rows."""
    loaded = load(random_file / "export")
    assert "the scales' values do not tell" in loaded.report and not loaded.description.byte_order.swizzled


def test_what_was_rearranged_is_refused_where_values_do_not_tell(random_file, tmp_path):
    config = common.config_of(random_file / "export")
    folder = common.save(tmp_path, common.stored(random_file / "export"), config,
                         {"quantization_config": json.dumps(config["quantization_config"])})
    with pytest.raises(CheckpointError, match="nothing tells in which order"):
        load(folder)


def test_shapes_tell(random_file, tmp_path):
    """A scale of [N, 20] is row-major, one of [128, .] for 64 rows is tiles; both in one file are refused."""
    stored, config = common.stored(random_file / "bare"), common.config_of(random_file / "bare")
    odd = {key: stored.pop(key) for key in list(stored) if key.startswith("proj_out.")}
    weight = odd["proj_out.weight"]
    rows = {"weight": torch.zeros(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8), "weight_scale_2": torch.tensor(1.0),
            "weight_scale": torch.ones(weight.shape[0], weight.shape[1] // 16).to(torch.float8_e4m3fn), "bias": odd["proj_out.bias"]}
    tiles = rows | {"weight_scale": common.swizzle(rows["weight_scale"])}
    assert weight.shape[0] % 128
    for i, (leaves, swizzled) in enumerate(((rows, False), (tiles, True))):
        folder = common.save(tmp_path / str(i), stored | {f"proj_out.{leaf}": t for leaf, t in leaves.items()}, config)
        order = load(folder).description.byte_order
        assert order.swizzled is swizzled and "shapes" in order.why
    tiles = {f"norm_out.linear.{leaf}" if leaf != "bias" else "x": t for leaf, t in tiles.items()}
    mixed = stored | {f"proj_out.{leaf}": t for leaf, t in rows.items()}
    for layer in ("transformer_blocks.0.ff.net.2",):
        mixed[f"{layer}.weight_scale"] = torch.ones(256, 64).to(torch.float8_e4m3fn)
    mixed["x_embedder.weight"] = torch.zeros(256, 32, dtype=torch.uint8)
    mixed["x_embedder.weight_scale"] = torch.ones(256, 4).to(torch.float8_e4m3fn)
    mixed["x_embedder.weight_scale_2"] = torch.tensor(1.0)
    mixed["context_embedder.weight"] = torch.zeros(64, 32, dtype=torch.uint8)
    mixed["context_embedder.weight_scale"] = torch.ones(128, 4).to(torch.float8_e4m3fn)
    mixed["context_embedder.weight_scale_2"] = torch.tensor(1.0)
    with pytest.raises(CheckpointError, match="shapes of 128 x 4 tiles, those of others are row-major"):
        load(common.save(tmp_path / "both", mixed, config))


def test_layers_that_disagree_are_refused(exports, tmp_path):
    """Half of the layers in tiles: no writer does that, and one order would be noise."""
    stored, config = common.stored(exports["plain"]), common.config_of(exports["plain"])
    config.pop("quantization_config")
    names = [key for key in stored if key.endswith(".weight_scale") and not stored[key].shape[0] % 128]
    for key in names[::2]:
        stored[key] = common.swizzle(stored[key])
    with pytest.raises(CheckpointError, match="of some layers are in 128 x 4 tiles, those of others row-major"):
        load(common.save(tmp_path, stored, config))


def test_a_wish_against_what_a_file_says(random_file, tmp_path):
    from quantized_transformers.quant.marker import marker

    stored, config = common.stored(random_file / "bare"), common.config_of(random_file / "bare")
    marked = common.comfy_order(stored) | {key.replace("weight_scale_2", "comfy_quant"): marker({"format": "nvfp4"})
                                           for key in stored if key.endswith("weight_scale_2")}
    folder = common.save(tmp_path, marked, config)
    assert load(folder).description.byte_order.swizzled
    with pytest.raises(CheckpointError, match="the file says otherwise"):
        load(folder, byte_order="modelopt")
    with pytest.raises(CheckpointError, match="byte_order is 'sideways'"):
        load(random_file / "bare", byte_order="sideways")
    plain = flux.make()
    plain.save_pretrained(tmp_path / "bf16")
    assert "byte_order modelopt has no effect" in load(tmp_path / "bf16", byte_order="modelopt").report


def test_inspect_reads_headers_only(random_file):
    """It says what is likely, and that the values are asked later."""
    description = describe(Checkpoint(locate(str(random_file / "bare"))))
    assert not description.problems and any("the scales' values are asked when it is loaded" in note for note in description.notes)
