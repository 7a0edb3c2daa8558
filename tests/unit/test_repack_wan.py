"""The Wan repack tool on real msmodelslim exports: names against diffusers, bytes against the source, interruptions."""

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
from quantized_transformers.loaders.repack_wan import repack
from support.modelslim import DATA, EXPORTS, FFN, HIDDEN, HOST_TEXT, TEXT, Export
from support.modelslim import folder as loadable
from support.pack import PACK

TO_ORIGINAL = "to original"
LEAVES = ("weight_scale", "weight_offset", "weight_dual_scale", "scale_bias", "input_scale", "input_offset", "deq_scale",
          "quant_bias", "mul_scale")


def diffusers_model(layers=1, channels=16, out=None, text=TEXT, **kwargs):
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        return WanTransformer3DModel(num_attention_heads=1, attention_head_dim=HIDDEN, in_channels=channels,
                                     out_channels=out or channels, text_dim=text, ffn_dim=FFN, num_layers=layers,
                                     **kwargs)


def make_base(folder: Path, export: Export, transformer=None) -> Path:
    """A diffusers repo as published, small: components, files at the top, a nested folder called transformer."""
    transformer = transformer or diffusers_model(export.layers, export.channels)
    parts = ["transformer", "transformer_2"][:len(export.experts)]
    for part in parts:
        transformer.save_config(str(folder / part))
        save_file({"x": torch.zeros(4)}, str(folder / part / "diffusion_pytorch_model.safetensors"))
    save_file({"v": torch.ones(8)}, str(sub(folder / "vae") / "diffusion_pytorch_model.safetensors"))
    (sub(folder / "tokenizer") / "tokenizer.json").write_text("{}", encoding="utf-8")
    (sub(folder / "assets" / "transformer") / "readme.txt").write_text("mine", encoding="utf-8")
    (sub(folder / ".git") / "config").write_text("no", encoding="utf-8")
    index = {"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"],
             "tokenizer": ["transformers", "T5TokenizerFast"], "text_encoder": ["transformers", "UMT5EncoderModel"]}
    index |= {part: ["diffusers", "WanTransformer3DModel"] for part in parts}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def sub(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


def names(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(str(file)).items()}


@pytest.fixture
def case(tmp_path):
    """(export, base, target) of the export with two experts, of a size that ComfyUI loads."""
    base = make_base(tmp_path / "base", EXPORTS["mxfp8"], diffusers_model(text=HOST_TEXT))
    return loadable("mxfp8", tmp_path / "mxfp8"), base, tmp_path / "out"


def run(case, **kwargs) -> str:
    export, base, target = case
    return repack(str(export), str(base), str(target), **kwargs)


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


# --- interruptions ---

LOW, WEIGHTS = "low_noise_model", "quant_model_weight_w8a8_mxfp8.safetensors"
DESCRIPTION = "quant_model_description_w8a8_mxfp8.json"

KILLED = """
import os, pathlib, runpy, signal
runpy.run_path({pack!r} + "/__main__.py", run_name="qt")["import_pack"]()
from quantized_transformers.loaders.repack_wan import files, repack
files.CHUNK = 1 << 16
left = {bytes}
def step(count):
    global left
    left -= count
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
renames, rename = {renames}, pathlib.Path.rename
def counted(path, to):
    global renames
    renames -= 1
    if renames < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, to)
pathlib.Path.rename = counted
repack({export!r}, {base!r}, {target!r}, step=step)
"""


def kill(case, count: int = 1 << 60, renames: int = 99) -> None:
    export, base, target = map(str, case)
    script = KILLED.format(pack=str(PACK), bytes=count, renames=renames, export=export, base=base,
                           target=target)
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


def refuse_to_load(*folders: Path) -> None:
    for folder in folders:
        for component in ("transformer", "transformer_2"):
            with pytest.raises(CheckpointError):
                model.load(model.Request(str(folder), component), quiet=True)


# in the first expert's header, in its data, between the experts, in the second one's data
@pytest.mark.parametrize("share", [0.001, 0.3, 0.99, 1.7])
def test_killed_while_it_copies(share, case, tmp_path):
    count = int(share * os.path.getsize(case[0] / LOW / WEIGHTS))
    kill(case, count)
    work = tmp_path / ".out.repack" / "unfinished"
    assert not case[2].exists() and any(work.rglob("*.part")) and not list(work.rglob("*.safetensors"))
    refuse_to_load(case[2], work.parent, work, work / "transformer", work / "transformer_2")
    sizes = [path.stat().st_size for path in sorted(work.rglob("*.part"))]
    assert abs(sum(sizes) - count) < 1 << 17  # in chunks of 1 << 16: in the middle of a file
    report = run(case)
    assert "taken over" in report
    assert not work.parent.exists()
    for component in ("transformer", "transformer_2"):
        model.load(model.Request(str(case[2]), component), quiet=True)  # what is whole does load
    whole = tmp_path / "whole"
    run((*case[:2], whole))
    assert tree(case[2]) == tree(whole)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_while_it_finishes(renames, case, tmp_path):
    """All is copied; of three renames (two weights, the folder) some are done. What is there is complete."""
    kill(case, renames=renames)
    work = tmp_path / ".out.repack" / "unfinished"
    assert not case[2].exists() and len(list(work.glob("*/*.part"))) == 2 - renames
    assert "taken over" in run(case)
    run((*case[:2], tmp_path / "whole"))
    assert tree(case[2]) == tree(tmp_path / "whole") and not work.parent.exists()


@pytest.mark.parametrize("damage", [
    lambda data: data[:300_000] + bytes([data[300_000] ^ 1]) + data[300_001:], lambda data: data + b"too long",
    lambda data: b"", lambda data: data[:5] + b"x" + data[6:]])
def test_what_is_left_over_is_compared_not_trusted(damage, case, tmp_path):
    kill(case, 2_500_000)
    work = tmp_path / ".out.repack" / "unfinished"
    part = work / "transformer/diffusion_pytorch_model.safetensors.part"
    data = part.read_bytes()
    assert len(data) > 1_700_000  # complete
    part.write_bytes(damage(data))
    (sub(work / "old") / "stray.txt").write_text("of another base", encoding="utf-8")
    run(case)
    run((*case[:2], tmp_path / "whole"))
    assert tree(case[2]) == tree(tmp_path / "whole") and not (case[2] / "old").exists()


def test_cancel(case, tmp_path):
    class Stop(Exception):
        pass

    total = 0

    def step(count):
        nonlocal total
        total += count
        if total > 1_900_000:
            raise Stop

    with pytest.raises(Stop):
        run(case, step=step)
    assert not case[2].exists()
    total = -10 ** 9
    assert "taken over" in run(case, step=step)
    assert total + 10 ** 9 == sum(len(data) for name, data in tree(case[2]).items()
                                  if not (case[2] / name).is_symlink())  # progress ends at 100 %


def test_one_run_at_a_time(case, tmp_path):
    import fcntl

    kill(case, 2_500_000)
    with open(tmp_path / ".out.repack" / "repack-wan", "a") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another run writes"):
            run(case)
    run(case)


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
    (sub(tmp_path / ".out.repack") / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not this tool's"):
        run(case)
    shutil.rmtree(tmp_path / ".out.repack")
    (tmp_path / ".out.repack").symlink_to(sub(tmp_path / "elsewhere"))
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


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def rename_tensor(file: Path, old: str, new: str | None) -> None:
    """In the weights and in the description beside them; None drops it."""
    tensors = load_file(str(file))
    tensor = tensors.pop(old)
    save_file(tensors | ({new: tensor} if new else {}), str(file))
    description = next(file.parent.glob("quant_model_description*.json"))
    edit(description, lambda d: d.update({new: d.pop(old)}) if new else d.pop(old))


@pytest.mark.parametrize(("damage", "message"), [
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
    (lambda e, b: rename_tensor(e / LOW / WEIGHTS, "blocks.0.norm3.weight", None), "1 tensors of a Wan are missing"),
    (lambda e, b: rename_tensor(e / LOW / WEIGHTS, "head.head.bias", None), "missing: head.head.bias"),
    # names that contain a word of the upstream table: nothing is replaced in parts
    *((lambda e, b, new=new: rename_tensor(e / LOW / WEIGHTS, "blocks.0.self_attn.q_rot", new), "have no place in")
      for new in ("blocks.0.self_attn.quirk.weight", "my_modulation", "blocks.0.ffn.01.weight", "xhead.head.weight",
                  "blocks.0.self_attn.q.weight.linear.x", "blocks.00.self_attn.q_rot", "blocks.0.norm2.weight",
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
def test_input_refusals(damage, message, case, tmp_path):
    export = shutil.copytree(case[0], tmp_path / "export")
    damage(export, case[1])
    with pytest.raises(CheckpointError, match=message):
        run((export, case[1], case[2]))
    assert not case[2].exists() and not (tmp_path / ".out.repack").exists()


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
    refuse_to_load(case[2])


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
        assert Node.validate_inputs(source=str(case[0]), base=str(case[1])) is True
    finally:
        folder_paths.folder_names_and_paths["diffusers_components"][0].remove(str(tmp_path / "models"))
