"""Damaged and contradictory msmodelslim exports of a tiny Wan: each is refused by name, or proven to be harmless."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from support import modelslim as ms
from support import wan
from support.modelslim import same

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return ms.copy_all(tmp_path_factory.mktemp("modelslim"))


Q, DUAL = "blocks.0.self_attn.q", "blocks.0.ffn.2"


def entry(**changes):
    return lambda t, e: e.update(changes)


def kind_of(layer, kind):
    """Another type for a layer's tensors in the description."""
    return lambda t, e: e.update({k: kind for k in e if k.startswith(f"{layer}.") and not k.endswith(".bias")})


def tensor(name, change):
    return lambda t, e: t.__setitem__(name, change(t[name]))


def last(value):
    """The last value changed."""
    def change(t):
        t = t.clone()
        t.view(-1)[-1] = value
        return t
    return change


def both(name, value):
    return lambda t, e: (t.__setitem__(name, value), e.__setitem__(name, "FLOAT"))


REFUSED = {
    "absent tensors": ("mxfp8", lambda t, e: [t.pop(f"{Q}.{leaf}") for leaf in ("weight", "weight_scale")],
                       f"the description names 2 tensors that are not in the weights: {Q}.weight, {Q}.weight_scale"),
    "missing tensors": ("mxfp8", lambda t, e: [d.pop(f"{Q}.weight") for d in (t, e)], f"missing tensor {Q}.weight"),
    "missing scale": ("mxfp8", lambda t, e: [d.pop(f"{Q}.weight_scale") for d in (t, e)], f"{Q} (described as "
                      "W8A8_MXFP8): no weight_scale"),
    "missing bias": ("mxfp8", lambda t, e: [d.pop(f"{Q}.bias") for d in (t, e)], f"missing tensor {Q}.bias"),
    "unknown type": ("mxfp8", kind_of(Q, "W3A3_NEW"), f"{Q} is described as W3A3_NEW, which this version does not load"),
    "type that is refused": ("w8a8", kind_of(Q, "W8A8_TIMESTEP"), f"{Q} is described as W8A8_TIMESTEP, which this "
                             "version does not load (its activation scales change with the sampling step)"),
    "type of other tensors": ("mxfp8", kind_of(Q, "W8A8_DYNAMIC"), f"{Q} (described as W8A8_DYNAMIC): weight is F8_E4M3"),
    "static for dynamic": ("w8a8", kind_of(Q, "W8A8_DYNAMIC"), "tensors that W8A8_DYNAMIC does not have: deq_scale"),
    "FLOAT for codes": ("mxfp8", kind_of(Q, "FLOAT"), f"{Q} (described as FLOAT): tensors that FLOAT does not have: "
                        "weight_scale"),
    "no entry": ("mxfp8", lambda t, e: [e.pop(f"{Q}.{leaf}") for leaf in ("weight", "weight_scale")],
                 f"{Q} (not in the description): tensors that FLOAT does not have: weight_scale"),
    "two types in a layer": ("mxfp8", entry(**{f"{Q}.weight_scale": "W4A4_MXFP4"}),
                             "the description contradicts itself: weight_scale W4A4_MXFP4"),
    "quantized convolution": ("mxfp8", entry(**{"patch_embedding.weight": "W8A8_DYNAMIC"}), "patch_embedding is "
                              "described as W8A8_DYNAMIC, but it is an embedding, and quantized embeddings are not "
                              "supported"),
    "quantized norm": ("mxfp8", entry(**{"blocks.0.norm3.weight": "W8A8_DYNAMIC"}), "blocks.0.norm3 is described as "
                       "W8A8_DYNAMIC, but it is no Linear layer"),
    "unexpected tensor": ("mxfp8", both("blocks.0.mystery.weight", torch.ones(3)),
                          "1 unexpected tensors: blocks.0.mystery.weight"),
    "unexpected leaf": ("mxfp8", both(f"{Q}.zero_point", torch.ones(3)), "does not have: zero_point"),
    "unexpected float leaf": ("mxfp8", both("head.head.weight_scale", torch.ones(3)), "does not have: weight_scale"),
    "scale of wrong shape": ("mxfp8", tensor(f"{Q}.weight_scale", lambda s: s[:, :2]), "weight_scale is [128, 2]"),
    "weight of wrong shape": ("mxfp8", tensor(f"{Q}.weight", lambda w: w[:64]), "weight is [64, 128]"),
    "NaN scale": ("mxfp8", tensor(f"{Q}.weight_scale", lambda s: s | 255), f"{Q}.weight_scale holds NaN"),
    "NaN scale of MXFP4": ("mxfp4", tensor(f"{Q}.weight_scale", last(255)), f"{Q}.weight_scale holds NaN"),
    "NaN second-level scale": ("dual", tensor(f"{DUAL}.weight_dual_scale", last(torch.nan)), f"{DUAL}.weight_dual_scale holds NaN"),
    "negative second-level scale": ("dual", tensor(f"{DUAL}.weight_dual_scale", last(-1)),
                                    f"{DUAL}.weight_dual_scale holds negative values"),
    "infinite scale": ("w4a4_dynamic", tensor(f"{Q}.weight_scale", last(torch.inf)), f"{Q}.weight_scale holds infinite values"),
    "NaN deq_scale": ("w8a8", tensor(f"{Q}.deq_scale", last(torch.nan)), f"{Q}.deq_scale holds NaN"),
    "NaN smoothing": ("mxfp4_smooth", tensor(f"{Q}.div.mul_scale", last(torch.nan)), f"{Q}.mul_scale holds NaN"),
    "negative scale": ("w8a8_dynamic", tensor(f"{Q}.weight_scale", lambda s: -s), f"{Q}.weight_scale holds negative values"),
    "offset": ("w8a8_dynamic", tensor(f"{Q}.weight_offset", lambda o: o + 1), "weight_offset is not zero"),
    "another layer's bias": ("w8a8", tensor(f"{Q}.bias", lambda b: b.flip(0)), "of two different layers"),
    "twice": ("mxfp4_smooth", lambda t, e: [d.__setitem__(f"{Q}.weight", d[f"{Q}.linear.weight"]) for d in (t, e)],
              f"two stored tensors mean the same one: {Q}.linear.weight, {Q}.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, exports, tmp_path):
    name, damage, message = REFUSED[case]
    tensors, entries = dict(exports[name].tensors), dict(exports[name].entries)
    damage(tensors, entries)
    folder = ms.write(tmp_path, tensors, entries)
    with pytest.raises(CheckpointError) as caught:
        ms.load(folder)
    assert message in str(caught.value)


def quantize(tensors, entries, layer) -> None:
    """Store a layer that msmodelslim left alone as W8A8_DYNAMIC, by its rule
    (docs/sources/ascend.md, "Dynamic integers")."""
    weight = tensors[f"{layer}.weight"].float()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-6) / 127
    part = {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale,
            "weight_offset": torch.zeros_like(scale)}
    tensors.update({f"{layer}.{leaf}": tensor for leaf, tensor in part.items()})
    entries.update({f"{layer}.{leaf}": "W8A8_DYNAMIC" for leaf in part})


EMBEDDERS = {
    "native": ["text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1",
               "img_emb.proj.1", "img_emb.proj.3"],
    "diffusers": [f"condition_embedder.{layer}" for layer in (
        "text_embedder.linear_1", "text_embedder.linear_2", "time_embedder.linear_1", "time_embedder.linear_2",
        "time_proj", "image_embedder.ff.net.0.proj", "image_embedder.ff.net.2")],
}


@pytest.mark.parametrize("names", EMBEDDERS)
def test_quantized_embeddings_are_refused(names, exports, tmp_path):
    """Every Linear that embeds text, timestep or image; the export is one of an image-to-video model for this."""
    tensors, entries = dict(exports["mxfp8"].tensors), dict(exports["mxfp8"].entries)
    tensors["patch_embedding.weight"] = torch.nn.functional.pad(tensors["patch_embedding.weight"], (0,) * 7 + (20,))
    for layer, shape in (("img_emb.proj.0", (1280,)), ("img_emb.proj.1", (1280, 1280)),
                         ("img_emb.proj.3", (ms.HIDDEN, 1280)), ("img_emb.proj.4", (ms.HIDDEN,)),
                         ("blocks.0.cross_attn.k_img", (ms.HIDDEN, ms.HIDDEN)),
                         ("blocks.0.cross_attn.v_img", (ms.HIDDEN, ms.HIDDEN)),
                         ("blocks.0.cross_attn.norm_k_img", (ms.HIDDEN,))):
        bias = {} if "norm" in layer else {f"{layer}.bias": torch.zeros(shape[0], dtype=torch.bfloat16)}
        tensors |= {f"{layer}.weight": torch.ones(shape, dtype=torch.bfloat16), **bias}
    write = ms.write if names == "native" else lambda path, t, e: ms.repack(t, e, path)
    config = {"image_dim": 1280, "added_kv_proj_dim": ms.HIDDEN, "in_channels": 36}
    plain = write(tmp_path / "plain", tensors, entries)
    for layer in EMBEDDERS["native"]:
        quantize(tensors, entries, layer)
    folder = write(tmp_path / "embeddings", tensors, entries)
    if names == "diffusers":
        for path in (plain, folder):
            (path / "config.json").write_text(json.dumps({**ms.config(), **config}), encoding="utf-8")
    assert ms.load(plain).description.formats == {"BF16": 10, "W8A8_MXFP8": 10}
    with pytest.raises(CheckpointError) as caught:
        ms.load(folder)
    assert ("described as W8A8_DYNAMIC, but it is an embedding, and quantized embeddings are not supported; export the "
            "model again with this layer excluded, so that it stays FLOAT; the same of 6 more layers: ") in str(caught.value)
    assert all(layer in str(caught.value) for layer in EMBEDDERS[names])


def test_a_quantized_output_projection_loads(exports, tmp_path):
    """It is no embedding."""
    tensors, entries = dict(exports["mxfp8"].tensors), dict(exports["mxfp8"].entries)
    quantize(tensors, entries, "head.head")
    loaded = ms.load(ms.write(tmp_path, tensors, entries))
    assert loaded.description.formats == {"BF16": 5, "W8A8_MXFP8": 10, "W8A8_DYNAMIC": 1}
    assert torch.equal(ms.weights(loaded.patcher)["head.head"], ms.decode(tensors, entries)["head.head"].float())


def test_a_type_without_scales_is_plain(exports, tmp_path):
    """A layer that is stored in floats is loaded as such whatever it is called, with a note: no number can differ."""
    tensors, entries = dict(exports["mxfp8"].tensors), dict(exports["mxfp8"].entries)
    entries["head.head.weight"] = "W8A8_DYNAMIC"
    loaded = ms.load(ms.write(tmp_path, tensors, entries))
    assert "head.head is described as W8A8_DYNAMIC but stored as BF16 without scales" in loaded.report
    assert same(loaded.patcher, ms.load(exports["mxfp8"].folder).patcher)


def test_no_description(exports, tmp_path):
    folder = ms.write(tmp_path / "export", exports["w8a8"].tensors, exports["w8a8"].entries)
    (folder / "quant_model_description.json").unlink()
    for reference in (folder, folder / "quant_model_weights.safetensors"):
        with pytest.raises(CheckpointError, match=r"no quant_model_description\*.json|without which the"):
            ms.load(reference)
    (folder / "quant_model_description.json").write_text('{"version": "1.0.0", "metadata": {}}')
    with pytest.raises(CheckpointError, match="names no tensors"):
        ms.load(folder)
    wan.make(heads=1, layers=1).save_pretrained(tmp_path / "bf16")
    with pytest.raises(CheckpointError, match="no ModelSlim checkpoint"):
        model.load(model.Request(str(tmp_path / "bf16"), family="modelslim"))


def test_the_vendors_config_is_held_against_the_tensors(exports, tmp_path):
    for key, value, message in (("dim", 256, "config.json says hidden = 256, but the tensors have 128"),
                                ("eps", 1e-5, "ComfyUI runs Wan with eps 1e-06 only, config.json says 1e-05")):
        folder = shutil.copytree(exports["w8a8"].folder, tmp_path / key)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(CheckpointError, match=message):
            ms.load(folder)
