"""The note of each example workflow: what it is, what it needs, where the files come from."""

from __future__ import annotations

from dataclasses import dataclass

RUNS = {
    "FP8": "FP8 matrix multiplication needs an NVIDIA GPU of SM 8.9 or newer (RTX 40 and 50, L4, L40, H100, B200). "
           "Anything else, a CPU too, multiplies dequantized weights: same memory, slower; the report says *emulated*.",
    "NVFP4": "NVFP4 matrix multiplication needs an NVIDIA GPU of SM 10.0 or newer (B200, RTX 50). Anything else, a CPU "
             "too, multiplies dequantized weights: same memory, slower; the report says *emulated*.",
    "SVDQuant": "No nunchaku wheel is needed. INT4 kernels need an NVIDIA GPU of SM 8.0 or newer (RTX 30, 40 and 50, A100, "
                "H100), those of the `svdq-fp4` files SM 10.0 (B200, RTX 50). Anything else, a CPU too, multiplies "
                "dequantized weights: same memory, slower; the report names the *backend* and says why.",
    "W8A8": "No NPU is needed. INT8 matrix multiplication runs on an Ascend A2, A3 or A5 (torch_npu, CANN 8.0.RC2 or newer), "
            "and by comfy-kitchen on NVIDIA GPUs and the CPU; the report names the *backend*.",
    "MXFP8": "No NPU is needed. MXFP8 matrix multiplication needs an Ascend A5 (950; torch_npu, CANN 8.0.RC3 or newer) or an "
             "NVIDIA GPU of SM 10.0 or newer (B200, RTX 50). Other GPUs and the CPU multiply dequantized weights: same "
             "memory, slower. An Ascend A2 or A3 does so with the A5's arithmetic in plain torch, slowly: take W8A8 there. "
             "The report names the *backend* and says why.",
}
BLACK_FOREST = ("the FLUX repos are gated. Accept the licence on their Hugging Face pages and run `hf auth login` before "
                "you download. Non-commercial licence.")

BASE_FOR_TEXT = "Text encoder and VAE are the base's; its transformer is not needed."
BLACKWELL = "On a Blackwell GPU (RTX 50, B200) take the `svdq-fp4` file of the same name"
LIGHTNING = "svdq-int4_r32-qwen-image-lightningv1.0-4steps.safetensors"
EXPORT = "Wan2.2-T2V-A14B-w8a8f8"  # a folder as msmodelslim fills it
EXPERTS = ("Two transformers take turns, `transformer` for high noise and `transformer_2` for low noise. They change where sigma "
           "falls below 0.875: after 26 of 40 steps at shift 12.")
HYPER = {"name": "Hyper-FLUX.1-dev-8steps-lora.safetensors", "directory": "loras",
         "url": "https://huggingface.co/ByteDance/Hyper-SD/resolve/main/Hyper-FLUX.1-dev-8steps-lora.safetensors"}


@dataclass(frozen=True)
class Note:
    """`sizes` in words; `extra` are whole weight files of the base repo that nobody needs; `file` is one of the override;
    `more` are further commands. Without a `repo` on the Hub (`hub`), these get or make it; without a `repo` the base's
    own transformers are needed."""

    title: str
    base: str
    repo: str
    format: str
    about: str
    sizes: str
    licence: str
    extra: tuple[str, ...] = ()
    file: str = ""
    more: tuple[str, ...] = ()
    hub: bool = True

    def text(self) -> str:
        excludes = "".join(f'--exclude "{name}" ' for name in ("transformer/*.safetensors", *self.extra) if self.repo)
        folder = "models/diffusers/"
        override = (f"hf download {self.repo} {self.file + ' ' if self.file else ''}--local-dir "
                    f"{folder}{self.repo.split('/')[-1]}",) if self.repo and self.hub else ()
        return "\n\n".join((
            f"## {self.title}", self.about,
            f"**Hardware.** {RUNS[self.format]}",
            f"**Memory, about.** {self.sizes} ComfyUI offloads what does not fit.",
            "**Files.** Nothing is downloaded unless you switch on `download_missing` (an advanced input) in each loader; or "
            "run in ComfyUI's folder:\n\n```\n"
            + "\n\n".join((f"hf download {self.base} {excludes}--local-dir {folder}{self.base.split('/')[1]}", *override,
                           *self.more)) + "\n```",
            f"**Licence:** {self.licence}",
        ))


NOTES = {
    "flux1_dev_modelopt_fp8": Note(
        "FLUX.1-dev, ModelOpt FP8", "black-forest-labs/FLUX.1-dev", "lmsys/flux1-dev-modelopt-fp8-sglang-transformer", "FP8",
        "The base without its transformer, and NVIDIA ModelOpt's FP8 transformer in its place. Modulation and the double "
        "blocks' feed-forward layers are BF16 there.",
        "Transformer 20 GB (24 in BF16), text encoders 10 GB, VAE 0.2 GB.", BLACK_FOREST, ("flux1-dev.safetensors",)),
    "flux1_dev_modelopt_nvfp4": Note(
        "FLUX.1-dev, ModelOpt NVFP4", "black-forest-labs/FLUX.1-dev", "lmsys/flux1-dev-modelopt-nvfp4-sglang-transformer",
        "NVFP4",
        "The base without its transformer, and a mixed BF16 and NVFP4 transformer in its place: attention is NVFP4, "
        "modulation and feed-forward layers are BF16.",
        "Transformer 20 GB (24 in BF16), text encoders 10 GB, VAE 0.2 GB.", BLACK_FOREST, ("flux1-dev.safetensors",)),
    "flux2_dev_modelopt_fp8": Note(
        "FLUX.2-dev, ModelOpt FP8", "black-forest-labs/FLUX.2-dev", "lmsys/flux2-dev-modelopt-fp8-sglang-transformer", "FP8",
        "The base without its transformer, and NVIDIA ModelOpt's FP8 transformer in its place. Embedders and modulation are "
        "BF16 there.",
        "Transformer 33 GB (64 in BF16), text encoder 48 GB, VAE 0.3 GB.", BLACK_FOREST, ("flux2-dev.safetensors",)),
    "flux2_dev_nvfp4": Note(
        "FLUX.2-dev NVFP4, as Black Forest Labs published it", "black-forest-labs/FLUX.2-dev",
        "black-forest-labs/FLUX.2-dev-NVFP4", "NVFP4",
        "The repo holds weight files only, with packed q, k, v, so `kind` is *weights* and `weights_name` picks one. Where "
        "its layers have no activation scale, they get a dynamic one.",
        "Transformer 21 GB (64 in BF16), text encoder 48 GB, VAE 0.3 GB.", BLACK_FOREST, ("flux2-dev.safetensors",),
        "flux2-dev-nvfp4-mixed.safetensors"),
    "wan22_t2v_a14b_modelopt_fp8": Note(
        "Wan2.2 T2V A14B, ModelOpt FP8", "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "lmsys/wan22-t2v-a14b-modelopt-fp8-sglang-transformer", "FP8",
        "Two transformers take turns: `transformer` for high noise is the FP8 override, `transformer_2` for low noise "
        "stays BF16 and comes from the base. They change where sigma falls below 0.875: after 26 of 40 steps at shift 12.",
        "Transformer 14 GB (29 in BF16), transformer_2 29 GB, text encoder 11 GB, VAE 0.5 GB.", "Apache-2.0."),
    "wan22_t2v_a14b_modelopt_nvfp4": Note(
        "Wan2.2 T2V A14B, ModelOpt NVFP4", "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "lmsys/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer", "NVFP4",
        "Two transformers take turns: `transformer` for high noise is the NVFP4 override, `transformer_2` for low noise "
        "stays BF16 and comes from the base. They change where sigma falls below 0.875: after 26 of 40 steps at shift 12. "
        "`fp4_backend` asks for FlashInfer's cudnn kernels (`pip install flashinfer-python`); without them "
        "comfy-kitchen's are taken, and the report says so.",
        "Transformer 8 GB (29 in BF16), transformer_2 29 GB, text encoder 11 GB, VAE 0.5 GB.", "Apache-2.0."),
    "wan22_t2v_a14b_modelslim_w8a8": Note(
        "Wan2.2 T2V A14B, ModelSlim W8A8 (Ascend)", "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8", "W8A8",
        f"{EXPERTS} Both are INT8, quantized by msModelSlim and repacked for diffusers. {BASE_FOR_TEXT} The quantized repo is on "
        "ModelScope (`pip install modelscope`), where `download_missing` does not look.",
        "Each transformer 14.5 GB (29 in BF16), text encoder 11 GB, VAE 0.5 GB.", "Apache-2.0.",
        ("transformer_2/*.safetensors",), "", (
            'modelscope download --model Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8 --include "transformer/*" "transformer_2/*" '
            "--local_dir models/diffusers/Wan2.2-T2V-A14B-Diffusers-w8a8",), hub=False),
    "wan22_t2v_a14b_modelslim_mxfp8": Note(
        "Wan2.2 T2V A14B, ModelSlim MXFP8 (Ascend)", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", EXPORT, "MXFP8",
        f"{EXPERTS} Both are an MXFP8 export of msModelSlim, as it wrote it: `high_noise_model` and `low_noise_model` in one "
        f"folder, which `reference` names. {BASE_FOR_TEXT} No such export is published: make one on an Ascend NPU with the last "
        "command (it needs Wan's original weights). For a folder of another name set `reference` in both loaders, or empty "
        "it and choose in `folder`. Without an NPU take the *online_mxfp8* workflow.",
        "Each transformer 15 GB (29 in BF16), text encoder 11 GB, VAE 0.5 GB.", "Apache-2.0.",
        ("transformer_2/*.safetensors",), "", (
            "msmodelslim quant --model_type Wan2.2-T2V-A14B --quant_type w8a8f8 --device npu --trust_remote_code True "
            f"--model_path Wan2.2-T2V-A14B --save_path models/diffusers/{EXPORT}",), hub=False),
    "wan22_t2v_a14b_online_mxfp8": Note(
        "Wan2.2 T2V A14B, MXFP8 made on the way (Ascend)", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "", "MXFP8",
        f"{EXPERTS} Both are loaded from the base and quantized to MXFP8 when the workflow runs, by the rule of Ascend's "
        "kernels: no quantized checkpoint is needed. `keep_high_precision` names layers that stay; Wan has no preset. LoRA "
        "nodes may stand before or behind.",
        "Each transformer 15 GB (29 in BF16), text encoder 11 GB, VAE 0.5 GB. While it quantizes, the BF16 transformers "
        "are in system memory too: 29 GB each, until ComfyUI drops them.", "Apache-2.0."),
    "hunyuanvideo_modelopt_fp8": Note(
        "HunyuanVideo, ModelOpt FP8", "hunyuanvideo-community/HunyuanVideo",
        "lmsys/hunyuanvideo-modelopt-fp8-sglang-transformer", "FP8",
        "The base without its transformer, and NVIDIA ModelOpt's FP8 transformer in its place. Embedders, the text refiner "
        "and modulation are BF16 there. 17 frames of 544 x 960.",
        "Transformer 18 GB (26 in BF16), text encoders 15 GB, VAE 0.5 GB.",
        "Tencent Hunyuan Community License; it does not cover every country, read it first."),
    "qwen_image_modelopt_fp8": Note(
        "Qwen-Image, ModelOpt FP8", "Qwen/Qwen-Image", "lmsys/qwen-image-modelopt-fp8-sglang-transformer", "FP8",
        "The base without its transformer, and NVIDIA ModelOpt's FP8 transformer in its place. Embedders, modulation and the "
        "image stream's second feed-forward layer are BF16 there.",
        "Transformer 30 GB (41 in BF16), text encoder 17 GB, VAE 0.3 GB.", "Apache-2.0."),
    "qwen_image_edit_2511_modelopt_fp8": Note(
        "Qwen-Image-Edit-2511, ModelOpt FP8", "Qwen/Qwen-Image-Edit-2511",
        "lmsys/qwen-image-edit-modelopt-fp8-sglang-transformer", "FP8",
        "The base without its transformer, and NVIDIA ModelOpt's FP8 transformer in its place. The picture goes to the text "
        "encoder and, by the VAE, to the transformer, which sees it at timestep zero (`zero_cond_t`); no extra node is "
        "needed for that.",
        "Transformer 30 GB (41 in BF16), text encoder 17 GB, VAE 0.3 GB.", "Apache-2.0."),
    "flux1_dev_svdq_int4_lora": Note(
        "FLUX.1-dev, Nunchaku SVDQuant INT4, with a LoRA", "black-forest-labs/FLUX.1-dev", "nunchaku-tech/nunchaku-flux.1-dev",
        "SVDQuant",
        f"Nunchaku's 4-bit transformer as an ordinary MODEL, so ComfyUI's own LoRA nodes work on it: here ByteDance's "
        f"Hyper-FLUX, which makes 8 steps enough, at its strength of 0.125 (shown rounded). Where it is missing "
        f"ComfyUI offers to download it. Any other FLUX.1 LoRA can take its place (20 steps then), and several can be chained. {BASE_FOR_TEXT} {BLACKWELL}, and set `precision` to *auto*.",
        "Transformer 6.8 GB (24 in BF16), LoRA 1.4 GB, text encoders 10 GB, VAE 0.2 GB.",
        f"{BLACK_FOREST} The LoRA is under the same licence.", ("flux1-dev.safetensors",),
        "svdq-int4_r32-flux.1-dev.safetensors", (f"hf download ByteDance/Hyper-SD {HYPER['name']} --local-dir models/loras",)),
    "qwen_image_svdq_lightning_4steps": Note(
        "Qwen-Image Lightning in 4 steps, Nunchaku SVDQuant", "Qwen/Qwen-Image", "nunchaku-tech/nunchaku-qwen-image",
        "SVDQuant",
        f"Nunchaku's 4-bit transformer with Qwen-Image-Lightning already in it: 4 steps, cfg 1, shift 3. The repo has several "
        f"files, so `weights_name` picks one; the report reads the steps from its name. {BASE_FOR_TEXT} {BLACKWELL}, in `weights_name` too.",
        "Transformer 11.5 GB (41 in BF16), text encoder 17 GB, VAE 0.3 GB.", "Apache-2.0.", (), LIGHTNING),
    "qwen_image_edit_svdq": Note(
        "Qwen-Image-Edit-2509, Nunchaku SVDQuant", "Qwen/Qwen-Image-Edit-2509", "nunchaku-tech/nunchaku-qwen-image-edit-2509",
        "SVDQuant",
        f"Nunchaku's 4-bit transformer: 40 steps, cfg 4. The picture goes to the text encoder and, by the VAE, to the "
        f"transformer. For a Lightning file of the same repo set `weights_name`, the steps of its name, and cfg 1. "
        f"{BASE_FOR_TEXT} {BLACKWELL}.",
        "Transformer 11.5 GB (41 in BF16), text encoder 17 GB, VAE 0.3 GB.", "Apache-2.0.", (),
        "svdq-int4_r32-qwen-image-edit-2509.safetensors"),
    "z_image_turbo_svdq": Note(
        "Z-Image-Turbo, Nunchaku SVDQuant", "Tongyi-MAI/Z-Image-Turbo", "nunchaku-tech/nunchaku-z-image-turbo", "SVDQuant",
        f"Nunchaku's 4-bit transformer: 8 steps, cfg 1, shift 3. {BASE_FOR_TEXT} {BLACKWELL}.",
        "Transformer 3.6 GB (12 in BF16), text encoder 8 GB, VAE 0.2 GB.", "Apache-2.0.", (),
        "svdq-int4_r32-z-image-turbo.safetensors"),
}
