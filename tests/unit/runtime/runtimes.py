"""Whole runtimes of a tiny model on the CPU, without vLLM: steps go in, nobody looks at what attention computes."""

from __future__ import annotations

from typing import Any

import torch
from flashmemory_kernels.partial_attention import partial_attention

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.kinds.base import PageKind
from flashmemory_vllm.kinds.pages import InterleavedPages
from flashmemory_vllm.observability.counters import CounterWriter
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.types import StepInput
from flashmemory_vllm.runtime.assembly import RuntimeSizes, build_runtime
from flashmemory_vllm.runtime.runtime import ResidencyRuntime
from flashmemory_vllm.runtime.shape import AttentionShape

BLOCK, QUERY_HEADS, KV_HEADS, HEAD_DIM, MAX_SEQS = 4, 2, 1, 4, 16
LAYERS = ("0", "1")


def small_budget() -> BudgetPolicy:
    """Three tenths of a request's blocks, prefilled eight at a time."""
    return BudgetPolicy(
        block_size=BLOCK,
        resident_ratio=0.3,
        min_sparse_tokens=0,
        sink_tokens=BLOCK,
        recent_tokens=BLOCK,
        max_num_batched_tokens=8 * BLOCK,
        max_model_len=200,
        growth_reserve_tokens=0,
    )


class TinyModel:
    """A runtime under a model whose keys, values and queries are noise.

    Args:
        counters: the worker's counters.
        budget: slots of a request.
        num_slots: S.
        num_blocks: N.
        seed: of the noise; with another one, selections choose other blocks.
        options: our options.
    """

    def __init__(
        self,
        counters: CounterWriter,
        budget: BudgetPolicy,
        num_slots: int,
        num_blocks: int,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        caches = [self._noise(num_slots, KV_HEADS, BLOCK, 2 * HEAD_DIM) for _ in LAYERS]
        self.runtime: ResidencyRuntime = build_runtime(
            shape=AttentionShape(
                LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, 1.0, BLOCK, torch.float32, torch.device("cpu")
            ),
            caches=caches,
            kind=PageKind(InterleavedPages(KV_HEADS, BLOCK, HEAD_DIM), 1.0, partial_attention),
            config=FlashMemoryConfig(**options),
            budget=budget,
            sizes=RuntimeSizes(num_blocks, 2, MAX_SEQS, budget.max_num_batched_tokens),
            counters=counters,
        )

    def step(self, step_input: StepInput) -> bool:
        """Run one step. Returns whether it needed Python."""
        with self.runtime.step(step_input):
            needs_python = self.runtime.needs_python
            counts = step_input.num_scheduled_tokens.values()
            self._set_batch(step_input)
            query, output = (self._noise(sum(counts), QUERY_HEADS, HEAD_DIM) for _ in range(2))
            key, value = (self._noise(sum(counts), KV_HEADS, HEAD_DIM) for _ in range(2))
            for layer in range(len(LAYERS)):
                self.runtime.attended(layer, query, key, value, output)
        return needs_python

    def _set_batch(self, step_input: StepInput) -> None:
        computed = {new.req_id: new.num_computed_tokens for new in step_input.new}
        computed |= {running.req_id: running.num_computed_tokens for running in step_input.running}
        lens = [computed[req_id] + count for req_id, count in step_input.num_scheduled_tokens.items()]
        slots = torch.full((sum(step_input.num_scheduled_tokens.values()),), -1)
        req_ids = list(step_input.num_scheduled_tokens)
        self.runtime.set_batch(req_ids, torch.tensor(lens, dtype=torch.int32), slots)

    def _noise(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self._generator)
