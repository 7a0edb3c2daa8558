"""Text encoders and VAE out of whole checkpoints, which the host's own save node writes here: of tiny models, whose sizes
the host has in its code, so that it is told others while it loads (`sized`)."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers import host
from quantized_transformers.loaders import model
from quantized_transformers.loaders.components import text_encoder, vae, whole_text_encoders
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.nodes.load_parts import QT_LoadBaseTextEncoder
from quantized_transformers.quant.marker import marker
from support import common, flux, host_models, vaes
from support import text_encoders as tiny

pytestmark = pytest.mark.parity

PROMPT = "a red cat, running over the old river"
TRANSFORMER, ENCODERS, VAE = "model.diffusion_model.", "text_encoders.", "vae."
SIZES = {"clip_l": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
         "clip_g": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3},
         "clip_h": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3},
         "t5xxl": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4}}
OPTIONS = {f"{name}_model_config": sizes for name, sizes in SIZES.items()}


@contextlib.contextmanager
def sized(options=OPTIONS):
    """Sizes of the tiny encoders, where the host has those of the published ones in its code."""
    import comfy.sd

    theirs = comfy.sd.load_state_dict_guess_config
    def loads(sd, *args, te_model_options=None, **kwargs):
        return theirs(sd, *args, te_model_options={**(te_model_options or {}), **options}, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.sd, "load_state_dict_guess_config", loads)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole FLUX.1 checkpoint as ComfyUI saves it, with the CLIP and the VAE it is made of."""
    import comfy.sd

    root = tmp_path_factory.mktemp("whole")
    flux.make().to(torch.bfloat16).save_pretrained(root / "transformer")
    parts = model.load(model.Request(str(root / "transformer"), dtype="bf16"), quiet=True).patcher
    clip = text_encoder.load(text_encoder.Request(str(tiny.base("flux1", root / "texts")))).clip
    kind = vaes.make("flux1", **vaes.PUBLISHED["flux1"]).to(torch.bfloat16)
    pictures = vae.load(vae.Request(str(vaes.save_base("flux1", root / "pictures", kind)), dtype="bf16")).vae
    comfy.sd.save_checkpoint(str(root / "whole.safetensors"), parts, clip, pictures)
    return root / "whole.safetensors", clip, pictures


def load_clip(path, **options):
    with sized():
        return text_encoder.load(text_encoder.Request(str(path), **options))


def encode(clip):
    ((states, rest),) = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    return torch.cat([states.flatten(), rest["pooled_output"].flatten()])


def changed(path, folder, change):
    """A copy of a file with other tensors: `change` is given them, and leaves the new ones."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, folder / "changed.safetensors")
    return folder / "changed.safetensors"


def test_what_was_saved_is_loaded(whole):
    """Parameter by parameter, and a text: weights and tokens are those of the base that diffusers' own encode_prompt
    agrees with (test_text_encoders.py), but for its longer padding, which is no matter of the file."""
    path, clip, pictures = whole
    assert {name.split(".")[0] for name in load_file(path)} == {"model", "text_encoders", "vae"}
    loaded = load_clip(path)
    clip = clip.clone()
    clip.tokenizer_options = {}
    before, after = clip.cond_stage_model.state_dict(), loaded.clip.cond_stage_model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(encode(loaded.clip), encode(clip))
    assert "whole checkpoint of Flux" in loaded.report and "clip_l: " in loaded.report and "note" not in loaded.report, loaded.report
    made = vae.load(vae.Request(str(path), dtype="bf16"))
    latent = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(made.vae.decode(latent), pictures.decode(latent))
    assert "of a whole checkpoint of Flux" in made.report


def test_by_the_hosts_own_loader(whole):
    """The same numbers as ComfyUI's checkpoint loader."""
    import comfy.sd

    path, *_ = whole
    with sized():
        _, clip, _, _ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_model=False)
    assert torch.equal(encode(load_clip(path).clip), encode(clip))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["SD 1.5", "SD 2", "SDXL", "SDXL Refiner"])
def test_checkpoints_of_stable_diffusion(name, dtype, tmp_path):
    """The names they are published with, other ones than the host's: q, k and v in one, projections transposed. What the
    host saves of encoders of its own classes comes back number by number, as its own loader has it."""
    import comfy.sd
    import comfy.supported_models

    unet = host_models.make(name)
    options = OPTIONS | {"clip_l_model_config": SIZES["clip_l"] | {"num_hidden_layers": 12}}  # the 11th is asked for
    with host_models.detected(name), sized(options):
        config = type(comfy.sd.load_diffusion_model_state_dict(dict(unet)).model.model_config)
        config = config(dict(config.unet_config))
        target = config.clip_target(state_dict={})
        net = target.clip(**target.params, device="cpu", dtype=torch.float32, model_options=options)
        g = torch.Generator().manual_seed(2)
        made = {key: (torch.randn(tensor.shape, generator=g) * 0.2).to(dtype).float() for key, tensor in net.state_dict().items()}
        texts = config.process_clip_state_dict_for_saving(dict(made))
        company = {"first_stage_model.decoder.conv_in.weight": torch.ones(4, 4)}
        tensors = {f"{TRANSFORMER}{key}": tensor for key, tensor in unet.items()} | company
        tensors |= {key: tensor.to(dtype).contiguous() for key, tensor in texts.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        loaded = text_encoder.load(text_encoder.Request(str(tmp_path / "model.safetensors"), dtype="fp32"))
        _, stock, _, _ = comfy.sd.load_checkpoint_guess_config(str(tmp_path / "model.safetensors"), output_vae=False,
                                                               output_model=False)
    found = loaded.clip.cond_stage_model.state_dict()
    unread = [key for key in made if key.endswith("logit_scale") or key == "clip_l.transformer.text_projection.weight"]
    assert all(torch.equal(found[key].float(), made[key]) for key in made.keys() - unread) and found.keys() == made.keys()
    assert common.rel_l2(encode(loaded.clip), encode(stock)) < 1e-5 and "note" not in loaded.report


def renamed(tensors, old, new):
    for name in [name for name in tensors if name.startswith(old)]:
        tensors[new + name.removeprefix(old)] = tensors.pop(name)


def in_fp8(tensors, leaf, marked, part=f"{ENCODERS}t5xxl.", truth=False):
    """T5's layers as FP8 with scales: `leaf` is what they are called. `truth`: what they mean instead, in F32."""
    for name in [name for name in tensors if name.startswith(part) and name.endswith((".k.weight", ".wi_0.weight"))]:
        layer, scale = name.removesuffix(".weight"), tensors[name].float().abs().max() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        if truth:
            tensors[name] = tensors[name].float() * scale
            continue
        tensors[f"{layer}.{leaf}"] = scale
        if marked:
            tensors[f"{layer}.comfy_quant"] = marker({"format": "float8_e4m3fn"})
    if leaf == "scale_weight" and not truth:
        tensors[f"{part}transformer.scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("leaf", ["scale_weight", "weight_scale"])
def test_scaled_fp8(leaf, whole, tmp_path):
    """In ComfyUI's first and in its present form: the numbers times their scales."""
    (tmp_path / "truth").mkdir()
    path = changed(whole[0], tmp_path, lambda tensors: in_fp8(tensors, leaf, leaf == "weight_scale"))
    truth = changed(whole[0], tmp_path / "truth", lambda tensors: in_fp8(tensors, leaf, False, truth=True))
    loaded = load_clip(path, dtype="fp32")
    assert "F8_E4M3" in loaded.report and common.rel_l2(encode(loaded.clip), encode(load_clip(truth, dtype="fp32").clip)) < 1e-5


def test_fp8_casts(whole, tmp_path):
    """What Comfy-Org publishes: T5 as FP8 numbers that mean themselves; and a VAE of such numbers."""
    def cast(tensors):
        for name in tensors:
            if name.startswith((f"{ENCODERS}t5xxl.", VAE)) and tensors[name].ndim > 1:
                tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    def rounded(tensors):
        cast(tensors)
        tensors.update({name: t.to(torch.bfloat16) for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn})

    (tmp_path / "plain").mkdir()
    path, plain = changed(whole[0], tmp_path, cast), changed(whole[0], tmp_path / "plain", rounded)
    assert common.rel_l2(encode(load_clip(path).clip), encode(load_clip(plain).clip)) < 1e-5
    latent = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(1))
    one, two = (vae.load(vae.Request(str(p), dtype="fp32")) for p in (path, plain))
    assert torch.equal(one.vae.decode(latent), two.vae.decode(latent)) and "stored as BF16, F8_E4M3" in one.report


CHANGES = {
    "a layer is missing": (lambda t: t.pop(f"{ENCODERS}t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q.weight"),
                           "missing t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q.weight"),
    "an encoder is missing": (lambda t: [t.pop(name) for name in list(t) if "clip_l" in name], "missing clip_l"),
    "a scale that nobody multiplies by": (lambda t: in_fp8(t, "weight_scale", False), r"unused t5xxl.*weight_scale"),
    "no text encoders": (lambda t: [t.pop(name) for name in list(t) if name.startswith(ENCODERS)], "no text encoders in"),
    "no whole checkpoint": (lambda t: [t.pop(name) for name in list(t) if not name.startswith(TRANSFORMER)],
                            "no whole checkpoint with text"),
    "another width": (lambda t: t.update({f"{ENCODERS}t5xxl.transformer.encoder.final_layer_norm.weight": torch.ones(65)}),
                      "cannot load these text encoders"),
    "a transformer that nobody knows": (lambda t: renamed(t, f"{TRANSFORMER}double_blocks", f"{TRANSFORMER}twin_blocks"),
                                        "does not know the model|cannot find the parts")}


@pytest.mark.parametrize("what", CHANGES)
def test_refused(what, whole, tmp_path):
    change, message = CHANGES[what]
    path = changed(whole[0], tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_clip(path)
    assert str(path) in str(error.value)


VAE_CHANGES = {
    "a layer is missing": (lambda t: t.pop(f"{VAE}decoder.mid.block_1.conv1.weight"), "missing decoder.mid.block_1"),
    "a scale": (lambda t: t.update({f"{VAE}decoder.mid.block_1.conv1.weight_scale": torch.tensor(2.0)}), "unused decoder"),
    "codes": (lambda t: t.update({f"{VAE}decoder.mid.block_1.conv1.weight": torch.ones(512, 512, 3, 3, dtype=torch.int8)}),
              "stored as I8"),
    "no VAE": (lambda t: [t.pop(name) for name in list(t) if name.startswith(VAE)], "no VAE in this checkpoint")}


@pytest.mark.parametrize("what", VAE_CHANGES)
def test_vae_refused(what, whole, tmp_path):
    change, message = VAE_CHANGES[what]
    path = changed(whole[0], tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        vae.load(vae.Request(str(path)))


def test_parts_without_use_are_said(whole, tmp_path):
    path = changed(whole[0], tmp_path, lambda t: t.update({
        f"{ENCODERS}t5xxl.transformer.lm_head.weight": torch.ones(4, 4), f"{ENCODERS}clip_l.logit_scale": torch.ones(())}))
    loaded = load_clip(path)
    assert "left out, as ComfyUI's text encoder has no use for them: 1 tensors (t5xxl.transformer.lm_head.weight)" \
        in loaded.report


def test_dtype_reload_and_node(whole):
    path = str(whole[0])
    loaded = load_clip(path, dtype="fp32")
    assert "kept in float32" in loaded.report and "kept in bfloat16" not in loaded.report
    make, arguments = loaded.clip.patcher.cached_patcher_init[:2]
    with sized():
        again = make(*arguments)
        clip, report = QT_LoadBaseTextEncoder.execute(path, dtype="fp32").result
    assert report == loaded.report and torch.equal(encode(clip), encode(loaded.clip))
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), loaded.clip.patcher.model.state_dict().values(),
                                                 strict=True))
    first = QT_LoadBaseTextEncoder.fingerprint_inputs(path)
    assert first == QT_LoadBaseTextEncoder.fingerprint_inputs(path) != QT_LoadBaseTextEncoder.fingerprint_inputs(f"{path}x")


def test_shards_and_quantized_transformers(whole, tmp_path):
    """An index of shards is as good, and the transformer's format is of no account."""
    tensors = load_file(whole[0])
    for name in [name for name in tensors if name.startswith(f"{TRANSFORMER}single_blocks") and name.endswith("linear1.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".scale_weight")] = torch.tensor(2.0)
    tensors[f"{TRANSFORMER}scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    names = sorted(tensors)
    parts = {"whole-00001-of-00002.safetensors": names[::2], "whole-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = tmp_path / "whole.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}}))
    assert torch.equal(encode(load_clip(index).clip), encode(load_clip(whole[0]).clip))
    assert vae.load(vae.Request(str(index))).vae is not None


def test_badges(whole, tmp_path):
    """What the nodes' badges say of the file: of the part that the node takes, from headers."""
    from quantized_transformers.loaders.queries import Query
    from quantized_transformers.views.card import card

    tensors = load_file(whole[0])
    for node, prefix in (("QT_LoadBaseTextEncoder", ENCODERS), ("QT_LoadBaseVAE", VAE)):
        said = card(Query(str(whole[0]), node=node))
        assert said["size"] == sum(t.nbytes for name, t in tensors.items() if name.startswith(prefix)) and not said["problems"]
        assert said["architecture"] == "whole checkpoint" and said["family"] == "BF16"
    path = changed(whole[0], tmp_path, lambda t: [t.pop(name) for name in list(t) if name.startswith(VAE)])
    assert "no part of this checkpoint" in card(Query(str(path), node="QT_LoadBaseVAE"))["problems"][0]
    assert card(Query(str(path)))["architecture"] == "FLUX.1"


def test_the_hosts_names_of_every_model():
    """The text encoders of every class of the host's that has some, without memory: what it saves of them is what it asks
    for again, and nothing of that is taken for missing, left over or of no use."""
    import comfy.sd  # noqa: F401  # which imports all the text encoders
    import comfy.supported_models

    checked = 0
    for kind in comfy.supported_models.models:
        if kind.__name__ in host.NO_DIFFUSION or kind.__name__ == "ACEStep15":  # the latter wants to see tensors
            continue
        config = kind({**dict.fromkeys(("hidden_size", "dim", "context_in_dim"), 4096), "context_dim": None, **kind.unet_config})
        target = config.clip_target(state_dict={})
        net = target.clip(**target.params, device="meta", dtype=torch.bfloat16, model_options={}) if target else None
        there = net.state_dict() if target else {}
        if there:
            stored = config.process_clip_state_dict_for_saving(dict(there))
            given = whole_text_encoders._by_name(config.process_clip_state_dict(dict(stored)))
            assert whole_text_encoders._check(given.keys(), set(whole_text_encoders._by_name(there)), kind.__name__) == []
            assert len(given) > 0.95 * len(there)
            checked += 1
    assert checked > 50
