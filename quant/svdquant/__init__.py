"""SVDQuant (Nunchaku) linears in the host: parts, packings, layout, run time and LoRA."""
