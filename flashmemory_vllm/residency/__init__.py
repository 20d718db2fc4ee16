"""The pager: which logical blocks have a slot on the device, step by step. Pure Python and numpy, no I/O.

`quick/` does the same faster where numba is; nothing else here needs it.
"""
