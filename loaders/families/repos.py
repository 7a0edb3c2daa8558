"""Published checkpoints of families that know theirs by name; apart, because the nodes' lists need them while ComfyUI
starts."""

from __future__ import annotations

# The nine validated overrides of the support matrix.
MODELOPT = (
    "lmsys/flux1-dev-modelopt-fp8-sglang-transformer", "lmsys/flux1-dev-modelopt-nvfp4-sglang-transformer",
    "lmsys/flux2-dev-modelopt-fp8-sglang-transformer", "black-forest-labs/FLUX.2-dev-NVFP4",
    "lmsys/wan22-t2v-a14b-modelopt-fp8-sglang-transformer", "lmsys/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer",
    "lmsys/hunyuanvideo-modelopt-fp8-sglang-transformer", "lmsys/qwen-image-modelopt-fp8-sglang-transformer",
    "lmsys/qwen-image-edit-modelopt-fp8-sglang-transformer")
# Whole pipelines, of which the transformer is taken.
BITSANDBYTES = ("diffusers/FLUX.1-dev-bnb-4bit", "diffusers/FLUX.2-dev-bnb-4bit")
SDNQ = ("Disty0/Z-Image-Turbo-SDNQ-uint4-svd-r32", "Disty0/Qwen-Image-2512-SDNQ-uint4-svd-r32")
OVERRIDES = (*MODELOPT, *BITSANDBYTES, *SDNQ)
