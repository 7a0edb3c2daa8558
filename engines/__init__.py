"""Where a model runs, when it is not this ComfyUI: `sglang` drives SGLang-Diffusion's server."""
