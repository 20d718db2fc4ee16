"""Shapes of `merge_attention` shared by tests and benchmarks."""

from typing import NamedTuple


class MergeCase(NamedTuple):
    """T tokens, H query heads of D."""

    num_tokens: int
    num_heads: int
    head_dim: int


CASES = (
    MergeCase(num_tokens=1, num_heads=1, head_dim=16),
    MergeCase(num_tokens=7, num_heads=3, head_dim=20),
    MergeCase(num_tokens=33, num_heads=8, head_dim=64),
    MergeCase(num_tokens=5, num_heads=4, head_dim=128),
)
