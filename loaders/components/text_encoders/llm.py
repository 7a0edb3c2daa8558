"""What the three language-model text encoders share: names, shapes and config.json as transformers has written them.

All are the host's Llama2_ (comfy/text_encoders/llama.py): decoder layers of 128-wide heads, SiLU, RMS norms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ...words import first_ten
from .base import host_sizes, nothing_left

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
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
        raise CheckpointError(f"config.json gives several rope_theta: {sorted(thetas)}", ORIGIN, "download it again")
    kinds = {rope.get(key) for rope in ropes for key in ("rope_type", "type")} - {None, "default", "mrope"}
    factors = [part.get("partial_rotary_factor") for part in (text, *ropes)]
    if kinds or any(factor not in (None, 1, 1.0) for factor in factors):
        raise CheckpointError(f"ComfyUI's text encoder has no rope of type {sorted(map(str, kinds)) or 'partial'}",
                              ORIGIN, "use the base's own text encoder")
    text["rope_theta"] = thetas.pop() if thetas else None
    text["mrope_section"] = next((rope["mrope_section"] for rope in ropes if "mrope_section" in rope), None)
    lacking = [name for name in (*SIZES, "rms_norm_eps", "rope_theta") if text.get(name) is None]
    if lacking:  # transformers' defaults are those of other models
        raise CheckpointError(f"config.json does not say {', '.join(lacking)}", ORIGIN, "download it again")
    text["architectures"] = config.get("architectures")
    return text


def sizes(text: dict[str, Any], host: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """The host's model config for the values of `text_part`, where they differ from `host`.

    `fixed` are values the host cannot be told, besides those of every Llama2_. Raises CheckpointError for other ones.
    """
    given = {**text, "head_dim": text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]}
    kinds = set(given.get("layer_types") or ()) - {"full_attention"}
    if kinds or given.get("use_sliding_window"):
        raise CheckpointError("ComfyUI's text encoder has no sliding attention window", ORIGIN,
                              "use the base's own text encoder")
    return host_sizes(given, host, {"head_dim": HEAD, "hidden_act": "silu", "mlp_bias": False, **fixed})


def shapes(text: dict[str, Any], bias: bool = False, norms: bool = False) -> Shapes:
    """The host's names and shapes of the language model; `bias` on q, k and v, `norms` on q and k."""
    width, inner = text["hidden_size"], text["intermediate_size"]
    heads, shared = text["num_attention_heads"] * HEAD, text["num_key_value_heads"] * HEAD
    layer: Shapes = {
        "input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (heads, width), "self_attn.k_proj.weight": (shared, width),
        "self_attn.v_proj.weight": (shared, width), "self_attn.o_proj.weight": (width, heads),
        "mlp.gate_proj.weight": (inner, width), "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner)}
    if bias:
        layer |= {f"self_attn.{name}_proj.bias": (rows,) for name, rows in (("q", heads), ("k", shared), ("v", shared))}
    if norms:
        layer |= {"self_attn.q_norm.weight": (HEAD,), "self_attn.k_norm.weight": (HEAD,)}
    out: Shapes = {"model.embed_tokens.weight": (text["vocab_size"], width), "model.norm.weight": (width,)}
    for number in range(text["num_hidden_layers"]):
        out |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return out


def rename(tensors: dict[str, Tensor], prefixes: dict[str, str], unneeded: tuple[str, ...], there: Shapes,
           kind: str) -> dict[str, Tensor]:
    """Stored tensors under the host's names: the first of `prefixes` that fits is exchanged for its value.

    Names that begin with one of `unneeded` are left out. Raises CheckpointError unless what is left are exactly the
    tensors `there`, in these shapes.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(unneeded) or name.endswith("rotary_emb.inv_freq"):  # old transformers stored the angles
            continue
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        new = prefixes.get(old, "") + name.removeprefix(old)
        if new in out:
            raise CheckpointError(f"{new} is stored twice, under two names", kind, "download the text encoder again")
        out[new] = tensor
    nothing_left([name for name in out if name not in there], kind)
    missing = sorted(there.keys() - out)
    if missing:
        raise CheckpointError(f"{len(missing)} tensors of {kind} are missing: {first_ten(missing)}", ORIGIN,
                              "finish the download of this folder")
    wrong = [f"{name} {list(out[name].shape)} instead of {list(shape)}" for name, shape in there.items()
             if tuple(out[name].shape) != shape]
    if wrong:
        raise CheckpointError(f"tensors of {kind} have other shapes than config.json says: {first_ten(wrong)}", ORIGIN,
                              "config.json and weights come from different models; download both again")
    return out
