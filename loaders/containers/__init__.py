"""Files as headers and bytes."""
