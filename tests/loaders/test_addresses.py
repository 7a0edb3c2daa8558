"""Where published files are, by their names alone."""

from __future__ import annotations

import json
import sys

import pytest
from huggingface_hub import hf_hub_url

from quantized_transformers import host
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.files.addresses import address_of
from quantized_transformers.loaders.files.places import downloadable, find_path
from support.pack import PACK

sys.path.append(str(PACK / "tests"))


def test_the_table_is_what_the_hosts_templates_say():
    import make_addresses

    kept = json.loads(make_addresses.FILE.read_text(encoding="utf-8"))
    if kept["source"] != make_addresses.source():
        pytest.skip(f"another version is installed than {kept['source']}")
    assert kept["files"] == make_addresses.derive()
    urls = {name: {url.partition("?")[0] for template in make_addresses.templates()
                   for other, url, _ in make_addresses.models(template) if other == name}
            for name in ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "flux1-dev-kontext_fp8_scaled.safetensors")}
    for name, published in urls.items():  # huggingface_hub makes the same address of it
        owner, repo, path = address_of(name).split("/", 2)
        assert {hf_hub_url(f"{owner}/{repo}", path, endpoint="https://huggingface.co")} == published


# addresses as users' scripts and the publishers' pages have them
PUBLISHED = (
    "nunchaku-tech/nunchaku-qwen-image/svdq-fp4_r128-qwen-image-lightningv1.1-8steps.safetensors",
    "nunchaku-tech/nunchaku-qwen-image/svdq-int4_r32-qwen-image.safetensors",
    "nunchaku-tech/nunchaku-qwen-image-edit-2509/lightning-251115/"
    "svdq-int4_r32-qwen-image-edit-2509-lightning-4steps-251115.safetensors",
    "nunchaku-tech/nunchaku-qwen-image-edit-2509/svdq-int4_r32-qwen-image-edit-2509.safetensors",
    "nunchaku-tech/nunchaku-z-image-turbo/svdq-int4_r128-z-image-turbo.safetensors",
    "nunchaku-tech/nunchaku-flux.1-kontext-dev/svdq-int4_r32-flux.1-kontext-dev.safetensors",
    "nunchaku-tech/nunchaku-t5/awq-int4-flux.1-t5xxl.safetensors",
    "black-forest-labs/FLUX.2-dev-NVFP4/flux2-dev-nvfp4-mixed.safetensors",
    "city96/FLUX.1-dev-gguf/flux1-dev-Q4_K_S.gguf", "city96/Qwen-Image-gguf/qwen-image-Q8_0.gguf",
    "city96/t5-v1_1-xxl-encoder-gguf/t5-v1_1-xxl-encoder-Q5_K_M.gguf",
    "black-forest-labs/FLUX.2-klein-4b-fp8/flux-2-klein-4b-fp8.safetensors",
    "QuantStack/Wan2.1_14B_VACE-GGUF/Wan2.1_14B_VACE-Q4_K_M.gguf",
    "jayn7/HunyuanVideo-1.5_T2V_720p-GGUF/720p/hunyuanvideo1.5_720p_t2v-Q4_K_M.gguf")


@pytest.mark.parametrize("address", PUBLISHED)
def test_names_that_publishers_give(address):
    name = address.rpartition("/")[2]
    for text in (name, f"my models/{name}", f"flux\\{name}", f'"{name}"'):  # in folders of a user's own
        assert downloadable(text) == address


@pytest.mark.parametrize("text", [
    "svdq-int4_r32-somebody.safetensors", "svdq-int4_r32-flux.1-dev.gguf", "my-svdq-int4_r32-flux.1-dev.safetensors",
    "flux1-dev-Q4_K_S.safetensors", "flux2-dev-nvfp4", "model.safetensors", "", "/somewhere/flux2-dev-nvfp4.safetensors"])
def test_other_names_are_nobodys(text):
    assert not downloadable(text)


def test_a_published_file_is_found_by_its_name(tmp_path, monkeypatch):
    """Where ComfyUI's own dialog puts it: in a model folder, without its repo. Only its own name stands for it."""
    name = "Chroma1-HD-fp8mixed.safetensors"
    (tmp_path / name).touch()
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(host, "model_folders", lambda: [str(tmp_path)])
    assert find_path(address_of(name)) == tmp_path / name
    for other in (f"somebody/else/{name}", "somebody/else/model.safetensors"):
        with pytest.raises(CheckpointError):
            find_path(other)


def test_a_repo_is_never_another():
    reference = "somebody/their-repo/flux2-dev-nvfp4.safetensors"
    assert downloadable(reference) == reference
