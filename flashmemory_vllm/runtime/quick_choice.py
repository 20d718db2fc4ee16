"""The quick way of asking for a step's choice, by a loop that is compiled; `ChoiceQueue` describes what is asked."""

from __future__ import annotations

import numpy as np
from flashmemory_kernels.common.due_rows import Due

from flashmemory_vllm.indexer.shares import TILE
from flashmemory_vllm.residency.asked import Ask, Asked
from flashmemory_vllm.runtime import choice_loops
from flashmemory_vllm.runtime.choice_loops import NOT_DONE, AccountArrays, ChoiceRule
from flashmemory_vllm.runtime.choice_work import NUM_UPLOADED, ChoiceWork


class QuickChoice:
    """Prepares most steps with a loop. The first one compiles it, or reads what was compiled before.

    Args:
        account: what the host knows of places, live.
        rule: what is the same in every step.
    """

    def __init__(self, account: AccountArrays, rule: ChoiceRule) -> None:
        self._account, self._rule = account, rule
        nobody = np.empty((0, len(Ask)), np.int32)
        self.work(0, Asked((), nobody, nobody))

    def work(self, step: int, asked: Asked) -> ChoiceWork | None:
        """What a step chooses; None, with nothing changed, if a row has no set yet or a list is in force at once.

        Args:
            step: its number.
            asked: the rows, each of a place of its own.
        """
        num, names = len(asked), asked.req_ids
        fields, order, packed = (
            np.empty((num, len(Ask)), np.int32),
            np.empty(num, np.int32),
            np.empty(NUM_UPLOADED * num, np.int32),
        )
        num_scored = choice_loops.prepare(step, asked.fields, self._account, self._rule, fields, order, packed)
        if num_scored == NOT_DONE:
            return None
        return ChoiceWork(
            Asked(tuple([names[row] for row in order.tolist()]), fields, asked.block_ids),
            packed[: num * len(Due)].reshape(num, len(Due)),
            packed[num * len(Due) : num * (len(Due) + 1)],
            (),
            0,
            (slice(0, 0), slice(0, num_scored)),
            packed,
        )


def rule_of(num_queries: int, num_kept: int, goes_on: int, *, is_finite: bool) -> ChoiceRule:
    """See `ChoiceRule`."""
    return ChoiceRule(num_queries, num_kept, TILE, is_finite, goes_on)
