"""The oracle of the integration tests agrees with torch, and notices what is wrong."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flashmemory_vllm.residency.types import NOTHING, Phase, Row
from tests.helpers.oracle import AttentionOracle

BLOCK_SIZE = 2
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8
SCALE = HEAD_DIM**-0.5
# A request of six tokens in three blocks: five are prefilled, then one is decoded
BLOCK_TABLE = [4, 2, 6]
KEY, VALUE = torch.randn(2, 6, NUM_KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
QUERY = torch.randn(6, NUM_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
IMPL = SimpleNamespace(
    layer_index=0, group=0, scale=SCALE, sinks=None, runtime=SimpleNamespace(in_step=True, num_logical_blocks=8)
)
# As vLLM knows layers by name
LAYERS = SimpleNamespace(static_forward_context={"0": SimpleNamespace(impl=IMPL)})


def _attention(queries: slice, positions: list[int], *, is_causal: bool = False) -> torch.Tensor:
    """Torch's attention of some tokens to some tokens, [T, Hq, D]."""
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (QUERY[queries], KEY[positions], VALUE[positions]))
    output = scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=SCALE, enable_gqa=True)
    return output[0].transpose(0, 1)


def _show_step(oracle: AttentionOracle, row: Row, output: torch.Tensor) -> None:
    """One step with one row, as a running engine would show it."""
    tokens = slice(row.num_computed_tokens, row.num_computed_tokens + row.num_tokens)
    slots = [BLOCK_TABLE[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE for position in range(6)]
    metadata = SimpleNamespace(
        num_reqs=1,
        block_table_tensor=torch.tensor([BLOCK_TABLE], dtype=torch.int32),
        query_start_loc=torch.tensor([0, row.num_tokens]),
        seq_lens=torch.tensor([tokens.stop]),
    )
    builder = SimpleNamespace(
        kv_cache_spec=SimpleNamespace(block_size=BLOCK_SIZE),
        vllm_config=SimpleNamespace(compilation_config=LAYERS),
        layer_names=["0"],
    )
    oracle.see_slots(SimpleNamespace(slot_mapping=torch.tensor(slots[tokens])))
    oracle.see_batch(SimpleNamespace(self=builder, common_attn_metadata=metadata))
    plan = SimpleNamespace(rows={row.req_id: row})
    oracle.see_rows(SimpleNamespace(self=SimpleNamespace(_plan=plan), req_ids=[row.req_id]))
    oracle.see_keys(SimpleNamespace(self=IMPL, key=KEY[tokens], value=VALUE[tokens]))
    oracle.check(SimpleNamespace(self=IMPL, query=QUERY[tokens], output=output.reshape(row.num_tokens, -1)))


def _row(phase: Phase, num_computed_tokens: int, num_tokens: int, positions: list[int]) -> Row:
    blocks = np.array(positions, np.int32)
    evicted = BLOCK_SIZE * (3 - len(positions))
    return Row("r", phase, num_computed_tokens, num_tokens, (blocks,), (blocks,), (evicted,), (NOTHING,))


@pytest.mark.parametrize(
    ("read", "is_right"),
    [
        ([0, 1, 4, 5], True),
        ([2, 3, 4, 5], False),  # another block
        ([0, 1, 2, 3, 4, 5], False),  # a block too many
        ([0, 1, 5], False),  # a token too few
    ],
)
def test_decode_row_reads_its_resident_blocks(read: list[int], is_right: bool) -> None:
    oracle = AttentionOracle()
    _show_step(oracle, _row(Phase.PREFILL, 0, 5, [0, 1, 2]), _attention(slice(5), [*range(5)], is_causal=True))
    assert oracle.checked["prefill"].max_error < 1e-6
    _show_step(oracle, _row(Phase.DECODE, 5, 1, [0, 2]), _attention(slice(5, 6), read))
    assert (oracle.checked["sparse_decode"].max_error < 1e-6) == is_right


def test_nan_in_one_output_is_not_forgotten() -> None:
    oracle = AttentionOracle()
    right = _attention(slice(5), [*range(5)], is_causal=True)
    for output in (torch.full_like(right, torch.nan), right):
        _show_step(oracle, _row(Phase.PREFILL, 0, 5, [0, 1, 2]), output)
    assert np.isnan(oracle.checked["prefill"].max_error)
    assert oracle.checked["prefill"].rows == 2
