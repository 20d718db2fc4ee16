"""A twin of vLLM's scheduler: prefix caching, chunked prefill, preemption, admission by the slot ledger."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import numpy as np

from flashmemory_vllm.residency.budget import BudgetPolicy, cdiv
from flashmemory_vllm.residency.ledger import SlotLedger
from flashmemory_vllm.residency.types import NewRequest, RunningRequest, StepInput
from tests.unit.residency.memory_twin import TagArray

TAG_STRIDE = 10**6


@dataclass(slots=True, eq=False)
class Request:
    """A request of the twin: the first `num_shared` tokens are those of its family, the rest its own."""

    req_id: str
    uid: int
    family: int
    num_shared: int
    num_prompt: int
    num_outputs: int
    num_tokens: int = 0
    num_computed: int = 0
    prefill_len: int = 0
    block_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_tokens = self.num_prompt

    def tags(self, start: int, end: int) -> TagArray:
        """One tag for each token: unique for the token's whole prefix."""
        position = np.arange(start, end)
        source = np.where(position < self.num_shared, self.family, 1000 + self.uid)
        tags: TagArray = source * TAG_STRIDE + position
        return tags

    def block_key(self, position: int, block_size: int) -> int:
        """What prefix caching finds a full block by: the tag of its last token."""
        return int(self.tags((position + 1) * block_size - 1, (position + 1) * block_size)[0])

    @property
    def is_done(self) -> bool:
        """All tokens have KV, and no more will be sampled."""
        return self.num_tokens >= self.num_prompt + self.num_outputs


class BlockPool:
    """Logical blocks with reference counts and a prefix cache; free blocks keep their content."""

    def __init__(self, num_blocks: int) -> None:
        self._free: dict[int, None] = dict.fromkeys(range(1, num_blocks))
        self._refs = [0] * num_blocks
        self.block_of_key: dict[int, int] = {}
        self._key_of_block: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated."""
        return len(self._free)

    def allocate(self) -> int:
        """Take the block that has been free the longest; what was cached in it is gone."""
        block = next(iter(self._free))
        del self._free[block]
        key = self._key_of_block.pop(block, None)
        if key is not None:
            del self.block_of_key[key]
        self._refs[block] = 1
        return block

    def is_free(self, block: int) -> bool:
        """Whether no request has the block."""
        return not self._refs[block]

    def share(self, block: int) -> None:
        """One more request has the block."""
        if self._refs[block] == 0:
            del self._free[block]
        self._refs[block] += 1

    def cache(self, block: int, key: int) -> None:
        """Let later requests find the block, unless another one has the same content."""
        if key not in self.block_of_key and block not in self._key_of_block:
            self.block_of_key[key] = block
            self._key_of_block[block] = key

    def free(self, blocks: list[int]) -> None:
        """One request less has the blocks; the last of them is reused first."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None

    def cached_blocks(self) -> Iterator[tuple[int, int]]:
        """Pairs of key and block."""
        yield from self.block_of_key.items()


class SchedulerTwin:
    """Makes step inputs; the caller runs them and calls `step_done`."""

    def __init__(self, policy: BudgetPolicy, num_logical_blocks: int, num_slots: int, random: Random) -> None:
        self._policy = policy
        self._random = random
        self.pool = BlockPool(num_logical_blocks)
        self.ledger = SlotLedger(num_slots, policy)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._finished: list[str] = []
        self._step = 0
        self.num_preemptions = 0

    @property
    def is_idle(self) -> bool:
        """Nothing to do and nothing to report."""
        return not self.waiting and not self.running and not self._finished

    def schedule(self) -> StepInput:
        """One step: running requests first, then waiting ones in order, as slots, blocks and tokens allow."""
        self._step += 1
        finished, self._finished = self._finished, []
        scheduled: dict[str, int] = {}
        preempted: list[str] = []
        running: list[RunningRequest] = []
        tokens_left = self._policy.max_num_batched_tokens
        for request in list(self.running):
            if request not in self.running or tokens_left == 0 or self._random.random() < 0.05:
                continue
            num_tokens = min(request.num_tokens - request.num_computed, tokens_left)
            if not self._make_room(request, num_tokens, preempted, scheduled):
                continue
            computed = request.num_computed
            added = self._grow(request, num_tokens)
            running.append(RunningRequest(request.req_id, tuple(added), computed))
            scheduled[request.req_id] = num_tokens
            tokens_left -= num_tokens
        new = [] if preempted else self._admit_waiting(tokens_left, scheduled)
        # Nobody preempted is scheduled: victims come from the end of the list, not yet served in this step.
        assert not set(preempted) & set(scheduled)
        return StepInput(self._step, frozenset(finished), tuple(preempted), tuple(new), tuple(running), scheduled)

    def step_done(self, step: StepInput) -> None:
        """The step ran: requests whose tokens all have KV sample one more, or end."""
        for request in list(self.running):
            if request.req_id not in step.num_scheduled_tokens or request.num_computed < request.num_tokens:
                continue
            if request.is_done:
                self.finish(request)
            else:
                request.num_tokens += 1

    def finish(self, request: Request) -> None:
        """End or abort a running request."""
        self.running.remove(request)
        self._give_back(request)
        self._finished.append(request.req_id)

    def _give_back(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        self.ledger.release(request.req_id)
        request.block_ids, request.num_computed = [], 0

    def _make_room(self, request: Request, num_tokens: int, preempted: list[str], scheduled: dict[str, int]) -> bool:
        total = request.num_computed + num_tokens
        while True:
            needed = cdiv(total, self._policy.block_size) - len(request.block_ids)
            fits = self.ledger.can_admit(request.req_id, total, request.prefill_len)
            if fits and needed <= self.pool.num_free:
                self.ledger.commit(request.req_id, total, request.prefill_len)
                return True
            victim = self.running[-1]
            if victim.req_id in scheduled:
                return False
            self.running.remove(victim)
            self._give_back(victim)
            self.waiting.insert(0, victim)
            preempted.append(victim.req_id)
            self.num_preemptions += 1
            if victim is request:
                return False

    def _admit_waiting(self, tokens_left: int, scheduled: dict[str, int]) -> list[NewRequest]:
        new = []
        while self.waiting and tokens_left:
            request = self.waiting[0]
            hits = self._find_hits(request)
            num_hit_tokens = len(hits) * self._policy.block_size
            num_free = self.pool.num_free - sum(self.pool.is_free(block) for block in hits)
            if cdiv(request.num_tokens, self._policy.block_size) - len(hits) > num_free:
                break
            if not self.ledger.can_admit(request.req_id, request.num_tokens, request.num_tokens):
                break
            self.waiting.pop(0)
            self.running.append(request)
            for block in hits:
                self.pool.share(block)
            request.block_ids, request.num_computed = hits, num_hit_tokens
            request.prefill_len = request.num_tokens
            num_tokens = min(request.num_tokens - num_hit_tokens, tokens_left)
            self.ledger.commit(request.req_id, num_hit_tokens + num_tokens, request.prefill_len)
            self._grow(request, num_tokens)
            blocks = tuple(request.block_ids)
            new.append(NewRequest(request.req_id, blocks, num_hit_tokens, request.prefill_len, request.num_prompt))
            scheduled[request.req_id] = num_tokens
            tokens_left -= num_tokens
        return new

    def _find_hits(self, request: Request) -> list[int]:
        hits = []
        for position in range((request.num_tokens - 1) // self._policy.block_size):
            block = self.pool.block_of_key.get(request.block_key(position, self._policy.block_size))
            if block is None:
                break
            hits.append(block)
        return hits

    def _grow(self, request: Request, num_tokens: int) -> list[int]:
        """Allocate for the tokens, sometimes one block ahead; full blocks can be hit even in this step."""
        block_size = self._policy.block_size
        first_full = request.num_computed // block_size
        request.num_computed += num_tokens
        wanted = cdiv(request.num_computed, block_size) - len(request.block_ids)
        if self._random.random() < 0.2 and self.pool.num_free > wanted:
            wanted += 1
        added = [self.pool.allocate() for _ in range(max(wanted, 0))]
        request.block_ids.extend(added)
        for position in range(first_full, request.num_computed // block_size):
            self.pool.cache(request.block_ids[position], request.block_key(position, block_size))
        return added
