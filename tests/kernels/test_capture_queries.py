"""capture_queries: each place has its newest queries, and nobody else's are touched."""

import pytest
import torch
from flashmemory_kernels.capture_queries import capture_queries
from flashmemory_kernels.capture_queries.cases import CASES, CaptureCase, make_inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_queries_lie_where_their_tokens_say(case: CaptureCase, dtype: torch.dtype) -> None:
    query, query_row, queries = make_inputs(case, dtype)
    expected = queries.clone()
    for token, row in enumerate(query_row.tolist()):
        if row >= 0:
            expected[row] = query[token]
    capture_queries(query, query_row, queries)
    torch.testing.assert_close(queries, expected, rtol=0, atol=0, equal_nan=True)


def test_steps_of_any_length_leave_the_newest_queries() -> None:
    num_kept, query = 4, torch.arange(11.0).view(11, 1, 1)
    queries = torch.full((3 * num_kept, 1, 1), torch.nan)
    for start, end in ((0, 3), (3, 4), (4, 11)):
        position = torch.arange(start, end)
        rows = torch.where(position >= end - num_kept, num_kept + position % num_kept, -1).int()
        capture_queries(query[start:end], rows, queries)
    assert queries.flatten()[num_kept : 2 * num_kept].tolist() == [8.0, 9.0, 10.0, 7.0]
    assert bool(queries[:num_kept].isnan().all())
    assert bool(queries[2 * num_kept :].isnan().all())


def test_wrong_arguments_are_named() -> None:
    query, query_row, queries = make_inputs(CASES[1])
    with pytest.raises(ValueError, match=r"query_row: expected at most 6 rows, got 7"):
        capture_queries(query[:6], query_row, queries)
    with pytest.raises(ValueError, match=r"queries: expected shape \[\*, 6, 20\], got \[15, 6, 19\]"):
        capture_queries(query, query_row, queries[..., :19])
    with pytest.raises(ValueError, match=r"queries: expected dtype torch.bfloat16, got torch.float32"):
        capture_queries(query, query_row, queries.float())
    with pytest.raises(ValueError, match=r"query_row: expected dtype torch.int32, got torch.int64"):
        capture_queries(query, query_row.long(), queries)
    with pytest.raises(ValueError, match=r"query: expected a last dim of stride 1"):
        capture_queries(query.mT.contiguous().mT, query_row, queries)
