"""Which hubs have a published repo, where that is known (docs/sources/modelscope.md, "Who has what"); a repo that is
not named here may be on either."""

from __future__ import annotations

_BOTH = ("huggingface", "modelscope")
HUBS: dict[str, tuple[str, ...]] = {
    "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8": ("modelscope",),
    **dict.fromkeys((
        "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.2-dev", "Qwen/Qwen-Image", "Qwen/Qwen-Image-Edit-2509",
        "Qwen/Qwen-Image-Edit-2511", "Tongyi-MAI/Z-Image-Turbo", "nunchaku-tech/nunchaku-flux.1-dev",
        "nunchaku-tech/nunchaku-flux.1-canny-dev", "nunchaku-tech/nunchaku-flux.1-depth-dev"), _BOTH)}
