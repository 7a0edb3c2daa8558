"""What the builders' tests share: real ModelOpt exports with their backbone.pt and base, and SGLang-Diffusion's rules."""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from support import flux, flux2, hunyuan_video, qwen_image, wan


class Case(NamedTuple):
    """A BF16 base, its real FP8 export, and the backbone.pt of the same calibration."""

    base: Path
    export: Path
    backbone: Path


def hunyuan_of_the_table() -> Any:
    """HunyuanVideo as docs/sources/sglang.md, "FP8 builder's statistics", counts it: one refiner block, which
    ComfyUI does not run."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=hunyuan_video.TEXT,
        pooled_projection_dim=hunyuan_video.POOLED, rope_axes_dim=(8, 12, 12)).to(torch.bfloat16).eval()


def _run(family: Any, **sizes: Any) -> Callable[[Any, int], Any]:
    return lambda model, seed: family.diffusers_velocity(model, **family.inputs(seed=seed, **sizes))


# Name -> (the family's module, a model of two blocks of each kind, one calibration step)
MODELS: dict[str, tuple[Any, Callable[[], Any], Callable[[Any, int], Any]]] = {
    "flux1": (flux, flux.make, _run(flux)),
    "flux2": (flux2, flux2.make, _run(flux2)),
    "wan": (wan, wan.make, _run(wan)),
    "hunyuan": (hunyuan_video, lambda: hunyuan_video.make(double=2), _run(hunyuan_video)),
    "qwen": (qwen_image, qwen_image.make, _run(qwen_image, references=1)),
    "hunyuan of the table": (hunyuan_video, hunyuan_of_the_table, _run(hunyuan_video, channels=4)),
}


def export_fp8(name: str, folder: Path) -> Case:
    """One calibration by nvidia-modelopt, saved as its example does: backbone.pt, then the diffusers export."""
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    _, make, step = MODELS[name]
    model = make()
    case = Case(folder / "base", folder / "hf" / "transformer", folder / "ckpt" / "backbone.pt")
    model.save_pretrained(case.base)
    with torch.no_grad():
        model = mtq.quantize(model, copy.deepcopy(mtq.FP8_DEFAULT_CFG), lambda m: step(m, 3))
    case.backbone.parent.mkdir()
    mto.save(model, str(case.backbone))
    export_hf_checkpoint(model, export_dir=str(case.export))
    return case


class Rules:
    """What SGLang-Diffusion's loader makes of a folder, by docs/sources/sglang.md, "Accepted declarations",
    "Ignore lists" and "NVFP4 by tensors": headers and config.json only, written from the rules, without the pack.
    `refused` says why it would be, or is empty."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        index = json.loads(next(folder.glob("*.safetensors.index.json")).read_text(encoding="utf-8"))
        self.tensors: dict[str, dict[str, Any]] = {}
        self.refused = ""
        headers = []
        for name in sorted(set(index["weight_map"].values())):
            with open(folder / name, "rb") as file:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            headers.append(header.pop("__metadata__", {}))
            for tensor in header:
                assert index["weight_map"][tensor] == name and tensor not in self.tensors
            self.tensors |= header
        assert self.tensors.keys() == index["weight_map"].keys()
        size = sum(info["data_offsets"][1] - info["data_offsets"][0] for info in self.tensors.values())
        assert index["metadata"]["total_size"] == size
        self.spec: dict[str, Any] = {}
        self._merge(self.spec, self.config["quantization_config"])
        for header in headers:
            for key in ("_quantization_metadata", "quantization_config"):
                self._merge(self.spec, json.loads(header[key]))
            assert json.loads(header["config"]) == self.config
            assert header["_class_name"] == self.config["_class_name"] and header["format"] == "pt"
        self.method = self._method()
        self.kind = {"modelopt_fp8": self._fp8, "fp8": self._generic_fp8, "modelopt_fp4": self._nvfp4}[self.method]()

    def _merge(self, into: dict, other: dict) -> None:
        for key, value in other.items():
            if key in into and isinstance(value, dict):
                self._merge(into[key], value)
            elif into.setdefault(key, copy.deepcopy(value)) != value:
                self.refused = f"Conflicting checkpoint quantization field {key!r}"

    def _method(self) -> str:
        method, algo = self.spec["quant_method"], self.spec.get("quant_algo", "")
        if method != "modelopt":
            return method
        assert algo == algo.upper() and self.spec["quant_type"] == algo
        return {"FP8": "modelopt_fp8", "NVFP4": "modelopt_fp4"}[algo]

    def layers(self, dtype: str) -> set[str]:
        """Modules with a weight of two dimensions and this type."""
        return {name.removesuffix(".weight") for name, info in self.tensors.items()
                if name.endswith(".weight") and info["dtype"] == dtype and len(info["shape"]) == 2}

    def plain(self) -> set[str]:
        return set().union(*map(self.layers, ("BF16", "F16", "F32")))

    def excluded(self, module: str) -> bool:
        """is_layer_excluded: a full match, `*` crosses dots."""
        return any(re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), module) for pattern in self.spec["ignore"])

    def _scale(self, name: str, shape: list[int]) -> None:
        info = self.tensors.get(name)
        if info is None or info["dtype"] != "F32" or info["shape"] != shape:
            self.refused = f"{name} is {info}"

    def _fp8(self) -> str:
        for module in self.layers("F8_E4M3"):
            for leaf in ("weight_scale", "input_scale"):  # one that is missing would be filled with ones
                self._scale(f"{module}.{leaf}", [1])  # scales without a dimension cannot be concatenated
        codes = {n for n, i in self.tensors.items() if i["dtype"] == "F8_E4M3"}
        if codes != {f"{module}.weight" for module in self.layers("F8_E4M3")}:
            self.refused = "FP8 tensors that are no Linear weight"
        return "static"

    def _generic_fp8(self) -> str:
        for module in self.layers("F8_E4M3"):
            self._scale(f"{module}.weight_scale", [1])
        static = any(name.endswith(".input_scale") for name in self.tensors)
        if (self.spec["activation_scheme"] == "static") != static:
            self.refused = "activation_scheme"
        for module in self.plain():  # else they would be cast to FP8 without a scale
            if not any(f".{ignored}." in f".{module}." for ignored in self.spec["ignored_layers"]):
                self.refused = f"{module} is not in ignored_layers"
        return self.spec["activation_scheme"]

    def _nvfp4(self) -> str:
        codes = {m for m in self.layers("U8") if self.tensors.get(f"{m}.weight_scale", {}).get("dtype") == "F8_E4M3"}
        sizes = {2 * self.tensors[f"{m}.weight"]["shape"][1] / self.tensors[f"{m}.weight_scale"]["shape"][1]
                 for m in codes}
        group = next(iter(self.spec["config_groups"].values()))["weights"]["group_size"]
        if not codes or sizes != {16.0} or group != 16:
            self.refused = f"group sizes {sizes}, declared {group}"
        for module in codes:
            self._scale(f"{module}.weight_scale_2", [])
            if not self.spec.get("dynamic_input_scale"):
                self._scale(f"{module}.input_scale", [])
        assert isinstance(self.spec["swap_weight_nibbles"], bool)
        return "swapped" if self.spec["swap_weight_nibbles"] else "low first"
