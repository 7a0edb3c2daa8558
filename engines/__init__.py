"""Where a model runs when this ComfyUI alone is not enough: `sglang` drives SGLang-Diffusion's server, `worker` is for
many ComfyUIs."""
