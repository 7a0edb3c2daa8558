"""Build quantized transformer folders: what to quantize is worked out first, then it is written tensor by tensor."""
