"""What packers of weights write (compressed-tensors, GPTQ, AWQ, AutoRound, SDNQ, quanto, torchao): tensors of one layer
to a tile. Formats here (stored.StoredFormat) are made with what their files' configuration says of the layer; nothing
in them knows an architecture or a file."""
