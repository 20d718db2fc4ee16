"""A whole runtime on the CPU without vLLM: a made-up model writes and attends, and a test compares its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from flashmemory_kernels.partial_attention import partial_attention

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.indexer.base import Selector
from flashmemory_vllm.kinds.base import PageKind
from flashmemory_vllm.kinds.pages import InterleavedPages
from flashmemory_vllm.observability.counters import CounterReader, CounterWriter, worker_name
from flashmemory_vllm.residency.types import NewRequest, RunningRequest, StepInput
from flashmemory_vllm.runtime import assembly
from flashmemory_vllm.runtime.capacity import budget_policy
from flashmemory_vllm.runtime.runtime import ResidencyRuntime
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.status import StripsAsked
from flashmemory_vllm.transfer.engine import CpuTransferEngine, TransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool

BLOCK, LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 4, 2, 8
NUM_BLOCKS, NUM_SLOTS, MOST_TOKENS = 200, 40, 128
SCALE = 0.5
SHAPE = AttentionShape(
    tuple(map(str, range(LAYERS))), QUERY_HEADS, KV_HEADS, HEAD_DIM, SCALE, BLOCK, torch.float32, torch.device("cpu")
)
# A sink and a recent block beside the share; selected for every other step, in force two steps later
OPTIONS: Mapping[str, Any] = {
    "selector": "bounds",
    "resident_ratio": 0.4,
    "min_sparse_tokens": 0,
    "sink_tokens": 1,
    "recent_tokens": 1,
    "growth_reserve_tokens": 0,
    "tau_steps": 2,
    "staging_blocks": 2,
    "check_integrity": True,
    "poison_free_slots": True,
}


class DrivenRuntime:
    """Drives a runtime through scheduler steps as a worker does.

    Queries, keys and values depend on request, position and layer alone, so equal outputs mean equal blocks read.

    Args:
        folder: for the counters.
        options: ours, beside `OPTIONS`.
        engine: kind of transfer engine.
        selector: scores blocks. Default: the one that the options name.
        replaced: the runtime that this one takes the place of, its host pool and its device pages.
    """

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, Any] = {},
        engine: type[TransferEngine] = CpuTransferEngine,
        selector: type[Selector] | None = None,
        replaced: DrivenRuntime | None = None,
    ) -> None:
        self.counters: CounterWriter = (
            replaced.counters if replaced else CounterWriter.create(folder / "engine", worker_name(0))
        )
        self._reader = CounterReader(folder / "engine")
        page = (KV_HEADS, BLOCK, 2 * HEAD_DIM)
        self.caches: list[torch.Tensor] = (
            replaced.caches if replaced else [torch.zeros(NUM_SLOTS, *page) for _ in range(LAYERS)]
        )
        with mock.patch.object(assembly, "CpuTransferEngine", engine):
            self.runtime = self._build(FlashMemoryConfig(**{**OPTIONS, **options}), selector, replaced)
        self._computed: dict[str, int] = {}
        self._blocks: dict[str, list[int]] = {}
        self._step = 0

    def _build(
        self, config: FlashMemoryConfig, selector: type[Selector] | None, replaced: DrivenRuntime | None
    ) -> ResidencyRuntime:
        pool: HostPool | None = replaced.runtime.pool if replaced else None

        def build() -> ResidencyRuntime:
            return assembly.build_runtime(
                shape=SHAPE,
                caches=self.caches,
                kind=PageKind(InterleavedPages(KV_HEADS, BLOCK, HEAD_DIM), SHAPE.softmax_scale, partial_attention),
                config=config,
                budget=budget_policy(config, block_size=BLOCK, max_num_batched_tokens=64, max_model_len=400),
                sizes=assembly.RuntimeSizes(NUM_BLOCKS, 2, 8, MOST_TOKENS),
                counters=self.counters,
                buffers=replaced.runtime.buffers if replaced else None,
                pool=pool,
            )

        if selector is None:
            return build()
        made = selector
        with mock.patch.object(assembly, "create_selector", lambda _, geometry, **__: made(geometry)):
            return build()

    def finish(self, name: str) -> None:
        """A step that runs nothing: a request has ended."""
        self._step += 1
        with self.runtime.step(StepInput(self._step, [name], (), (), (), {})):
            pass

    def step(
        self,
        new: Sequence[NewRequest] = (),
        preempted: Sequence[str] = (),
        tokens: Mapping[str, int] = {},
        **more_tokens: int,
    ) -> dict[str, torch.Tensor]:
        """Run a step; the attention output [L, T, Hq, D] of each scheduled request, by keyword or in the mapping."""
        tokens = {**tokens, **more_tokens}
        self._step += 1
        for request in new:
            self._computed[request.req_id] = request.num_computed_tokens
            self._blocks[request.req_id] = list(request.block_ids)
        first = {request.req_id for request in new}
        running = tuple(RunningRequest(name, (), self._computed[name]) for name in tokens if name not in first)
        step_input = StepInput(self._step, (), preempted, tuple(new), running, tokens)
        with self.runtime.step(step_input):
            outputs = self._forward(tokens)
        for name, count in tokens.items():
            self._computed[name] += count
        return outputs

    def prefill(self, name: str, num_blocks: int, first_block: int = 1) -> dict[str, torch.Tensor]:
        """Prefill a prompt of full blocks in one step; some blocks are for growth."""
        blocks = tuple(range(first_block, first_block + num_blocks + 8))
        return self.step([NewRequest(name, blocks, 0, num_blocks * BLOCK)], tokens={name: num_blocks * BLOCK})

    def decode(self, name: str, num_steps: int) -> list[torch.Tensor]:
        """Outputs [L, 1, Hq, D] of decode steps."""
        return [self.step(tokens={name: 1})[name] for _ in range(num_steps)]

    def metric(self, name: str) -> float:
        """What the worker has published."""
        return self._reader.read()[name]

    def resident(self, name: str) -> list[int]:
        """Positions of the blocks that a request holds."""
        status = self.runtime.status(str, StripsAsked(1000))
        (request,) = (one for one in status["requests"] if one["engine_request_id"] == name)
        states = [state for state, count in request["strips"][0] for _ in range(count)]
        return [at for at, state in enumerate(states) if state in {"resident", "recalled", "sink", "recent"}]

    def _forward(self, tokens: Mapping[str, int]) -> dict[str, torch.Tensor]:
        runtime, positions = self.runtime, {}
        for name, count in tokens.items():
            positions[name] = range(self._computed[name], self._computed[name] + count)
        mapping = torch.tensor(
            [self._blocks[name][at // BLOCK] * BLOCK + at % BLOCK for name in tokens for at in positions[name]],
            dtype=torch.int64,
        )
        lengths = torch.tensor([positions[name].stop for name in tokens], dtype=torch.int32)
        runtime.set_batch(list(tokens), lengths, mapping)
        (table,) = runtime.compacted_tables(len(tokens))
        outputs: list[torch.Tensor] = []
        for layer in range(LAYERS):
            parts = [_values(name, layer, at) for name in tokens for at in positions[name]]
            query, key, value = (torch.stack(part) for part in zip(*parts, strict=True))
            self.caches[layer][mapping // BLOCK, :, mapping % BLOCK] = torch.cat((key, value), -1)
            output = torch.empty_like(query)
            start = 0
            for row, count in enumerate(tokens.values()):
                own = slice(start, start + count)
                output[own] = self._attend(layer, query[own], table.block_table[row], int(table.seq_lens[row]))
                start += count
            runtime.attended(layer, query, key, value, output)
            outputs.append(output)
        split = torch.split(torch.stack(outputs), list(tokens.values()), dim=1)
        return dict(zip(tokens, split, strict=True))

    def _attend(self, layer: int, query: torch.Tensor, slots: torch.Tensor, length: int) -> torch.Tensor:
        """Causal attention of the last tokens of a row over its table: [T, Hq, D]."""
        pages = self.caches[layer][slots[: -(-length // BLOCK)].long()]
        past = pages.transpose(1, 2).flatten(0, 1)[:length].repeat_interleave(QUERY_HEADS // KV_HEADS, 1)
        logits = torch.einsum("thd,shd->hts", query, past[..., :HEAD_DIM]) * SCALE
        future = torch.ones(logits.shape[1:], dtype=torch.bool).triu(length - len(query) + 1)
        weights = logits.masked_fill(future, -torch.inf).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, past[..., HEAD_DIM:])


def _values(name: str, layer: int, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [Hq, D], key and value [Hkv, D] of a token."""
    seed = (sum(map(ord, name)) * 1009 + position) * LAYERS + layer
    drawn = torch.randn(QUERY_HEADS + 2 * KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    query, key, value = torch.split(drawn, [QUERY_HEADS, KV_HEADS, KV_HEADS])
    return query, key, value
