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

    Attributes:
        nums: how many blocks there are of each group.
    """

    def __init__(self, num_groups: int) -> None:
        # Per group int32 `[3, m]` places, positions, epochs
        self._came: list[IntArray] = [np.empty((3, 64), np.int32) for _ in range(num_groups)]
        self.nums = [0] * num_groups

    def with_room(self, group: int, num_more: int) -> IntArray:
        """Places, positions and tenants of a group's blocks, int32 `[3, m]`, live, with room for so many more."""
        came, num = self._came[group], self.nums[group]
        if num + num_more > came.shape[1]:
            self._came[group] = np.empty((3, 2 * (num + num_more)), np.int32)
            self._came[group][:, :num] = came[:, :num]
        return self._came[group]

    def add(self, pairs: Sequence[Pairs], epoch: IntArray) -> None:
        """Lists have brought blocks.

        Args:
            pairs: per group what they have changed, for tenants that are there.
            epoch: int32 `[P]` tenants that each place has had.
        """
        for group, of_group in enumerate(pairs):
            comes = of_group.come != NOBODY
            place = of_group.place[comes]
            num, room = self.nums[group], self.with_room(group, place.size)
            self.nums[group] += place.size
            room[:, num : num + place.size] = place, of_group.come[comes], epoch[place]

    def take(self, place: IntArray, epoch: IntArray) -> Sequence[IntArray]:
        """What came into the sets of places, int32 `[n]`, since the last call for them.

        Returns:
            Per group int32 `[2, m]` places and positions; a block is there as often as it came.
        """
        is_asked: BoolArray = np.zeros(epoch.size, np.bool_)
        is_asked[place] = True
        taken = []
        for group, num in enumerate(self.nums):
            came = self._came[group][:, :num]
            is_there, is_taken = came[2] == epoch[came[0]], is_asked[came[0]]
            taken.append(came[:2, is_there & is_taken])
            kept = came[:, is_there & ~is_taken]
            self._came[group][:, : kept.shape[1]], self.nums[group] = kept, kept.shape[1]
        return taken
