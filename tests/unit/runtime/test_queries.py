"""The last token's queries of each row are kept, whatever the shape of the batch."""

import torch

from flashmemory_vllm.runtime.queries import QueryBuffer
from flashmemory_vllm.runtime.shape import AttentionShape

SHAPE = AttentionShape(("layer",), 3, 1, 8, 1.0, 16, torch.float32, torch.device("cpu"))


def test_queries_of_each_rows_last_token_are_kept() -> None:
    buffer = QueryBuffer(2, 4, SHAPE)
    query = torch.randn(6, 3, 8)
    buffer.set_rows([4, 2])
    buffer.capture(1, query, one_token_rows=False)
    assert torch.equal(buffer.row(0)[1], query[3])
    assert torch.equal(buffer.row(1)[1], query[5])
    assert not buffer.row(0)[0].any()


def test_rows_of_one_token_need_no_word_from_the_host() -> None:
    buffer = QueryBuffer(1, 4, SHAPE)
    buffer.set_rows([4, 2])
    query = torch.randn(6, 3, 8)  # padded beyond the most rows
    buffer.capture(0, query, one_token_rows=True)
    assert torch.equal(torch.stack([buffer.row(index)[0] for index in range(4)]), query[:4])


def test_rows_are_copied() -> None:
    buffer = QueryBuffer(2, 4, SHAPE)
    buffer.all_rows.copy_(torch.randn(2, 4, 3, 8))
    rows = buffer.rows(torch.tensor([2, 0]))
    assert torch.equal(rows, torch.stack([buffer.row(2), buffer.row(0)], dim=1))
    buffer.all_rows.zero_()
    assert rows.any()
