"""Shares of blocks, against their definition written out."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmemory_vllm.capture.labels import block_mass


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
