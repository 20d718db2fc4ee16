"""The blocks that serving keeps whatever an indexer says, and how many it keeps in all."""

from __future__ import annotations

from functools import lru_cache

from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.ranking import Frame

# The ratio that a training run is made for, stopped and judged by.
MAIN_RATIO = 0.135
# As the options of the same names are by default.
SINK_TOKENS = 64
RECENT_TOKENS = 256


# Every selector is asked about the same tokens
@lru_cache(4096)
def frame_of(num_tokens: int, block_size: int, ratio: float) -> tuple[Frame, int]:
    """Forced blocks and budget of a request.

    Args:
        num_tokens: tokens of the request.
        block_size: tokens in a block.
        ratio: resident blocks over all blocks.
    """
    policy = BudgetPolicy(
        block_size=block_size,
        resident_ratio=ratio,
        min_sparse_tokens=0,
        sink_tokens=SINK_TOKENS,
        recent_tokens=RECENT_TOKENS,
        max_num_batched_tokens=1,
        max_model_len=num_tokens,
        growth_reserve_tokens=0,
    )
    num_blocks = -(-num_tokens // block_size)
    recent_start = num_blocks - policy.recent_blocks(num_tokens)
    return Frame(min(policy.sink_blocks(num_tokens), recent_start), recent_start, num_blocks), policy.decode_budget(
        num_tokens
    )
