"""Where a model runs when this ComfyUI alone is not enough."""
