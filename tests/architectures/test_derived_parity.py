"""Models by derived tables, in F32 on the CPU, against diffusers' own forward; and bases without weights."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures.diffusers_classes import DERIVED
from quantized_transformers.loaders.errors import CheckpointError
from support import common, host_models
from support.passthrough import load

pytestmark = pytest.mark.parity

SIGMA = torch.tensor([0.5])


def noise(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def patches(x):
    """[B, C, H, W] -> tokens of 2 x 2, [B, HW/4, 4C]."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def pictures(tokens, h, w):
    b, _, c = tokens.shape
    return tokens.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def grid(h, w):
    return torch.stack([torch.zeros(h, w), torch.arange(h)[:, None].expand(h, w), torch.arange(w).expand(h, w)], -1).reshape(-1, 3).float()


def sd3(net, x, text, pooled):
    return net(x, text, pooled, SIGMA * 1000, return_dict=False)[0]


def ltxv(net, x, text):
    b, c, f, h, w = x.shape
    out = net(x.flatten(2).transpose(1, 2), text, SIGMA * 1000, torch.ones(b, text.shape[1]), f, h, w,
              rope_interpolation_scale=(8 / 25, 32, 32), return_dict=False)[0]
    return out.transpose(1, 2).reshape(b, c, f, h, w)


def vace(net, x, text, context):
    return net(x, SIGMA * 1000, text, control_hidden_states=context, control_hidden_states_scale=torch.ones(2),
               return_dict=False)[0]


def lumina2(net, x, text):
    return -net(x, 1 - SIGMA, text, torch.ones(text.shape[:2], dtype=torch.bool), return_dict=False)[0]


def auraflow(net, x, text):
    return net(x, text, SIGMA, return_dict=False)[0]


def chroma(net, x, text):
    out = net(patches(x), text, SIGMA, img_ids=grid(x.shape[2] // 2, x.shape[3] // 2), txt_ids=torch.zeros(text.shape[1], 3),
              return_dict=False)[0]
    return pictures(out, *x.shape[2:])


def krea2(net, x, text):
    ids = torch.cat([torch.zeros(text.shape[1], 3), grid(x.shape[2] // 2, x.shape[3] // 2)])
    return pictures(net(patches(x), text, SIGMA, ids, return_dict=False)[0], *x.shape[2:])


def picture(width, tokens=7, channels=16):
    return noise(1, channels, 8, 12), noise(1, tokens, width)


# class -> (tiny configuration, host's model of its sizes, diffusers' forward, inputs, what the host is given)
CASES = {
    "Stable Diffusion 3": ({"sample_size": 16, "num_layers": 3, "attention_head_dim": 64, "num_attention_heads": 3,
                            "joint_attention_dim": 64, "caption_projection_dim": 192, "pooled_projection_dim": 32,
                            "pos_embed_max_size": 16, "dual_attention_layers": [0, 1], "qk_norm": "rms_norm"}, "SD3.5 M", sd3,
                           lambda: (*picture(64), noise(1, 32)), lambda x, text, pooled: {"c_crossattn": text, "y": pooled}),
    "LTX-Video": ({"num_attention_heads": 32, "attention_head_dim": 4, "cross_attention_dim": 128, "num_layers": 2,
                   "caption_channels": 4096}, "LTX-Video", ltxv,
                  lambda: (noise(1, 128, 2, 4, 3), noise(1, 7, 4096)),
                  lambda x, text: {"c_crossattn": text, "attention_mask": None, "frame_rate": 25}),
    "Wan VACE": ({"patch_size": [1, 2, 2], "num_attention_heads": 1, "attention_head_dim": 128, "in_channels": 16,
                  "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 256, "num_layers": 4,
                  "vace_layers": [0, 2], "vace_in_channels": 96}, "Wan VACE", vace,
                 lambda: (noise(1, 16, 1, 8, 8), noise(1, 7, 4096), noise(1, 96, 1, 8, 8)),
                 lambda x, text, context: {"c_crossattn": text, "vace_context": context[:, None], "vace_strength": [1.0]}),
    "Lumina 2": ({"hidden_size": 96, "num_layers": 2, "num_refiner_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
                  "axes_dim_rope": [8, 8, 8], "axes_lens": [300, 512, 512], "cap_feat_dim": 64}, "Lumina 2", lumina2,
                 lambda: picture(64), lambda x, text: {"c_crossattn": text, "num_tokens": text.shape[1]}),
    "AuraFlow": ({"sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 32,
                  "num_attention_heads": 4, "joint_attention_dim": 2048, "caption_projection_dim": 128,
                  "pos_embed_max_size": 64}, "AuraFlow", auraflow,
                 lambda: picture(2048, channels=4), lambda x, text: {"c_crossattn": text}),
    "Chroma": ({"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 1,
                "joint_attention_dim": 64, "approximator_hidden_dim": 96, "approximator_layers": 2}, "Chroma", chroma,
               lambda: picture(64), lambda x, text: {"c_crossattn": text, "guidance": torch.zeros(1)}),
    "Krea-2": ({"num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
                "intermediate_size": 768, "text_hidden_dim": 160, "num_text_layers": 3, "text_num_attention_heads": 20,
                "text_num_key_value_heads": 20, "text_intermediate_size": 512}, "Krea-2", krea2,
               lambda: (noise(1, 16, 8, 12), noise(1, 7, 3, 160)), lambda x, text: {"c_crossattn": text.flatten(2)}),
}
DETECTED = [name for name, case in CASES.items() if case[1] not in host_models.FIXED]


def made(title, **others):
    """(a seeded model of diffusers in BF16, the same numbers in F32, whose buffers never were anything else)."""
    import diffusers

    one = next(one for one in DERIVED if one.title == title)
    if not hasattr(diffusers, next(iter(one.classes))):
        assert Version(version("diffusers")) < Version("0.42"), "only older ones know fewer classes"
        pytest.skip("this diffusers has no such class")
    kind, config = getattr(diffusers, next(iter(one.classes))), CASES[title][0] | others
    torch.manual_seed(0)
    stored, net = common.randomise(kind(**config)), kind(**config).eval()
    net.load_state_dict(stored.state_dict())
    return stored, net


@pytest.fixture(scope="module", params=CASES)
def tiny(request, tmp_path_factory):
    """(title, folder, diffusers' model in F32)."""
    title, sizes = request.param, CASES[request.param][1]
    stored, net = made(title)
    folder = tmp_path_factory.mktemp("derived") / "model"
    stored.save_pretrained(folder)
    if sizes in host_models.FIXED:  # where only one size of it is known, which the configuration would have to say
        (folder / "config.json").write_text(f'{{"_class_name": "{type(net).__name__}"}}', encoding="utf-8")
    return title, folder, net


def test_every_class_is_compared():
    assert {one.title for one in DERIVED} == set(CASES)


def test_a_folder_equals_diffusers(tiny):
    title, folder, net = tiny
    _, sizes, run, inputs, conds = CASES[title]
    given = inputs()
    with torch.no_grad():
        expected = run(net, *given)
    with host_models.detected(sizes):
        patcher = load(folder).patcher
    found = common.apply_model(patcher, given[0], SIGMA, **conds(*given))
    worst = (found - expected).abs().max() / expected.abs().max()
    assert worst < 1e-5, worst
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("title", DETECTED)
def test_a_deferred_base_takes_its_weights(title, tmp_path):
    config, _, run, inputs, conds = CASES[title]
    stored, net = made(title)
    stored.save_pretrained(tmp_path / "base")
    stored.save_pretrained(tmp_path / "override")
    next((tmp_path / "base").glob("*.safetensors")).unlink()
    base = model.defer(model.Request(str(tmp_path / "base"), dtype="fp32"))
    given = inputs()
    with pytest.raises(CheckpointError, match="no weights yet"):
        common.apply_model(base.patcher, given[0], SIGMA, **conds(*given))
    loaded = model.override(base.patcher, model.Request(str(tmp_path / "override")))
    with torch.no_grad():
        expected = run(net, *given)
    found = common.apply_model(loaded.patcher, given[0], SIGMA, **conds(*given))
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5
    other, _ = made(title, num_layers=config["num_layers"] + 2)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="is another|beside every so many|as many heads"):
        model.override(base.patcher, model.Request(str(tmp_path / "other")))
