"""What the bytes of a page mean: keys, values and attention over a part of them, which `transfer` knows nothing of."""
