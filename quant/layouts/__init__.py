"""How the host holds tiles: this pack's own layout, and the host's where the bytes are the same."""
