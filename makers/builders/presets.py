"""Which layers stay in BF16, and under which names `ignore` lists them (docs/sources/sglang.md, "FP8 presets" and
"NVFP4 builder").

A preset has two lists. `keep` is the fallback set that SGLang-Diffusion validated: these layers are taken from the base
even where ModelOpt quantized them. `leave` is what nvidia-modelopt's own examples leave alone when they calibrate such
a model; it is used where there is no export, so that quantizing straight from BF16 ends with the same layers
(docs/sources/modelopt.md, "Calibration filters"). Every other architecture is quantized by what its names tell: Linear
layers of its stacks of blocks, without their modulation; embedders, refiners and heads stay high.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from ...loaders.words import first_ten

if TYPE_CHECKING:
    from ...loaders.patterns import Expression


class Preset(NamedTuple):
    """Regular expressions (re.search) on module names. `deep` is added to `leave` where a model has 30 blocks or more:
    it names blocks by number."""

    name: str
    class_name: str = ""
    keep: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    deep: tuple[str, ...] = ()
    primary_only: bool = False  # validated for a pipeline's first transformer, not for transformer_2


NONE = Preset("none")
PRESETS = {preset.name: preset for preset in (
    Preset("flux1", "FluxTransformer2DModel",
           (r"^transformer_blocks\.\d+\.norm1\.linear$", r"^transformer_blocks\.\d+\.norm1_context\.linear$",
            r"^transformer_blocks\.\d+\.ff\.net\.0\.proj$", r"^transformer_blocks\.\d+\.ff\.net\.2$",
            r"^transformer_blocks\.\d+\.ff_context\.net\.0\.proj$", r"^transformer_blocks\.\d+\.ff_context\.net\.2$",
            r"^single_transformer_blocks\.\d+\.norm\.linear$"),
           ("^proj_out", "time_text_embed", "context_embedder", "x_embedder", "norm_out")),
    Preset("flux2", "Flux2Transformer2DModel",
           (r"^time_guidance_embed\.(timestep_embedder|guidance_embedder)\.linear_[12]$",
            r"^double_stream_modulation_(img|txt)\.linear$",
            r"^single_stream_modulation\.linear$", "^x_embedder$", "^context_embedder$", r"^norm_out\.linear$"),
           ("^proj_out", "x_embedder", "context_embedder", "norm_out", "time_guidance_embed", "stream_modulation")),
    Preset("hunyuan-video", "HunyuanVideoTransformer3DModel",
           (r"^context_embedder\.", r"^x_embedder\.proj$",
            r"^time_text_embed\.(timestep_embedder|guidance_embedder|text_embedder)\.linear_[12]$",
            r"^norm_out\.linear$", "^proj_out$",
            r"^transformer_blocks\.\d+\.norm1\.linear$", r"^transformer_blocks\.\d+\.norm1_context\.linear$",
            r"^single_transformer_blocks\.\d+\.norm\.linear$"),
           (r"^context_embedder\.", "x_embedder", "time_text_embed", "norm_out", "^proj_out$")),
    Preset("qwen-image", "QwenImageTransformer2DModel",
           ("^img_in$", "^txt_in$", r"^time_text_embed\.timestep_embedder\.linear_[12]$", r"^norm_out\.linear$",
            "^proj_out$", r"^transformer_blocks\.\d+\.img_mlp\.net\.2$",
            r"^transformer_blocks\.\d+\.(img_mod|txt_mod)$"),
           ("^img_in$", "^txt_in$", "time_text_embed", "norm_out", "^proj_out$")),
    Preset("wan22", "WanTransformer3DModel", (), ("patch_embedding", "condition_embedder", "proj_out"),
           (r"^blocks\.(0|1|2|37|38|39)\.",), primary_only=True),
    NONE)}
MODEL_TYPES = ("auto", *PRESETS)
# Globs (full match, `*` crosses dots) on module names.
PATTERN_PRESETS: dict[str, tuple[str, ...]] = {"none": (), "flux1-nvfp4": (
    "transformer_blocks.*.norm1.linear*", "transformer_blocks.*.norm1_context.linear*",
    "transformer_blocks.*.ff.net.0.proj*", "transformer_blocks.*.ff.net.2*",
    "transformer_blocks.*.ff_context.net.0.proj*", "transformer_blocks.*.ff_context.net.2*",
    "single_transformer_blocks.*.norm.linear*", "single_transformer_blocks.*.proj_mlp*")}


def preset_of(model_type: str, class_name: str, folder: str = "") -> Preset:
    """The FP8 preset that a model type names; "auto" goes by config.json's `_class_name`, "none" where there is none.

    `folder` is the name of the folder that holds the transformer. Raises CheckpointError for an unknown type, the
    preset of another architecture, and the second transformer of a model whose preset is for the first.
    """
    if model_type not in MODEL_TYPES:
        raise CheckpointError(Text("unknown model type {model_type!r}", model_type=model_type), "",
                              Text("choose one of: {names}", names=", ".join(MODEL_TYPES)))
    if model_type == "auto":
        preset = next((p for p in PRESETS.values() if p.class_name and p.class_name == class_name), NONE)
    else:
        preset = PRESETS[model_type]
    if preset.class_name and class_name and class_name != preset.class_name:
        raise CheckpointError(Text("model type {preset} is for {class_name}, but config.json says {found}",
                                   preset=preset.name, class_name=preset.class_name, found=class_name), "",
                              Text("choose auto, or none with patterns of your own"))
    if preset.primary_only and folder == "transformer_2":
        raise CheckpointError(Text("model type {preset} is for the pipeline's first transformer; transformer_2 stays "
                                   "as it is in the base", preset=preset.name), folder,
                              Text("give the folder transformer, or choose model type none to quantize this one as "
                                   "well"))
    return preset


def compiled(patterns: Iterable[str]) -> list[Expression]:
    """Regular expressions a user wrote. Raises CheckpointError for one that is none."""
    from ...loaders.patterns import Expressions

    found, written = [], Expressions(do=Text("give a simpler one"))
    for pattern in patterns:
        try:
            found.append(written.compile(pattern))
        except re.error as error:
            raise CheckpointError(Text("{pattern!r} is no regular expression: {error}", pattern=pattern, error=error),
                                  "", Text("correct the pattern; a dot in a name is written \\.")) from error
    return found


def left_alone(preset: Preset, names: Iterable[str]) -> list[Expression]:
    """What ModelOpt's examples leave alone in a model with these weights; without a preset, all but the inner layers of
    its blocks."""
    if not preset.class_name:
        high = sorted(high_by_name({name.rpartition(".")[0] for name in names}))
        return compiled([f"^({'|'.join(map(re.escape, high))})$"]) if high else []
    deep = any(re.search(r"^blocks\.29\.", name) for name in names)
    return compiled((*preset.leave, *(preset.deep if deep else ())))


def high_by_name(modules: Collection[str]) -> set[str]:
    """The modules that lose most by few bits and hold little of a model: those outside of its own stacks of blocks, and
    of blocks the norms, modulation and embedders. A stack inside of another part, or called otherwise, is of a refiner,
    an approximator or an encoder (Chroma's distilled_guidance_layer.layers, Lumina 2's noise_refiner)."""
    found = {module: re.match(_BLOCKS, module) for module in modules}
    return {module for module, block in found.items() if block is None or re.search(_HIGH, module[block.end():])}


def unmatched(patterns: Mapping[str, Callable[[str], object]], names: Collection[str]) -> list[str]:
    """A note about patterns (as they were written -> what finds a name by them) that find nothing, if there are any."""
    lost = [pattern for pattern, finds in patterns.items() if not any(map(finds, names))]
    return [Text("these patterns match no layer: {patterns}", patterns=first_ten(lost))] if lost else []


# Patterns are compiled when they are first used: the nodes' lists need this module's names.
_BLOCKS = r"(model\.diffusion_model\.)?(\w*(blocks|layers)|mid_block\.attentions)\.\d+(?=\.|$)"
_HIGH = r"(?i)(^|\.)(norm|ada|time|mod$|mod\.|mod_|\w+_mod(\.|$)|\w*(modulation|scale_shift|embed))"
_SPELLINGS = ((r"(\.(?:audio_)?ff)\.net\.0\.proj$", r"\1.proj_in"),
              (r"(\.(?:audio_)?ff)\.net\.2$", r"\1.proj_out"), (r"\.(img_mod|txt_mod)\.1$", r".\1"))
# HunyuanVideo: diffusers' names -> those of SGLang-Diffusion's own model, which its ignore list is compared with.
_REFINER = r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\."
_MLP = (r"ff\.net\.0(?:\.proj)?$", "mlp.fc_in"), (r"ff\.net\.2(?:\.proj)?$", "mlp.fc_out")
_QK = {"norm_q": "img_attn_q_norm", "norm_k": "img_attn_k_norm", "norm_added_q": "txt_attn_q_norm",
       "norm_added_k": "txt_attn_k_norm", "to_[qkv]": "img_attn_qkv", "add_[qkv]_proj": "txt_attn_qkv",
       r"to_out\.0": "img_attn_proj", "to_add_out": "txt_attn_proj"}
_HUNYUAN = (
    *((rf"^{stored}\.linear_{i}$", f"{name}.{fc}")
      for stored, name in ((r"context_embedder\.time_text_embed\.timestep_embedder", "txt_in.t_embedder.mlp"),
                           (r"context_embedder\.time_text_embed\.text_embedder", "txt_in.c_embedder"),
                           (r"time_text_embed\.timestep_embedder", "time_in.mlp"),
                           (r"time_text_embed\.guidance_embedder", "guidance_in.mlp"),
                           (r"time_text_embed\.text_embedder", "vector_in"))
      for i, fc in ((1, "fc_in"), (2, "fc_out"))),
    (r"^context_embedder\.proj_in$", "txt_in.input_embedder"), (r"^x_embedder\.proj$", "img_in.proj"),
    (r"^norm_out\.linear$", "final_layer.adaLN_modulation.linear"), ("^proj_out$", "final_layer.linear"),
    *((_REFINER + stored, rf"txt_in.refiner_blocks.\1.{name}")
      for stored, name in (("(norm[12])$", r"\2"), (r"attn\.to_[qkv]$", "self_attn_qkv"),
                           (r"attn\.to_out\.0$", "self_attn_proj"), *_MLP,
                           (r"norm_out\.linear$", "adaLN_modulation.linear"))),
    *((rf"^transformer_blocks\.(\d+)\.{stored}", rf"double_blocks.\1.{name}")
      for stored, name in ((r"norm1\.linear$", "img_mod.linear"), (r"norm1_context\.linear$", "txt_mod.linear"),
                           *((rf"attn\.{stored}$", name) for stored, name in _QK.items()),
                           *((stored, f"img_{name}") for stored, name in _MLP),
                           *((stored.replace("ff", "ff_context"), f"txt_{name}") for stored, name in _MLP))),
    *((rf"^single_transformer_blocks\.(\d+)\.{stored}$", rf"single_blocks.\1.{name}")
      for stored, name in ((r"attn\.norm_([qk])", r"\2_norm"), (r"attn\.to_[qkv]", "linear1"), ("proj_mlp", "linear1"),
                           ("proj_out", "linear2"), (r"norm\.linear", "modulation.linear"))))


def variants(module: str, class_name: str) -> tuple[str, ...]:
    """The names that patterns are compared with: the stored one, SGLang-Diffusion's spelling of it, and for
    HunyuanVideo the name in SGLang's own model. The last one is written into `ignore`."""
    names = [module]
    names += [module.removeprefix(prefix) for prefix in ("model.diffusion_model.", "velocity_model.")
              if module.startswith(prefix)]
    for name in list(names):
        for pattern, other in _SPELLINGS:
            names.append(re.sub(pattern, other, name))
    if class_name == PRESETS["hunyuan-video"].class_name:
        names += [re.sub(pattern, other, name) for name in tuple(names) for pattern, other in _HUNYUAN
                  if re.search(pattern, name)]
    return tuple(dict.fromkeys(names))
