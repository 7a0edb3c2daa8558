"""Published checkpoints by name: bases, and those of families that know theirs. Apart from what reads them: the nodes'
lists need no more than the names."""

from __future__ import annotations

# The bases of the support matrix.
KNOWN_BASES = (
    "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell", "black-forest-labs/FLUX.2-dev",
    "black-forest-labs/FLUX.2-dev-NVFP4", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "hunyuanvideo-community/HunyuanVideo", "Qwen/Qwen-Image",
    "Qwen/Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2511", "Tongyi-MAI/Z-Image-Turbo",
    "black-forest-labs/FLUX.2-klein-4B", "stabilityai/stable-diffusion-3.5-large", "lodestones/Chroma1-HD",
    "Wan-AI/Wan2.1-VACE-14B-diffusers", "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
    "HiDream-ai/HiDream-I1-Full", "Lightricks/LTX-2")
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
# Single files, of FP8 and of blocks; of repos with several the file.
FP8 = (
    "black-forest-labs/FLUX.2-klein-4b-fp8", "Comfy-Org/stable-diffusion-3.5-fp8/sd3.5_large_fp8_scaled.safetensors",
    "Comfy-Org/Chroma1-HD_repackaged/split_files/diffusion_models/Chroma1-HD-fp8mixed.safetensors",
    "Comfy-Org/HiDream-I1_ComfyUI/split_files/diffusion_models/hidream_i1_full_fp8.safetensors",
    "Lightricks/LTX-2/ltx-2-19b-dev-fp8.safetensors")
GGUF = (
    "QuantStack/Wan2.1_14B_VACE-GGUF/Wan2.1_14B_VACE-Q4_K_M.gguf",
    "jayn7/HunyuanVideo-1.5_T2V_720p-GGUF/720p/hunyuanvideo1.5_720p_t2v-Q4_K_M.gguf")
OVERRIDES = (*MODELOPT, *BITSANDBYTES, *SDNQ, *FP8, *GGUF)
