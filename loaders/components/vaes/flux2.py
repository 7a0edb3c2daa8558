"""diffusers AutoencoderKLFlux2: 32 latent channels, patches of 2x2 and a batch norm.

In diffusers the pipeline patches and normalises; ComfyUI's VAE does both itself, and the latent format is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .... import host
from ....host.texts import Text
from .autoencoder_kl import FIXED_2D
from .base import CHANNELS, Latents, Plan, VAEClass, kl_sizes, levels

LATENT, PATCH = 32, 2


def _plan(config: Mapping[str, Any]) -> Plan:
    encoder = levels(config, "block_out_channels", CHANNELS)
    decoder = levels(config, "decoder_block_out_channels", encoder)
    # ComfyUI reads the decoder's first width from the tensors
    inferred = encoder == CHANNELS and [n // decoder[0] for n in decoder] == [n // CHANNELS[0] for n in CHANNELS]
    return Plan("FLUX.2", "kl", kl_sizes(LATENT, encoder, decoder, batch_norm_latent=True),
                kl_sizes(LATENT, CHANNELS, CHANNELS, batch_norm_latent=True), inferred, "Flux2",
                LATENT * PATCH * PATCH, Latents((1.0,), (0.0,)), host.diffusers_vae_names,
                Text("widths {encoder}, decoder {decoder}", encoder=encoder, decoder=decoder))


FLUX2 = VAEClass(
    "AutoencoderKLFlux2",
    {**FIXED_2D, "latent_channels": LATENT, "use_quant_conv": True, "use_post_quant_conv": True,
     "batch_norm_eps": 1e-4, "patch_size": [PATCH, PATCH]},
    frozenset({"block_out_channels", "decoder_block_out_channels"}),
    frozenset({"sample_size", "force_upcast", "batch_norm_momentum"}), _plan)
