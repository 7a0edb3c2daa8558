"""What a model takes on this machine: seconds of a sampling step, memory, and which kernels take the time."""
