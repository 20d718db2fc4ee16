"""The blocks that came into sets since each request's last selection, which the next one judges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmemory_vllm.residency.lists import NOBODY, Pairs
from flashmemory_vllm.residency.types import BoolArray, IntArray


class Came:
    """Places and positions of the blocks that lists brought; those of tenants that are gone count no more.

    Args:
        num_groups: G.
    """

    def __init__(self, num_groups: int) -> None:
        # Per group, for each list int32 `[3, m]` places, positions, epochs
        self._parts: list[list[IntArray]] = [[] for _ in range(num_groups)]

    def add(self, pairs: Sequence[Pairs], epoch: IntArray) -> None:
        """Lists have brought blocks.

        Args:
            pairs: per group what they have changed, for tenants that are there.
            epoch: int32 `[P]` tenants that each place has had.
        """
        for parts, of_group in zip(self._parts, pairs, strict=True):
            place = of_group.place
            came = np.stack((place, of_group.come, epoch[place]))
            parts.append(came[:, of_group.come != NOBODY])

    def take(self, place: IntArray, epoch: IntArray) -> Sequence[IntArray]:
        """What came into the sets of places, int32 `[n]`, since the last call for them.

        Returns:
            Per group int32 `[2, m]` places and positions; a block is there as often as it came.
        """
        is_asked: BoolArray = np.zeros(epoch.size, np.bool_)
        is_asked[place] = True
        taken = []
        for group, parts in enumerate(self._parts):
            came = np.concatenate(parts, axis=1) if parts else np.empty((3, 0), np.int32)
            is_there, is_taken = came[2] == epoch[came[0]], is_asked[came[0]]
            self._parts[group] = [came[:, is_there & ~is_taken]]
            taken.append(came[:2, is_there & is_taken])
        return taken
