"""One score per layer group and block, from the log-mass of every head and layer."""

from flashmemory_kernels.ensemble_scores.op import Aggregate, ensemble_scores

__all__ = ["Aggregate", "ensemble_scores"]
