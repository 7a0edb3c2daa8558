"""Weights into quantized formats: arithmetic on tensors, in blocks whose temporaries stay in the processor's cache."""
