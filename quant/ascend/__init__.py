"""Ascend (ModelSlim) formats: what is stored, what it means, and how ComfyUI runs it."""
