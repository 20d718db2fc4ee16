"""What the device knows of decoding requests: their newest queries, what their blocks are worth, and their sets.

One operation brings the rows that are due up to date and lists who comes into a set and who goes. It runs beside the
model; the host reads the list two steps later and applies it to its own account (`residency/books.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from flashmemory_kernels.choose_sets import ChoicePolicy, choose_sets
from flashmemory_kernels.common.due_rows import Due

from flashmemory_vllm.indexer.places import MemoryKind, PlaceState
from flashmemory_vllm.residency.lists import HEADER, NOBODY

# In NUM_KNOWN of a row whose memory goes on: all bits, so that what is known is left of it
GOES_ON = -1


@dataclass(frozen=True, slots=True)
class ChoiceSizes:
    """Sizes of the persistent tensors.

    Attributes:
        num_channels: C, what a block is remembered for.
        num_groups: G.
        num_places: P, most requests that have blocks at once.
        width: W, most blocks of a request.
        max_rows: most rows that are chosen for in one step.
        listed: L, most blocks of a row that come in one list, and most that go.
    """

    num_channels: int
    num_groups: int
    num_places: int
    width: int
    max_rows: int
    listed: int

    @property
    def columns(self) -> int:
        """Columns of a list's row."""
        return HEADER + 2 * self.listed

    @property
    def num_bytes(self) -> int:
        """What the tensors take."""
        by_place = self.num_groups * self.num_places * self.width
        of_lists = self.max_rows * (1 + self.num_groups * self.columns)
        return (4 * self.num_channels + 1) * by_place + 4 * (of_lists + self.num_places + self.num_channels)


class ChoiceState:
    """Memory and sets by place, beside the queries and the blocks that they are made from; for one stream.

    Args:
        sizes: of the tensors.
        queries: model dtype `[A, P, Q, Hq, D]`; that of the token at position i is `[:, place, i % Q]`.
        block_ids: int32 `[P, W]` logical blocks by position.
        kind: what a selector remembers.
        policy: how that becomes worth.

    Attributes:
        places: what selectors see: `memory` `[C, G, P, W]`, `in_set` `[G, P, W]` with all lists so far applied, and the
            arguments.
        known: int32 `[P]` blocks that the memory of each place knows.
    """

    def __init__(
        self, sizes: ChoiceSizes, queries: torch.Tensor, block_ids: torch.Tensor, kind: MemoryKind, policy: ChoicePolicy
    ) -> None:
        device = block_ids.device
        self.sizes, self._policy = sizes, policy
        by_place = (sizes.num_groups, sizes.num_places, sizes.width)
        self.places = PlaceState(
            queries,
            block_ids,
            torch.zeros((sizes.num_channels, *by_place), device=device),
            torch.zeros(by_place, dtype=torch.int8, device=device),
        )
        self.known = torch.zeros(sizes.num_places, dtype=torch.int32, device=device)
        self._num_inner = kind.num_inner
        self._weights = torch.tensor(kind.weights or (1.0,) * (sizes.num_channels - kind.num_inner), device=device)
        num_elems = sizes.max_rows * (1 + sizes.num_groups * sizes.columns)
        # Which rows have failed ends where the list begins, and is 0 already where none has
        self._out = torch.full((num_elems,), NOBODY, dtype=torch.int32, device=device)
        self._out[: sizes.max_rows] = 0
        self._has_failed = self._is_checked = False

    def look_up(self, rows: torch.Tensor, unscored: Sequence[slice]) -> None:
        """Fill in what only the device knows; not needed where the host keeps account of what memories know.

        Args:
            rows: int32 `[n, len(Due)]` on the device. NUM_KNOWN is `GOES_ON` where a memory goes on, else 0; NUM_BLOCKS
                counts all full blocks, and is made what the memory knows where blocks are not scored.
            unscored: those rows.
        """
        known = self.known.index_select(0, rows[:, Due.PLACE])
        rows[:, Due.NUM_KNOWN].bitwise_and_(known)
        for part in unscored:
            if part.start < part.stop:
                rows[part, Due.NUM_BLOCKS].clamp_(max=rows[part, Due.NUM_KNOWN])

    def keep_known(self, rows: torch.Tensor) -> None:
        """Keep how many blocks the memories of rows know, for `look_up`; of rows as `choose` leaves them."""
        self.known.index_copy_(0, rows[:, Due.PLACE].long(), rows[:, Due.NUM_BLOCKS])

    def choose(self, rows: torch.Tensor, failed: torch.Tensor | None, long_list: torch.Tensor) -> torch.Tensor:
        """Choose the sets of rows, and list what changes.

        Args:
            rows: int32 `[n, len(Due)]`, looked up and scored; NUM_BLOCKS becomes NUM_KNOWN where a row has failed.
            failed: int32 `[n]`, not 0 for those whose memory is what it was before they were scored. None: nobody's.
            long_list: int32 `[S]`, takes the changes of rows that say so.

        Returns:
            int32 `[n + n * G * (6 + 2 L)]`, a view that the next call overwrites: `failed`, and the list.
        """
        num_rows, size = len(rows), self.sizes
        out = self._out[size.max_rows - num_rows : size.max_rows + num_rows * size.num_groups * size.columns]
        if self._has_failed:
            self._out[: size.max_rows] = 0
        self._has_failed = failed is not None
        if failed is not None:
            out[:num_rows] = failed
            rows[:, Due.NUM_BLOCKS] = torch.where(failed != 0, rows[:, Due.NUM_KNOWN], rows[:, Due.NUM_BLOCKS])
        listed = out[num_rows:].view(num_rows, size.num_groups, size.columns)
        memory, in_set = self.places.memory[self._num_inner :], self.places.in_set
        choose_sets(memory, in_set, rows, self._weights, self._policy, listed, long_list, is_checked=self._is_checked)
        self._is_checked = True
        return out
