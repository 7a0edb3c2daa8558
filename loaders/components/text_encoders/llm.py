"""What the three language-model text encoders share: names, shapes and config.json as transformers has written them.

All are the host's Llama2_ (comfy/text_encoders/llama.py): decoder layers of 128-wide heads, SiLU, RMS norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ....host.texts import Text
from ...architectures.base import Module
from ...errors import CheckpointError
from .base import OF_TOKENIZERS, Known, embedding, host_sizes, linear, plain

KNOWN = Known("model.layers.0.input_layernorm.weight", "hidden_size")
# Old versions of transformers stored the angles.
UNNEEDED = rf"(^|\.)rotary_emb\.inv_freq$|{OF_TOKENIZERS}"
HEAD = 128  # the host's head_dim; it can be told no other
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads")
ORIGIN = "config.json"


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's values: `text_config` where there is one, else config.json itself; rope in the old form.

    transformers 4 wrote rope_theta and rope_scaling, 5 writes rope_parameters. Raises CheckpointError when both are
    there with different angles, when rope is scaled in any way, and for values that must be given but are not.
    """
    text = dict(config.get("text_config") or config)
    ropes = [rope for rope in (text.get("rope_parameters"), text.get("rope_scaling")) if isinstance(rope, dict)]
    thetas = {float(part["rope_theta"]) for part in (text, *ropes) if part.get("rope_theta") is not None}
    if len(thetas) > 1:
        raise CheckpointError(Text("config.json gives several rope_theta: {thetas}", thetas=sorted(thetas)), ORIGIN,
                              Text("download it again"))
    kinds = {rope.get(key) for rope in ropes for key in ("rope_type", "type")} - {None, "default", "mrope"}
    factors = [part.get("partial_rotary_factor") for part in (text, *ropes)]
    if kinds or any(factor not in (None, 1, 1.0) for factor in factors):
        raise CheckpointError(Text("ComfyUI's text encoder has no rope of type {kinds}",
                                   kinds=sorted(map(str, kinds)) or Text("partial")),
                              ORIGIN, Text("use the base's own text encoder"))
    text["rope_theta"] = thetas.pop() if thetas else None
    text["mrope_section"] = next((rope["mrope_section"] for rope in ropes if "mrope_section" in rope), None)
    lacking = [name for name in (*SIZES, "rms_norm_eps", "rope_theta") if text.get(name) is None]
    if lacking:  # transformers' defaults are those of other models
        raise CheckpointError(Text("config.json does not say {lacking}", lacking=", ".join(lacking)),
                              ORIGIN, Text("download it again"))
    text["architectures"] = config.get("architectures")
    return text


def sizes(text: dict[str, Any], host: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """The host's model config for the values of `text_part`, where they differ from `host`.

    `fixed` are values the host cannot be told, besides those of every Llama2_. Raises CheckpointError for other ones.
    """
    given = {**text, "head_dim": text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]}
    kinds = set(given.get("layer_types") or ()) - {"full_attention"}
    if kinds or given.get("use_sliding_window"):
        raise CheckpointError(Text("ComfyUI's text encoder has no sliding attention window"), ORIGIN,
                              Text("use the base's own text encoder"))
    return host_sizes(given, host, {"head_dim": HEAD, "hidden_act": "silu", "mlp_bias": False, **fixed})


def modules(text: dict[str, Any], bias: bool = False, norms: bool = False, head: int = 0,
            around: tuple[str, ...] = ("input", "post_attention")) -> Iterator[Module]:
    """The language model by the host's names; `bias` on q, k and v, `norms` on q and k, `head`: width of one where it
    is not HEAD, `around`: the norms of a layer. `text` are `text_part`'s."""
    width, inner, head = text["hidden_size"], text["intermediate_size"], head or HEAD
    heads, shared = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    yield embedding("model.embed_tokens", text["vocab_size"], width)
    for number in range(text["num_hidden_layers"]):
        here = f"model.layers.{number}"
        for norm in around:
            yield plain(f"{here}.{norm}_layernorm", width)
        for part, rows in (("q", heads), ("k", shared), ("v", shared)):
            yield linear(f"{here}.self_attn.{part}_proj", rows, width, bias)
        for part in ("q", "k") if norms else ():
            yield plain(f"{here}.self_attn.{part}_norm", head)
        yield linear(f"{here}.self_attn.o_proj", width, heads)
        yield linear(f"{here}.mlp.gate_proj", inner, width)
        yield linear(f"{here}.mlp.up_proj", inner, width)
        yield linear(f"{here}.mlp.down_proj", width, inner)
    yield plain("model.norm", width)
