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


def test_a_prompt_that_ends_leaves_the_queries_of_its_newest_tokens() -> None:
    buffer = QueryBuffer(2, 4, SHAPE)
    queries = torch.randn(2, 9, 3, 8)
    buffer.set_rows([4, 1, 3, 1], ending=[0, 2, 3], window=3)
    for anchor, query in enumerate(queries):
        buffer.capture(anchor, query, one_token_rows=False)
    earlier = [buffer.earlier(row) for row in range(4)]
    assert earlier[1] is None
    assert earlier[3] is None  # one token: it has no others in this step
    assert earlier[0] is not None
    assert torch.equal(earlier[0], queries[:, 1:3].transpose(0, 1))
    assert earlier[2] is not None
    assert torch.equal(earlier[2], queries[:, 5:7].transpose(0, 1))
    assert torch.equal(buffer.row(2), queries[:, 7])


def test_a_step_forgets_the_tokens_of_the_step_before() -> None:
    buffer = QueryBuffer(1, 4, SHAPE)
    buffer.set_rows([4], ending=[0], window=9)
    buffer.capture(0, torch.randn(4, 3, 8), one_token_rows=False)
    kept = buffer.earlier(0)
    assert kept is not None
    assert len(kept) == 3
    buffer.set_rows([1])
    assert buffer.earlier(0) is None


def test_rows_are_copied() -> None:
    buffer = QueryBuffer(2, 4, SHAPE)
    buffer.all_rows.copy_(torch.randn(2, 4, 3, 8))
    rows = buffer.rows(torch.tensor([2, 0]))
    assert torch.equal(rows, torch.stack([buffer.row(2), buffer.row(0)], dim=1))
    buffer.all_rows.zero_()
    assert rows.any()
