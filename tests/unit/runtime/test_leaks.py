"""Nothing grows with the number of requests: thousands of them through every object of ours that lives as long."""

from __future__ import annotations

import gc
import sys
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from flashmemory_kernels.partial_attention import partial_attention
from prometheus_client import CollectorRegistry

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.kinds.base import PageKind
from flashmemory_vllm.kinds.pages import InterleavedPages
from flashmemory_vllm.observability.counters import CounterReader, CounterWriter, worker_name
from flashmemory_vllm.observability.publisher import MetricsPublisher
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.runtime.assembly import RuntimeSizes, build_runtime
from flashmemory_vllm.runtime.shape import AttentionShape
from tests.helpers.indexers import save_untrained
from tests.unit.residency.scheduler_twin import Request, SchedulerTwin

BLOCK, HEADS, HEAD_DIM, LAYERS = 4, 4, 8, 2
MAX_WAITING, MAX_ROWS, MAX_TOKENS, MAX_LEN = 32, 64, 256, 64
NUM_BLOCKS, EXTRA_SLOTS = 38, 14
# Packages whose objects are looked into
OWNERS = ("flashmemory_vllm", "prometheus_client", "tests")
# Of all requests; they fill what is bounded, such as the history of selections
WARM_SHARE = 0.2
# What is bounded, such as the last selections, does not always hold the same, and Python keeps some memory for itself.
# A leak of one object would be one for each request.
MAX_GROWTH_EACH = 0.5


class Traffic:
    """Short requests, as many at once as fit, through scheduler's ledger, runtime, selector, counters and publisher."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self._random = Random(0)
        policy = BudgetPolicy(BLOCK, 0.4, 0, BLOCK, BLOCK, MAX_TOKENS, MAX_LEN, 0)
        config = FlashMemoryConfig(
            resident_ratio=policy.resident_ratio,
            min_sparse_tokens=0,
            sink_tokens=policy.sink_tokens,
            recent_tokens=policy.recent_tokens,
            growth_reserve_tokens=0,
            staging_blocks=4,
            tau_steps=2,
            query_window=3,
            opening_steps=1,
            score_threshold=0.01,
            dense_fallback_share=0.3,
            **options,
        )
        num_slots = policy.worst_case() + EXTRA_SLOTS
        shape = AttentionShape(("0", "1"), HEADS, HEADS, HEAD_DIM, 0.5, BLOCK, torch.float32, torch.device("cpu"))
        self.counters = CounterWriter.create(folder, worker_name(0))
        self.runtime = build_runtime(
            shape=shape,
            caches=list(torch.zeros(LAYERS, num_slots, HEADS, BLOCK, 2 * HEAD_DIM)),
            kind=PageKind(InterleavedPages(HEADS, BLOCK, HEAD_DIM), 0.5, partial_attention),
            config=config,
            budget=policy,
            sizes=RuntimeSizes(NUM_BLOCKS, 4, MAX_ROWS, MAX_TOKENS),
            counters=self.counters,
        )
        self.scheduler = SchedulerTwin(policy, NUM_BLOCKS, num_slots, self._random)
        self._reader = CounterReader(folder)
        self._publisher = MetricsPublisher(CollectorRegistry())
        self._num_requests = self._num_steps = 0

    @property
    def parts(self) -> list[object]:
        """What lives as long as a server, of both processes."""
        return [self.runtime, self.scheduler.ledger, self.counters, self._reader, self._publisher]

    def serve(self, count: int) -> None:
        """Serve so many requests to their end; some are aborted, some preempted."""
        last = self._num_requests + count
        while self._num_requests < last or not self.scheduler.is_idle:
            while self._num_requests < last and len(self.scheduler.waiting) < MAX_WAITING:
                self._arrive()
            self._step()
            if self.scheduler.running and self._random.random() < 0.05:
                self.scheduler.finish(self._random.choice(self.scheduler.running))
        self._step()  # tells that the last ones have ended
        self._publish()

    def _arrive(self) -> None:
        uid = self._num_requests
        self._num_requests += 1
        num_prompt = self._random.randint(6, 24)
        shared = self._random.choice([0, num_prompt])
        # Uids of tags come again: the twin's prefix cache would grow, and is not what is tested
        request = Request(f"r{uid}", uid % 997, uid % 5, shared, num_prompt, self._random.randint(1, 4))
        self.scheduler.waiting.append(request)

    def _step(self) -> None:
        step = self.scheduler.schedule()
        with self.runtime.step(step):
            if step.num_scheduled_tokens:
                self._forward(step.num_scheduled_tokens)
        self.runtime.take_comparisons()
        self.scheduler.step_done(step)
        self._num_steps += 1
        if self._num_steps % 20 == 0:
            self._publish()

    def _forward(self, num_tokens: Mapping[str, int]) -> None:
        """As a model would, but for the attention over resident blocks."""
        runtime, total = self.runtime, sum(num_tokens.values())
        computed = {request.req_id: request.num_computed for request in self.scheduler.running}
        lens = torch.tensor([computed[req_id] for req_id in num_tokens], dtype=torch.int32)
        runtime.set_batch(list(num_tokens), lens, torch.full((total,), -1))
        runtime.compacted_tables(len(lens))
        query = torch.randn(total, HEADS, HEAD_DIM)
        for layer in range(LAYERS):
            runtime.attended(layer, query, query, query, query.clone())

    def _publish(self) -> None:
        self._publisher.publish(self._reader.read(), "model", "0")


def census(roots: list[object]) -> Counter[str]:
    """How much the containers and tensors hold that can be reached, by the kind of object."""
    seen: set[int] = set()
    held: Counter[str] = Counter()
    waiting = list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, np.ndarray | torch.Tensor):
            held["numbers"] += one.size if isinstance(one, np.ndarray) else one.numel()
        elif isinstance(one, dict | list | set | frozenset | deque | tuple):
            held[type(one).__name__] += len(one)
            waiting += gc.get_referents(one)
        elif type(one).__module__.partition(".")[0] in OWNERS:
            waiting += gc.get_referents(one)
    return held


@pytest.mark.slow
@pytest.mark.parametrize(("selector", "num_requests"), [("h2o", 4_000), ("neural", 1_500)])
def test_requests_leave_nothing_behind(selector: str, num_requests: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"selector": selector}
    if selector == "neural":
        heads = {"num_query_heads": HEADS, "num_kv_heads": HEADS, "head_dim": HEAD_DIM}
        sizes = heads | {"block_size": BLOCK, "chunk_size": 2}
        options["indexer"] = str(save_untrained(tmp_path / "indexer.safetensors", **sizes))
    traffic = Traffic(tmp_path / "counters", options)
    num_warm = int(WARM_SHARE * num_requests)
    traffic.serve(num_warm)
    before = _measure(traffic)
    traffic.serve(num_requests - num_warm)
    after = _measure(traffic)
    planned = traffic.runtime._parts.planner.counters
    assert min(planned.selections, planned.evictions, planned.recalled_blocks) > 100
    assert traffic.scheduler.num_preemptions > 0
    assert planned.fallbacks > 5
    assert (traffic.scheduler.ledger.reserved, len(traffic.runtime._parts.planner.requests)) == (0, 0)
    most = MAX_GROWTH_EACH * (num_requests - num_warm)
    assert {kind: count - before[0][kind] for kind, count in after[0].items() if count - before[0][kind] > most} == {}
    assert after[1] == before[1], "open files"
    assert after[2] - before[2] < most, "objects"


def _measure(traffic: Traffic) -> tuple[Counter[str], int, int]:
    """What is held, open files, and blocks of memory of all Python objects."""
    gc.collect()
    return census(traffic.parts), len(list(Path("/proc/self/fd").iterdir())), sys.getallocatedblocks()


def test_the_census_sees_what_grows() -> None:
    class Leaky:
        def __init__(self) -> None:
            self.kept = {"a": [torch.zeros(3)]}

    leaky = Leaky()
    before = census([leaky])
    leaky.kept["a"].append(torch.zeros(5))
    after = census([leaky])
    assert (after["list"] - before["list"], after["numbers"] - before["numbers"]) == (1, 5)
