"""The published forms of the models that this pack knows, ordered for this machine: what fits, what runs natively, why.

Sizes are of one transformer as it is loaded, in GB (1e9 bytes), as published or by the bits of the format; of Wan's two
the one for high noise. They only order and inform: what a download really takes is asked of the hub.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from .. import host
from ..host.texts import Text
from ..loaders.errors import CheckpointError
from ..loaders.families import families
from ..loaders.files import hubs
from ..loaders.files.places import cleaned, downloadable
from ..loaders.queries import Query, locate_parts
from .catalog import LOADS_WITH
from .verdict import AMBER, GREEN, RED, Verdict, of_formats

BASE, OVERRIDE, SVDQ = "base", "override", "svdq"
_ROOM = 1.15  # of the weights' size, for activations beside them


class Variant(NamedTuple):
    """`kind` is the catalog's and says which node loads it; `values` are that node's other widgets."""

    reference: str
    format: str
    gb: float
    kind: str = OVERRIDE
    values: tuple[tuple[str, str | int], ...] = ()

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of formats as reports have them."""
        if self.kind == SVDQ:
            return f"SVDQ {'NVFP4' if 'NVFP4' in self.format else 'INT4'}", "AWQ INT4"
        usual = [name for family in families() if self.reference in family.published
                 for name in family.usual_formats(self.reference)]
        return tuple(usual) or (self.format.partition(",")[0],)


def _svdq(model: str, gb: float, *more: tuple[int, float]) -> tuple[Variant, ...]:
    """Both precisions of a Nunchaku repo, of rank 32 and others (rank, GB)."""
    return tuple(Variant(f"nunchaku-tech/nunchaku-{model}", f"SVDQuant {words}, rank {rank}", size, SVDQ,
                         (("precision", precision), ("rank", rank)))
                 for rank, size in ((32, gb), *more) for precision, words in (("int4", "INT4"), ("nvfp4", "NVFP4")))


def _gguf(repo: str, file: str, billions: float) -> tuple[Variant, ...]:
    """Three of city96's files, by the bits of their blocks."""
    return tuple(Variant(f"city96/{repo}-gguf/{file}-{name}.gguf", f"GGUF {block}", round(billions * bits / 8, 1))
                 for name, block, bits in (("Q8_0", "Q8_0", 8.5), ("Q5_K_S", "Q5_K", 5.5), ("Q4_K_S", "Q4_K", 4.5)))


_COMFY = "Comfy-Org"
# Title -> forms; the first is the base, unquantized.
MODELS: dict[str, tuple[Variant, ...]] = {
    "FLUX.1 dev": (
        Variant("black-forest-labs/FLUX.1-dev", "BF16", 23.8, BASE),
        Variant("lmsys/flux1-dev-modelopt-fp8-sglang-transformer", "FP8, ModelOpt", 20),
        Variant("lmsys/flux1-dev-modelopt-nvfp4-sglang-transformer", "NVFP4, ModelOpt", 20),
        Variant("diffusers/FLUX.1-dev-bnb-4bit", "NF4, bitsandbytes", 6.7),
        *_svdq("flux.1-dev", 6.8), *_gguf("FLUX.1-dev", "flux1-dev", 11.9)),
    "FLUX.1 schnell": (
        Variant("black-forest-labs/FLUX.1-schnell", "BF16", 23.8, BASE),
        *_svdq("flux.1-schnell", 6.8), *_gguf("FLUX.1-schnell", "flux1-schnell", 11.9)),
    "FLUX.2 dev": (
        Variant("black-forest-labs/FLUX.2-dev", "BF16", 64, BASE),
        Variant("lmsys/flux2-dev-modelopt-fp8-sglang-transformer", "FP8, ModelOpt", 33),
        Variant("black-forest-labs/FLUX.2-dev-NVFP4", "NVFP4", 21, OVERRIDE,
                (("weights_name", "flux2-dev-nvfp4-mixed.safetensors"),)),
        Variant("diffusers/FLUX.2-dev-bnb-4bit", "NF4, bitsandbytes", 18)),
    "Wan2.2 T2V A14B": (
        Variant("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "BF16", 29, BASE),
        Variant("lmsys/wan22-t2v-a14b-modelopt-fp8-sglang-transformer", "FP8, ModelOpt", 14),
        Variant("lmsys/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer", "NVFP4, ModelOpt", 8),
        Variant("Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8", "W8A8, ModelSlim", 14.5, "modelslim")),
    "HunyuanVideo": (
        Variant("hunyuanvideo-community/HunyuanVideo", "BF16", 26, BASE),
        Variant("lmsys/hunyuanvideo-modelopt-fp8-sglang-transformer", "FP8, ModelOpt", 18)),
    "Qwen-Image": (
        Variant("Qwen/Qwen-Image", "BF16", 41, BASE),
        Variant("lmsys/qwen-image-modelopt-fp8-sglang-transformer", "FP8, ModelOpt", 30),
        Variant(f"{_COMFY}/Qwen-Image_ComfyUI/split_files/diffusion_models/qwen_image_fp8_e4m3fn.safetensors",
                "FP8, cast", 20.4),
        *_svdq("qwen-image", 11.5, (128, 12.7)), *_gguf("Qwen-Image", "qwen-image", 20.4)),
    "Qwen-Image-Edit 2509": (
        Variant("Qwen/Qwen-Image-Edit-2509", "BF16", 41, BASE),
        Variant(f"{_COMFY}/Qwen-Image-Edit_ComfyUI/split_files/diffusion_models/qwen_image_edit_2509_fp8_e4m3fn.safetensors",
                "FP8, cast", 20.4),
        *_svdq("qwen-image-edit-2509", 11.5, (128, 12.7))),
    "Qwen-Image-Edit 2511": (
        Variant("Qwen/Qwen-Image-Edit-2511", "BF16", 41, BASE),
        Variant("lmsys/qwen-image-edit-modelopt-fp8-sglang-transformer", "FP8, ModelOpt", 30)),
    "Z-Image-Turbo": (
        Variant("Tongyi-MAI/Z-Image-Turbo", "BF16", 12.3, BASE),
        Variant("Disty0/Z-Image-Turbo-SDNQ-uint4-svd-r32", "UINT4, SDNQ with SVD", 3.6),
        *_svdq("z-image-turbo", 3.6, (128, 4.0))),
    "FLUX.2 klein 4B": (
        Variant("black-forest-labs/FLUX.2-klein-4B", "BF16", 7.8, BASE),
        Variant("black-forest-labs/FLUX.2-klein-4b-fp8", "FP8", 4.1)),
    "Stable Diffusion 3.5 Large": (
        Variant("stabilityai/stable-diffusion-3.5-large", "BF16", 16.1, BASE),
        Variant(f"{_COMFY}/stable-diffusion-3.5-fp8/sd3.5_large_fp8_scaled.safetensors", "FP8", 8.1)),
    "Chroma1-HD": (
        Variant("lodestones/Chroma1-HD", "BF16", 17.8, BASE),
        Variant(f"{_COMFY}/Chroma1-HD_repackaged/split_files/diffusion_models/Chroma1-HD-fp8mixed.safetensors",
                "FP8, mixed", 9.2)),
    "HiDream-I1 Full": (
        Variant("HiDream-ai/HiDream-I1-Full", "BF16", 34.2, BASE),
        Variant(f"{_COMFY}/HiDream-I1_ComfyUI/split_files/diffusion_models/hidream_i1_full_fp8.safetensors",
                "FP8, cast", 17.1)),
    "LTX-2": (
        Variant("Lightricks/LTX-2", "BF16", 37.8, BASE),
        Variant("Lightricks/LTX-2/ltx-2-19b-dev-fp8.safetensors", "FP8", 20)),
    "Wan2.1 VACE 14B": (
        Variant("Wan-AI/Wan2.1-VACE-14B-diffusers", "BF16", 34.7, BASE),
        Variant("QuantStack/Wan2.1_14B_VACE-GGUF/Wan2.1_14B_VACE-Q4_K_M.gguf", "Q4_K_M, GGUF", 11.1)),
    "HunyuanVideo 1.5 720p": (
        Variant("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v", "BF16", 16.7, BASE),
        Variant("jayn7/HunyuanVideo-1.5_T2V_720p-GGUF/720p/hunyuanvideo1.5_720p_t2v-Q4_K_M.gguf", "Q4_K_M, GGUF",
                5.1)),
}


def model_of(reference: str) -> str:
    """The title of the model that a reference is a form of; empty where it is not known."""
    text = hubs.split(downloadable(reference))[1] or cleaned(reference).replace("\\", "/")
    parts = text.split("/")
    return next((_titles()[name] for name in (text, "/".join(parts[:2]), parts[-1]) if name in _titles()), "")


def base_of(reference: str) -> str:
    """The base of the model that a reference is a form of; empty where it is not known."""
    return next((form.reference for form in MODELS.get(model_of(reference), ())), "")


@cache
def _titles() -> dict[str, str]:
    """Of whole references, of the last parts of folders, and of repos with files of one model."""
    found = {}
    for title, forms in MODELS.items():
        for form in forms:
            found[form.reference] = found[form.reference.rpartition("/")[2]] = title
            if form.format.startswith("GGUF"):
                found["/".join(form.reference.split("/")[:2])] = title
    return found


def forms(reference: str) -> dict[str, Any] | None:
    """What the route `variants` answers: the model's title, this machine, its memory in bytes, and the forms, the best
    for it first; None for a model that is not known."""
    title = model_of(reference)
    if not title:
        return None
    memory = 0 if host.lacking("memory") else host.device_memory()
    rows = sorted((_row(form, memory) for form in MODELS[title]), key=_order)
    return {"model": title, "device": host.device_name(), "memory": memory, "items": rows}


def _row(form: Variant, memory: int) -> dict[str, Any]:
    size, judged = int(form.gb * 1e9), _verdict(form)
    node, widget = LOADS_WITH[form.kind]
    return {"reference": form.reference, "format": form.format, "kind": form.kind, "node": node, "input": widget,
            "size": size, "values": dict(form.values), "fits": not memory or size * _ROOM <= memory,
            "verdict": judged.level, "verdict_text": judged.text, "on_disk": _here(form, node)}


def _verdict(form: Variant) -> Verdict:
    if form.kind == BASE:
        return Verdict(GREEN, Text("not quantized: runs as ComfyUI runs it"))
    return of_formats(form.formats)


def _order(row: dict[str, Any]) -> tuple[bool, bool, bool, float]:
    """What cannot run comes last; then what does not fit, and what is emulated; of the rest the larger, which is the
    closer to the model as it was made, comes first where it fits, and the smaller where nothing does."""
    return (row["verdict"] == RED, not row["fits"], row["verdict"] == AMBER,
            -row["size"] if row["fits"] else row["size"])


def _here(form: Variant, node: str) -> bool:
    """Whether all files of a form are on this machine; of a repo with several, those of this one."""
    try:
        locate_parts(Query(form.reference, node, **dict[str, Any](form.values)))
    except CheckpointError:
        return False
    return True
