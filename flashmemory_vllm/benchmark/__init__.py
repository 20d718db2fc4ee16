"""Paired runs of stock vLLM and of our backend: scenarios, measuring, rows, tables and plots."""
