"""Text encoders and VAEs of a diffusers pipeline."""
