"""Models in diffusers' names by derived tables: each table is what diffusers' own converter does, and what loads has the
weights that stock ComfyUI has of the same numbers in its own names, brought there by that converter."""

from __future__ import annotations

import importlib
import json
import shutil
from importlib.metadata import version

import pytest
import tables
import torch
from packaging.version import Version

from quantized_transformers.host import model_identity, passthrough
from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures import derived, diffusers_classes
from quantized_transformers.loaders.architectures.base import Naming, tensor_name
from quantized_transformers.loaders.architectures.diffusers_classes import DERIVED
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from support import common, host_models
from support.derived import REFUSED
from support.passthrough import FORMS, load, stock, weights

pytestmark = pytest.mark.parity

KNOWN = [one for one in DERIVED if tables.is_there(one.table)]  # to this diffusers
CASES = [(one, model) for one in KNOWN for model in tables.SOURCES[one.table].models]
IDS = [f"{one.title}, {model}" for one, model in CASES]


class Tiny:
    """A model of the host's, and what diffusers' converter makes of it; `back` brings numbers in diffusers' names home."""

    def __init__(self, one, model):
        self.one, self.model, source = one, model, tables.SOURCES[one.table]
        self.case = next((case for case in tables.CASES[one.table] if case.model == model), None)
        self.native = tables.published(source, host_models.make(model))
        self.tags = tables.converted(one.table, tables.tagged(self.native))
        self.stored = {name: tensor.contiguous() for name, tensor in tables.converted(one.table, self.native).items()}

    def back(self, numbers):
        flat = torch.zeros(sum(tensor.numel() for tensor in self.native.values()))
        for name, ids in self.tags.items():
            flat[ids.reshape(-1)] = numbers[name].float().reshape(-1)
        parts = flat.split([tensor.numel() for tensor in self.native.values()])
        home = {name: part.reshape(tensor.shape) for (name, tensor), part in zip(self.native.items(), parts, strict=True)}
        return home | self.one.made({})

    def linears(self):
        """Names of the stored weights of Linear layers."""
        with host_models.detected(self.model):
            net = passthrough.network({name: tuple(t.shape) for name, t in self.native.items()},
                                      host_models.metadata_of(self.model))
        linear = {name for name, target in net.becomes.items() if target and target.removesuffix(".weight") in net.linears}
        owner = torch.tensor([t.numel() for t in self.native.values()]).cumsum(0)
        names = list(self.native)
        return [name for name, ids in self.tags.items() if name.endswith(".weight") and ids.ndim == 2
                and names[int(torch.bucketize(ids.reshape(-1)[0], owner, right=True))] in linear]

    def write(self, folder, form="BF16", **config):
        """A folder in diffusers' names; returns the truth in the host's."""
        stored = {name: tensor.to(torch.bfloat16) for name, tensor in self.stored.items()}
        truth = {name: tensor.float() for name, tensor in stored.items()}
        self.quantized = 0
        for name in self.linears() if FORMS[form] else ():
            made = FORMS[form](self.stored[name])
            if made:
                self.quantized += 1
                del stored[name]
                stored |= {f"{name.removesuffix('weight')}{leaf}": tensor for leaf, tensor in made[0].items()}
                truth[name] = made[1]
        self.save(folder, stored, **config)
        return self.back(truth)

    def save(self, folder, stored, **config):
        """A folder of a transformer, with those of its companions beside it."""
        told = self.case and self.case.companions and self.model not in host_models.OF_ONE_SIZE
        config = {**self.case.config, **config} if told else config
        beginnings = tables.SOURCES[self.one.table].apart
        apart = {name: tensor for name, tensor in stored.items() if beginnings and name.startswith(beginnings)}
        common.save(folder, {name: t for name, t in stored.items() if name not in apart}, {"_class_name": self.one.classes[0], **config})
        left = {f"{name}weight": torch.ones(2, 3, dtype=torch.bfloat16) for name in self.one.leaves[:1]}
        for name, kwargs in self.case.companions.items() if self.case else ():
            common.save(folder.parent / name, apart | left, kwargs if told else {"_class_name": kwargs["_class_name"]})


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def tiny(request):
    return Tiny(*request.param)


@pytest.mark.parametrize("table", [one.table for one in KNOWN if tables.SOURCES[one.table].converter
                                   or tables.SOURCES[one.table].rule])
def test_tables_are_what_diffusers_does(table):
    file = derived.FOLDER / f"{table}.json"
    assert file.read_text(encoding="utf-8") == tables.text(tables.table(table))


def test_every_table_is_of_a_class():
    if Version(version("diffusers")) >= Version("0.42"):  # with fewer classes, older ones have fewer cases here
        assert list(DERIVED) == KNOWN
    assert {one.table for one in DERIVED} == set(tables.SOURCES)
    assert {one.table for one in DERIVED if not one.names} == {path.stem for path in derived.FOLDER.iterdir()}


@pytest.mark.parametrize("one", KNOWN, ids=lambda one: one.title)
def test_all_keys_of_a_configuration_are_known(one):
    """What is new in diffusers' class is looked at by someone before it is let through."""
    import inspect

    import diffusers

    for name in one.classes:
        keys = inspect.signature(getattr(diffusers, name).__init__).parameters.keys() - {"self"}
        assert keys <= one.fixed.keys() | one.free and not one.fixed.keys() & one.free, keys ^ (one.fixed.keys() | one.free)
    for name, config in tables.CASES[one.table][0].companions.items():
        other = one.companions[name]
        keys = inspect.signature(getattr(importlib.import_module(other.place), config["_class_name"]).__init__).parameters.keys() - {"self"}
        assert keys == other.fixed.keys() | other.free and not other.fixed.keys() & other.free


REAL = [(one, config) for one in KNOWN for config in tables.SOURCES[one.table].real]


@pytest.mark.part(4)
@pytest.mark.parametrize("one, config", REAL, ids=[f"{one.title}, {at}" for at, (one, _) in enumerate(REAL)])
def test_at_published_sizes_the_host_has_what_diffusers_has(one, config):
    """Without memory: every tensor of diffusers' class is used, and makes all of the host's."""
    import diffusers

    config = {"_class_name": one.classes[0], **config}
    with torch.device("meta"):
        net = getattr(diffusers, config["_class_name"]).from_config(config)
    stored, used = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}, {}
    for module in diffusers_classes.of_config(config).modules({}, Naming("diffusers")):
        for name, rows in zip(module.stored, module.rows, strict=True):
            used[tensor_name(name, module.stored_leaf)] = (rows, *module.inner) if module.kind != "any" else None
            if module.bias:
                used[tensor_name(name, "bias")] = (rows,)
    assert used.keys() == stored.keys()
    assert {name: shape or stored[name] for name, shape in used.items()} == stored


@pytest.mark.part(4)
@pytest.mark.parametrize("one", {one.title: one for one, _ in REAL}.values(), ids=lambda one: one.title)
def test_at_published_sizes_a_base_has_no_memory(one, tmp_path):
    """Whatever the host computes while it builds a model; its weights come later."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": one.classes[0], **tables.SOURCES[one.table].real[0]}))
    net = model.defer(model.Request(str(tmp_path))).patcher.model.diffusion_model
    assert sum(p.numel() for p in net.parameters()) > 5e8
    assert sum(p.numel() for p in net.parameters() if not p.is_meta) < 1e5


@pytest.mark.parametrize("config, words", [({"in_channels": 16, "patch_size": None}, "diffusers makes no HiDream"),
                                           ({"patch_size": 0}, ""), ({"num_single_layers": 257}, "expected a number of layers"),
                                           ({"max_resolution": 2 ** 40}, "max_resolution is 1099511627776, expected a number")])
def test_a_configuration_that_diffusers_makes_nothing_of(config, words, tmp_path):
    """The class is called with what others wrote: its errors are the file's."""
    said = tables.SOURCES["hidream"].real[0] if "hidream" in tables.SOURCES else {}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "HiDreamImageTransformer2DModel", **said, **config}))
    with pytest.raises(CheckpointError) as refused:
        model.defer(model.Request(str(tmp_path)))
    assert words in refused.value.what


# Every model in three forms, and in one of the others in turn.
FORM = ["BF16", "FP8", "NVFP4, ModelOpt"]
OTHERS = [form for form in FORMS if form not in FORM]


@pytest.mark.part(2)
@pytest.mark.parametrize("form", [*FORM, "another"])
def test_a_folder_has_stocks_weights(tiny, form, tmp_path):
    form = OTHERS[CASES.index((tiny.one, tiny.model)) % len(OTHERS)] if form == "another" else form
    truth = tiny.write(tmp_path / "model", form)
    with host_models.detected(tiny.model):
        loaded = load(tmp_path / "model", byte_order="modelopt" if form == "NVFP4, ModelOpt" else "auto")
    reference = stock(truth, tiny.model)
    expected, found = weights(reference), weights(loaded.patcher.model)
    assert found.keys() == expected.keys()
    for name in tables.SOURCES[tiny.one.table].unread:  # which is anything, in both
        expected.pop(f"diffusion_model.{name}", None)
    worst = max(expected, key=lambda key: float((found[key] - expected[key]).abs().max()) if expected[key].numel() else 0.0)
    assert torch.allclose(found[worst], expected[worst], rtol=2e-6, atol=1e-7), worst
    identity, wanted = model_identity(loaded.patcher.model), model_identity(reference)
    assert identity == wanted
    assert loaded.description.naming.style == "diffusers" and not loaded.description.problems
    count = sum(number for kind, number in loaded.description.formats.items() if kind not in ("BF16", "F32"))
    assert count == tiny.quantized and (count > 5 or form != "FP8"), (count, tiny.quantized)


def test_weights_alone_are_known_by_their_names(tiny, tmp_path):
    assert [one for one in DERIVED if one.is_named("\n".join(tiny.stored))] == [tiny.one]
    tiny.write(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    if tiny.case and tiny.case.companions:
        with pytest.raises(CheckpointError, match="only its config.json|makes no sense of this Cosmos"):
            describe(Checkpoint(locate(str(tmp_path / "model"))))
        return
    with host_models.detected(tiny.model):
        description = describe(Checkpoint(locate(str(tmp_path / "model"))))
    assert description.naming.style == ("diffusers" if tiny.one.renames else "native") and not description.problems


DAMAGE = {
    "missing": (lambda stored, names: stored.pop(names[len(names) // 2]), ""),
    "another shape": (lambda stored, names: stored.update({names[-2]: stored[names[-2]][:, :-1].contiguous()}), ""),
    "more": (lambda stored, names: stored.update({"something.else.weight": torch.ones(3, 3)}), "unexpected"),
    "half": (lambda stored, names: [stored.pop(name) for name in names[len(names) // 2:]], "")}


@pytest.mark.part(2)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(tiny, damage, tmp_path):
    change, words = DAMAGE[damage]
    names = tiny.linears()
    whole, tiny.stored = tiny.stored, dict(tiny.stored)
    try:
        change(tiny.stored, names)
        tiny.save(tmp_path / "model", {name: t.to(torch.bfloat16) for name, t in tiny.stored.items()})
    finally:
        tiny.stored = whole
    with host_models.detected(tiny.model), pytest.raises(CheckpointError) as caught:
        load(tmp_path / "model")
    assert words in str(caught.value)


def test_a_configuration_that_comfyui_does_not_run(tiny, tmp_path):
    key, (value, *_) = next(item for item in tiny.one.fixed.items() if isinstance(item[1][0], int))
    tiny.write(tmp_path / "other", **{key: value + 1})
    tiny.write(tmp_path / "new", a_new_option=3)
    tiny.write(tmp_path / "fine", **{key: value}, a_new_option=None, quantization_config={"a": 1})
    with host_models.detected(tiny.model):
        for name, words in (("other", f"{key} {value + 1} (ComfyUI: {value})"), ("new", "a_new_option")):
            with pytest.raises(CheckpointError) as caught:
                load(tmp_path / name)
            assert words in str(caught.value)
        describe(Checkpoint(locate(str(tmp_path / "fine"))))


def test_another_class_is_refused(tmp_path):
    tiny = Tiny(*next(case for case in CASES if case[0].title == "LTX-Video"))
    tiny.write(tmp_path / "model")
    other = next(one for one in DERIVED if one.title != tiny.one.title)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"_class_name": other.classes[0]}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="do not belong together"):
        load(tmp_path / "model")


@pytest.mark.parametrize("one, config, words", [(one, *row) for one in DERIVED for row in REFUSED[one.table]],
                         ids=lambda value: getattr(value, "title", None))
def test_combinations_that_comfyui_does_not_run(one, config, words):
    if not words:
        one.check(config)
        return
    with pytest.raises(ValueError, match=words):
        one.check(config)


@pytest.mark.parametrize("config, words", [
    ({"model_dim": 1792, "axes_dims": [16, 24, 24], "visual_cond": True}, ""),
    ({"model_dim": 4096, "axes_dims": [32, 48, 48], "visual_cond": True}, ""),
    ({"model_dim": 2560, "axes_dims": [32, 48, 48], "visual_cond": False}, ""),
    ({"model_dim": 1792, "axes_dims": [32, 48, 48], "visual_cond": True}, "rotary axes"),
    ({"model_dim": 2560, "axes_dims": [32, 48, 48], "visual_cond": True}, "from text alone"),
    ({"model_dim": 4096, "axes_dims": [32, 48, 48], "visual_cond": False}, "beside the latents")])
def test_kandinskys_are_told_by_their_width(config, words):
    refused("Kandinsky 5", config, words)


@pytest.mark.parametrize("config, words", [
    ({"sample_size": 128, "interpolation_scale": 2, "use_additional_conditions": False}, ""),
    ({"_class_name": "Transformer2DModel", "sample_size": 128, "norm_type": "ada_norm_single"}, ""),
    ({"_class_name": "Transformer2DModel", "sample_size": 128, "norm_type": "ada_norm_zero"}, "norm_type"),
    ({"sample_size": 256, "interpolation_scale": 4, "use_additional_conditions": False}, ""),
    ({"sample_size": 32, "use_additional_conditions": False}, "512 pixels"), ({"sample_size": 64}, "PixArt-Alpha")])
def test_pixarts_that_are_told_apart(config, words):
    refused("PixArt", config, words)


@pytest.mark.parametrize("config, words", [
    ({}, "before 1.5"), ({"use_learned_positional_embeddings": True}, "before 1.5"),
    ({"use_rotary_positional_embeddings": False}, "before 1.5"), ({"patch_size_t": 2, "in_channels": 33}, "48 channels")])
def test_older_cogvideox_would_run_otherwise(config, words, tmp_path):
    """With its configuration, and of tensors alone; where the host has other positions than diffusers' pipelines."""
    from diffusers import CogVideoXTransformer3DModel

    net = CogVideoXTransformer3DModel(**{
        "num_attention_heads": 3, "time_embed_dim": 64, "text_embed_dim": 64, "num_layers": 2,
        "use_rotary_positional_embeddings": True, **config})
    net.to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{words}|positional_embeddings"):
        diffusers_classes.of_config(common.config_of(tmp_path))
    for told in (True, False):
        if not told:
            (tmp_path / "config.json").unlink()
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path)


@pytest.mark.parametrize("title, config, words", [
    ("Stable Cascade C", {"block_out_channels": [1536, 1536], "num_attention_heads": [24, 24]}, ""),
    ("Stable Cascade C", {"block_out_channels": [1536, 1536], "num_attention_heads": [32, 32]}, "heads of 64"),
    ("Stable Cascade B", {"block_out_channels": [320, 576, 1152, 1152], "num_attention_heads": [-1, 9, 16, 18],
                          "block_types_per_layer": tables.SOURCES["cascade_b"].real[0]["block_types_per_layer"]}, "heads of 64")])
def test_heads_of_stable_cascade_are_told_by_nothing_else(title, config, words):
    refused(title, config, words)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_hosts_own_names_beside_a_configuration(prefix, tmp_path):
    """Where they are diffusers', too: below the prefix of a whole checkpoint they are the host's."""
    tiny = Tiny(*next(case for case in CASES if case[0].title == "JoyAI-Image-Edit"))
    common.save(tmp_path, {prefix + name: tensor for name, tensor in tiny.native.items()}, {"_class_name": tiny.one.classes[0]})
    loaded = load(tmp_path)
    assert loaded.description.naming.style == ("native" if prefix else "diffusers")
    found, expected = weights(loaded.patcher.model), weights(stock(tiny.native, tiny.model))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def refused(title, config, words):
    """Whether a configuration is refused with these words, or let through where there are none."""
    one = next(one for one in DERIVED if one.title == title)
    if not words:
        one.check(config)
        return
    with pytest.raises(ValueError, match=words):
        one.check(config)


@pytest.mark.parametrize("layers, fine", [([0, 2], True), ([0, 1], False), ([1, 3], False), ([0, 1, 2, 3], True)])
def test_vace_blocks_stand_evenly(layers, fine):
    one = next(one for one in DERIVED if one.title == "Wan VACE")
    if fine:
        one.check({"num_layers": 4, "vace_layers": layers})
    else:
        with pytest.raises(ValueError, match="beside"):
            one.check({"num_layers": 4, "vace_layers": layers})


COSMOS = {"_class_name": "CosmosTransformer3DModel", "num_attention_heads": 16, "num_layers": 28}
V1 = {"extra_pos_embed_type": "learnable", "num_attention_heads": 32, "rope_scale": [2.0, 1.0, 1.0]}
TOLD = {  # config.json -> what it is of its class, or words of why it is refused
    "Cosmos 1": ({**COSMOS, **V1}, "Cosmos 1"),
    "Cosmos 1, another depth": ({**COSMOS, **V1, "num_layers": 36}, "of this width with 28 layers"),
    "Cosmos 2": ({**COSMOS, "extra_pos_embed_type": None, "rope_scale": [1.0, 4.0, 4.0]}, "Cosmos Predict 2"),
    "Cosmos 2, video": ({**COSMOS, "extra_pos_embed_type": None, "in_channels": 17, "rope_scale": [1.0, 3.0, 3.0]},
                        "Cosmos Predict 2"),
    "Cosmos 2, other positions": ({**COSMOS, "extra_pos_embed_type": None, "rope_scale": [1.0, 3.0, 3.0]}, "[1.0, 3.0, 3.0]"),
    "Cosmos Predict 2.5": ({**COSMOS, "extra_pos_embed_type": None, "use_crossattn_projection": True}, "use_crossattn_projection"),
}


@pytest.mark.parametrize("config, words", TOLD.values(), ids=TOLD)
def test_a_configuration_tells_which_of_its_class_it_is(config, words):
    try:
        assert diffusers_classes.told(config).title == words
    except ValueError as error:
        assert words in str(error)


@pytest.mark.parametrize("adapter, words", [
    (None, "Cosmos Predict 2"), ({}, "Anima"), ({"num_layers": 6, "model_dim": 1024}, "Anima"), ({"num_layers": 7}, "num_layers 7")])
def test_anima_is_told_by_its_adapter(adapter, words):
    config = TOLD["Cosmos 2"][0] | ({} if adapter is None else {"_text_conditioner": adapter})
    try:
        assert diffusers_classes.told(config).title == words
    except ValueError as error:
        assert words in str(error)


def test_of_parts_with_scales_of_their_own_only_what_is_detected_by_its_rows_is_dequantized(tmp_path):
    """The host reads the number of heads from the rows of one qkv, and sees of several tiles the first."""
    tiny = Tiny(*next(case for case in CASES if case[0].title == "MiniMax-H3"))
    tiny.write(tmp_path / "model", "FP8")
    with host_models.detected(tiny.model):
        loaded = load(tmp_path / "model")
    assert [line for line in loaded.report.splitlines() if "dequantized, because" in line and "height" in line] == [
        line for line in loaded.report.splitlines() if "blocks.0.attn.qkv_proj: FP8 dequantized" in line and "refiner" not in line]
    weights = {name: hasattr(layer.weight, "_layout_cls") for name, layer in loaded.patcher.model.diffusion_model.named_modules()
               if name.endswith("qkv_proj")}
    assert weights == {"token_refiner.blocks.0.attn.qkv_proj": True, "blocks.0.attn.qkv_proj": False,
                       "blocks.1.attn.qkv_proj": True}


def test_a_new_class_is_an_entry_and_a_table(tmp_path, monkeypatch):
    """Nothing else of the pack has to know of it: here one that diffusers will have, of a model that the host has."""
    tiny = Tiny(*next(case for case in CASES if case[0].title == "AuraFlow"))
    truth = tiny.write(tmp_path / "model", "FP8", _class_name="NewTransformer2DModel")
    with host_models.detected(tiny.model), pytest.raises(CheckpointError):
        load(tmp_path / "model")
    (tmp_path / "tables").mkdir()
    shutil.copy(derived.FOLDER / "auraflow.json", tmp_path / "tables" / "new.json")
    new = tiny.one._replace(title="New", table="new", classes=("NewTransformer2DModel",))
    monkeypatch.setattr(derived, "FOLDER", tmp_path / "tables")
    monkeypatch.setattr(diffusers_classes, "DERIVED", (new, *DERIVED))
    with host_models.detected(tiny.model):
        loaded = load(tmp_path / "model")
    assert loaded.description.naming.style == "diffusers"
    expected, found = weights(stock(truth, tiny.model)), weights(loaded.patcher.model)
    assert all(torch.allclose(found[name], expected[name], rtol=2e-6, atol=1e-7) for name in expected)
