"""What tests/gpu_table.py measures on a GPU, stage by stage (docs/gpu.md)."""
