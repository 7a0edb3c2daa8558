"""What SGLang 0.5.23 knows of the models that this pack loads: by which name it finds a local folder's settings, which
pairs its makers have validated, and which models are guided by a second evaluation."""

from __future__ import annotations

VERSION = "0.5.23"
# Bases that sglang/multimodal_gen/registry.py has settings for; --model-id takes the last part of one.
BASES = (
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.2-dev",
    "black-forest-labs/FLUX.2-klein-4B",
    "black-forest-labs/FLUX.2-klein-9B",
    "black-forest-labs/FLUX.2-klein-base-4B",
    "black-forest-labs/FLUX.2-klein-base-9B",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "hunyuanvideo-community/HunyuanVideo",
    "Qwen/Qwen-Image",
    "Qwen/Qwen-Image-2512",
    "Qwen/Qwen-Image-Edit",
    "Qwen/Qwen-Image-Edit-2509",
    "Qwen/Qwen-Image-Edit-2511",
    "Qwen/Qwen-Image-Layered",
    "Tongyi-MAI/Z-Image",
    "Tongyi-MAI/Z-Image-Turbo",
    "Lightricks/LTX-2",
    "baidu/ERNIE-Image",
    "baidu/ERNIE-Image-Turbo",
    "meituan-longcat/LongCat-Image",
    "meituan-longcat/LongCat-Image-Edit",
    "krea/Krea-2",
    "stabilityai/stable-diffusion-3-medium-diffusers",
    "stabilityai/stable-diffusion-3.5-medium",
    "stabilityai/stable-diffusion-3.5-large",
)
# model_index.json's class -> the base whose settings a folder of another name gets, where one is the usual model of it
BY_CLASS = {
    "FluxPipeline": "FLUX.1-dev",
    "Flux2Pipeline": "FLUX.2-dev",
    "QwenImagePipeline": "Qwen-Image",
    "QwenImageEditPlusPipeline": "Qwen-Image-Edit-2511",
    "HunyuanVideoPipeline": "HunyuanVideo",
    "ZImagePipeline": "Z-Image-Turbo",
}
# The nine rows of SGLang's quantization page: (base, override).
VALIDATED = frozenset(
    {
        ("black-forest-labs/FLUX.1-dev", "lmsys/flux1-dev-modelopt-fp8-sglang-transformer"),
        ("black-forest-labs/FLUX.2-dev", "lmsys/flux2-dev-modelopt-fp8-sglang-transformer"),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "lmsys/wan22-t2v-a14b-modelopt-fp8-sglang-transformer"),
        ("hunyuanvideo-community/HunyuanVideo", "lmsys/hunyuanvideo-modelopt-fp8-sglang-transformer"),
        ("Qwen/Qwen-Image", "lmsys/qwen-image-modelopt-fp8-sglang-transformer"),
        ("Qwen/Qwen-Image-Edit-2511", "lmsys/qwen-image-edit-modelopt-fp8-sglang-transformer"),
        ("black-forest-labs/FLUX.1-dev", "lmsys/flux1-dev-modelopt-nvfp4-sglang-transformer"),
        ("black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-dev-NVFP4"),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "lmsys/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer"),
    }
)
# For which its makers choose FlashInfer's cuDNN (row 9).
CUDNN = "lmsys/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer"
FP4_BACKEND = "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND"
# Words in the names of pipeline classes whose servers make videos, in jobs with files.
VIDEO = ("Wan", "HunyuanVideo", "LTX", "Mochi", "CogVideo", "Cosmos", "SkyReels")
# Guidance is an input of the model: one evaluation a step, and a second one is an error or a waste.
DISTILLED = ("FluxPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "Flux2NvfpPipeline", "HunyuanVideoPipeline",
             "ZImagePipeline")

# What /v1/images/edits reads of a form; it leaves anything else unread.
EDIT_FIELDS = frozenset({
    "prompt", "negative_prompt", "n", "size", "seed", "generator_device", "output_format", "response_format", "quality",
    "guidance_scale", "true_cfg_scale", "num_inference_steps", "num_frames", "task_type", "output_quality",
    "output_compression", "enable_teacache", "enable_cache_dit", "cache_dit_params", "enable_upscaling",
    "upscaling_scale"})

# In the path of a model: SGLang takes it for a quantized repo that diffusers alone loads, whatever --backend says.
_DIFFUSERS = ("-awq", "-gptq", "-4bit")


def diffusers_word(path: str) -> str:
    """The word in a base's path for which SGLang hands it to diffusers; empty where there is none."""
    return next((word for word in _DIFFUSERS if word in path.lower()), "")


def model_id(repo: str, pipeline_class: str) -> str:
    """The name by which SGLang finds the settings of a base; empty where it has to go by the pipeline's class."""
    last = repo.rpartition("/")[2].lower()
    known = {base.rpartition("/")[2].lower(): base.rpartition("/")[2] for base in BASES}
    return known.get(last) or BY_CLASS.get(pipeline_class, "")


def takes_true_cfg(pipeline_class: str) -> bool:
    """Whether a pipeline's guidance is called true_cfg_scale, which wins there over guidance_scale."""
    return pipeline_class.startswith("QwenImage")


def is_video(pipeline_class: str) -> bool:
    """Whether a pipeline makes videos."""
    return any(word in pipeline_class for word in VIDEO)


def is_validated(base: str, override: str) -> bool:
    """Whether this base and this override, or the repo that it is a file of, are one of the nine rows."""
    return any(base == one and (override == other or override.startswith(f"{other}/")) for one, other in VALIDATED)
