"""Processes that end with the one that needs them, however that one ends."""
