"""Masses and golden blocks, against their definitions written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmemory_vllm.capture.labels import block_mass, default_min_votes, golden_votes


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
    num_tokens = data.draw(st.integers((num_blocks - 1) * block_size + 1, num_blocks * block_size))
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(num_blocks, num_kv_heads, block_size, 8, generator=generator)
    query = torch.randn(num_kv_heads * heads_each, 8, generator=generator) * 3
    flat = keys.permute(1, 0, 2, 3).reshape(num_kv_heads, -1, 8)[:, :num_tokens].double()
    expected = torch.zeros(len(query), num_blocks, dtype=torch.float64)
    for head, own in enumerate(query.double()):
        shares = (flat[head // heads_each] @ own * 0.3).softmax(0)
        for token, share in enumerate(shares):
            expected[head, token // block_size] += share
    keys[-1, :, num_tokens - (num_blocks - 1) * block_size :] = torch.nan  # memory that nothing was written to
    torch.testing.assert_close(block_mass(query, keys, num_tokens, 0.3).double(), expected, rtol=1e-4, atol=1e-6)


def brute_force_votes(mass: torch.Tensor, top_p: float) -> list[int]:
    votes = [0] * mass.shape[1]
    for layer in mass.tolist():
        held = 0.0
        for block in sorted(range(len(layer)), key=lambda block: -layer[block]):
            if held >= top_p:
                break
            votes[block] += 1
            held += layer[block]
    return votes


@given(
    # Multiples of 2^-10 add up exactly, so that ties and crossings are the same for both
    st.lists(st.lists(st.integers(0, 40), min_size=7, max_size=7), min_size=1, max_size=6),
    st.integers(1, 200),
)
def test_votes_count_the_shortest_prefixes(rows: list[list[int]], top: int) -> None:
    mass = torch.tensor(rows, dtype=torch.float32) / 1024
    votes = golden_votes(mass.unsqueeze(1), top / 1024)
    assert votes.dtype == torch.uint8
    assert votes.tolist() == brute_force_votes(mass, top / 1024)


def test_the_block_that_crosses_the_line_is_golden() -> None:
    shares = torch.tensor([[[0.25, 0.5, 0.125, 0.125]]])
    assert golden_votes(shares, 0.6).tolist() == [1, 1, 0, 0]
    assert golden_votes(shares, 0.5).tolist() == [0, 1, 0, 0]


def test_a_block_that_no_head_looks_at_is_not_golden() -> None:
    # One head looks at block 0 alone, the other everywhere
    shares = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]])
    assert golden_votes(shares, 1.0).tolist() == [1, 1, 1, 1]
    assert golden_votes(shares, 1.0, min_share=0.25).tolist() == [1, 1, 1, 1]
    assert golden_votes(shares, 1.0, min_share=0.5).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(("layers", "votes"), [(1, 1), (5, 1), (6, 2), (20, 3), (36, 5)])
def test_default_votes(layers: int, votes: int) -> None:
    assert default_min_votes(layers) == votes
