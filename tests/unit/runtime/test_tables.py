"""Compacted tables: slots in order, lengths short by exactly what was left out, padding rows empty."""

import numpy as np
import torch

from flashmemory_vllm.residency.types import Phase, Row
from flashmemory_vllm.runtime.queries import QueryBuffer
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.tables import StepTables

CPU = torch.device("cpu")


def row(req_id: str, slots: list[int], computed: int, tokens: int, evicted: int) -> Row:
    table = np.array(slots, dtype=np.int32)
    return Row(
        req_id,
        Phase.DECODE,
        computed,
        tokens,
        (table,),
        (np.arange(len(slots), dtype=np.int32),),
        (evicted,),
        (table[:0],),
    )


def test_rows_and_lengths() -> None:
    tables = StepTables(1, 4, 8, CPU)
    rows = [row("a", [5, 3, 9], 99, 1, 52), row("b", [7], 0, 3, 0)]
    (table,) = tables.fill(rows, 3, torch.tensor([100, 3, 0], dtype=torch.int32))
    assert table.block_table[0, :3].tolist() == [5, 3, 9]
    assert table.block_table[1, 0].item() == 7
    assert table.seq_lens.tolist() == [48, 3, 0]
    assert table.seq_lens_host.tolist() == [48, 3, 0]
    assert table.max_seq_len == 48


def test_tables_keep_their_memory_between_steps() -> None:
    tables = StepTables(1, 4, 8, CPU)
    first = tables.fill([row("a", [1], 0, 4, 0)], 1, torch.tensor([4], dtype=torch.int32))[0]
    second = tables.fill([row("a", [2], 4, 1, 0)], 1, torch.tensor([5], dtype=torch.int32))[0]
    assert first.block_table.data_ptr() == second.block_table.data_ptr()
    assert first.seq_lens.data_ptr() == second.seq_lens.data_ptr()


def test_queries_of_each_rows_last_token_are_kept() -> None:
    shape = AttentionShape(("layer",), 3, 1, 8, 1.0, 16, torch.float32, CPU)
    buffer = QueryBuffer(2, 4, shape)
    query = torch.randn(6, 3, 8)
    buffer.set_rows([4, 2])
    buffer.capture(1, query)
    assert torch.equal(buffer.row(0)[1], query[3])
    assert torch.equal(buffer.row(1)[1], query[5])
    assert not buffer.row(0)[0].any()
