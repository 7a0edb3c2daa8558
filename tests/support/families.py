"""The six architectures under one interface, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from support import flux, flux2, hunyuan_video, qwen_image, wan, z_image


@dataclass(frozen=True)
class Family:
    """One architecture: its support module, and the names that the mutation table needs.

    `q` and `k` are two Linear layers of one shape, `other` one of another shape that is not square, `norm` and
    `embedder` two tensors, `first` and `last` the prefixes of two blocks, `config` config entries that contradict it.
    """

    support: Any
    q: str
    k: str
    other: str
    norm: str
    embedder: str
    first: str
    last: str
    config: tuple[dict[str, Any], ...]
    context: Callable[[], Any] = nullcontext

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Where the host fixes widths that no tiny model has, the test-only shim."""
        with self.context():
            yield

    def export(self, folder: Path, algorithm: str) -> Path:
        """A real ModelOpt export of the tiny model."""
        model = self.support.make()
        if self.support is flux:
            return (flux.export_fp8 if algorithm == "FP8" else flux.export_nvfp4)(model, folder)
        return self.support.export(model, folder, algorithm)

    def run(self, patcher: Any, load: bool = True) -> torch.Tensor:
        """The velocity through the host."""
        return self.support.comfy_velocity(patcher, load=load, **self.support.inputs())

    def reference(self, tensors: dict[str, torch.Tensor], config: dict) -> torch.Tensor:
        """diffusers' forward on plain tensors, in F32."""
        return self.support.diffusers_velocity(self.support.emulate(tensors, config), **self.support.inputs())


_FLUX_LIKE = dict(q="transformer_blocks.0.attn.to_q", k="transformer_blocks.0.attn.to_k",
                  norm="transformer_blocks.0.attn.norm_q.weight", first="transformer_blocks.0.",
                  last="single_transformer_blocks.1.")
FAMILIES = {
    "flux1": Family(flux, other="transformer_blocks.1.ff.net.2", embedder="x_embedder.weight", **_FLUX_LIKE,
                    config=({"num_attention_heads": 4}, {"num_layers": 3}, {"guidance_embeds": False})),
    "flux2": Family(flux2, other="transformer_blocks.1.ff.linear_out", embedder="x_embedder.weight", **_FLUX_LIKE,
                    config=({"num_attention_heads": 4}, {"num_layers": 3}, {"guidance_embeds": False})),
    "hunyuan_video": Family(hunyuan_video, other="transformer_blocks.0.ff.net.2", embedder="context_embedder.proj_in.weight",
                            **_FLUX_LIKE, config=({"num_attention_heads": 4}, {"num_layers": 3}, {"guidance_embeds": False})),
    "wan": Family(wan, q="blocks.0.attn1.to_q", k="blocks.0.attn1.to_k", other="condition_embedder.text_embedder.linear_1",
                  norm="blocks.0.attn1.norm_q.weight", embedder="patch_embedding.weight", first="blocks.0.", last="blocks.1.",
                  config=({"num_attention_heads": 4}, {"num_layers": 3}, {"ffn_dim": 512})),
    "qwen_image": Family(qwen_image, q="transformer_blocks.0.attn.to_q", k="transformer_blocks.0.attn.to_k",
                         other="transformer_blocks.1.img_mlp.net.2", norm="transformer_blocks.0.attn.norm_q.weight",
                         embedder="img_in.weight", first="transformer_blocks.0.", last="transformer_blocks.1.",
                         config=({"num_attention_heads": 4}, {"num_layers": 3}, {"joint_attention_dim": 128}),
                         context=qwen_image.small_widths),
    "z_image": Family(z_image, q="layers.0.attention.to_q", k="layers.0.attention.to_k", other="layers.0.feed_forward.w2",
                      norm="layers.0.attention.norm_q.weight", embedder="all_x_embedder.2-1.weight", first="noise_refiner.0.",
                      last="layers.0.", config=({"dim": 2304}, {"n_layers": 3}, {"cap_feat_dim": 128}),
                      context=z_image.small_widths),
}
