"""What makes new files, and what compares models: nothing here is needed to load."""
