"""Scheduler side: the KV cache spec of our layers and the manager that admits requests by slots.

vLLM's scheduler sees N logical blocks, sized from host memory. What limits how many requests may run is the
number of device slots, so the manager counts slot budgets beside blocks and answers "does not fit" with the
sentinel vLLM itself uses: more blocks than the pool has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from flashmemory_vllm.errors import UnsupportedError
from flashmemory_vllm.observability.counters import SCHEDULER, CounterWriter, read_capacity
from flashmemory_vllm.observability.metrics import series
from flashmemory_vllm.plugin import compat
from flashmemory_vllm.plugin.compat_outputs import fail_requests_with_broken_blocks, hear_every_rank
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.ledger import SlotLedger
from flashmemory_vllm.residency.modes import reason


@dataclass(frozen=True, kw_only=True)
class FlashMemorySpec(FullAttentionSpec):
    """A full-attention spec that carries the slot budget to the scheduler's process.

    Args:
        budget: how many slots a request may hold, filled in by our worker.
        counters_dir: directory of the engine's shared counters, where the worker publishes its slots.
        query_window: newest prompt tokens that a first selection is made with; they are computed for every request.
    """

    budget: BudgetPolicy | None = None
    counters_dir: str = ""
    query_window: int = 1

    @property
    def least_recomputed(self) -> int:
        """Newest tokens of a request that no prefix hit may cover, for a selection is made with their queries."""
        assert self.budget is not None
        is_ever_sparse = not self.budget.keeps_all(self.budget.max_model_len)
        return self.query_window if is_ever_sparse else 1

    @classmethod
    def from_spec(
        cls, spec: FullAttentionSpec, budget: BudgetPolicy, counters_dir: Path, query_window: int = 1
    ) -> Self:
        """Translate vLLM's spec of one layer.

        Raises:
            UnsupportedError: the layer is not plain full attention over an unquantised cache, or its keys and values
                differ in size.
        """
        is_latent = type(spec) is MLAAttentionSpec
        is_plain = is_latent or type(spec) is FullAttentionSpec
        if not is_plain or spec.sliding_window or spec.attention_chunk_size or spec.non_causal:
            raise UnsupportedError(
                f"model: a layer has KV cache spec {spec}; "
                "allowed: FullAttentionSpec or MLAAttentionSpec, causal, no window"
            )
        if spec.head_size_v != (0 if is_latent else spec.head_size):
            raise UnsupportedError(
                f"model: a layer has keys of {spec.head_size} elements and values of {spec.head_size_v}; "
                "allowed with --attention-backend flashmemory: equal sizes"
            )
        if spec.kv_quant_mode:
            raise UnsupportedError(
                f"--kv-cache-dtype: quantised KV ({spec.kv_quant_mode!r}) is not supported; allowed: auto"
            )
        # Of latents, too: their own fields tell apart what is not served
        stock = {field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec)}
        return cls(**stock, budget=budget, counters_dir=str(counters_dir), query_window=query_window)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Merge the layers' specs; vLLM's merge rebuilds from a fixed list of fields and would drop ours."""
        first = specs[0]
        ours = {"budget": first.budget, "counters_dir": first.counters_dir, "query_window": first.query_window}
        return replace(super().merge(specs), **ours)


class FlashMemoryManager(FullAttentionManager):
    """Full-attention block manager that also admits by device slots."""

    def __init__(self, kv_cache_spec: FlashMemorySpec, **kwargs: Any) -> None:
        """Read the number of slots that the workers published before the scheduler is built."""
        fail_requests_with_broken_blocks(managed_blocks)
        hear_every_rank()
        super().__init__(kv_cache_spec, **kwargs)
        assert kv_cache_spec.budget is not None
        directory = Path(kv_cache_spec.counters_dir)
        self._budget = kv_cache_spec.budget
        self._ledger = SlotLedger(read_capacity(directory).num_slots, self._budget)
        self._counters = CounterWriter.create(directory, SCHEDULER)
        self._prefill_lens: dict[str, int] = {}
        self._refused: set[str] = set()
        # While a step is scheduled: of each request that it gave tokens, the blocks that could be hit before
        self._hittable_before: dict[str, int] | None = None

    @classmethod
    def find_longest_cache_hit(
        cls, *, max_length: int, kv_cache_spec: FlashMemorySpec, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """As vLLM's, but for the question, which is computed in any case: see `runtime/question.py`.

        vLLM leaves one token to be computed, for the logits. A prompt that is asked again, or for another answer
        (n > 1), is a hit to its end, and nobody would know what it asks for.
        """
        allowed = max(0, max_length + 1 - kv_cache_spec.least_recomputed)
        found: tuple[tuple[list[KVCacheBlock], ...], int] = super().find_longest_cache_hit(
            max_length=allowed, kv_cache_spec=kv_cache_spec, **kwargs
        )
        return found

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """As vLLM's, or more blocks than there are when the request's slots do not fit now."""
        if not self._ledger.covers(request_id, num_tokens):
            prefill_len = self._prefill_len(request_id, num_tokens, prefill_end)
            if not self._ledger.can_admit(request_id, num_tokens, prefill_len):
                self._count_refusal(request_id)
                return int(self.block_pool.num_gpu_blocks) + 1
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """As vLLM's; the request's slot budget is reserved from here on."""
        if not self._ledger.covers(request_id, num_tokens):
            is_new = not self._ledger.is_admitted(request_id)
            self._ledger.commit(request_id, num_tokens, self._prefill_lens[request_id])
            self._refused.discard(request_id)
            if is_new:
                self._count_admission(request_id)
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def new_step_starts(self) -> None:
        """As vLLM's; from here on a request may be preempted that the step has given tokens."""
        super().new_step_starts()
        self._hittable_before = {}

    def take_new_block_ids(self) -> list[int]:
        """As vLLM's, which asks as a step is scheduled: it takes no tokens back any more."""
        self._hittable_before = None
        ids: list[int] = super().take_new_block_ids()
        return ids

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; remembers which blocks can be hit because of the step that is being scheduled."""
        before = self.num_cached_block.get(request.request_id, 0)
        if num_tokens // self.block_size <= before and self.block_size == self.block_pool.hash_block_size:
            return  # no block is full that was not: vLLM finds the same, later
        if self._hittable_before is not None:
            self._hittable_before.setdefault(request.request_id, before)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As vLLM's; finished, aborted and preempted requests give their slot budget back.

        By priority a request may be preempted in the step that has given it tokens already. They will not be computed:
        what vLLM has put into its prefix cache for them must not be found there.
        """
        before = (self._hittable_before or {}).pop(request_id, None)
        if before is not None:
            self.block_pool.evict_blocks({block.block_id for block in self.req_to_blocks[request_id][before:]})
        self._ledger.release(request_id)
        self._prefill_lens.pop(request_id, None)
        self._refused.discard(request_id)
        return super().pop_blocks_for_free(request_id)

    def _prefill_len(self, request_id: str, num_tokens: int, prefill_end: int) -> int:
        """Tokens that the worker prefills: all that the request has as it is admitted, fixed from then on.

        vLLM's own bound moves on with the outputs, and is one token short for a request that was preempted, whose
        last token the worker prefills with the others. Before it is admitted, vLLM asks for the whole request first
        and for its first chunk then.
        """
        if not self._ledger.is_admitted(request_id):
            known = self._prefill_lens.get(request_id, 0)
            self._prefill_lens[request_id] = max(known, prefill_end, num_tokens)
        return self._prefill_lens[request_id]

    def _count_admission(self, request_id: str) -> None:
        """Count how the request starts, again each time that it comes back after preemption."""
        policy, prefill_len = self._ledger.policy_of(request_id), self._prefill_lens[request_id]
        why = reason(policy, prefill_len, self._budget.resident_ratio)
        key = "requests_sparse_total" if why == "sparse" else series("requests_dense_total", why)
        self._counters.add(key)

    def _count_refusal(self, request_id: str) -> None:
        """Count a request once for each time it starts waiting, not once for each step that it waits.

        A running one that is refused room to grow is not counted: it preempts, which vLLM counts.
        """
        if request_id not in self._refused and not self._ledger.is_admitted(request_id):
            self._refused.add(request_id)
            self._counters.add("refused_admissions_total", 1)


def managed_blocks(scheduler: Scheduler) -> FlashMemoryManager | None:
    """A scheduler's manager of managed blocks; None in another engine than ours."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    return next((manager for manager in managers if isinstance(manager, FlashMemoryManager)), None)


def counts_slots(scheduler: Scheduler) -> bool:
    """Whether a scheduler works with our block manager."""
    return managed_blocks(scheduler) is not None


def _register() -> None:
    # vLLM registers its own specs only while its list is empty: make it do so before ours goes in.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(FlashMemorySpec, FlashMemoryManager, uniform_type_base_spec=FullAttentionSpec)
    compat.let_sessions_give_up_their_blocks(Scheduler, counts_slots)


# At import: the engine core imports this module when it unpickles the workers' specs.
_register()
