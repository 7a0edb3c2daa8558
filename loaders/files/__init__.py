"""Where files are and which ones a component is made of; bytes and names, no quantization."""
