"""Tasks, metrics and runners that measure what sparse residency costs in accuracy."""
