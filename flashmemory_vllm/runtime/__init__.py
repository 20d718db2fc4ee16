"""Worker side of a step: plan residency, move pages, hand compacted tables to attention, score blocks."""
