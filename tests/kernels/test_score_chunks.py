"""score_chunks: every block of every row against the definition in float64, and the fp8 rows it reads."""

import itertools
from typing import Any

import pytest
import torch
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.score_chunks import Ensemble, block_logits, dequantise_codes, quantise_codes, score_chunks
from flashmemory_kernels.score_chunks.cases import CASES, ChunkCase, ChunkInputs, make_inputs
from flashmemory_kernels.score_chunks.naive import score_chunks_naive
from hypothesis import given
from hypothesis import strategies as st

# Sums of at most 16 heads of 128 products in float32.
TOL_FP32: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-3}


def by_definition(inputs: ChunkInputs, case: ChunkCase, line: int) -> torch.Tensor:
    """Logits [G, n] of one row, a block, layer and query after the other, in float64; -1e4 for what is no number."""
    row, ensemble = inputs.rows[line].tolist(), inputs.ensemble
    num_blocks, num_queries, per_block = row[Due.NUM_BLOCKS], row[Due.NUM_QUERIES], case.chunks_per_block
    ids = inputs.block_ids[row[Due.PLACE], :num_blocks].long()
    codes = dequantise_codes(inputs.codes, inputs.scales)[:, ids].double().flatten(1, 2)
    hint = torch.arange(num_blocks * per_block, 0, -1).double().log()
    logits = torch.empty(num_queries, len(case.layer_groups), num_blocks, dtype=torch.float64)
    for query, layer in itertools.product(range(num_queries), range(len(case.layer_groups))):
        products = (inputs.heads[line, query, layer].double() @ codes[layer].T).relu()
        chunks = inputs.gates[line, query, layer].double() @ products
        chunks = chunks + ensemble.bias[layer] + ensemble.slope[layer] * hint
        chunks = torch.where(chunks.isfinite(), chunks, -1e4).view(num_blocks, per_block)
        for block in range(num_blocks):
            before = chunks[block - 1, per_block - case.reach :] + ensemble.reach_offset[layer] if block else chunks[0]
            logits[query, layer, block] = torch.cat((chunks[block], before)).max()
    groups = [logits[:, [at for at, own in enumerate(case.layer_groups) if own == group]] for group in
              range(max(case.layer_groups) + 1)]  # fmt: skip
    by_query = [group.amax(1) if case.aggregate == "max" else group.mean(1) for group in groups]
    return torch.stack([group.amax(0) for group in by_query])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_block_of_every_row_has_its_best_chunk(case: ChunkCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    score_chunks(*inputs)
    written = torch.zeros_like(inputs.logits, dtype=torch.bool)
    for line, num_blocks in enumerate(case.num_blocks):
        own = inputs.logits[:, inputs.rows[line, Due.PLACE], :num_blocks]
        written[:, inputs.rows[line, Due.PLACE], :num_blocks] = True
        if num_blocks:
            torch.testing.assert_close(own.double(), by_definition(inputs, case, line), **TOL_FP32)
    assert inputs.logits[~written].isnan().all()
    assert inputs.logits[written].isfinite().all()


def test_portions_give_the_same_logits() -> None:
    got, expected = make_inputs(CASES[1]), make_inputs(CASES[1])
    score_chunks_naive(*got, chunk_elems=1)
    score_chunks(*expected)
    torch.testing.assert_close(got.logits, expected.logits, **TOL_FP32, equal_nan=True)


def test_of_fewer_queries_than_a_row_says_the_newest_count() -> None:
    got, expected = make_inputs(CASES[1]), make_inputs(CASES[1])
    assert int(got.rows[:, Due.NUM_QUERIES].max()) > 1
    expected.rows[:, Due.NUM_QUERIES].clamp_(max=1)
    score_chunks(*got._replace(heads=got.heads[:, :1], gates=got.gates[:, :1]))
    score_chunks(*expected)
    assert torch.equal(got.logits.nan_to_num(7.0), expected.logits.nan_to_num(7.0))


def test_the_last_chunks_of_a_block_speak_for_the_next() -> None:
    chunks = torch.tensor([[5.0, 1.0, 0.0, 2.0, 0.0, 3.0]])

    def logits(chunks_per_block: int, *offsets: float) -> list[float]:
        found: list[float] = block_logits(chunks, chunks_per_block, torch.tensor([offsets]))[0].tolist()
        return found

    assert logits(2) == [5, 2, 3]
    assert logits(2, 0.0) == [5, 2, 3]
    assert logits(2, 0.0, 0.0) == [5, 5, 3]
    assert logits(3, 0.0, 0.0) == [5, 3]
    assert logits(2, -2.0, 3.0) == [5, 4, 5]
    assert block_logits(torch.zeros(2, 0), 2, torch.zeros(2, 1)).shape == (2, 0)


@given(
    row=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=64),
    factor=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_rounding_keeps_three_bits_beside_the_largest_element(row: list[float], factor: float) -> None:
    rows = torch.tensor([row]) * factor
    codes, scales = quantise_codes(rows)
    error = (dequantise_codes(codes, scales) - rows).abs()
    # Half of the last of three mantissa bits; below the smallest normal number half of its smallest step.
    allowed = torch.maximum(rows.abs() / 16, scales.unsqueeze(-1) * 2.0**-10) * (1 + 1e-4)
    assert bool((error <= allowed).all())
    assert bool(dequantise_codes(codes, scales).isfinite().all())


def test_zeros_stay_zero() -> None:
    codes, scales = quantise_codes(torch.zeros(3, 8))
    assert not dequantise_codes(codes, scales).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": torch.ones(6, 4, 3, 5)}, r"gates: expected shape \[6, 4, 3, 6\], got \[6, 4, 3, 5\]"),
        ({"codes": torch.ones(3, 118, 3, 20)}, r"codes: expected dtype torch.float8_e4m3fn, got torch.float32"),
        ({"scales": torch.ones(3, 118, 2)}, r"scales: expected shape \[3, 118, 3\]"),
        ({"scales": torch.ones(3, 3, 118).mT}, r"codes: expected those of a block contiguous"),
        ({"block_ids": torch.ones(5, 23, dtype=torch.int64)}, r"block_ids: expected dtype torch.int32"),
        ({"rows": torch.ones(5, 16, dtype=torch.int32)}, r"rows: expected shape \[6, 16\]"),
        ({"logits": torch.ones(2, 5, 22)}, r"logits: expected shape \[\*, 5, 23\], got \[2, 5, 22\]"),
        ({"heads": torch.ones(6, 4, 3, 20, 6).mT}, r"heads: expected a last dim of stride 1"),
        ({"bias": torch.ones(1)}, r"bias: expected shape \[3\], got \[1\]"),
        ({"slope": torch.ones(3, 1)}, r"slope: expected shape \[3\], got \[3, 1\]"),
        ({"reach_offset": torch.ones(3, 4)}, r"reach_offset: expected at most 3 columns"),
        ({"groups": torch.ones(3)}, r"groups: expected dtype torch.int32"),
        ({"aggregate": "sum"}, r"aggregate: expected 'max' or 'mean', got 'sum'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    inputs = make_inputs(CASES[1])
    of_ensemble = {name: value for name, value in change.items() if name in Ensemble._fields}
    others = {name: value for name, value in change.items() if name not in of_ensemble}
    with pytest.raises(ValueError, match=message):
        score_chunks(*inputs._replace(**others, ensemble=inputs.ensemble._replace(**of_ensemble)))
