"""Drift on a GPU: no step waits for a comparison, and each sees the queries of its own step."""

from __future__ import annotations

import pytest
import torch

from flashmemory_vllm.runtime.drift import QueryDrift
from flashmemory_vllm.runtime.queries import QueryRing
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.side_stream import SideStream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_ROWS = 16
# About a second: what waits for it is seen to.
LONG_CYCLES = 1_500_000_000


def test_comparisons_neither_wait_nor_see_later_queries() -> None:
    device = torch.device("cuda")
    shape = AttentionShape(("layer",), 8, 2, 64, 1.0, 16, torch.bfloat16, device)
    buffer, side_stream = QueryRing(3, NUM_ROWS, 1, shape), SideStream(device)
    drift = QueryDrift(0.5, 1, buffer, side_stream)
    drift.warm_up()
    rows = {str(row): row for row in range(NUM_ROWS)}
    selected_with = torch.randn_like(buffer.all_rows)
    later = selected_with.clone()
    later[:, ::2] *= -1
    buffer.all_rows.copy_(selected_with)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drift.compare(1, rows, {})
        torch.cuda._sleep(LONG_CYCLES)  # type: ignore[no-untyped-call]
        buffer.all_rows.copy_(later)
        drift.compare(2, {}, rows)
        buffer.all_rows.zero_()
        is_busy = not torch.cuda.current_stream(device).query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert is_busy
    assert drift.drifted(3) == []
    assert drift.drifted(4) == [str(row) for row in range(0, NUM_ROWS, 2)]
