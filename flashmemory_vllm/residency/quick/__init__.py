"""What makes the pager faster and nothing else: its description stands one folder up, and works without this one.

Each loop does to the arrays what methods of `Books`, `Entries`, `SlotTable`, `DecodeRows`, `ListNotes` and `Asking` do,
which tell what is done and why. What is rare, or wrong, it leaves to them: it says so, and nothing is changed then.
"""
