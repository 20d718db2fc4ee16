"""Shapes of `summarise_keys` shared by tests and benchmarks."""

from typing import NamedTuple


class SummaryCase(NamedTuple):
    """n blocks of T tokens with Hkv heads of D."""

    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int


CASES = (
    SummaryCase(num_blocks=1, num_kv_heads=1, block_size=1, head_dim=1),
    SummaryCase(num_blocks=3, num_kv_heads=2, block_size=16, head_dim=20),
    SummaryCase(num_blocks=11, num_kv_heads=8, block_size=32, head_dim=128),
)
