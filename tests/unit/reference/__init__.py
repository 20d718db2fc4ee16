"""Tests of the reference model: data, model, training and export."""
