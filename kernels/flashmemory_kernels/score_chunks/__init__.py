"""Logits of all due requests' blocks, by learned codes of their chunks under the index heads of a neural indexer."""

from flashmemory_kernels.score_chunks.naive import (
    CODE_DTYPE,
    LEAST_LOGIT,
    Ensemble,
    block_logits,
    dequantise_codes,
    quantise_codes,
)
from flashmemory_kernels.score_chunks.op import score_chunks

__all__ = [
    "CODE_DTYPE",
    "LEAST_LOGIT",
    "Ensemble",
    "block_logits",
    "dequantise_codes",
    "quantise_codes",
    "score_chunks",
]
