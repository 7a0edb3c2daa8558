"""LoRAs and other patches of the host's nodes, beside quantized weights instead of in them.

The host would dequantize a weight, add, and quantize again: 4 and 8 bits lose most of what a LoRA adds. Here the weight
stays as it is, and what is low-rank is one more matmul (factors.py); the rest makes the layer a plain one while it is
there. linear.py is the Linear that does this, in every state that the host's memory management has; loading.py what
the host tells a MODEL of; stand_ins.py what goes through the host's code in place of tensors that nobody has to make.
"""
