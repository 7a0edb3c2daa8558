"""diffusers AutoencoderKLMochi (Mochi 1). ComfyUI has Genmo's own: q, k and v in one, and every block of the decoder
drops the frames that come too many. Its encoder looks at later frames, too, which Genmo's and diffusers' do not: nor
does it here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from .base import GROUPS, Plan, VAEClass, normalised
from .hunyuan_image import renamed

if TYPE_CHECKING:
    import torch

LATENT, SPATIAL, TEMPORAL = 12, [2, 2, 2], [1, 2, 3]
ENCODER, DECODER = [64, 128, 256, 384], [128, 256, 512, 768]
LAYERS = [3, 3, 4, 6, 3]
ATTENTION = [False, True, True, True, True]
HEAD = 32
ROWS = 2**15  # of attention at once: CUDA's kernels refuse twice as many
# What a block of diffusers' consists of -> ComfyUI's names
BLOCK = {"norm1.norm_layer.": "stack.0.", "conv1.conv.": "stack.2.", "norm2.norm_layer.": "stack.3.",
         "conv2.conv.": "stack.5."}
ATTENDING = {"to_q.": "to_q.", "to_k.": "to_k.", "to_v.": "to_v.", "to_out.0.": "out."}


def _blocks(stored: str, native: str, first: int, count: int) -> dict[str, str]:
    """A row of `count` blocks, the first of which has the number `first` in ComfyUI."""
    table: dict[str, str] = {}
    for number in range(count):
        here = f"{native}{first + number}."
        table |= {f"{stored}resnets.{number}.{old}": here + new for old, new in BLOCK.items()}
        table[f"{stored}norms.{number}.norm_layer."] = f"{here}attn_block.norm."
        table |= {f"{stored}attentions.{number}.{old}": f"{here}attn_block.attn.{new}"
                  for old, new in ATTENDING.items()}
    return table


def names() -> dict[str, str]:
    """Beginnings of diffusers' names -> ComfyUI's."""
    start, *inner, end = LAYERS
    table = {"encoder.proj_in.": "encoder.layers.0.", "encoder.norm_out.norm_layer.": "encoder.output_norm.",
             "encoder.proj_out.": "encoder.output_proj.", "decoder.conv_in.": "decoder.blocks.0.0.",
             "decoder.proj_out.": "decoder.output_proj.",
             **_blocks("encoder.block_in.", "encoder.layers.", 1, start),
             **_blocks("encoder.block_out.", "encoder.layers.", 1 + start + len(inner), end),
             **_blocks("decoder.block_in.", "decoder.blocks.0.", 1, end),
             **_blocks("decoder.block_out.", f"decoder.blocks.{1 + len(inner)}.", 0, start)}
    for level, count in enumerate(inner):
        down, up = f"encoder.layers.{1 + start + level}.layers.", f"decoder.blocks.{len(inner) - level}."
        table |= {f"encoder.down_blocks.{level}.conv_in.conv.": f"{down}0.",
                  **_blocks(f"encoder.down_blocks.{level}.", down, 1, count)}
        stored = f"decoder.up_blocks.{len(inner) - 1 - level}."
        table |= {f"{stored}proj.": f"{up}proj.", **_blocks(stored, f"{up}blocks.", 0, count)}
    return table


def joined() -> dict[str, tuple[str, ...]]:
    """The tensors that ComfyUI has as one: its name -> those of the pieces."""
    start, *inner, end = LAYERS
    blocks = [f"{1 + start + level}.layers.{1 + number}" for level, count in enumerate(inner)
              for number in range(count)] + [f"{1 + start + len(inner) + number}" for number in range(end)]
    return {f"encoder.layers.{block}.attn_block.attn.qkv.weight":
            tuple(f"encoder.layers.{block}.attn_block.attn.to_{part}.weight" for part in "qkv") for block in blocks}


def attend(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """ComfyUI's attention over time, in which a frame sees itself and those before it, as in training."""
    import torch.nn.functional as functional

    batch, width, frames, *area = x.shape
    rows = x.permute(0, 3, 4, 2, 1).reshape(-1, frames, width)
    made = []
    for some in rows.split(ROWS):
        q, k, v = layer.qkv(some).unflatten(-1, (3, width // HEAD, HEAD)).transpose(1, 3).unbind(2)
        out = functional.scaled_dot_product_attention(functional.normalize(q, dim=-1), functional.normalize(k, dim=-1),
                                                      v, is_causal=True)
        made.append(layer.out(out.transpose(1, 2).flatten(2)))
    return _cat(made).reshape(batch, *area, frames, width).permute(0, 4, 3, 1, 2)


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _finish(vae: Any) -> None:
    for module in vae.first_stage_model.encoder.modules():
        if hasattr(module, "qkv"):
            module.forward = partial(attend, module)


def _widths(config: Mapping[str, Any], key: str, default: list[int]) -> list[int]:
    value = config.get(key) or default
    if not isinstance(value, list) or len(value) != len(default) or len(set(value)) != len(value) or not all(
            isinstance(n, int) and n > 0 and not n % GROUPS for n in value):
        raise ValueError(Text("config.json: {key} is {value!r}; ComfyUI's network has {count} levels of different "
                              "widths, multiples of {number}", key=key, value=value, count=len(default),
                              number=GROUPS))
    return value


def _sizes(encoder: list[int], decoder: list[int]) -> dict[str, Any]:
    """The arguments of both halves, with every width as a multiple of 1."""
    both = {"base_channels": 1, "num_res_blocks": LAYERS, "latent_dim": LATENT, "padding_mode": "replicate"}
    return {"encoder": {**both, "in_channels": 15, "channel_multipliers": encoder, "temporal_reductions": TEMPORAL,
                        "spatial_reductions": SPATIAL, "prune_bottlenecks": [False] * len(LAYERS),
                        "has_attentions": ATTENTION, "input_is_conv_1x1": True},
            "decoder": {**both, "out_channels": 3, "channel_multipliers": decoder, "temporal_expansions": TEMPORAL,
                        "spatial_expansions": SPATIAL, "has_attention": [False] * len(LAYERS), "output_norm": False}}


def _plan(config: Mapping[str, Any]) -> Plan:
    encoder = _widths(config, "encoder_block_out_channels", ENCODER)
    decoder = _widths(config, "decoder_block_out_channels", DECODER)
    return Plan("Mochi", "mochi", _sizes(encoder, decoder), _sizes(ENCODER, DECODER),
                (encoder, decoder) == (ENCODER, DECODER), "Mochi", LATENT, normalised(config, LATENT),
                partial(renamed, names(), {}), Text("widths {encoder}, decoder {decoder}", encoder=encoder,
                                                    decoder=decoder),
                (Text("the first frames are decoded as in Genmo's own code, which drops those that come too many in "
                      "every block; diffusers drops them at the end, and its first frames differ"),),
                _finish, joined=joined())


MOCHI = VAEClass(
    "AutoencoderKLMochi",
    {"in_channels": 15, "out_channels": 3, "latent_channels": LATENT, "layers_per_block": LAYERS, "act_fn": "silu",
     "temporal_expansions": TEMPORAL, "spatial_expansions": SPATIAL, "add_attention_block": ATTENTION,
     "scaling_factor": 1.0},
    frozenset({"encoder_block_out_channels", "decoder_block_out_channels", "latents_mean", "latents_std"}),
    frozenset(), _plan)
