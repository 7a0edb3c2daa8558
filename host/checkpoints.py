"""The text encoders and the VAE of a whole checkpoint, by the host's own code for such files.

Which names they have there, and which classes they are, the host's class of the transformer says; so of the transformer
names and shapes are enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .check import needs
from .passthrough import stand_ins

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]


class Parts(NamedTuple):
    """What is beside a transformer in its file, under the names that the host's models have.

    `model` is the host's class of the transformer. `vae` and `text_encoders` are empty where the file has none.
    """

    model: str
    vae: dict[str, torch.Tensor]
    text_encoders: dict[str, torch.Tensor]


@needs("whole checkpoints")
def parts_of(shapes: Shapes, others: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Parts | None:
    """The parts of a whole checkpoint: `shapes` of the transformer's tensors under their names in the file, prefix
    included, and all `others`. None where the host does not know the transformer."""
    import comfy.model_detection
    import comfy.utils

    stored = {**stand_ins(shapes), **others}
    prefix = comfy.model_detection.unet_prefix_from_state_dict(stored)
    config = comfy.model_detection.model_config_from_unet(dict(stored), prefix, metadata=dict(metadata))
    if config is None:
        return None
    prefixes = dict.fromkeys(config.vae_key_prefix, "")
    vae = comfy.utils.state_dict_prefix_replace(dict(others), prefixes, filter_keys=True)
    return Parts(type(config).__name__, config.process_vae_state_dict(vae),
                 config.process_clip_state_dict(dict(others)))


@needs("whole checkpoints")
def load_text_encoders_of(shapes: Shapes, others: Mapping[str, torch.Tensor], metadata: Mapping[str, str],
                          dtype: torch.dtype | None, disable_dynamic: bool) -> Any:
    """The CLIP of a whole checkpoint (see `parts_of`), as the host's checkpoint loader makes it; None where the host
    has no text encoder for this transformer, or the file no tensors for it."""
    import comfy.sd
    import folder_paths

    _, clip, _, _ = comfy.sd.load_state_dict_guess_config(
        {**stand_ins(shapes), **others}, output_vae=False, output_model=False,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        te_model_options={} if dtype is None else {"dtype": dtype}, metadata=dict(metadata),
        disable_dynamic=disable_dynamic)
    return clip
