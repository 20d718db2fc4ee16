"""Rows of different lengths in one flat array."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class Ragged:
    """Block ids of each recorded token, and a value with each, in one flat array.

    Args:
        pointers: int64 [T + 1], where each token's entries begin, and the end of the last.
        ids: int64 [nnz], block ids.
        values: [nnz].
    """

    def __init__(self, pointers: IntArray, ids: IntArray, values: FloatArray) -> None:
        self.pointers, self.ids, self.values = pointers, ids, values

    def row(self, token: int, num_blocks: int) -> tuple[IntArray, FloatArray]:
        """Ids below `num_blocks` and values of a token."""
        entries = slice(int(self.pointers[token]), int(self.pointers[token + 1]))
        ids, values = self.ids[entries], self.values[entries]
        return ids[ids < num_blocks], values[ids < num_blocks]

    def maxima(self, first: int, end: int, num_blocks: int) -> FloatArray:
        """Largest value of each of the first blocks over the tokens `[first, end)`, [num_blocks]."""
        entries = slice(int(self.pointers[first]), int(self.pointers[end]))
        maxima = np.zeros(max(num_blocks, int(self.ids[entries].max(initial=-1)) + 1), np.float32)
        np.maximum.at(maxima, self.ids[entries], self.values[entries])
        return maxima[:num_blocks]

    def sums(self, first: int, end: int, num_blocks: int) -> FloatArray:
        """Sum of the values of each block over the tokens `[first, end)`, [num_blocks] or more."""
        entries = slice(int(self.pointers[first]), int(self.pointers[end]))
        sums: FloatArray = np.bincount(self.ids[entries], self.values[entries], num_blocks).astype(np.float32)
        return sums
