"""Has a selector bring memories up to date, and nothing of it where that goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from flashmemory_kernels.common.due_rows import Due

from flashmemory_vllm.indexer.places import DueRows, PlaceState
from flashmemory_vllm.indexer.shares import PASS_QUERIES
from flashmemory_vllm.runtime.selector_guard import SelectorGuard

# Why a row's memory is what it was before
NOT_FINITE, RAISED = 1, 2


class Remembering:
    """Calls a selector for rows that have a set, and for those that have none yet.

    Args:
        guard: stands before the selector.
        state: by place.
        is_finite: whether the selector never gives a number that is none.
    """

    def __init__(self, guard: SelectorGuard, state: PlaceState, *, is_finite: bool) -> None:
        self._guard, self._state, self._is_finite = guard, state, is_finite

    def go_on(self, due: DueRows) -> torch.Tensor | None:
        """Rows that have a set, scored with their newest queries.

        Returns:
            Int32 `[n]` why the memory of a row is what it was before, 0 where it is not; None: of no row.
        """
        if not self._is_finite:
            return self._apart(due, self._state.queries[:, due.places])
        done = self._guard.remember(due, self._state)
        return None if done else _all(due, RAISED)

    def enter(self, due: DueRows, earlier: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """Rows that have no set yet, scored with their newest query and with those of their question.

        Args:
            due: the rows.
            earlier: queries `[q, A, Hq, D]` of each one's question, the last one last.

        Returns:
            As `go_on`.
        """
        kept = self._state.queries
        newest = kept[:, due.places, due.on_device[:, Due.POSITION].long() % kept.shape[2]]  # [A, n, Hq, D]
        most = max(PASS_QUERIES, 1 + max(0 if one is None else len(one) for one in earlier))
        queries = kept.new_zeros((kept.shape[0], len(earlier), most, *kept.shape[3:]))
        queries[:, :, most - 1] = newest
        for index, one in enumerate(earlier):
            if one is not None:
                queries[:, index, most - 1 - len(one) : most - 1] = one.transpose(0, 1)
        fields, on_device = due.fields.copy(), due.on_device.clone()
        for of_side in (fields, on_device):
            of_side[:, Due.POSITION] = most - 1
        return self._apart(replace(due, fields=fields, on_device=on_device), queries)

    def _apart(self, due: DueRows, queries: torch.Tensor) -> torch.Tensor | None:
        """On a copy, with queries `[A, n, Q, Hq, D]`, which is put back where all of it are numbers."""
        state, places, memory = self._state, due.places, self._state.memory
        own = PlaceState(queries, state.block_ids[places], memory[:, :, places], state.in_set[:, places])
        fields, on_device, count = due.fields.copy(), due.on_device.clone(), len(due)
        fields[:, Due.PLACE] = np.arange(count)
        on_device[:, Due.PLACE] = torch.arange(count, device=on_device.device)
        if not self._guard.remember(replace(due, fields=fields, on_device=on_device), own):
            return _all(due, RAISED)
        if self._is_finite:
            memory[:, :, places] = own.memory
            return None
        is_known = torch.arange(memory.shape[3], device=memory.device) < due.on_device[:, Due.NUM_BLOCKS, None]
        is_wrong = (~own.memory.isfinite() & is_known).flatten(0, 1).any(0).any(1)
        memory[:, :, places] = torch.where(is_wrong[:, None], memory[:, :, places], own.memory)
        return is_wrong.int() * NOT_FINITE


def _all(due: DueRows, reason: int) -> torch.Tensor:
    return torch.full((len(due),), reason, dtype=torch.int32, device=due.on_device.device)
