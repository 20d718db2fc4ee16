"""Selector `bounds`: per-channel minimum and maximum of a block's keys (Quest, arXiv 2406.10774)."""

from __future__ import annotations

from typing import ClassVar

from flashmemory_kernels.summarise_keys import Kind

from flashmemory_vllm.indexer.indexed import IndexedSelector


class BoundsSelector(IndexedSelector):
    """Ranks a block by an upper bound on the logit of any of its tokens: `sum_d max(q_d min_d, q_d max_d)`.

    Per channel the larger product is `q_d max_d` where q_d is positive and `q_d min_d` where it is negative,
    so the bound is one dot product of `[min(q, 0), max(q, 0)]` with the row `[min, max]`.
    """

    name: ClassVar[str] = "bounds"
    summary: Kind = "bounds"
