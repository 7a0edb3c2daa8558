"""LTX-2's VAE of sound with both kinds of vocoders, against diffusers' two components. In fp32 on the CPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders.components import vae
from quantized_transformers.loaders.errors import CheckpointError, MissingFiles
from quantized_transformers.nodes.load_parts import QT_LoadBaseVAE
from support import common
from support.downloads import environment
from support.hub import FakeRepo, Hub
from support.pack import PACK

pytest.importorskip("diffusers.pipelines.ltx2.vocoder")
pytestmark = pytest.mark.parity

SAME = 1e-5
PLAIN = {"hidden_channels": 32, "upsample_kernel_sizes": [16, 15], "upsample_factors": [6, 5], "resnet_kernel_sizes": [3, 7],
         "resnet_dilations": [[1, 3, 5], [1, 2, 4]]}
FIRST = {**PLAIN, "upsample_factors": [16, 5]}  # 80 values, which the second takes at once
SECOND = {**PLAIN, "hidden_channels": 16, "upsample_kernel_sizes": [32, 31], "upsample_factors": [16, 15]}
VOCODERS = {"LTX2Vocoder": PLAIN, "LTX2VocoderWithBWE": {**FIRST, **{f"bwe_{key}": value for key, value in SECOND.items()}}}
FRAMES = 9


def seeded(model):
    """Weights of a size that keeps a wave within -1..1, and trained statistics."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.randn(tensor.shape) * (0.1 if tensor.ndim == 1 else tensor[0].numel() ** -0.5))
            if "conv_out" in name:
                tensor.mul_(0.03 if hasattr(model, "bwe_generator") else 0.1)
        for name, tensor in model.named_buffers():
            if name == "latents_std":
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
            elif name == "latents_mean" or "basis" in name:
                tensor.copy_(torch.randn(tensor.shape) * 0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=VOCODERS)
def pipeline(request, tmp_path_factory):
    """(its folder, diffusers' VAE, diffusers' vocoder)"""
    from diffusers import AutoencoderKLLTX2Audio
    from diffusers.pipelines.ltx2 import vocoder

    folder = tmp_path_factory.mktemp("sound")
    audio = seeded(AutoencoderKLLTX2Audio(ch_mult=(1, 2, 2), num_res_blocks=1))
    voice = seeded(getattr(vocoder, request.param)(**VOCODERS[request.param]))
    audio.save_pretrained(folder / "audio_vae")
    voice.save_pretrained(folder / "vocoder")
    index = {"_class_name": "LTX2Pipeline", "audio_vae": ["diffusers", "AutoencoderKLLTX2Audio"], "vocoder": ["ltx2", request.param]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder, audio, voice


def load(folder):
    return vae.load(vae.Request(str(folder), dtype="fp32"))


def wave(audio, voice, latents):
    """As pipeline_ltx2.py decodes what a sampler leaves."""
    from diffusers import LTX2Pipeline as Pipeline

    packed = Pipeline._denormalize_audio_latents(Pipeline._pack_audio_latents(latents), audio.latents_mean, audio.latents_std)
    return voice(audio.decode(Pipeline._unpack_audio_latents(packed, latents.shape[2], latents.shape[3])).sample)


@torch.inference_mode()
def test_sound_and_latents_are_those_of_diffusers(pipeline):
    """By ComfyUI's own node; and the encoder's, of a spectrogram."""
    from comfy_extras.nodes_lt_audio import LTXVAudioVAEDecode
    from diffusers import LTX2Pipeline as Pipeline

    folder, audio, voice = pipeline
    loaded, report = QT_LoadBaseVAE.execute(base_model=str(folder / "audio_vae"), dtype="fp32").args
    latents = torch.randn(1, 8, FRAMES, 16, generator=torch.Generator().manual_seed(1))
    expected = wave(audio, voice, latents)
    made, = LTXVAudioVAEDecode.execute(samples={"samples": latents, "type": "audio"}, audio_vae=loaded).args
    assert made["sample_rate"] == voice.config.output_sampling_rate and made["waveform"].shape == expected.shape
    assert expected.std() > 0.01 and (expected.abs() < 0.99).float().mean() > 0.99  # nothing is hidden by its end
    assert common.rel_l2(made["waveform"], expected) < SAME
    spectrogram = torch.randn(1, 2, 4 * FRAMES - 3, 64, generator=torch.Generator().manual_seed(2))
    mean = audio.encode(spectrogram).latent_dist.mode()
    own = loaded.first_stage_model
    assert common.rel_l2(own.autoencoder.encode(spectrogram).chunk(2, 1)[0], mean) < SAME
    packed = Pipeline._normalize_audio_latents(Pipeline._pack_audio_latents(mean), audio.latents_mean, audio.latents_std)
    assert common.rel_l2(own.normalizer.normalize(mean), Pipeline._unpack_audio_latents(packed, mean.shape[2], 16)) < SAME
    assert f"sound of {voice.config.output_sampling_rate} Hz" in report and "with: vocoder" in report


def test_it_is_loaded_again_and_followed(pipeline):
    folder, _, _ = pipeline
    loaded = load(folder / "audio_vae").vae
    factory, arguments = loaded.patcher.cached_patcher_init
    again = factory(*arguments).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.first_stage_model.state_dict().items())
    before = QT_LoadBaseVAE.fingerprint_inputs(str(folder / "audio_vae"))
    next((folder / "vocoder").glob("*.safetensors")).touch()
    assert QT_LoadBaseVAE.fingerprint_inputs(str(folder / "audio_vae")) != before


def test_without_its_vocoder(pipeline, tmp_path):
    shutil.copytree(pipeline[0] / "audio_vae", tmp_path / "audio_vae")
    with pytest.raises(MissingFiles):
        load(tmp_path / "audio_vae")


@pytest.mark.parametrize("part", ["audio_vae", "vocoder"])
@pytest.mark.parametrize("change", [lambda t: t.popitem(), lambda t: t.update(more=torch.zeros(2)),
                                    lambda t: t.update({max(t): t[max(t)][:-1].contiguous()})], ids=["missing", "more", "cut"])
def test_damaged_tensors(pipeline, part, change, tmp_path):
    folder = shutil.copytree(pipeline[0], tmp_path / "damaged")
    file, = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="the tensors are not those of config.json|tensors of another shape"):
        load(folder / "audio_vae")


@pytest.mark.parametrize("part, change, words", [
    ("audio_vae", {"norm_type": "group"}, "norm_type"), ("audio_vae", {"mel_bins": 32}, "ComfyUI has 8 and 64"),
    ("audio_vae", {"a_new_option": 3}, "a_new_option"), ("vocoder", {"a_new_option": 3}, "a_new_option"),
    ("vocoder", {"act_fn": "snake"}, "act_fn 'snake'"), ("vocoder", {"in_channels": 64}, "in_channels"),
    ("vocoder", {"resnet_kernel_sizes": [4, 7]}, "kernels of odd sizes"),
    ("vocoder", {"_class_name": "Another"}, "of Another, expected LTX2Vocoder")])
def test_what_comfyui_does_not_run(pipeline, part, change, words, tmp_path):
    folder = shutil.copytree(pipeline[0], tmp_path / "changed")
    config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    (folder / part / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(CheckpointError, match=words):
        load(folder / "audio_vae")


@pytest.mark.parametrize("pipeline", ["LTX2VocoderWithBWE"], indirect=True)
@pytest.mark.parametrize("change, words", [({"bwe_final_act_fn": "tanh"}, "nothing at its end"), ({"window_length": 256}, "windows"),
                                           ({"hop_length": 40}, "bwe_upsample_factors")])
def test_a_second_vocoder_that_comfyui_does_not_run(pipeline, change, words, tmp_path):
    test_what_comfyui_does_not_run(pipeline, "vocoder", change, words, tmp_path)


def test_a_download_brings_both(pipeline, tmp_path):
    probe = ("import sys; sys.argv = ['x']; sys.path.insert(0, {tests!r})\n"
             "from support.pack import start_comfy; start_comfy()\n"
             "from quantized_transformers.loaders.components import vae\n"
             "print(vae.load(vae.Request('owner/sound/audio_vae', download=True)).report)\n")
    repo = FakeRepo.of(pipeline[0])
    repo.files["vae/config.json"] = b"{}"
    with Hub({"owner/sound": repo}) as hub:
        done = subprocess.run([sys.executable, "-c", probe.format(tests=str(PACK / "tests"))], text=True, capture_output=True,
                              env=environment(hub, tmp_path), check=False)
        assert done.returncode == 0 and "VAE of LTX-2 (sound)" in done.stdout, done.stderr
        assert not hub.asked_for("/vae/config.json")
