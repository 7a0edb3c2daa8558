"""Nunchaku's SVDQuant files: which file, what it is, which layer goes where, and the native tensors it becomes."""
