"""score_rows: index formats against brute force, chunk edges, ring of queries, sets, and what is no number."""

from typing import Any

import pytest
import torch
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.score_rows import OnlySets, naive, score_rows
from flashmemory_kernels.score_rows.cases import CASES, ScoreRowsCase, ScoreRowsInputs, make_inputs

# A dot product and a sum of at most 32 terms in float32.
TOL_FP32: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def block_rows(given: ScoreRowsInputs, layer: int, block: int, kv_head: int) -> torch.Tensor:
    """The index rows [R, E] that a block has in one layer and head, float64."""
    rows = given.key_rows.float()[layer, block, kv_head].double()
    return rows if given.scales is None else rows * float(given.scales[layer, block, kv_head])


def one_mass(given: ScoreRowsInputs, row: list[int], layer: int, head: int, age: int, block: int) -> float:
    num_kept, num_heads, head_dim = given.queries.shape[2:]
    query = given.queries[layer, row[Due.PLACE], (row[Due.POSITION] - age) % num_kept, head].double()
    rows = block_rows(
        given, layer, int(given.block_ids[row[Due.PLACE], block]), head * given.key_rows.shape[2] // num_heads
    )
    if rows.shape[1] == 2 * head_dim:
        products = torch.maximum(query * rows[:, :head_dim], query * rows[:, head_dim:])
    else:
        products = query * rows
    return float((products.sum(1) * given.scale).exp().sum().log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_one_mass_at_a_time(case: ScoreRowsCase, dtype: torch.dtype) -> None:
    given = make_inputs(case, dtype)
    score_rows(*given)
    for row in given.rows.tolist():
        for block in range(row[Due.NUM_BLOCKS] if row[Due.NUM_QUERIES] else 0):
            at = given.mass[row[Due.FIRST_TILE] + block // case.tile, :, :, block % case.tile]
            for layer in range(case.num_layers):
                group = layer % case.num_groups if case.num_groups else 0
                is_left_out = (
                    given.only is not None
                    and block < row[Due.NUM_KNOWN]
                    and not given.only.in_set[group, row[Due.PLACE], block]
                )
                for head in range(case.num_heads):
                    for age in range(row[Due.NUM_QUERIES]):
                        got = float(at[layer * case.num_heads + head, age])
                        expected = -torch.inf if is_left_out else one_mass(given, row, layer, head, age, block)
                        assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert bool(given.mass[-1].isnan().all())


@pytest.mark.parametrize("chunk_elems", [1, 3000])
@pytest.mark.parametrize("case", CASES)
def test_chunking_changes_nothing(case: ScoreRowsCase, chunk_elems: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make_inputs(case, torch.float32)
    chunked = torch.full_like(given.mass, torch.nan)
    score_rows(*given)
    monkeypatch.setattr(naive, "CHUNK_ELEMS", chunk_elems)
    score_rows(*given._replace(mass=chunked))
    torch.testing.assert_close(chunked, given.mass, **TOL_FP32, equal_nan=True)


def test_a_broken_query_or_key_gives_no_mass() -> None:
    given = make_inputs(CASES[1], torch.float32)
    row = given.rows[1].tolist()
    place, first = row[Due.PLACE], row[Due.FIRST_TILE]
    given.queries[0, place, row[Due.POSITION] % CASES[1].num_kept, 2, 7] = torch.nan
    given.key_rows[1, int(given.block_ids[place, 5]), 0, 3, 1] = torch.nan
    score_rows(*given)
    assert bool((given.mass[first, 2, 0] == -torch.inf).all())
    assert bool((given.mass[first, 6:9, : row[Due.NUM_QUERIES], 5] == -torch.inf).all())
    finite = given.mass[first, :, : row[Due.NUM_QUERIES]].isfinite()
    assert int((~finite).sum()) == CASES[1].tile + 3 * row[Due.NUM_QUERIES]


def test_wrong_arguments_are_named() -> None:
    given = make_inputs(CASES[1])
    with pytest.raises(ValueError, match=r"index: expected rows of 20 or 40 elements, got 19"):
        score_rows(*given._replace(key_rows=given.key_rows[..., :19]))
    with pytest.raises(ValueError, match=r"index: expected a number of heads that divides 5, got 2"):
        score_rows(*given._replace(queries=given.queries[:, :, :, :5]))
    with pytest.raises(ValueError, match=r"scales: expected with an index of torch.float8_e4m3fn and with no other"):
        score_rows(*given._replace(scales=torch.ones(given.key_rows.shape[:3])))
    with pytest.raises(ValueError, match=r"mass: expected tiles of a power of two from 16 on, got 8"):
        score_rows(*given._replace(mass=given.mass[..., :8].contiguous()))
    with pytest.raises(ValueError, match=r"mass: expected at most 5 queries, got 8"):
        score_rows(*given._replace(mass=given.mass.repeat(1, 1, 2, 1)))
    only = OnlySets(torch.zeros(1, 3, 37, dtype=torch.int8), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"in_set: expected shape \[\*, 5, 37\], got \[1, 3, 37\]"):
        score_rows(*given._replace(only=only))
    with pytest.raises(ValueError, match=r"index: expected dtype torch.float32, got torch.bfloat16"):
        score_rows(*given._replace(queries=given.queries.float()))
