"""What a choice queue is asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from flashmemory_kernels.common.due_rows import Due

from flashmemory_vllm.residency.lists import HEADER, NOBODY
from flashmemory_vllm.residency.types import IntArray


class Asked(NamedTuple):
    """A row that is chosen for. Positions are of blocks within their request.

    Attributes:
        req_id: vLLM's request id.
        place: where its tables lie.
        epoch: which tenant of the place it is.
        num_tokens: tokens with KV after the step.
        prompt_len: tokens of its prompt.
        block_ids: int32 `[n]` its full blocks.
        sink_end: end of the sink.
        first_recent: first of the newest blocks that are always in the set.
        end: blocks of the request, the one being written included.
        want: how many are to be chosen.
        cap: how many of them may be new in the set, if its list is not in force at once.
        is_new: it has no set yet; its list is in force at once.
        is_scored: its blocks are scored; otherwise what is known of them counts.
        at_once: its list is in force in the next step, with as many new blocks as it likes.
        earlier: of a row without a set, queries `[q, A, Hq, D]` that it is scored with as well as with its newest
            one, those of its question, the last one last. Default: none.
    """

    req_id: str
    place: int
    epoch: int
    num_tokens: int
    prompt_len: int
    block_ids: IntArray
    sink_end: int
    first_recent: int
    end: int
    want: int
    cap: int
    is_new: bool = False
    is_scored: bool = True
    at_once: bool = False
    earlier: torch.Tensor | None = None

    @property
    def num_queries(self) -> int:
        """Queries that a row without a set is scored with."""
        return 1 if self.earlier is None else 1 + len(self.earlier)


class Chosen(NamedTuple):
    """A part of a step's list.

    Attributes:
        rows: int32 `[n, G, 6 + 2 L]`, see `lists.pairs_of`.
        sets: by place of a row that had no set: per layer group int32 `[k]` chosen positions, without sink and recent
            ones.
    """

    rows: IntArray
    sets: Mapping[int, list[IntArray]]


def from_long_list(fields: IntArray, num_new: int, listed: IntArray, behind: IntArray) -> Chosen:
    """The rows that are in force at once.

    Args:
        fields: int32 `[n, len(Due)]`, as the device was asked.
        num_new: how many of them, the first, had no set.
        listed: int32 `[n, G, 6 + 2 L]` their rows, which have no positions.
        behind: int32 `[S]` the positions.
    """
    pairs = [_positions(asked, row, behind) for asked, row in zip(fields, listed, strict=True)]
    new, others = pairs[:num_new], pairs[num_new:]
    sets = {int(row[0, 0]): [come for come, _ in of_row] for row, of_row in zip(listed, new, strict=False)}
    longest = max((positions.size for of_row in others for pair in of_row for positions in pair), default=0)
    rows = np.full((len(others), listed.shape[1], HEADER + 2 * longest), NOBODY, np.int32)
    rows[:, :, :HEADER] = listed[num_new:, :, :HEADER]
    for of_row, lines in zip(others, rows, strict=True):
        for (come, go), line in zip(of_row, lines, strict=True):
            line[HEADER : HEADER + come.size] = come
            line[HEADER + longest : HEADER + longest + go.size] = go
    return Chosen(rows, sets)


def _positions(asked: IntArray, row: IntArray, behind: IntArray) -> list[tuple[IntArray, IntArray]]:
    """Per layer group who comes and who goes of one row."""
    span, pairs = int(asked[Due.FIRST_RECENT] - asked[Due.SINK_END]), []
    for group, (comes, goes) in enumerate(row[:, 3:5].tolist()):
        start = int(asked[Due.LONG_START]) + group * span
        pairs.append((behind[start : start + comes], behind[start + comes : start + comes + goes]))
    return pairs
