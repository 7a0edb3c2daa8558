"""The Wan repack tool on real msmodelslim exports: names against diffusers, bytes against the source, refused inputs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers.repack_wan import repack
from support.crash import tree
from support.modelslim import DATA, EXPORTS, FFN, HIDDEN, HOST_TEXT, TEXT, Export
from support.modelslim import folder as loadable
from support.pack import PACK
from support.repack import (
    TO_ORIGINAL,
    diffusers_model,
    make_base,
    make_case,
    names,
    run,
    sub,
)

pytestmark = pytest.mark.unit

LEAVES = ("weight_scale", "weight_offset", "weight_dual_scale", "scale_bias", "input_scale", "input_offset", "deq_scale",
          "quant_bias", "mul_scale")


@pytest.fixture
def case(tmp_path):
    return make_case(tmp_path)


@pytest.mark.parametrize("name", EXPORTS)
def test_names_are_diffusers(name, tmp_path):
    export = EXPORTS[name]
    base = make_base(tmp_path / "base", export)
    run((DATA / name, base, tmp_path / "out"))
    expected = set(diffusers_model(export.layers, export.channels).state_dict())
    for part, expert in zip(("transformer", "transformer_2"), export.experts, strict=False):
        tensors = names(tmp_path / "out" / part)
        plain = {key for key in tensors if key.rpartition(".")[2] not in (*LEAVES, "q_rot", "k_rot")}
        plain |= {key.replace("quant_bias", "bias") for key in tensors if key.endswith("quant_bias")}
        assert plain == expected
        extra = {key.rpartition(".")[0] for key in tensors if key.rpartition(".")[2] in LEAVES}
        assert extra and all(f"{layer}.weight" in expected for layer in extra)
        assert {key for key in tensors if key.endswith("_rot")} <= {f"blocks.0.attn1.{x}_rot" for x in "qk"}
        description = json.loads((tmp_path / "out" / part / "quant_model_description.json").read_text())
        old = json.loads(next((DATA / name / expert).glob("quant_model_description*.json")).read_text())
        assert set(description) - set(tensors) == {key for key in old if key not in names(DATA / name / expert)}
        assert set(tensors) < set(description)
        assert list(description.values()) == list(old.values())  # one to one, in order
        assert (tmp_path / "out" / part / "config.json").read_bytes() == (base / part / "config.json").read_bytes()


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("with_base", [False, True])
def test_there_and_back_is_byte_identical(name, with_base, tmp_path):
    """Every file: weights (header and data), descriptions, indexes, config.json."""
    run((DATA / name, make_base(tmp_path / "base", EXPORTS[name]), tmp_path / "out"))
    original = ""
    if with_base:  # the vendor's repo: its own configs, weights that are not wanted, and the rest
        original = str(sub(tmp_path / "vendor"))
        shutil.copytree(DATA / name, tmp_path / "vendor", dirs_exist_ok=True)
        (tmp_path / "vendor" / "Wan2.1_VAE.pth").write_bytes(b"never read")
        shutil.rmtree(tmp_path / "out" / "transformer" / "original")
    repack(str(tmp_path / "out"), original, str(tmp_path / "back"), TO_ORIGINAL)
    expected = tree(DATA / name)
    if with_base:
        expected["Wan2.1_VAE.pth"] = b"never read"
        if EXPORTS[name].experts == ("",):  # descriptions of the vendor's folder lie at its top, beside the new ones
            expected |= {k: v for k, v in tree(tmp_path / "vendor").items() if not k.endswith(".safetensors")}
    assert tree(tmp_path / "back") == expected


def test_rest_of_the_base(case):
    export, base, target = case
    report = run(case)
    assert (target / "assets/transformer/readme.txt").read_text() == "mine"  # nested: not the transformer
    assert not (target / ".git").exists()
    assert os.path.islink(target / "vae/diffusion_pytorch_model.safetensors")
    assert "rest of the base: 4 files linked" in report and "lacks text_encoder" in report
    assert "transformer from high_noise_model: 54 tensors" in report and "10 W8A8_MXFP8" in report
    shutil.rmtree(target)
    assert "4 files copied" in run(case, link=False)
    assert not any(path.is_symlink() for path in target.rglob("*"))
    assert (target / "vae/diffusion_pytorch_model.safetensors").read_bytes() == (
        base / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    # experts: high noise is `transformer`
    q = "blocks.0.{}.weight"
    for part, expert in (("transformer", "high_noise_model"), ("transformer_2", "low_noise_model")):
        assert torch.equal(names(target / part)[q.format("attn1.to_q")].view(torch.uint8),
                           names(export / expert)[q.format("self_attn.q")].view(torch.uint8))


def host_wan(**kwargs) -> dict[str, torch.Tensor]:
    """Names and shapes of ComfyUI's WanModel, tagged: every tensor has its own number."""
    import comfy.ldm.wan.model
    import comfy.ops

    wan = comfy.ldm.wan.model.WanModel(patch_size=(1, 2, 2), dim=HIDDEN, ffn_dim=FFN, text_dim=TEXT, num_heads=1,
                                       num_layers=2, operations=comfy.ops.disable_weight_init, dtype=torch.float16,
                                       device="cpu", **kwargs)
    return {name: torch.full(tensor.shape, i, dtype=torch.float16) for i, (name, tensor) in
            enumerate(wan.state_dict().items())}


@pytest.mark.parametrize(("host", "theirs"), [
    ({"model_type": "t2v", "in_dim": 16, "out_dim": 16}, {"channels": 16}),
    ({"model_type": "i2v", "in_dim": 36, "out_dim": 16, "flf_pos_embed_token_number": None},
     {"channels": 36, "out": 16, "image_dim": 1280, "added_kv_proj_dim": HIDDEN}),
    ({"model_type": "i2v", "in_dim": 36, "out_dim": 16, "flf_pos_embed_token_number": 10},
     {"channels": 36, "out": 16, "image_dim": 1280, "added_kv_proj_dim": HIDDEN, "pos_embed_seq_len": 10})])
def test_every_tensor_goes_where_diffusers_converter_puts_it(host, theirs, tmp_path):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    tensors = host_wan(**host)
    export = sub(tmp_path / "export")
    save_file(tensors, str(export / "quant_model_weight.safetensors"))
    (export / "quant_model_description.json").write_text(json.dumps(dict.fromkeys(tensors, "FLOAT")), encoding="utf-8")
    reference = diffusers_model(2, **theirs)
    run((export, make_base(tmp_path / "base", Export(), reference), tmp_path / "out"))
    result = names(tmp_path / "out/transformer")
    shapes = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert {name: tensor.shape for name, tensor in result.items()} == shapes
    expected = convert_wan_transformer_to_diffusers(dict(tensors))
    if "img_emb.emb_pos" in expected:  # which that converter leaves out
        expected["condition_embedder.image_embedder.pos_embed"] = expected.pop("img_emb.emb_pos")
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def split(folder: Path, to: Path, parts: int) -> Path:
    """An export in several shards with an index, as msmodelslim writes it with a part_file_size."""
    sub(to)
    tensors = names(folder)
    weight_map = {}
    for i in range(parts):
        chosen = {name: tensors[name] for name in sorted(tensors)[i::parts]}
        file = f"quant_model_weight-{i + 1:05d}-of-{parts:05d}.safetensors"
        save_file(chosen, str(to / file), {"made": "here"})
        weight_map |= dict.fromkeys(chosen, file)
    (to / "quant_model_weight.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2), encoding="utf-8")
    for file in folder.glob("*.json"):
        shutil.copy(file, to)
    return to


def test_shards(tmp_path):
    export = split(DATA / "w8a8_dynamic", tmp_path / "export", 3)
    base = make_base(tmp_path / "base", EXPORTS["w8a8_dynamic"])
    run((export, base, tmp_path / "out"))
    new = tmp_path / "out/transformer"
    index = json.loads((new / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 1} and len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        assert name in load_file(str(new / file))
    repack(str(tmp_path / "out"), "", str(tmp_path / "back"), TO_ORIGINAL)
    assert tree(tmp_path / "back") == tree(export)
    (export / "quant_model_weight-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 3 shards are missing"):
        run((export, base, tmp_path / "again"))


@pytest.mark.parametrize("name", EXPORTS)
def test_comfyui_loads_the_same_weights_from_both(name, tmp_path):
    """By ModelSlim Loader, from the export and from its repack."""
    export = EXPORTS[name]
    base = make_base(tmp_path / "base", export, diffusers_model(export.layers, export.channels, text=HOST_TEXT))
    folder = loadable(name, tmp_path / "export")
    run((folder, base, tmp_path / "out"))
    for component in ("transformer", "transformer_2")[:len(export.experts)]:
        a, b = (model.load(model.Request(str(source), component), quiet=True).patcher.model.state_dict()
                for source in (folder, tmp_path / "out"))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(*(tensors[key].reshape(-1).view(torch.uint8) for tensors in (a, b))), key


# --- ways in ---

def test_command_line_needs_neither_torch_nor_comfyui(case, tmp_path):
    script = ("import runpy, sys; sys.modules['torch'] = None; sys.argv = ['qt', 'repack-wan', *sys.argv[1:]]; "
              f"runpy.run_path({str(PACK)!r}, run_name='__main__')")
    environment = {k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"}

    def call(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True,
                              env=environment, check=False, cwd=tmp_path)

    done = call(case[0], "--base", case[1], "--output", "out", "--copy", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(case[2])
    done = call("out", "--output", tmp_path / "back", "--direction", TO_ORIGINAL)
    assert done.returncode == 0 and "repacked Wan to original" in done.stdout, done.stderr
    assert tree(tmp_path / "back") == tree(case[0])
    done = call("out", "--output", tmp_path / "back", "--direction", TO_ORIGINAL)
    assert done.returncode == 1 and "error: the output folder is not empty" in done.stderr
    assert "Traceback" not in done.stderr


def test_node(case, tmp_path, monkeypatch):
    import folder_paths

    from quantized_transformers.nodes.build import QT_RepackModelSlimWan as Node

    folder_paths.add_model_folder_path("diffusers_components", str(sub(tmp_path / "models")), is_default=True)
    try:
        schema = Node.define_schema()
        assert schema.is_output_node and schema.category == "loaders/quantized/build"
        output = Node.execute(source=str(case[0]), base=str(case[1]), output="mine/wan")
        assert output.args[0].startswith("repacked Wan to diffusers")
        assert (tmp_path / "models/mine/wan/model_index.json").is_file()
        assert Node.validate_inputs(source=str(tmp_path / "nothing"), base="") is not True
        check, given = Node.validate_inputs, {"source": str(case[0]), "base": str(case[1])}
        assert check(**given) is True and check(**given, output="mine/new") is True
        assert check(source=None, base=None, output=None) is True, "known when it runs"
        assert "the output folder is not empty" in check(**given, output="mine/wan")
        assert "no output folder is given" in check(**given, output=" ")
        assert "no source is given" in check(base=str(case[1])) and "no base is given" in check(source=str(case[0]))
        assert check(source=str(case[0]), output="mine/new", direction="to original") is True
    finally:
        folder_paths.folder_names_and_paths["diffusers_components"][0].remove(str(tmp_path / "models"))
