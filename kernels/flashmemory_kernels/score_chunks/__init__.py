"""Logits of learned per-block codes under the query heads of a neural indexer."""

from flashmemory_kernels.score_chunks.naive import CODE_DTYPE, dequantise_codes, quantise_codes
from flashmemory_kernels.score_chunks.op import score_chunks

__all__ = ["CODE_DTYPE", "dequantise_codes", "quantise_codes", "score_chunks"]
