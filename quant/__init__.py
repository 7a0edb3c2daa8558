"""Stored quantization formats -> tensors the host runs. Knows tensors and devices, never files or nodes."""
