"""Gemma 3 12B and the projection of all its hidden states, the text encoders of LTX-2 and LTX-2.3.

The projection lies in diffusers' `connectors` beside the two connectors, which belong to the MODEL in the host. LTX-2
has one for video and audio, 2.3 one of each (diffusers, pipelines/ltx2/connectors.py; comfy/text_encoders/lt.py). The
states are those of the prompt alone; diffusers pads on the left, and hides it. Prompts hold no pictures.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ...architectures.base import Module
from ...errors import CheckpointError
from .base import Encoder, Family, Known, exchanging, host_sizes, linear
from .llm import KNOWN, ORIGIN, UNNEEDED
from .llm import modules as llm_modules
from .mistral3 import PREFIXES
from .vocabulary import sentencepiece

if TYPE_CHECKING:
    from torch import Tensor

    from ...files.source import Source

HEAD, WIDTH, LAYERS = 256, 3840, 48
# comfy/text_encoders/llama.py, Gemma3_12B_Config; transformers has the same for what config.json leaves out
SIZES = {"vocab_size": 262208, "intermediate_size": 15360, "num_attention_heads": 16, "num_key_value_heads": 8,
         "rms_norm_eps": 1e-6}
FIXED = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "head_dim": HEAD, "query_pre_attn_scalar": HEAD,
         "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "sliding_window": 1024}
ROPE = (1000000.0, 8.0, 10000.0)  # base angle, what positions are divided by, base angle of a window
PROJECTION = "text_embedding_projection"
VIDEO, AUDIO = 4096, 2048  # widths of LTX-2.3
CLASSES = ("Gemma3ForConditionalGeneration", "Gemma3Model", "Gemma3ForCausalLM", "Gemma3TextModel")
CALLED = exchanging(PREFIXES, r"^(model\.)?(vision_tower|multi_modal_projector)\.|"
                    r"^(language_model\.|model\.)?lm_head\.|" + UNNEEDED)


def _text(config: dict[str, Any]) -> dict[str, Any]:
    return {**SIZES, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, **(config.get("text_config") or config),
            "architectures": config.get("architectures")}


def modules(config: dict[str, Any], names: Collection[str]) -> Iterator[Module]:
    """See llm.modules; four norms a layer."""
    return llm_modules(_text(config), norms=True, head=HEAD,
                       around=("input", "post_attention", "pre_feedforward", "post_feedforward"))


def rope_of(text: dict[str, Any]) -> tuple[float, float, float]:
    """The values of ROPE as transformers 4 or 5 has written them."""
    new, old = text.get("rope_parameters") or {}, text.get("rope_scaling") or {}
    full, local = new.get("full_attention") or {}, new.get("sliding_attention") or {}
    return (float(full.get("rope_theta", text.get("rope_theta", ROPE[0]))),
            float(full.get("factor", old.get("factor", 1.0))),
            float(local.get("rope_theta", text.get("rope_local_base_freq", ROPE[2]))))


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from Gemma 3 12B's. Raises CheckpointError for what the host's code fixes."""
    text = _text(config)
    if rope_of(text) != ROPE:
        raise CheckpointError(Text("config.json has rotary embeddings of {said}, ComfyUI's Gemma 3 of {fixed}",
                                   said=rope_of(text), fixed=ROPE), ORIGIN, Text("use the base's own text encoder"))
    return host_sizes(text, SIZES, FIXED)


def tokenizer(source: Source) -> dict[str, Tensor]:
    """The folder's SentencePiece model; see vocabulary.sentencepiece."""
    return sentencepiece(source, "tokenizer.model")


def note(config: dict[str, Any]) -> str:
    """What of the folder goes unused."""
    return Text("the vision tower and its projector are not part of LTX-2's conditioning and were left out")


def projection_called(name: str, config: dict[str, Any]) -> str | None:
    """The projections of diffusers' connectors; the connectors themselves are the MODEL's."""
    names = {"text_proj_in.": f"{PROJECTION}.", "video_text_proj_in.": f"{PROJECTION}.video_aggregate_embed.",
             "audio_text_proj_in.": f"{PROJECTION}.audio_aggregate_embed."}
    old = next((old for old in names if name.startswith(old)), None)
    return names[old] + name.removeprefix(old) if old else name if name.startswith(f"{PROJECTION}.") else None


def projection_modules(config: dict[str, Any], names: Collection[str]) -> Iterator[Module]:
    """One Linear, or one of each kind."""
    columns = WIDTH * (LAYERS + 1)
    if not config.get("per_modality_projections"):
        yield linear(PROJECTION, WIDTH, columns)
        return
    yield linear(f"{PROJECTION}.video_aggregate_embed", VIDEO, columns, bias=True)
    yield linear(f"{PROJECTION}.audio_aggregate_embed", AUDIO, columns, bias=True)


def projection_config(config: dict[str, Any]) -> dict[str, Any]:
    """Nothing. Raises CheckpointError for other sizes than the host's."""
    each = bool(config.get("per_modality_projections"))
    wanted = {"caption_channels": WIDTH, "text_proj_in_factor": LAYERS + 1, "proj_bias": each,
              **({"video_hidden_dim": VIDEO, "audio_hidden_dim": AUDIO} if each else {})}
    return host_sizes({"architectures": [config.get("_class_name")], "proj_bias": False, **config}, {}, wanted)


EYES = ("vision_model.", "multi_modal_projector.")
GEMMA3 = Encoder("Gemma 3", CLASSES, "gemma3_12b", KNOWN, CALLED, modules, host_config, tokenizer, apart=EYES,
                 eyeless=CLASSES, note=note, set_by="")
CONNECTORS = Encoder("LTX-2's projection", ("LTX2TextConnectors",), PROJECTION, Known(f"{PROJECTION}.weight", "none"),
                     projection_called, projection_modules, projection_config, lambda source: {})
FAMILIES = (Family("LTX-2", "LTXV", (("text_encoder", "tokenizer", GEMMA3), ("connectors", "", CONNECTORS)),
                   "LTXAVTEModel", ("LTX2",)),)
