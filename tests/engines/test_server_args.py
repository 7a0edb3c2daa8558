"""SGLang's own reading of the command lines that `serve` writes (prepare_server_args)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.server

FP8, NVFP4 = "modelopt-fp8-sglang-transformer", "modelopt-nvfp4-sglang-transformer"
# The nine rows of SGLang's quantization page: name of the base's settings, the base's class, override, its flag.
ROWS = {
    1: ("FLUX.1-dev", "FluxPipeline", f"flux1-dev-{FP8}", "FluxPipelineConfig"),
    2: ("FLUX.2-dev", "Flux2Pipeline", f"flux2-dev-{FP8}", "Flux2PipelineConfig"),
    3: ("Wan2.2-T2V-A14B-Diffusers", "WanPipeline", f"wan22-t2v-a14b-{FP8}", "Wan2_2_T2V_A14B_Config"),
    4: ("HunyuanVideo", "HunyuanVideoPipeline", f"hunyuanvideo-{FP8}", "HunyuanConfig"),
    5: ("Qwen-Image", "QwenImagePipeline", f"qwen-image-{FP8}", "QwenImagePipelineConfig"),
    6: ("Qwen-Image-Edit-2511", "QwenImageEditPlusPipeline", f"qwen-image-edit-{FP8}", "QwenImageEditPlus_2511_PipelineConfig"),
    7: ("FLUX.1-dev", "FluxPipeline", f"flux1-dev-{NVFP4}", "FluxPipelineConfig"),
    8: ("FLUX.2-dev", "Flux2Pipeline", "flux2-dev-nvfp4-mixed.safetensors", "Flux2PipelineConfig"),
    9: ("Wan2.2-T2V-A14B-Diffusers", "WanPipeline", f"wan22-t2v-a14b-{NVFP4}", "Wan2_2_T2V_A14B_Config"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A local pipeline's folder: SGLang reads no more of it than this, before it loads."""
    def made(pipeline_class):
        folder = tmp_path_factory.mktemp("base")
        (folder / "transformer").mkdir()
        index = {"_class_name": pipeline_class, "_diffusers_version": "0.37.0", "transformer": ["diffusers", "Transformer"]}
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        return str(folder)
    return made


@pytest.mark.parametrize("row", ROWS)
def test_rows(server_args, base, row, tmp_path):
    model, pipeline_class, name, settings = ROWS[row]
    folder, override = base(pipeline_class), tmp_path / name
    if row == 8:
        override.write_bytes(b"")
        flag = "--transformer-weights-path"
    else:
        override.mkdir()
        (override / "config.json").write_text("{}", encoding="utf-8")
        flag = "--transformer-path"
    found = server_args(["--model-path", folder, "--model-id", model, flag, str(override), "--served-model-name", "qt:a+b=c"])
    assert found.get("error") is None
    assert (found["model_path"], found["served_model_name"], found["pipeline_config"]) == (folder, "qt:a+b=c", settings)
    assert found["component_paths"] == ({} if row == 8 else {"transformer": str(override)})
    assert found["transformer_weights_path"] == (str(override) if row == 8 else None)
    assert found["component_weights_paths"] == {}


def test_the_second_transformer(server_args, base):
    wan = ["--model-path", base("WanPipeline"), "--model-id", "Wan2.2-T2V-A14B-Diffusers"]
    both = server_args([*wan, "--transformer-path", "/one", "--transformer-2-path", "/two"])
    assert both["component_paths"] == {"transformer": "/one", "transformer_2": "/two"}
    raw = server_args([*wan, "--transformer-2-weights-path", "/two.safetensors"])
    assert raw["component_weights_paths"] == {"transformer_2": "/two.safetensors"} and not raw["component_paths"]


@pytest.mark.parametrize("model, pipeline_class, flags, degrees", [
    ("FLUX.1-dev", "FluxPipeline", "--num-gpus 2", dict(cfg=1, kv=2)),
    ("FLUX.1-dev", "FluxPipeline", "--num-gpus 4", dict(cfg=1, ulysses=4)),
    ("FLUX.1-dev", "FluxPipeline", "--num-gpus 4 --ulysses-degree 2 --ring-degree 2", dict(ulysses=2, ring=2)),
    ("FLUX.1-dev", "FluxPipeline", "--num-gpus 4 --dp-size 4", dict(dp=4)),
    ("FLUX.1-dev", "FluxPipeline", "--num-gpus 3 --ulysses-degree 2", dict(ulysses=2)),  # accepted: `serve` must not write it
    ("Wan2.2-T2V-A14B-Diffusers", "WanPipeline", "--num-gpus 2", dict(cfg=2)),
    ("Wan2.2-T2V-A14B-Diffusers", "WanPipeline", "--num-gpus 4 --cfg-parallel-size 2 --ulysses-degree 2", dict(cfg=2, ulysses=2)),
])
def test_degrees(server_args, base, model, pipeline_class, flags, degrees):
    found = server_args(["--model-path", base(pipeline_class), "--model-id", model, *flags.split()])
    names = {"cfg": "cfg_parallel_degree", "kv": "kv_gather_degree", "ulysses": "ulysses_degree", "ring": "ring_degree",
             "dp": "dp_size"}
    assert {name: found[names[name]] for name in degrees} == degrees
    assert found["num_gpus"] == int(flags.split()[1])


def test_what_a_typo_does(server_args, base):
    """A mistyped component is a component, of no model, and nobody looks at it. Other words are refused."""
    flux = ["--model-path", base("FluxPipeline"), "--model-id", "FLUX.1-dev"]
    assert server_args([*flux, "--transformr-path", "/x"])["component_paths"] == {"transformr": "/x"}
    assert server_args([*flux, "--transformer-2-path", "/x"])["component_paths"] == {"transformer_2": "/x"}
    assert "--transformer-pathh" in server_args([*flux, "--transformer-pathh", "/x"])["error"]
    assert "--num-gpus: invalid int value" in server_args([*flux, "--num-gpus", "two"])["error"]


def test_what_it_gives_to_diffusers(server_args, base):
    """A folder that lacks a component of its index goes to diffusers, with a line in the log alone, unless `--backend
    sglang` forbids it. One with such a word in its path goes there even then."""
    folder = Path(base("FluxPipeline"))

    def read(path, *more):
        return server_args(["--model-path", str(path), "--model-id", "FLUX.1-dev", *more])

    native = ("--backend", "sglang")
    assert read(folder)["pipeline_config"] == read(folder, *native)["pipeline_config"] == "FluxPipelineConfig"
    for word in ("-AWQ", "-gptq", "-4bit"):
        named = folder.rename(f"{folder}{word}")
        assert all(read(named, *more)["pipeline_config"].startswith("Diffusers") for more in ((), native))
        named.rename(folder)
    (folder / "transformer").rmdir()
    assert read(folder)["pipeline_config"].startswith("Diffusers")
    assert "Could not get model info" in read(folder, *native)["error"]


def test_svdquant_needs_a_gpu(server_args, base, tmp_path):
    """An SVDQuant file is told by its name, and refused here."""
    file = tmp_path / "svdq-int4_r32-flux.1-dev.safetensors"
    file.write_bytes(b"")
    found = server_args(["--model-path", base("FluxPipeline"), "--model-id", "FLUX.1-dev", "--transformer-weights-path", str(file)])
    assert found["error"].strip() == "Nunchaku SVDQuant is only supported on NVIDIA CUDA GPUs (Ampere SM8x or SM12x)."
