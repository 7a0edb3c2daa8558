"""Where files are published that workflows name without their repo.

addresses.json is what ComfyUI's own templates say (tests/make_addresses.py derives it); the rules are for publishers
who name their files after the model and the format.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

# A file's name -> its repo; \1 is the model. Compiled when they are first used.
RULES = (
    # Nunchaku (docs/sources/nunchaku.md): svdq-int4_r32-qwen-image-lightningv1.0-4steps.safetensors
    (r"svdq-(?:int4|fp4)_r\d+-(qwen-image-edit-2509)-lightning-[48]steps-251115\.safetensors",
     r"nunchaku-tech/nunchaku-\1/lightning-251115"),
    (r"svdq-(?:int4|fp4)_r\d+-(flux\.1-(?:dev|schnell|(?:fill|canny|depth|kontext|krea)-dev)|qwen-image-edit-2509"
     r"|qwen-image-edit|qwen-image|z-image-turbo|sdxl-turbo|sdxl)(?:-lightning[\w.-]+)?\.safetensors",
     r"nunchaku-tech/nunchaku-\1"),
    (r"awq-int4-flux\.1-t5xxl\.safetensors", "nunchaku-tech/nunchaku-t5"),
    # Black Forest Labs
    (r"flux2-dev-nvfp4(?:-mixed)?\.safetensors", "black-forest-labs/FLUX.2-dev-NVFP4"),
    # QuantStack, jayn7
    (r"Wan2\.1_14B_VACE-Q\w+\.gguf", "QuantStack/Wan2.1_14B_VACE-GGUF"),
    (r"hunyuanvideo1\.5_720p_t2v-Q\w+\.gguf", "jayn7/HunyuanVideo-1.5_T2V_720p-GGUF/720p"),
    # city96: flux1-dev-Q4_K_S.gguf
    (r"flux1-(dev|schnell)-(?:B?F16|Q\w+)\.gguf", r"city96/FLUX.1-\1-gguf"),
    (r"qwen-image-(?:BF16|Q\w+)\.gguf", "city96/Qwen-Image-gguf"),
    (r"(t5-v1_1-xxl|umt5-xxl)-encoder-(?:F16|F32|Q\w+)\.gguf", r"city96/\1-encoder-gguf"),
)


def address_of(text: str) -> str:
    """owner/name/path of a published file by its name, whatever folder of the user's it is named in; empty where it is
    not known, and for what names a repo itself."""
    folder, _, name = text.replace("\\", "/").rpartition("/")
    if "/" in folder or not name.endswith((".safetensors", ".sft", ".gguf")):
        return ""
    for pattern, repo in RULES:
        found = re.fullmatch(pattern, name)
        if found:
            return f"{found.expand(repo)}/{name}"
    return _table().get(name, "")


@cache
def _table() -> dict[str, str]:
    found = json.loads(Path(__file__).with_name("addresses.json").read_text(encoding="utf-8"))
    return dict(found["files"])
