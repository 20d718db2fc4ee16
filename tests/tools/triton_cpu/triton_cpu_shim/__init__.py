"""Lets Triton's interpreter stand in for a CPU backend, so that vLLM's model runner V2 runs without a GPU.

Put the folder that holds this package on PYTHONPATH and set TRITON_INTERPRET=1. Nothing is compiled: with the
interpreter on, Triton never asks a backend to; it and vLLM only want to see that one exists and is active.
"""
