"""What the Wan repack tool refuses: targets, bases and exports that do not fit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers.repack_wan import repack
from quantized_transformers.makers.repack_wan.expert import read_expert
from quantized_transformers.makers.repack_wan.scales import damage, refuse_damaged
from quantized_transformers.quant import scales
from support.crash import tree
from support.modelslim import EXPORTS
from support.modelslim import folder as loadable
from support.repack import DESCRIPTION, LOW, TO_ORIGINAL, WEIGHTS, edit, make_case, names, rename_tensor, run, sub

pytestmark = pytest.mark.unit


@pytest.fixture
def case(tmp_path):
    return make_case(tmp_path)


# --- refusals: the target ---

def test_target_refusals(case, tmp_path):
    export, base, target = case
    (sub(tmp_path / "full") / "mine.txt").write_text("precious", encoding="utf-8")
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "alias").symlink_to(base)
    own = tmp_path / "export"
    shutil.copytree(export, own)
    for output, message in (
            (tmp_path / "full", "not empty"), (tmp_path / "file", "a link or a file"),
            (tmp_path / "dangling", "a link or a file"), ("", "no output folder"),
            (f"{tmp_path}/x/../full", "must not contain"), (base / "new", "lie in each other"),
            (own / "transformer", "lie in each other"), (tmp_path / "alias" / "new", "lie in each other"),
            (tmp_path / "alias", "a link or a file"), (sub(tmp_path / "empty"), "")):
        if message:
            with pytest.raises(CheckpointError, match=message):
                repack(str(own), str(base), str(output))
        else:
            repack(str(own), str(base), str(output))  # an empty folder is taken
    assert tree(tmp_path / "full") == {"mine.txt": b"precious"} and not (tmp_path / "nowhere").exists()
    around = sub(tmp_path / "around")
    shutil.move(own, around / "export")
    shutil.rmtree(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="not empty"):
        repack(str(around / "export"), str(base), str(around))


def test_work_folder_of_someone_else(case, tmp_path):
    (sub(tmp_path / ".out.unfinished") / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not this tool's"):
        run(case)
    shutil.rmtree(tmp_path / ".out.unfinished")
    (tmp_path / ".out.unfinished").symlink_to(sub(tmp_path / "elsewhere"))
    with pytest.raises(CheckpointError, match="not this tool's"):
        run(case)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.skipif(os.name == "nt", reason="POSIX rights")
def test_read_only_target(case):
    """As an ordinary user where the tests run as root, whom rights do not stop."""
    import tempfile

    place = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        inputs = [shutil.copytree(folder, place / folder.name) for folder in case[:2]]
        for path in place.rglob("*.*"):
            path.chmod(0o644)
        locked = sub(place / "locked")
        locked.chmod(0o555)
        place.chmod(0o755)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(CheckpointError, match="cannot write: Permission denied"):
                repack(str(inputs[0]), str(inputs[1]), str(locked / "out"))
        finally:
            if root:
                os.seteuid(0)
        assert not list(locked.iterdir())
    finally:
        shutil.rmtree(place)


def test_no_space(case):
    with open(case[1] / "vae" / "big.bin", "wb") as file:
        file.truncate(8 << 40)  # sparse
    with pytest.raises(CheckpointError, match="the new folder needs .* more, .* are free"):
        run(case, link=False)
    assert not case[2].exists()
    run(case)  # links need none


# --- refusals: the inputs ---

@pytest.mark.parametrize("trick", ["file link", "folder link", "fifo", "link in the export", "index"])
def test_links_and_names_that_leave(trick, case, tmp_path):
    export, base, target = case
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    export = shutil.copytree(export, tmp_path / "export")
    message = "leaves its folder"
    if trick == "file link":
        (base / "vae" / "x.json").symlink_to(tmp_path / "secret")
    elif trick == "folder link":
        (base / "more").symlink_to(tmp_path)
        message = "link to a folder"
    elif trick == "fifo":
        os.mkfifo(base / "pipe")
        message = "no ordinary file"
    elif trick == "link in the export":
        (export / "low_noise_model" / "x.json").symlink_to(tmp_path / "secret")
    else:
        (export / "low_noise_model" / "a.safetensors.index.json").write_text(
            '{"weight_map": {"x": "../../secret.safetensors"}}', encoding="utf-8")
        message = "outside its folder"
    with pytest.raises(CheckpointError, match=message):
        run((export, base, target))
    assert not target.exists()


def test_hugging_face_cache_links_are_followed(case, tmp_path):
    repo = tmp_path / "models--a--b"
    snapshot, blobs = repo / "snapshots" / "abc", sub(repo / "blobs")
    shutil.copytree(case[1], snapshot)
    for i, path in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        path.rename(blobs / str(i))
        path.symlink_to(os.path.relpath(blobs / str(i), path.parent))
    run((case[0], snapshot, tmp_path / "linked"))
    run(case)
    assert tree(tmp_path / "linked") == tree(case[2])


def poison(file, name, value):
    tensors = load_file(str(file))
    tensors[name].view(-1)[-1] = value
    save_file(tensors, str(file))


@pytest.mark.parametrize(("export", "leaf", "value", "words"), [
    ("w8a8", "deq_scale", -1, "negative values"), ("w8a8_dynamic", "weight_scale", torch.nan, "NaN"), ("dual", "weight_dual_scale", torch.inf,
    "infinite values"), ("w8a8_dynamic", "weight_offset", torch.nan, "NaN"), ("mxfp4_smooth", "mul_scale", torch.inf, "infinite values")])
def test_scales_that_mean_nothing_are_not_copied(export, leaf, value, words, tmp_path):
    """Every kind of an export's."""
    source = loadable(export, tmp_path / "export")
    folder = source / EXPORTS[export].experts[0]
    file, = folder.glob("*.safetensors")
    name = next(name for name in load_file(str(file)) if name.endswith(f".{leaf}"))
    poison(file, name, value)
    with pytest.raises(CheckpointError, match=f"{name} holds {words}, expected "):
        refuse_damaged(read_expert(folder))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "I64"])
def test_without_torch_the_same_is_said_as_with_it(dtype):
    values = torch.tensor([1.0, 0.0, -0.0, -2.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-7])
    for value in values:
        pair = torch.stack([torch.ones(()), value]).to({"F16": torch.float16, "BF16": torch.bfloat16}.get(dtype, torch.float32))
        raw = pair.view(torch.int32).long() if dtype == "I64" else pair
        for rule in (scales.FINITE, scales.NOT_NEGATIVE, scales.POSITIVE):
            assert damage(raw.view(torch.uint8).numpy().tobytes(), dtype, rule) == scales.damage(pair, rule), (value, rule)


@pytest.mark.parametrize(("change", "message"), [
    (lambda e, b: shutil.rmtree(e / LOW), "there is high_noise_model only"),
    (lambda e, b: (e / LOW / WEIGHTS).unlink(), "no .safetensors file"),
    (lambda e, b: (e / LOW / DESCRIPTION).unlink(), "there is no quant_model_description"),
    (lambda e, b: os.truncate(e / LOW / WEIGHTS, 700_000), "truncated"),
    (lambda e, b: edit(e / LOW / DESCRIPTION, lambda d: d.pop("blocks.0.ffn.0.bias")), "says nothing of 1 tensors"),
    (lambda e, b: edit(e / LOW / DESCRIPTION, lambda d: d.update({"blocks.1.ffn.0.bias": "FLOAT"})),
     "names 1 tensors that are not there: blocks.1.ffn.0.bias"),
    (lambda e, b: edit(e / LOW / DESCRIPTION, lambda d: d.update({"blocks.0.ffn.0.quant_type": "FLOAT"})),
     "keys of no known meaning: blocks.0.ffn.0.quant_type"),
    (lambda e, b: shutil.copy(e / LOW / WEIGHTS, e / LOW / "quant_model_weight_w8a8.safetensors"), "two shards hold"),
    (lambda e, b: shutil.copy(e / LOW / WEIGHTS, e / LOW / "other.safetensors"), "belong to nothing"),
    (lambda e, b: shutil.copy(e / LOW / DESCRIPTION, e / LOW / "quant_model_description.json"), "2 descriptions"),
    (lambda e, b: poison(e / LOW / WEIGHTS, "blocks.0.self_attn.q.weight_scale", 255),
     r"blocks\.0\.self_attn\.q\.weight_scale holds NaN, expected exponents"),
    (lambda e, b: rename_tensor(e / LOW / WEIGHTS, "blocks.0.norm3.weight", None), "1 tensors of a Wan are missing"),
    (lambda e, b: rename_tensor(e / LOW / WEIGHTS, "head.head.bias", None), "missing: head.head.bias"),
    # names that contain a word of the upstream table: nothing is replaced in parts
    (lambda e, b: rename_tensor(e / LOW / WEIGHTS, "blocks.0.self_attn.q_rot", "blocks.00.self_attn.q_rot"),
     "blocks blocks.N are there, and not those of the numbers"),
    *((lambda e, b, new=new: rename_tensor(e / LOW / WEIGHTS, "blocks.0.self_attn.q_rot", new), "have no place in")
      for new in ("blocks.0.self_attn.quirk.weight", "my_modulation", "blocks.0.ffn.01.weight", "xhead.head.weight",
                  "blocks.0.self_attn.q.weight.linear.x", "blocks.0.norm2.weight",
                  "blocks.0.self_attn.q.weight_scale_inv")),
    (lambda e, b: (b / "model_index.json").unlink(), "no diffusers pipeline"),
    (lambda e, b: edit(b / "model_index.json", lambda d: d.update(transformer_2=[None, None])), "the base 1"),
    (lambda e, b: (b / "transformer_2" / "config.json").unlink(), "no config.json there"),
    (lambda e, b: edit(b / "transformer_2" / "config.json", lambda d: d.update(num_layers=2)),
     r"blocks 1 \(config.json 2\)"),
    (lambda e, b: edit(b / "transformer" / "config.json", lambda d: d.update(in_channels=36)), "input channels 16"),
    (lambda e, b: edit(b / "transformer" / "config.json", lambda d: d.update(quantization_config={})), "quantized"),
    (lambda e, b: edit(b / "transformer" / "config.json", lambda d: d.update(_class_name="FluxTransformer2DModel")),
     "FluxTransformer2DModel"),
])
def test_input_refusals(change, message, case, tmp_path):
    export = shutil.copytree(case[0], tmp_path / "export")
    change(export, case[1])
    with pytest.raises(CheckpointError, match=message):
        run((export, case[1], case[2]))
    assert not case[2].exists() and not (tmp_path / ".out.unfinished").exists()


def test_the_wrong_direction_and_half_a_repack(case, tmp_path):
    with pytest.raises(CheckpointError, match="check the direction"):
        repack(str(case[0] / LOW), "", str(tmp_path / "x"), TO_ORIGINAL)
    run(case)
    with pytest.raises(CheckpointError, match="no place in the original naming|the base 2"):
        repack(str(case[2]), str(case[1]), str(tmp_path / "x"))
    shutil.rmtree(case[2] / "transformer_2")
    with pytest.raises(CheckpointError, match="half of the model is missing"):
        repack(str(case[2]), "", str(tmp_path / "x"), TO_ORIGINAL)
    with pytest.raises(CheckpointError, match="transformer_2"):
        model.load(model.Request(str(case[2]), "transformer_2"), quiet=True)
    (case[2] / "transformer" / "quant_model_description.json").unlink()
    with pytest.raises(CheckpointError):
        model.load(model.Request(str(case[2])), quiet=True)


def test_an_sglang_repack_goes_back_too(case, tmp_path):
    """Its to_q_rot, and its description that keeps the original name of what is no tensor."""
    run(case)
    shutil.rmtree(case[2] / "transformer" / "original")
    for x in "qk":
        rename_tensor(case[2] / "transformer/diffusion_pytorch_model.safetensors", f"blocks.0.attn1.{x}_rot",
                      f"blocks.0.attn1.to_{x}_rot")
    edit(case[2] / "transformer/quant_model_description.json",
         lambda d: d.update({"blocks.0.self_attn.quant_type": "FP8_DYNAMIC"}))
    report = repack(str(case[2]), "", str(tmp_path / "back"), TO_ORIGINAL)
    assert "no config.json for high_noise_model" in report
    back = tmp_path / "back" / "high_noise_model"
    assert names(back).keys() == names(case[0] / "high_noise_model").keys()
    assert json.loads((back / DESCRIPTION).read_text())["blocks.0.self_attn.quant_type"] == "FP8_DYNAMIC"
