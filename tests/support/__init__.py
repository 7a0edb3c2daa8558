"""Fixtures that tests, demo and bench share."""
