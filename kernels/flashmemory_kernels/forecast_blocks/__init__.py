"""What each block is expected to be worth, from what it was worth before and from what its content says."""

from flashmemory_kernels.forecast_blocks.naive import (
    NEIGHBOURS,
    NOT_ASKED,
    NUM_OTHERS,
    Head,
    Seen,
    forecast_logits,
    mixed,
    num_features,
)
from flashmemory_kernels.forecast_blocks.op import forecast_blocks

__all__ = [
    "NEIGHBOURS",
    "NOT_ASKED",
    "NUM_OTHERS",
    "Head",
    "Seen",
    "forecast_blocks",
    "forecast_logits",
    "mixed",
    "num_features",
]
