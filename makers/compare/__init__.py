"""How far a quantized model is from another: by its weights (weights.py), and by what it draws (models.py)."""
