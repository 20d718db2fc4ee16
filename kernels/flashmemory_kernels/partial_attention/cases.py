"""Shapes of `partial_attention` shared by tests and benchmarks."""

from typing import NamedTuple


class AttentionCase(NamedTuple):
    """T queries with H heads of D against K keys with Hkv heads; values have D elements, or Dv if that is not 0."""

    num_tokens: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int = 0


CASES = (
    AttentionCase(num_tokens=1, num_keys=1, num_heads=1, num_kv_heads=1, head_dim=16),
    AttentionCase(num_tokens=7, num_keys=50, num_heads=6, num_kv_heads=2, head_dim=20),
    AttentionCase(num_tokens=33, num_keys=33, num_heads=4, num_kv_heads=4, head_dim=64),
    AttentionCase(num_tokens=65, num_keys=257, num_heads=8, num_kv_heads=1, head_dim=33),
    AttentionCase(num_tokens=5, num_keys=70, num_heads=4, num_kv_heads=1, head_dim=72, value_dim=64),
    AttentionCase(num_tokens=129, num_keys=513, num_heads=4, num_kv_heads=2, head_dim=128),
)
