"""VAEs against diffusers on the same folder: pictures, latents, latent formats, and what is refused. All in fp32 on the CPU.

ComfyUI's VAE.encode gives the mean of the distribution (its regularizer does not sample), so the means are compared.
"""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers import host
from quantized_transformers.loaders.components import vae
from quantized_transformers.loaders.components.vaes import by_class_name
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.nodes.load_parts import QT_LoadBaseVAE
from support import common, vaes

pytestmark = pytest.mark.parity

# fp32 forwards of the same network in two implementations, some 60 layers deep: measured 2e-7 .. 1.2e-6.
SAME = 1e-5
# The latent formats of the MODEL classes (comfy/supported_models.py) that these VAEs belong to.
MODELS = {"flux1": "Flux", "z_image": "ZImage", "sdxl": "SDXL", "sd15": "SD15", "flux2": "Flux2", "wan": "WAN21_T2V", "wan22": "WAN22_T2V",
          "hunyuan_video": "HunyuanVideo", "qwen_image": "QwenImage", "sd3": "SD3", "ltx": "LTXV", "ltx091": "LTXV", "ltx095": "LTXV",
          "ltx2": "LTXAV", "hunyuan_image": "HunyuanImage21", "hunyuan_refiner": "HunyuanImage21Refiner",
          "hunyuan_video_15": "HunyuanVideo15", "cogvideox": "CogVideoX_T2V", "cosmos": "CosmosT2V", "mochi": "GenmoMochi"}
# Latent frames; n of them are 4 n - 3 frames.
CASES = [(family, frames) for family in vaes.FAMILIES if family != "z_image"  # the same folder as FLUX.1's
         for frames in {"wan": (1, 2, 3, 4), "wan22": (1, 2, 3), "hunyuan_video": (1, 2, 3, 4), "ltx": (1, 2), "ltx091": (2,), "ltx095": (2,),
                       "ltx2": (1, 2), "hunyuan_video_15": (1, 2, 3),
                       "cogvideox": (1, 3, 5), "cosmos": (1, 3), "mochi": (1, 2, 4)}.get(family, (1,))]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These convolutions are so small that a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The base folder and the diffusers model of each family, made once."""
    made = {}

    def base(family):
        if family not in made:
            model = vaes.make(family)
            made[family] = vaes.save_base(family, tmp_path_factory.mktemp(family), model), model
        return made[family]

    return base


def load(folder, dtype="fp32"):
    return vae.load(vae.Request(str(folder), dtype=dtype))


def sampler_latent(loaded, frames, seed=1, batch=1, family=""):
    """A normal latent as a sampler leaves it: [B, C, H, W] for images, else [B, C, T, H, W]."""
    torch.manual_seed(seed)
    time = () if loaded.latent_dim == 2 else (frames,)
    channels = loaded.latent_channels * (2 if family == "hunyuan_refiner" else 1)  # two of the VAE's frames beside each other
    return torch.randn(batch, channels, *time, 2, 3)


def latent_format(family):
    import comfy.latent_formats
    import comfy.supported_models

    if family == "cogvideox":  # of a config, not of a class
        return comfy.latent_formats.CogVideoX1_5()
    return getattr(comfy.supported_models, MODELS[family]).latent_format()


@torch.inference_mode()
def agrees(loaded, model, family, frames=1):
    """Decode and encode on both sides, through both sides' latent conventions. Returns the two errors."""
    latent = sampler_latent(loaded, frames, batch=2 if loaded.latent_dim == 2 else 1, family=family)
    expected = vaes.diffusers_decode(model, latent)
    torch.manual_seed(vaes.NOISE_SEED)  # LTX-Video's decoders draw noise
    actual = loaded.decode(latent_format(family).process_out(latent))
    assert actual.shape == expected.shape
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.99  # the clamp hides nothing
    pixels = torch.rand_like(expected)
    mean = vaes.diffusers_encode(model, pixels)
    # a video is a batch of frames for ComfyUI
    encoded = loaded.encode(pixels if loaded.latent_dim == 2 else pixels[0])
    assert encoded.shape == mean.shape
    to_sampler = latent_format(family).process_in(encoded)
    own = hasattr(model, "bn") or family == "cosmos" or vaes.normalises(model)  # ComfyUI's VAE normalises by itself
    assert common.rel_l2(to_sampler if own else vaes.raw_latent(model, to_sampler), encoded) < SAME
    return common.rel_l2(actual - 0.5, expected - 0.5), common.rel_l2(encoded, mean)


@pytest.mark.part(2)
@pytest.mark.parametrize(("family", "frames"), CASES)
def test_decode_and_encode_equal_diffusers(family, frames, bases):
    folder, model = bases(family)
    loaded = load(folder).vae
    decoded, encoded = agrees(loaded, model, family, frames)
    assert decoded < SAME and encoded < SAME, (decoded, encoded)


@torch.inference_mode()
def test_mochis_last_frames_are_those_of_diffusers_as_it_is(bases):
    """Which drops its surplus frames at the end: what they reach differs, and no convolution reaches the last ones."""
    folder, model = bases("mochi")
    loaded = load(folder)
    assert "the first frames are decoded as in Genmo's own code" in loaded.report
    latent = sampler_latent(loaded.vae, 14)
    vaes.drop_in_blocks(model, done=False)
    expected = (model.decode(vaes.raw_latent(model, latent)).sample.clamp(-1, 1) / 2 + 0.5).movedim(1, -1)
    actual = loaded.vae.decode(latent_format("mochi").process_out(latent))
    assert actual.shape == expected.shape and common.rel_l2(actual[:, -6:] - 0.5, expected[:, -6:] - 0.5) < SAME
    assert common.rel_l2(actual[:, :6] - 0.5, expected[:, :6] - 0.5) > 0.01


def test_hunyuan_videos_in_pieces_where_memory_is_short(bases, monkeypatch, caplog):
    """Then the host's own way, with its norms of each piece: other values, which the log says. A copy does the same."""
    import comfy.model_management

    folder, model = bases("hunyuan_video")
    loaded = load(folder).vae
    loaded.first_stage_model = loaded.patcher.model = copy.deepcopy(loaded.first_stage_model)
    assert max(agrees(loaded, model, "hunyuan_video", 3)) < SAME and not caplog.records
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: 10**6)
    decoded, encoded = agrees(loaded, model, "hunyuan_video", 3)
    assert 1e-3 < decoded < 1 and 1e-3 < encoded < 1
    assert sum("in pieces" in record.message for record in caplog.records) == 2
    # what the host can evict counts (dynamic VRAM), which only the patcher knows
    monkeypatch.setattr(loaded.patcher, "get_free_memory", lambda device: 10**12)
    assert max(agrees(loaded, model, "hunyuan_video", 3)) < SAME and len(caplog.records) == 2


@pytest.mark.parametrize("family", ["flux1", "wan22"])
def test_shards(family, bases, tmp_path):
    _, model = bases(family)
    folder = vaes.save_base(family, tmp_path, model, max_shard_size="8MB")
    assert len(list((folder / "vae").glob("*.safetensors"))) > 1
    loaded = load(folder)
    assert "shards" in loaded.report and max(agrees(loaded.vae, model, family)) < SAME


def test_published_width(tmp_path):
    """FLUX.1's real widths go through the host's own constructor; stored as BF16, as published."""
    model = vaes.make("flux1", **vaes.PUBLISHED["flux1"]).to(torch.bfloat16)
    folder = vaes.save_base("flux1", tmp_path, model)
    assert max(agrees(load(folder).vae, model.float(), "flux1")) < SAME


def test_attention_as_old_diffusers_named_it(bases, tmp_path):
    """Stable Diffusion's VAEs were published before diffusers renamed query, key, value and proj_attn."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for name in [name for name in tensors if ".attentions." in name]:
            new = next((name.replace(f".{now}.", f".{then}.") for now, then in old.items() if f".{now}." in name), name)
            tensors[new] = tensors.pop(name)

    folder = edited(bases, "sd15", tmp_path, change=rename)
    assert max(agrees(load(folder).vae, bases("sd15")[1], "sd15")) < SAME


def test_z_image_has_the_vae_of_flux1():
    assert vaes.FAMILIES["z_image"] == vaes.FAMILIES["flux1"]
    torch.manual_seed(0)
    latent = torch.randn(1, 16, 2, 3)
    assert torch.equal(latent_format("z_image").process_out(latent), latent_format("flux1").process_out(latent))


def counted(tensors):
    """Single numbers, which the host copies, with memory."""
    return {name: torch.tensor(0.0) if t.ndim == 0 else t for name, t in tensors.items()}


@pytest.mark.parametrize("family", vaes.FAMILIES)
def test_published_sizes_are_what_the_hosts_constructor_makes(family):
    """Names and shapes only, without memory: diffusers' tensors of the published sizes, renamed, fill the host's VAE."""
    with torch.device("meta"):
        model = vaes.empty(family, **vaes.PUBLISHED[family])
    known = by_class_name(vaes.FAMILIES[family][0])
    plan = known.plan(json.loads(model.to_json_string()))
    assert plan.inferred
    native = plan.native(model.state_dict())
    with host.without_memory():
        loaded = host.load_vae(counted(plan.join(native)) | plan.made(), None, plan.metadata, plan.marks)

    def shapes(tensors):
        return {name: t.shape for name, t in tensors.items() if not name.endswith(vae.UNREAD)}

    there = shapes(loaded.first_stage_model.state_dict())
    assert there == shapes(plan.join(native) | plan.made()) == shapes(host.vae_tensors(plan.kind, plan.sizes))
    assert there == shapes(host.vae_tensors(plan.kind, plan.published)) or plan.kind == "wan21"


@pytest.mark.parametrize("family", vaes.FAMILIES)
def test_other_sizes_are_run_like_the_published(family, bases):
    """Ratios, channels and conventions of the tiny VAE are those the host's constructor sets for the published one."""
    loaded = load(bases(family)[0]).vae
    with torch.device("meta"):
        model = vaes.empty(family, **vaes.PUBLISHED[family])
    plan = by_class_name(vaes.FAMILIES[family][0]).plan(json.loads(model.to_json_string()))
    with host.without_memory():
        published = host.load_vae(counted(plan.join(plan.native(model.state_dict()))) | plan.made(), "float32", plan.metadata, plan.marks)
    assert vars(loaded).keys() == vars(published).keys()
    changed = {"first_stage_model", "patcher", "size"}
    for key in vars(loaded).keys() - changed:
        mine, theirs = getattr(loaded, key), getattr(published, key)
        if isinstance(mine, tuple):
            mine, theirs = ([f(64) if callable(f) else f for f in x] for x in (mine, theirs))
        elif callable(mine):
            continue
        assert mine == theirs, key
    assert loaded.patcher.load_device == published.patcher.load_device
    assert loaded.patcher.offload_device == published.patcher.offload_device
    assert type(loaded.first_stage_model) is type(published.first_stage_model)
    assert not loaded.first_stage_model.training


@pytest.mark.parametrize("family", vaes.FAMILIES)
def test_renaming_copies_nothing(family, bases):
    _, model = bases(family)
    stored = model.state_dict()
    native = by_class_name(type(model).__name__).plan(json.loads(model.to_json_string())).native(stored)
    assert [t.data_ptr() for t in native.values()] == [t.data_ptr() for t in stored.values()]


# What is refused -----------------------------------------------------------------------------------------------------


def refused(message, folder, dtype="fp32"):
    with pytest.raises(CheckpointError) as caught:
        load(folder, dtype)
    assert message in str(caught.value) and "what to do:" in str(caught.value), str(caught.value)
    return str(caught.value)


def edited(bases, family, tmp_path, config=None, change=None):
    """A copy of a base with other values in config.json, or tensors that `change` was let loose on."""
    folder = shutil.copytree(bases(family)[0], tmp_path / "edited", dirs_exist_ok=True)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    if change:
        file = next((folder / "vae").glob("*.safetensors"))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    return folder


SOME = {"ltx": "decoder.up_blocks.1.upsamplers.0.conv.conv.weight", "ltx2": "latents_std",
        "hunyuan_image": "decoder.up_blocks.3.conv.weight", "hunyuan_video_15": "encoder.mid_block.attentions.0.to_k.weight",
        "mochi": "encoder.down_blocks.1.attentions.2.to_k.weight", "cosmos": "decoder.mid_block.temp_attentions.0.to_v.weight", "cogvideox": "decoder.norm_out.conv_b.conv.weight",
        "flux1": "decoder.up_blocks.2.resnets.1.conv2.weight", "flux2": "bn.running_var",
        "wan": "decoder.up_blocks.0.upsamplers.0.time_conv.weight", "wan22": "encoder.down_blocks.1.downsampler.time_conv.bias",
        "hunyuan_video": "encoder.mid_block.attentions.0.to_k.weight", "qwen_image": "decoder.norm_out.gamma"}


@pytest.mark.parametrize("family", SOME)
def test_damaged_tensors(family, bases, tmp_path):
    name = SOME[family]

    def grow(tensors):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    refused("missing", edited(bases, family, tmp_path / "1", change=lambda t: t.pop(name)))
    text = refused("unused decoder.extra.weight", edited(bases, family, tmp_path / "2", change=lambda t: t.update(
        {"decoder.extra.weight": torch.zeros(2)})))
    assert "missing -" in text
    assert name in refused("of another shape", edited(bases, family, tmp_path / "3", change=grow))
    codes = {name: torch.zeros(bases(family)[1].state_dict()[name].shape, dtype=torch.int8)}
    assert name in refused("stored as I8", edited(bases, family, tmp_path / "4", change=lambda t: t.update(codes)))


def test_the_first_ten_are_named(bases, tmp_path):
    many = {f"surplus.{i:02}": torch.zeros(1) for i in range(12)}
    text = refused("surplus.09, and 2 more", edited(bases, "flux1", tmp_path, change=lambda t: t.update(many)))
    assert "surplus.10" not in text


def test_the_counter_of_a_batch_norm_need_not_be_stored(bases, tmp_path):
    folder = edited(bases, "flux2", tmp_path, change=lambda t: t.pop("bn.num_batches_tracked"))
    assert load(folder).vae


MEAN = [*vaes.WAN22_MEAN[:47], 0.0]


@pytest.mark.parametrize(("family", "config", "message"), [
    ("flux1", {"scaling_factor": 1.5305}, "does not belong to Stable Diffusion 3"),
    ("cogvideox", {"scaling_factor": 0.5}, "does not belong to CogVideoX"),
    ("ltx", {"scaling_factor": 0.5}, "scaling_factor 1.0 only"),
    ("ltx", {"decoder_spatio_temporal_scaling": [True, True, False, False]}, "a latent is 1/32 of the picture"),
    ("flux1", {"shift_factor": None}, "shift is 0 in channel 0"),
    ("flux1", {"scaling_factor": None}, "scale is 5.48"),  # diffusers' default is SD1's
    ("flux1", {"latent_channels": 4}, "does not belong to SDXL"),
    ("sdxl", {"scaling_factor": 0.5}, "does not belong to SDXL"),
    ("sdxl", {"shift_factor": 0.1}, "shift is 0.1 in channel 0"),
    ("flux1", {"scaling_factor": "big"}, "scaling_factor is 'big', expected a number"),
    ("hunyuan_video", {"scaling_factor": 0.4}, "scale is 2.5 "),
    ("wan", {"latents_std": [1.0] * 16}, "scale is 1 in channel 0"),
    ("wan", {"latents_mean": [0.0] * 15}, "no list of 16"),
    ("wan22", {"latents_mean": MEAN}, "shift is 0 in channel 47"),
    ("wan22", {"latents_mean": None, "latents_std": None}, "no latents_mean"),
    ("mochi", {"latents_std": [1.0] * 12}, "scale is 1 in channel 0"),
    ("qwen_image", {"latents_mean": [0.0] * 16}, "shift is 0 in channel 0"),
])
def test_latents_that_the_model_would_scale_otherwise(family, config, message, bases, tmp_path):
    refused(message, edited(bases, family, tmp_path, config))


@pytest.mark.parametrize(("family", "config", "message"), [
    ("flux1", {"_class_name": "AutoencoderDC"}, "AutoencoderDC"),
    ("flux1", {"_class_name": "FluxTransformer2DModel"}, "supported: AutoencoderKL"),
    ("wan", {"_class_name": "AutoencoderKL"}, "latents_mean none"),
    ("flux1", {"norm_num_groups": 16}, "norm_num_groups 32 only"),
    ("flux1", {"act_fn": "relu"}, "act_fn silu only"),
    ("flux1", {"latent_channels": 8}, "latent_channels is 8"),
    ("sdxl", {"use_quant_conv": False}, "both or none"),
    ("sdxl", {"latents_mean": [0.0] * 4}, "latents_mean none"),
    ("flux1", {"latents_mean": [0.0] * 16}, "latents_mean"),
    ("flux1", {"use_quant_conv": True}, "both or none"),
    ("flux1", {"block_out_channels": [32, 64, 96]}, "four levels"),
    ("flux1", {"block_out_channels": [64, 96, 128, 128]}, "multiples"),
    ("flux1", {"brand_new": 3}, "brand_new 3"),
    ("flux2", {"batch_norm_eps": 1e-5}, "batch_norm_eps 0.0001 only"),
    ("flux2", {"patch_size": [1, 1]}, "patch_size [2, 2] only"),
    ("wan", {"decoder_base_dim": 24}, "one for both"),
    ("wan", {"temperal_downsample": [True, True, False]}, "temperal_downsample"),
    ("wan", {"z_dim": 48}, "z_dim 48"),
    ("wan", {"base_dim": "wide"}, "base_dim is 'wide', expected a whole number"),
    ("wan22", {"is_residual": False}, "z_dim 48"),
    ("wan22", {"patch_size": 4}, "patch_size 4"),
    ("mochi", {"encoder_block_out_channels": [32, 64, 64, 128]}, "different widths"),
    ("mochi", {"layers_per_block": [3, 3, 4, 6, 2]}, "layers_per_block [3, 3, 4, 6, 3] only"),
    ("hunyuan_video", {"temporal_compression_ratio": 8}, "temporal_compression_ratio 4 only"),
])
def test_settings_that_comfyui_would_not_honour(family, config, message, bases, tmp_path):
    refused(message, edited(bases, family, tmp_path, config))


def test_settings_without_effect(bases, tmp_path):
    """Deprecated keys, and those another version of diffusers adds and leaves off."""
    config = {"clip_output": False, "_name_or_path": "x", "new_switch": False, "new_value": None}
    assert load(edited(bases, "wan22", tmp_path, config)).vae


# References, files, dtypes -------------------------------------------------------------------------------------------


def test_references(bases, tmp_path):
    """A base, its vae folder, an index and a native file are the same VAE."""
    folder, model = bases("wan")
    expected = load(folder).vae
    vaes.save("wan", tmp_path, model, max_shard_size="2MB")
    native = tmp_path / "native.safetensors"
    save_file({k: v.contiguous() for k, v in expected.get_sd().items()}, native)
    latent = sampler_latent(expected, 1)
    for reference in (folder / "vae", next((tmp_path / "vae").glob("*.index.json")), native):
        assert torch.equal(load(reference).vae.decode(latent), expected.decode(latent)), reference


def test_other_references(bases, tmp_path):
    folder, _ = bases("wan")
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioPipeline", "vae": [null, null]}')
    refused("AudioPipeline) has no vae", tmp_path)
    (tmp_path / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKLWan"]}')
    refused("no vae on disk", tmp_path)
    assert '--include "vae/*"' in refused("is not on this machine", "owner/never-heard-of-vae")
    refused("with its config.json", next((folder / "vae").glob("*.safetensors")))  # diffusers' names, without config
    native = tmp_path / "native.safetensors"
    tensors = {k: v.contiguous() for k, v in load(folder).vae.get_sd().items()}
    save_file({**tensors, "decoder.extra": torch.zeros(2)}, native)
    refused("unused decoder.extra", native)
    save_file({k: v for k, v in tensors.items() if k != "conv2.bias"}, native)
    refused("missing conv2.bias", native)
    save_file({**tensors, "conv2.bias": torch.zeros(3)}, native)
    refused("size mismatch for conv2.bias", native)


@pytest.mark.parametrize("family", ["flux1", "wan"])  # through both ways into the host
def test_dtype(family, bases):
    folder, model = bases(family)
    latent = sampler_latent(load(folder).vae, 1)
    expected = vaes.diffusers_decode(model, latent) - 0.5
    errors = {}
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        loaded = load(folder, dtype)
        assert {p.dtype for p in loaded.vae.first_stage_model.parameters()} == {kind} == {loaded.vae.vae_dtype}
        assert f"runs in {str(kind).removeprefix('torch.')}" in loaded.report
        assert ("would not choose" in loaded.report) == (dtype == "fp16" and family == "flux1")
        errors[dtype] = common.rel_l2(loaded.vae.decode(latent_format(family).process_out(latent)) - 0.5, expected)
    # roundings of 2^-9 and 2^-12 in some 60 layers
    assert errors["fp32"] < SAME < errors["fp16"] < 0.01 and errors["fp16"] < errors["bf16"] < 0.1, errors
    default = load(folder, "default").vae
    assert default.vae_dtype == torch.float32  # what the host picks for this CPU


@pytest.mark.parametrize("family", ["flux1", "wan"])
def test_the_host_can_load_it_again(family, bases):
    loaded = load(bases(family)[0]).vae
    factory, arguments = loaded.patcher.cached_patcher_init
    for again in (factory(*arguments, disable_dynamic=True), loaded.patcher.deepclone_multigpu(torch.device("cpu"))):
        theirs = again.model.state_dict()
        for name, tensor in loaded.first_stage_model.state_dict().items():
            assert torch.equal(theirs[name], tensor) and theirs[name].data_ptr() != tensor.data_ptr()


def test_node(bases):
    folder, model = bases("qwen_image")
    loaded, report = QT_LoadBaseVAE.execute(base_model="nothing", reference=str(folder), dtype="fp32").args
    assert max(agrees(loaded, model, "qwen_image")) < SAME
    assert "VAE of Qwen-Image · AutoencoderKLQwenImage" in report and "16 channels, 1/8 of width and height" in report
    assert "128 channels, 1/16 of width and height" in QT_LoadBaseVAE.execute(str(bases("flux2")[0])).args[1]
    inputs = [i.id for i in QT_LoadBaseVAE.define_schema().inputs]
    assert inputs == ["base_model", "reference", "dtype", "revision", "download_missing"]


def test_fingerprint_follows_the_files(bases, tmp_path):
    folder = edited(bases, "wan", tmp_path)
    before = QT_LoadBaseVAE.fingerprint_inputs(str(folder))
    assert before == QT_LoadBaseVAE.fingerprint_inputs(str(folder)) != QT_LoadBaseVAE.fingerprint_inputs(str(folder), dtype="bf16")
    file = next((folder / "vae").glob("*.safetensors"))
    file.touch()
    touched = QT_LoadBaseVAE.fingerprint_inputs(str(folder))
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text("{}")
    assert touched not in (before, "") and touched == QT_LoadBaseVAE.fingerprint_inputs(str(folder))
    shutil.rmtree(folder / "vae")
    assert QT_LoadBaseVAE.fingerprint_inputs(str(folder)) != touched
