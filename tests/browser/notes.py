"""The note of each example workflow: what it is, what it needs, where the files come from.

No code in the texts: Nodes 2.0 shows it blue on blue.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

RUNS = {
    "FP8": "FP8 matrix multiplication needs an NVIDIA GPU of SM 8.9 or newer (RTX 40 and 50, L4, L40, H100, B200). "
           "Anything else, a CPU too, multiplies dequantized weights: same memory, slower; the report says *emulated*.",
    "NVFP4": "NVFP4 matrix multiplication needs an NVIDIA GPU of SM 10.0 or newer (B200, RTX 50). Anything else, a CPU "
             "too, multiplies dequantized weights: same memory, slower; the report says *emulated*.",
    "SVDQuant": "No nunchaku wheel is needed. INT4 kernels need an NVIDIA GPU of SM 8.0 or newer (RTX 30, 40 and 50, A100, "
                "H100), those of the *svdq-fp4* files SM 10.0 (B200, RTX 50). Anything else, a CPU too, multiplies "
                "dequantized weights: same memory, slower; the report names the *backend* and says why.",
    "W8A8": "No NPU is needed. INT8 matrix multiplication runs on an Ascend A2, A3 or A5 (torch_npu, CANN 8.0.RC2 or newer), "
            "and by comfy-kitchen on NVIDIA GPUs and the CPU; the report names the *backend*.",
    "MXFP8": "No NPU is needed. MXFP8 matrix multiplication needs an Ascend A5 (950; torch_npu, CANN 8.0.RC3 or newer) or an "
             "NVIDIA GPU of SM 10.0 or newer (B200, RTX 50). Other GPUs and the CPU multiply dequantized weights: same "
             "memory, slower. An Ascend A2 or A3 does so with the A5's arithmetic in plain torch, slowly: take W8A8 there. "
             "The report names the *backend* and says why.",
    "GGUF": "Blocks stay packed in memory, and every matrix multiplication unpacks them, on any device: same memory, slower "
            "than BF16 that fits. Ascend NPUs unpack them when they are loaded.",
}
HUB = "https://huggingface.co/"
KIND = "The file is weights alone, so *kind* is *weights*: the base gives the configuration."
MISSING = "Missing files: press Download in the dialog that opens, or on a node's badge, then Run."
START = "Start the server with the command below, then Run."
SERVED = (
    "**Hardware.** The server's machine needs an NVIDIA GPU of SM 8.9 or newer (RTX 40 and 50, L4, L40, H100, B200), and memory for "
    "about these files: *--offload layerwise* keeps the transformer in its RAM, *--gpus N* draws one result on several. This "
    "ComfyUI needs neither files nor a GPU.",
    "**Another machine** than this one: name it where ComfyUI starts, in *QT_SERVERS* (*name=address*), and put the name "
    "into *server*.",
    "**Seeds are not ComfyUI's**: the server draws the noise on its CPU, so the template without a server makes another result of "
    "the same seed. **Cancel** stops waiting, and the server finishes what it draws.")
BLACK_FOREST = ("the FLUX repos are gated. Accept the licence on their Hugging Face pages and run *hf auth login* before "
                "you download. Non-commercial licence.")

BASE_FOR_TEXT = "Text encoder and VAE are the base's; its transformer is not needed."
BLACKWELL = "On a Blackwell GPU (RTX 50, B200) take the *svdq-fp4* file of the same name"
LIGHTNING = "svdq-int4_r32-qwen-image-lightningv1.0-4steps.safetensors"
EXPORT = "Wan2.2-T2V-A14B-w8a8f8"  # a folder as msmodelslim fills it
EXPERTS = ("Two transformers take turns, *transformer* for high noise and *transformer_2* for low noise. They change where sigma "
           "falls below 0.875: after 26 of 40 steps at shift 12.")
HYPER = {"name": "Hyper-FLUX.1-dev-8steps-lora.safetensors", "directory": "loras",
         "url": "https://huggingface.co/ByteDance/Hyper-SD/resolve/main/Hyper-FLUX.1-dev-8steps-lora.safetensors"}
LTX2 = {"name": "ltx-2-19b-dev-fp8.safetensors", "directory": "checkpoints",
        "url": f"{HUB}Lightricks/LTX-2/resolve/main/ltx-2-19b-dev-fp8.safetensors"}
_HIDREAM = "Comfy-Org/HiDream-I1_ComfyUI"
HIDREAM = tuple({"name": name, "directory": "text_encoders", "url": f"{HUB}{_HIDREAM}/resolve/main/split_files/text_encoders/{name}"}
                for name in ("clip_l_hidream.safetensors", "clip_g_hidream.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors",
                             "llama_3.1_8b_instruct_fp8_scaled.safetensors"))


@dataclass(frozen=True)
class Part:
    """A transformer: in GB as it is loaded, and in BF16. One of the same size is the base's own."""

    name: str
    gb: float
    bf16: float


@dataclass(frozen=True)
class Note:
    """`title` is the template's file name; `rest` are the sizes of what the base gives besides transformers; `extra` are
    whole weight files of the base repo that nobody needs; `file` is one of the override; `others` are more repos and what
    they give; `more` are further commands. Without a `repo` on the Hub (`hub`), these get or make it, and `page` is where
    it is; without a `repo` the base's own transformers are needed. `in_repo`: the override is named by its file; `folder`: where that has to lie,
    because another node reads it, too. `server`: SGLang's has them all."""

    title: str
    base: str
    repo: str
    format: str
    about: str
    parts: tuple[Part, ...]
    rest: str
    licence: str
    extra: tuple[str, ...] = ()
    file: str = ""
    others: tuple[tuple[str, str], ...] = ()
    more: tuple[str, ...] = ()
    hub: bool = True
    page: str = ""
    in_repo: bool = False
    folder: str = ""
    server: bool = False

    @property
    def reference(self) -> str:
        """What an override is given: the repo, or of one with several models the file in it."""
        return f"{self.repo}/{self.file}" if self.in_repo else self.repo

    def text(self) -> str:
        files = "\n".join(f"- [{name}]({page}): {what}" for name, page, what in self.links())
        if self.server:
            return "\n\n".join((
                f"## {self.title}", self.about, f"### {START}", files, f"**Licence:** {self.licence}", *SERVED,
                "**On the server's machine**, beside SGLang 0.5.23, in ComfyUI's folder:\n\n```\npython custom_nodes/quantized-transformers "
                f"serve {self.base} --override {self.repo} --download --run\n```"))
        return "\n\n".join((
            f"## {self.title}", self.about, f"### {MISSING}", files,
            f"**Licence:** {self.licence}", f"**Hardware.** {RUNS[self.format]}",
            "**Memory** is about the size of these files; ComfyUI offloads what does not fit.",
            "**By hand**, in ComfyUI's folder:\n\n```\n" + "\n\n".join(self.commands()) + "\n```"))

    def links(self) -> list[tuple[str, str, str]]:
        """(name, page, what is there) of each repo."""
        quantized = [f"{part.name} {part.gb:g} GB ({part.bf16:g} in BF16)" for part in self.parts if part.gb < part.bf16]
        own = [f"{part.name} {part.bf16:g} GB" for part in self.parts if part.gb == part.bf16]
        if not self.repo:
            own = [f"{part.name} {part.bf16:g} GB ({part.gb:g} in {self.format})" for part in self.parts]
        page = self.page or (HUB + self.repo if self.repo and self.hub else "")
        return [*([(self.repo, page, ", ".join(quantized))] if page else []),
                (self.base, HUB + self.base, ", ".join([*own, self.rest])),
                *((name, HUB + name, what) for name, what in self.others)]

    def commands(self) -> list[str]:
        """What fetches all of it without a page."""
        folder = "models/diffusers/"
        excludes = "".join(f'--exclude "{name}" ' for name in ("transformer/*.safetensors", *self.extra) if self.repo)
        override = [f"hf download {self.repo} {self.file + ' ' if self.file else ''}--local-dir "
                    f"{self.folder or folder + self.repo.split('/')[-1]}"] if self.repo and self.hub else []
        return [f"hf download {self.base} {excludes}--local-dir {folder}{self.base.split('/')[1]}", *override, *self.more]


def one(gb: float, bf16: float) -> tuple[Part, ...]:
    return (Part("transformer", gb, bf16),)


def experts(high: float, low: float) -> tuple[Part, ...]:
    """Of Wan2.2 A14B, 29 GB each in BF16."""
    return Part("transformer", high, 29), Part("transformer_2", low, 29)


NOTES = {
    "flux1_dev_modelopt_fp8": Note(
        "FLUX.1 dev - ModelOpt FP8", "black-forest-labs/FLUX.1-dev", "lmsys/flux1-dev-modelopt-fp8-sglang-transformer", "FP8",
        "The base without its transformer, and NVIDIA ModelOpt's FP8 transformer in its place. Modulation and the double "
        "blocks' feed-forward layers are BF16 there.",
        one(20, 24), "text encoders 10 GB, VAE 0.2 GB", BLACK_FOREST, ("flux1-dev.safetensors",)),
    "flux1_dev_modelopt_nvfp4": Note(
        "FLUX.1 dev - ModelOpt NVFP4", "black-forest-labs/FLUX.1-dev", "lmsys/flux1-dev-modelopt-nvfp4-sglang-transformer",
        "NVFP4",
        "The base without its transformer, and a mixed BF16 and NVFP4 transformer in its place: attention is NVFP4, "
        "modulation and feed-forward layers are BF16.",
        one(20, 24), "text encoders 10 GB, VAE 0.2 GB", BLACK_FOREST, ("flux1-dev.safetensors",)),
    "flux2_dev_modelopt_fp8": Note(
        "FLUX.2 dev - ModelOpt FP8", "black-forest-labs/FLUX.2-dev", "lmsys/flux2-dev-modelopt-fp8-sglang-transformer", "FP8",
        "The base without its transformer, and NVIDIA ModelOpt's FP8 transformer in its place. Embedders and modulation are "
        "BF16 there.",
        one(33, 64), "text encoder 48 GB, VAE 0.3 GB", BLACK_FOREST, ("flux2-dev.safetensors",)),
    "flux2_dev_nvfp4": Note(
        "FLUX.2 dev - NVFP4", "black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-dev-NVFP4", "NVFP4",
        "The repo holds weight files only, with packed q, k, v, so *kind* is *weights* and *weights_name* picks one. Where "
        "its layers have no activation scale, they get a dynamic one.",
        one(21, 64), "text encoder 48 GB, VAE 0.3 GB", BLACK_FOREST, ("flux2-dev.safetensors",),
        "flux2-dev-nvfp4-mixed.safetensors"),
    "wan22_t2v_a14b_modelopt_fp8": Note(
        "Wan2.2 T2V A14B - ModelOpt FP8", "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "lmsys/wan22-t2v-a14b-modelopt-fp8-sglang-transformer", "FP8",
        "Two transformers take turns: *transformer* for high noise is the FP8 override, *transformer_2* for low noise "
        "stays BF16 and comes from the base. They change where sigma falls below 0.875: after 26 of 40 steps at shift 12.",
        experts(14, 29), "text encoder 11 GB, VAE 0.5 GB", "Apache-2.0."),
    "wan22_t2v_a14b_modelopt_nvfp4": Note(
        "Wan2.2 T2V A14B - ModelOpt NVFP4", "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "lmsys/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer", "NVFP4",
        "Two transformers take turns: *transformer* for high noise is the NVFP4 override, *transformer_2* for low noise "
        "stays BF16 and comes from the base. They change where sigma falls below 0.875: after 26 of 40 steps at shift 12. "
        "*fp4_backend* asks for FlashInfer's cudnn kernels (*pip install flashinfer-python*); without them "
        "comfy-kitchen's are taken, and the report says so.",
        experts(8, 29), "text encoder 11 GB, VAE 0.5 GB", "Apache-2.0."),
    "wan22_t2v_a14b_modelslim_w8a8": Note(
        "Wan2.2 T2V A14B - ModelSlim W8A8 (Ascend)", "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8", "W8A8",
        f"{EXPERTS} Both are INT8, quantized by msModelSlim and repacked for diffusers. {BASE_FOR_TEXT} The quantized repo is on "
        "ModelScope (*pip install modelscope*), where Download does not look: take the last command.",
        experts(14.5, 14.5), "text encoder 11 GB, VAE 0.5 GB", "Apache-2.0.",
        ("transformer_2/*.safetensors",), "", (), (
            'modelscope download --model Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8 --include "transformer/*" "transformer_2/*" '
            "--local_dir models/diffusers/Wan2.2-T2V-A14B-Diffusers-w8a8",), hub=False,
        page="https://modelscope.cn/models/Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8"),
    "wan22_t2v_a14b_modelslim_mxfp8": Note(
        "Wan2.2 T2V A14B - ModelSlim MXFP8 (Ascend)", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", EXPORT, "MXFP8",
        f"{EXPERTS} Both are an MXFP8 export of msModelSlim, as it wrote it: *high_noise_model* and *low_noise_model* in one "
        f"folder, which *reference* names. {BASE_FOR_TEXT} No such export is published: make one on an Ascend NPU with the last "
        "command (it needs Wan's original weights). For a folder of another name set *reference* in both loaders, or empty "
        "it and choose in *folder*. Without an NPU take *MXFP8 made on the way*.",
        experts(15, 15), "text encoder 11 GB, VAE 0.5 GB", "Apache-2.0.",
        ("transformer_2/*.safetensors",), "", (), (
            "msmodelslim quant --model_type Wan2.2-T2V-A14B --quant_type w8a8f8 --device npu --trust_remote_code True "
            f"--model_path Wan2.2-T2V-A14B --save_path models/diffusers/{EXPORT}",), hub=False),
    "wan22_t2v_a14b_online_mxfp8": Note(
        "Wan2.2 T2V A14B - MXFP8 made on the way (Ascend)", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "", "MXFP8",
        f"{EXPERTS} Both are loaded from the base and quantized to MXFP8 when the workflow runs, by the rule of Ascend's "
        "kernels: no quantized checkpoint is needed. *keep_high_precision* names layers that stay; Wan has no preset. LoRA "
        "nodes may stand before or behind. While it quantizes, the BF16 transformers are in system memory too: 29 GB each, "
        "until ComfyUI drops them.",
        experts(15, 15), "text encoder 11 GB, VAE 0.5 GB", "Apache-2.0."),
    "hunyuanvideo_modelopt_fp8": Note(
        "HunyuanVideo - ModelOpt FP8", "hunyuanvideo-community/HunyuanVideo",
        "lmsys/hunyuanvideo-modelopt-fp8-sglang-transformer", "FP8",
        "The base without its transformer, and NVIDIA ModelOpt's FP8 transformer in its place. Embedders, the text refiner "
        "and modulation are BF16 there. 17 frames of 544 x 960.",
        one(18, 26), "text encoders 15 GB, VAE 0.5 GB",
        "Tencent Hunyuan Community License; it does not cover every country, read it first."),
    "qwen_image_modelopt_fp8": Note(
        "Qwen-Image - ModelOpt FP8", "Qwen/Qwen-Image", "lmsys/qwen-image-modelopt-fp8-sglang-transformer", "FP8",
        "The base without its transformer, and NVIDIA ModelOpt's FP8 transformer in its place. Embedders, modulation and the "
        "image stream's second feed-forward layer are BF16 there.",
        one(30, 41), "text encoder 17 GB, VAE 0.3 GB", "Apache-2.0."),
    "qwen_image_edit_2511_modelopt_fp8": Note(
        "Qwen-Image-Edit 2511 - ModelOpt FP8", "Qwen/Qwen-Image-Edit-2511",
        "lmsys/qwen-image-edit-modelopt-fp8-sglang-transformer", "FP8",
        "The base without its transformer, and NVIDIA ModelOpt's FP8 transformer in its place. The picture goes to the text "
        "encoder and, by the VAE, to the transformer, which sees it at timestep zero (*zero_cond_t*); no extra node is "
        "needed for that.",
        one(30, 41), "text encoder 17 GB, VAE 0.3 GB", "Apache-2.0."),
    "flux1_dev_svdq_int4_lora": Note(
        "FLUX.1 dev - Nunchaku INT4 with LoRA", "black-forest-labs/FLUX.1-dev", "nunchaku-tech/nunchaku-flux.1-dev",
        "SVDQuant",
        f"Nunchaku's 4-bit transformer as an ordinary MODEL, so ComfyUI's own LoRA nodes work on it: here ByteDance's "
        f"Hyper-FLUX, which makes 8 steps enough, at its strength of 0.125 (shown rounded). Where it is missing "
        f"ComfyUI offers it. Any other FLUX.1 LoRA can take its place (20 steps then), and several can be chained. "
        f"{BASE_FOR_TEXT} {BLACKWELL}, and set *precision* to *auto*.",
        one(6.8, 24), "text encoders 10 GB, VAE 0.2 GB",
        f"{BLACK_FOREST} The LoRA is under the same licence.", ("flux1-dev.safetensors",),
        "svdq-int4_r32-flux.1-dev.safetensors", (("ByteDance/Hyper-SD", "LoRA 1.4 GB"),),
        (f"hf download ByteDance/Hyper-SD {HYPER['name']} --local-dir models/loras",)),
    "qwen_image_svdq_lightning_4steps": Note(
        "Qwen-Image - Nunchaku INT4, 4 steps", "Qwen/Qwen-Image", "nunchaku-tech/nunchaku-qwen-image",
        "SVDQuant",
        f"Nunchaku's 4-bit transformer with Qwen-Image-Lightning already in it: 4 steps, cfg 1, shift 3. The repo has several "
        f"files, so *weights_name* picks one; the report reads the steps from its name. {BASE_FOR_TEXT} {BLACKWELL}, "
        "in *weights_name* too.",
        one(11.5, 41), "text encoder 17 GB, VAE 0.3 GB", "Apache-2.0.", (), LIGHTNING),
    "qwen_image_edit_svdq": Note(
        "Qwen-Image-Edit 2509 - Nunchaku SVDQuant", "Qwen/Qwen-Image-Edit-2509", "nunchaku-tech/nunchaku-qwen-image-edit-2509",
        "SVDQuant",
        f"Nunchaku's 4-bit transformer: 40 steps, cfg 4. The picture goes to the text encoder and, by the VAE, to the "
        f"transformer. For a Lightning file of the same repo set *weights_name*, the steps of its name, and cfg 1. "
        f"{BASE_FOR_TEXT} {BLACKWELL}.",
        one(11.5, 41), "text encoder 17 GB, VAE 0.3 GB", "Apache-2.0.", (),
        "svdq-int4_r32-qwen-image-edit-2509.safetensors"),
    "z_image_turbo_svdq": Note(
        "Z-Image-Turbo - Nunchaku SVDQuant", "Tongyi-MAI/Z-Image-Turbo", "nunchaku-tech/nunchaku-z-image-turbo", "SVDQuant",
        f"Nunchaku's 4-bit transformer: 8 steps, cfg 1, shift 3. {BASE_FOR_TEXT} {BLACKWELL}.",
        one(3.6, 12), "text encoder 8 GB, VAE 0.2 GB", "Apache-2.0.", (),
        "svdq-int4_r32-z-image-turbo.safetensors"),
    "flux2_klein_4b_fp8": Note(
        "FLUX.2 klein 4B - FP8", "black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-4b-fp8", "FP8",
        f"Black Forest Labs' own FP8 transformer in place of the base's: 4 steps, cfg 1. {KIND}",
        one(4.1, 7.8), "text encoder 8 GB, VAE 0.3 GB", "Apache-2.0.", ("flux-2-klein-4b.safetensors",)),
    "sd35_large_fp8": Note(
        "Stable Diffusion 3.5 Large - FP8", "stabilityai/stable-diffusion-3.5-large", "Comfy-Org/stable-diffusion-3.5-fp8", "FP8",
        f"ComfyUI's FP8 checkpoint has text encoders and VAE in it, too: here its transformer alone is read, in place of the "
        f"base's. {KIND}",
        one(8.1, 16), "text encoders 11 GB, VAE 0.2 GB",
        "Stability AI Community License. The base repo is gated: accept the licence on its Hugging Face page and run *hf auth "
        "login* before you download.",
        ("sd3.5_large.safetensors", "text_encoders/*"), "sd3.5_large_fp8_scaled.safetensors", in_repo=True),
    "chroma1_hd_fp8": Note(
        "Chroma1-HD - FP8", "lodestones/Chroma1-HD", "Comfy-Org/Chroma1-HD_repackaged", "FP8",
        f"ComfyUI's mixed FP8 and BF16 transformer in place of the base's. {KIND} *T5TokenizerOptions* shows the model one "
        "token of padding behind a prompt, as it was trained.",
        one(9.2, 18), "text encoder 10 GB, VAE 0.2 GB", "Apache-2.0.", ("Chroma1-HD.safetensors",),
        "split_files/diffusion_models/Chroma1-HD-fp8mixed.safetensors", in_repo=True),
    "wan21_vace_14b_gguf": Note(
        "Wan2.1 VACE 14B - GGUF Q4", "Wan-AI/Wan2.1-VACE-14B-diffusers", "QuantStack/Wan2.1_14B_VACE-GGUF", "GGUF",
        f"A GGUF transformer (Q4_K_M) in place of the base's. {KIND} As it is, it makes a video of words alone. To edit or guide one, "
        "open the subgraph and connect a control video, masks or a reference picture to *Control video, masks, reference*.",
        one(11.1, 35), "text encoder 11 GB, VAE 0.5 GB", "Apache-2.0.", (), "Wan2.1_14B_VACE-Q4_K_M.gguf", in_repo=True),
    "hunyuanvideo15_720p_gguf": Note(
        "HunyuanVideo 1.5 720p - GGUF Q4", "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
        "jayn7/HunyuanVideo-1.5_T2V_720p-GGUF", "GGUF",
        f"A GGUF transformer (Q4_K_M) in place of the base's. {KIND} 121 frames of 1280 x 720. 20 steps are ComfyUI's choice; Tencent "
        "has 50, and a shift of 9. *VAE Decode (Tiled)* needs less memory.",
        one(5.1, 17), "text encoders 15 GB, VAE 2.5 GB",
        "Tencent Hunyuan Community License; it does not cover every country, read it first.", (),
        "720p/hunyuanvideo1.5_720p_t2v-Q4_K_M.gguf", in_repo=True),
    "ltx2_fp8": Note(
        "LTX-2 - FP8", "Lightricks/LTX-2", "Lightricks/LTX-2", "FP8",
        f"Video with sound. Lightricks' FP8 checkpoint is a file of 27 GB that has everything but the text encoder in it: its "
        f"transformer is read in place of the base's, and ComfyUI's own loader takes the VAE for sound. {KIND} Download that "
        "file by ComfyUI's list of missing models: both nodes read it in models/checkpoints, so one copy is enough.",
        one(20, 38), "text encoder 27 GB, VAE 2.4 GB", "LTX-2 Community License Agreement.", ("ltx-2-*",), LTX2["name"],
        in_repo=True, folder="models/checkpoints"),
    "hidream_i1_full_fp8": Note(
        "HiDream-I1 Full - FP8", "HiDream-ai/HiDream-I1-Full", _HIDREAM, "FP8",
        f"ComfyUI's FP8 transformer in place of the base's. {KIND} The base lacks one of its four text encoders, Llama 3.1 8B, "
        "so ComfyUI's own loader takes all of them, as files in models/text_encoders, which ComfyUI offers where they are missing.",
        one(17, 34), "VAE 0.2 GB", "MIT; Llama 3.1 has the Llama 3.1 Community License.", ("text_encoder*/*",),
        "split_files/diffusion_models/hidream_i1_full_fp8.safetensors", ((_HIDREAM, "text encoders 16 GB"),),
        (f'hf download {_HIDREAM} --include "split_files/text_encoders/*" --local-dir models/text_encoders/HiDream\n'
         "mv models/text_encoders/HiDream/split_files/text_encoders/* models/text_encoders/",), in_repo=True),
}
VERIFIED = "The graph names what the server must serve, and it is verified before every job."
NOTES |= {f"server_{name}": replace(NOTES[name], title=f"{NOTES[name].title} on a server", about=f"{about} {VERIFIED}", server=True)
          for name, about in {
    "flux1_dev_modelopt_fp8": "NVIDIA ModelOpt's FP8 transformer on its base, run by a server of SGLang-Diffusion.",
    "wan22_t2v_a14b_modelopt_fp8":
        "Run by a server of SGLang-Diffusion. *transformer* for high noise is NVIDIA ModelOpt's FP8 override, *transformer_2* for "
        "low noise stays BF16 and comes from the base; *cfg* is that of the first, *cfg_2* that of the second.",
    "qwen_image_edit_2511_modelopt_fp8":
        "NVIDIA ModelOpt's FP8 transformer on its base, run by a server of SGLang-Diffusion. The picture goes there, too; the result "
        "has its shape, at a megapixel."}.items()}
