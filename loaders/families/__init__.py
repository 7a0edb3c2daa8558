"""Who wrote a file: one package for each publisher's way of storing a model."""
