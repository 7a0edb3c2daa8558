"""SGLang-Diffusion's server: what it is asked to serve (identity.py), and the command that starts it (flags.py)."""
