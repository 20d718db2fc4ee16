"""The newest queries of each place are kept, whatever the shape of the batch."""

import numpy as np
import torch

from flashmemory_vllm.residency.batch import Batch
from flashmemory_vllm.residency.types import Phase, Row
from flashmemory_vllm.runtime.queries import QueryRing
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.tables import StepTables, TableSizes

CPU = torch.device("cpu")
SHAPE = AttentionShape(("layer",), 3, 1, 8, 1.0, 16, torch.float32, CPU)
NUM_PLACES, NUM_KEPT = 4, 3


def row(computed: int, tokens: int) -> Row:
    slots = (np.arange(1, 9, dtype=np.int32),)
    return Row("", Phase.PREFILL, computed, tokens, slots, slots, (0,), (np.empty(0, np.int32),))


def test_the_newest_queries_of_each_place_are_kept() -> None:
    """Steps of several requests, each row a token or more, with padding behind them."""
    sizes = TableSizes(1, 16, NUM_PLACES, NUM_KEPT, max_rows=4, max_tokens=30, width=8)
    ring, tables = QueryRing(2, NUM_PLACES, NUM_KEPT, SHAPE), StepTables(sizes, CPU)
    asked = torch.randn(NUM_PLACES, 100, 3, 8)
    computed = [0] * NUM_PLACES
    for step in ({2: 7, 0: 1}, {0: 1, 2: 1}, {0: 4, 2: 2, 3: 3}, {3: 1, 2: 1}):
        rows = [row(computed[place], tokens) for place, tokens in step.items()]
        for place, tokens in step.items():
            computed[place] += tokens
        lens = torch.tensor([*(computed[place] for place in step), 0], dtype=torch.int32)
        tables.write(Batch.of(rows, list(step)), lens, sum(step.values()) + 2)
        query = torch.cat([asked[place, computed[place] - tokens : computed[place]] for place, tokens in step.items()])
        query = torch.cat((query, torch.full((5, 3, 8), torch.nan)))
        ring.capture(1, query, tables.query_row(len(query)))
        for place, end in enumerate(computed):
            for position in range(max(0, end - NUM_KEPT), end):
                kept = ring.row(ring.row_of(place, position))
                assert torch.equal(kept[1], asked[place, position]), (place, position)
    assert not ring.all_rows[0].any()


def test_a_batch_that_is_nobodys_leaves_all_queries_as_they_are() -> None:
    sizes = TableSizes(1, 16, NUM_PLACES, NUM_KEPT, max_rows=4, max_tokens=30, width=8)
    ring, tables = QueryRing(1, NUM_PLACES, NUM_KEPT, SHAPE), StepTables(sizes, CPU)
    tables.write(Batch.of([row(0, 3)], [1]), torch.tensor([3], dtype=torch.int32), 3)
    tables.pass_through(torch.zeros((1, 1), dtype=torch.int32), torch.ones(1, dtype=torch.int32), torch.zeros(1), 1)
    ring.capture(0, torch.ones(30, 3, 8), tables.query_row(30))
    assert not ring.all_rows.any()
