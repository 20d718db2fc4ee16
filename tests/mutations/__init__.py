"""Deliberate bugs, each with the test that catches it: `python -m tests.mutations` plants them one after the other."""
