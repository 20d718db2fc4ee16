"""Our workers, one module for each platform.

They are apart because importing vLLM's CPU worker replaces parts of vLLM for the whole process: with it, unified
addressing buffers are plain host tensors, which no GPU kernel can read.
"""
