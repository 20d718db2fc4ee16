"""What each block is expected to be worth, from what it was worth before and from what its content says."""

from flashmemory_kernels.forecast_blocks.naive import (
    NEIGHBOURS,
    NOT_ASKED,
    Head,
    Seen,
    forecast_logits,
    num_features,
)
from flashmemory_kernels.forecast_blocks.op import forecast_blocks

__all__ = ["NEIGHBOURS", "NOT_ASKED", "Head", "Seen", "forecast_blocks", "forecast_logits", "num_features"]
