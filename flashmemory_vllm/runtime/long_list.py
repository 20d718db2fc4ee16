"""Reads what does not fit the rows of a list: the changes of rows that are in force at once."""

from __future__ import annotations

import numpy as np
from flashmemory_kernels.common.due_rows import Due

from flashmemory_vllm.residency.lists import COMES, GOES, HEADER, NOBODY
from flashmemory_vllm.residency.types import IntArray


def from_long_list(fields: IntArray, listed: IntArray, behind: IntArray) -> IntArray:
    """Rows with their positions, int32 `[n, G, 6 + 2 L]`; L is as large as it has to be.

    Args:
        fields: int32 `[n, len(Due)]`, as the device was asked.
        listed: int32 `[n, G, ...]` rows of the list, of which only what stands before positions means anything.
        behind: int32 `[S]` the positions.
    """
    longest = int(listed[:, :, COMES : GOES + 1].max(initial=0))
    rows = np.full((*listed.shape[:2], HEADER + 2 * longest), NOBODY, np.int32)
    rows[:, :, :HEADER] = listed[:, :, :HEADER]
    for asked, of_row in zip(fields, rows, strict=True):
        span = int(asked[Due.FIRST_RECENT] - asked[Due.SINK_END])
        for group, line in enumerate(of_row):
            start, comes, goes = int(asked[Due.LONG_START]) + group * span, int(line[COMES]), int(line[GOES])
            line[HEADER : HEADER + comes] = behind[start : start + comes]
            line[HEADER + longest : HEADER + longest + goes] = behind[start + comes : start + comes + goes]
    return rows
