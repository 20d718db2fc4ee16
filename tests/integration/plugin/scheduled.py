"""vLLM's own scheduler, with our block manager, over our planner and a memory of tags: no model, every event."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from flashmemory_kernels.choose_sets import ChoicePolicy
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from flashmemory_vllm.observability.counters import Capacity, CounterWriter, worker_name
from flashmemory_vllm.plugin.admission import FlashMemoryManager, FlashMemorySpec
from flashmemory_vllm.plugin.hybrid_admission import HybridSpec
from flashmemory_vllm.plugin.translate import StepTranslator
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.types import Geometry
from flashmemory_vllm.runtime.question import QuestionQueries
from flashmemory_vllm.runtime.shape import AttentionShape
from tests.unit.residency.list_twin import LateLists
from tests.unit.residency.memory_twin import MemoryTwin, TagArray

MODULUS = 10**11
VOCABULARY = 500


@dataclass(frozen=True, slots=True)
class Sizes:
    """One engine.

    Attributes:
        policy: of its requests.
        num_slots: S.
        num_blocks: N.
        max_num_seqs: most requests that run at once.
        query_window: newest prompt tokens of a first selection.
        scheduling: vLLM's policy, "fcfs" or "priority".
        is_async: a step is scheduled before the one before it has returned.
        is_v2: how preempted requests come back.
        caching: with prefix caching.
        window: of layers with a sliding window beside ours; 0 for none.
        state_block: tokens in a block of layers with a state beside ours; 0 for none.
        num_native_blocks: blocks of theirs.
    """

    policy: BudgetPolicy
    num_slots: int
    num_blocks: int
    max_num_seqs: int = 6
    query_window: int = 5
    scheduling: str = "fcfs"
    is_async: bool = False
    is_v2: bool = False
    caching: bool = True
    window: int = 0
    state_block: int = 0
    num_native_blocks: int = 60

    @property
    def managed(self) -> int:
        """Index of our group."""
        return int(self.has_native)

    @property
    def has_native(self) -> bool:
        """Whether there are other layers than ours."""
        return self.window + self.state_block > 0


def make_config(model: Path) -> VllmConfig:
    """What `make_scheduler` begins with; takes seconds."""
    return EngineArgs(model=str(model), skip_tokenizer_init=True, enforce_eager=True).create_engine_config()


def make_scheduler(sizes: Sizes, config: VllmConfig, counters: Path) -> Scheduler:
    """A scheduler as the engine core makes it, with the workers' slots published under `counters`."""
    policy, config = sizes.policy, deepcopy(config)
    config.model_config.max_model_len = policy.max_model_len
    cache, scheduling = config.cache_config, config.scheduler_config
    cache.block_size, cache.num_gpu_blocks = policy.block_size, sizes.num_blocks
    cache.enable_prefix_caching = sizes.caching
    cache.mamba_cache_mode, cache.mamba_block_size = (
        ("align" if sizes.state_block else "none"),
        sizes.state_block or None,
    )
    scheduling.max_num_batched_tokens, scheduling.max_num_seqs = policy.max_num_batched_tokens, sizes.max_num_seqs
    scheduling.policy, scheduling.async_scheduling = sizes.scheduling, sizes.is_async
    with CounterWriter.create(counters, worker_name(0)) as worker:
        worker.publish_capacity(Capacity(sizes.num_slots, sizes.num_blocks))
        stock = FullAttentionSpec(block_size=policy.block_size, num_kv_heads=1, head_size=8, dtype=torch.float32)
        scheduler_cls = AsyncScheduler if sizes.is_async else Scheduler
        scheduler = scheduler_cls(
            config,
            _kv_cache_config(sizes, stock, counters),
            StructuredOutputManager(config),
            block_size=max(policy.block_size, sizes.state_block),
            hash_block_size=policy.block_size,
            log_stats=True,
        )
    scheduler.use_v2_model_runner = sizes.is_v2
    return scheduler


def _kv_cache_config(sizes: Sizes, stock: FullAttentionSpec, counters: Path) -> KVCacheConfig:
    of_ours = sizes.policy, counters, sizes.query_window
    if not sizes.has_native:
        return KVCacheConfig(
            sizes.num_blocks, [], [KVCacheGroupSpec(["layer"], FlashMemorySpec.from_spec(stock, *of_ours))]
        )
    window = SlidingWindowSpec(
        block_size=stock.block_size, num_kv_heads=1, head_size=8, dtype=stock.dtype, sliding_window=sizes.window
    )
    state = MambaSpec(block_size=sizes.state_block, shapes=((64,),), dtypes=(stock.dtype,), mamba_cache_mode="align")
    native = state if sizes.state_block else window
    managed = HybridSpec.among(native.page_size_bytes, stock, *of_ours)
    groups = [KVCacheGroupSpec(["native"], native), KVCacheGroupSpec(["layer"], managed)]
    return KVCacheConfig(sizes.num_native_blocks, [], groups)


def next_token(tokens: Sequence[int]) -> int:
    """What the model that there is not would say."""
    return int(tags_of(tokens)[-1]) % VOCABULARY


def tags_of(tokens: Sequence[int]) -> TagArray:
    """One tag for each token, that of its whole prefix."""
    tags, last = np.empty(len(tokens), np.int64), 7
    for index, token in enumerate(tokens):
        last = (last * 31 + token + 1) % MODULUS
        tags[index] = last
    return tags


@dataclass(slots=True, eq=False)
class Known:
    """A request as a worker knows it."""

    tokens: list[int]
    prompt_len: int
    block_ids: list[int] = field(default_factory=list)

    def tags(self, start: int, end: int) -> TagArray:
        """Tags of the tokens `[start, end)`."""
        return tags_of(self.tokens[:end])[start:]


class TaggedWorker:
    """Plans and executes the steps that a scheduler gives, and checks every read, every law and every question."""

    def __init__(self, sizes: Sizes, manager: FlashMemoryManager, random: Random) -> None:
        geometry = Geometry(sizes.num_blocks, sizes.num_slots, 1, sizes.policy.block_size)
        self.sizes, self.geometry = sizes, geometry
        self.translator = StepTranslator(sizes.managed, has_native_groups=sizes.has_native)
        self.planner = StepPlanner(geometry, sizes.policy, tau=4, opening_steps=1)
        shape = AttentionShape(("layer",), 1, 1, 1, 1.0, 16, torch.float32, torch.device("cpu"))
        self.questions = QuestionQueries(sizes.query_window, 1, shape)
        self.memory = MemoryTwin(geometry, manager._ledger.policy_of)
        self.requests: dict[str, Known] = {}
        self.random = random
        self.lists = LateLists(self.planner, ChoicePolicy(), random.randrange(1 << 30))
        self.num_questions = 0

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """One step, as our worker and vLLM's model runner would."""
        step = self.translator.translate(output)
        self.questions.forget(step.finished)
        plan = self.planner.plan(step, self.lists.take(step.step))
        self.planner.check_integrity()
        self._learn(output)
        self.memory.execute(plan, self.planner, self.requests)
        self._ask(plan)
        self.planner.complete(plan)
        self.planner.check_integrity()
        self.lists.note(plan)
        self.lists.check()
        sampled = [self._sample(req_id) for req_id in plan.rows]
        names = list(plan.rows)
        return ModelRunnerOutput(names, {name: row for row, name in enumerate(names)}, sampled)

    def _learn(self, output: SchedulerOutput) -> None:
        """As the model runners keep their requests."""
        for req_id in output.finished_req_ids:
            self.requests.pop(req_id, None)
        for new in output.scheduled_new_reqs:
            tokens = new.prompt_token_ids if new.prefill_token_ids is None else new.prefill_token_ids
            assert tokens is not None
            self.requests[new.req_id] = Known(list(tokens), new.prompt_len)
        cached = output.scheduled_cached_reqs
        for req_id, num_outputs in zip(cached.req_ids, cached.num_output_tokens, strict=True):
            known = self.requests[req_id]
            if not self.sizes.is_v2:
                del known.tokens[known.prompt_len + num_outputs :]
        for state in self.planner.requests:
            if state.req_id in self.requests:
                self.requests[state.req_id].block_ids = state.blocks.ids.tolist()

    def _ask(self, plan: StepPlan) -> None:
        """A token's query is its position; a first selection must be made with those of the whole question."""
        rows = list(plan.rows.values())
        self.questions.set_rows(plan.rows.batch([*plan.rows]), lambda req_id: self.requests[req_id].prompt_len)
        positions = [np.arange(row.num_computed_tokens, row.num_computed_tokens + row.num_tokens) for row in rows]
        if positions:
            self.questions.capture(0, torch.from_numpy(np.concatenate(positions)).float().view(-1, 1, 1))
        for asked in plan.asked:
            prompt_len, earlier = self.requests[asked.req_id].prompt_len, self.questions.earlier(asked)
            assert asked.prompt_len == prompt_len
            if asked.is_new:
                last = asked.num_tokens - 1
                expected = np.arange(max(0, prompt_len - self.sizes.query_window), min(prompt_len, last))
                found = [] if earlier is None else earlier.flatten().tolist()
                assert found == expected.tolist()
                self.num_questions += 1

    def _sample(self, req_id: str) -> list[int]:
        """The next token, if all that are known have KV now."""
        state, known = self.planner.requests.get(req_id), self.requests[req_id]
        assert state is not None
        if state.num_tokens < len(known.tokens):
            return []
        known.tokens.append(next_token(known.tokens))
        return known.tokens[-1:]


class Engine:
    """Scheduler and worker, step by step."""

    def __init__(self, sizes: Sizes, config: VllmConfig, counters: Path, seed: int = 0) -> None:
        init_none_hash(sha256)
        self.scheduler = make_scheduler(sizes, config, counters)
        manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[sizes.managed]
        assert isinstance(manager, FlashMemoryManager)
        self.manager, self.random = manager, Random(seed)
        self.worker = TaggedWorker(sizes, manager, self.random)
        self.sizes = sizes
        self.finished: dict[str, str] = {}
        self.outputs: dict[str, list[int]] = {}
        self._hasher = get_request_block_hasher(sizes.policy.block_size, sha256)
        self._pending: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    def add(
        self, req_id: str, prompt: Sequence[int], max_tokens: int = 1, priority: int = 0, *, resumable: bool = False
    ) -> None:
        """A request, or the next turn of one that is known; `resumable` says that more may follow."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        sampling.update_from_generation_config({}, None)
        request = Request(
            req_id,
            list(prompt),
            sampling,
            None,
            priority=priority,
            resumable=resumable,
            block_hasher=self._hasher if self.sizes.caching else None,
        )
        self.scheduler.add_request(request)

    def abort(self, req_id: str) -> None:
        """As a client that goes away."""
        self.scheduler.finish_requests(req_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> SchedulerOutput:
        """Schedule and execute a step; its outputs, or those of the one before it, go back."""
        output: SchedulerOutput = self.scheduler.schedule()
        self._pending.append((output, self.worker.execute(output)))
        if len(self._pending) > self.sizes.is_async:
            self._return()
        return output

    def run(self, most_steps: int = 2000) -> None:
        """Step until nothing is left to do but to wait for more input."""
        for _ in range(most_steps):
            if self.scheduler.has_requests():
                self.step()
            elif self._pending:
                self._return()
            else:
                return
        raise AssertionError(f"{self.scheduler.get_request_counts()} requests run and wait for ever")

    def check_nothing_is_left(self) -> None:
        """All memory of requests is gone."""
        usage = self.worker.planner.usage()
        assert (usage.num_requests, usage.slots_pinned, self.manager._ledger.reserved) == (0, 0, 0)
        assert len(self.worker.questions) == 0
        assert not self.worker.translator._prompt_len
        assert self.scheduler.kv_cache_manager.usage == 0.0

    def _return(self) -> None:
        for outputs in self.scheduler.update_from_output(*self._pending.popleft()).values():
            for output in outputs.outputs:
                self.outputs.setdefault(output.request_id, []).extend(output.new_token_ids)
                if output.finish_reason is not None:
                    self.finished[output.request_id] = str(output.finish_reason)
