"""From a reference to a native MODEL: where the bytes are, what they are, how the host gets them."""
