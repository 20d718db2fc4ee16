"""The pager: which logical blocks have a slot on the device, step by step. Pure Python and numpy, no I/O."""
