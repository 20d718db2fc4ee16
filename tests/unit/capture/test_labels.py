"""Masses and golden blocks, against their definitions written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmemory_vllm.capture.labels import block_mass, default_min_votes, golden_blocks


@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3)),
    data=st.data(),
)
@settings(max_examples=50)
def test_mass_is_softmax_over_all_tokens_summed_by_block(
    seed: int, sizes: tuple[int, int, int, int], data: st.DataObject
) -> None:
    num_blocks, num_kv_heads, block_size, heads_each = sizes
    rows, num_queries = 2, 3
    last = st.integers(0, num_blocks * block_size - 1)
    positions = torch.tensor(data.draw(st.lists(last, min_size=6, max_size=6))).view(rows, num_queries)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, num_blocks, num_kv_heads, block_size, 8, generator=generator)
    queries = torch.randn(rows, num_queries, num_kv_heads * heads_each, 8, generator=generator) * 3
    flat = keys.transpose(1, 2).flatten(2, 3).double()
    expected = torch.zeros(rows, num_queries, num_kv_heads * heads_each, num_blocks, dtype=torch.float64)
    for row, query, head in torch.cartesian_prod(*map(torch.arange, expected.shape[:3])).tolist():
        num_tokens = int(positions[row, query]) + 1
        own = queries[row, query, head].double()
        shares = (flat[row, head // heads_each, :num_tokens] @ own * 0.3).softmax(0)
        for token, share in enumerate(shares):
            expected[row, query, head, token // block_size] += share
    for row, of_row in enumerate(keys.transpose(1, 2).unbind()):
        # Memory that nothing was written to
        written = int(positions[row].max()) + 1
        for token in range(written, num_blocks * block_size):
            of_row[:, token // block_size, token % block_size] = torch.nan
    torch.testing.assert_close(block_mass(queries, keys, positions, 0.3).double(), expected, rtol=1e-4, atol=1e-6)


def brute_force(mass: list[float], top_p: float) -> list[bool]:
    golden, held = [False] * len(mass), 0.0
    for block in sorted(range(len(mass)), key=lambda block: -mass[block]):
        if held >= top_p:
            break
        golden[block] = True
        held += mass[block]
    return golden


@given(
    # Multiples of 2^-10 add up exactly, so that ties and crossings are the same for both
    st.lists(st.lists(st.integers(0, 40), min_size=7, max_size=7), min_size=1, max_size=6),
    st.integers(1, 200),
)
def test_golden_are_the_shortest_prefixes(rows: list[list[int]], top: int) -> None:
    mass = torch.tensor(rows, dtype=torch.float32) / 1024
    found = golden_blocks(mass, torch.ones_like(mass), top / 1024)
    assert found.tolist() == [brute_force(row, top / 1024) for row in mass.tolist()]


def test_the_block_that_crosses_the_line_is_golden() -> None:
    mass = torch.tensor([0.25, 0.5, 0.125, 0.125])
    assert golden_blocks(mass, mass, 0.6).tolist() == [True, True, False, False]
    assert golden_blocks(mass, mass, 0.5).tolist() == [False, True, False, False]


def test_a_block_that_no_head_looks_at_is_not_golden() -> None:
    # One head looks at block 0 alone, the other everywhere
    shares = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    both = shares.mean(0), shares.amax(0)
    assert golden_blocks(*both, 1.0).tolist() == [True] * 4
    assert golden_blocks(*both, 1.0, min_share=0.25).tolist() == [True] * 4
    assert golden_blocks(*both, 1.0, min_share=0.5).tolist() == [True, False, False, False]


@pytest.mark.parametrize(("layers", "votes"), [(1, 1), (5, 1), (6, 2), (20, 3), (36, 5)])
def test_default_votes(layers: int, votes: int) -> None:
    assert default_min_votes(layers) == votes
