"""The block manager in vLLM's own scheduler terms: what it reserves, for how long, and what it counts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    KVCacheBlock,
    get_request_block_hasher,
    init_none_hash,
    make_block_hash_with_group_id,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

from flashmemory_vllm.observability.counters import Capacity, CounterReader, CounterWriter, worker_name
from flashmemory_vllm.plugin.admission import FlashMemoryManager, FlashMemorySpec
from flashmemory_vllm.residency.budget import BudgetPolicy, Mode

BLOCK = 16
NUM_SLOTS = 101
NUM_BLOCKS = 1000
TOO_MANY = NUM_BLOCKS + 1


@pytest.fixture
def counters(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "flashmemory-test-0"
    with CounterWriter.create(directory, worker_name(0)) as worker:
        worker.publish_capacity(Capacity(NUM_SLOTS, NUM_BLOCKS))
        yield directory


def make_manager(counters: Path, mode: Mode = "always", min_sparse_tokens: int = 0) -> FlashMemoryManager:
    """Dense requests reserve their blocks, sparse ones a tenth or a chunk of 41."""
    budget = BudgetPolicy(BLOCK, 0.1, min_sparse_tokens, BLOCK, BLOCK, 40 * BLOCK, 900 * BLOCK, 0, mode)
    stock = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    return FlashMemoryManager(
        FlashMemorySpec.from_spec(stock, budget, counters),
        block_pool=BlockPool(NUM_BLOCKS, enable_caching=False, hash_block_size=BLOCK),
        enable_caching=False,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK,
    )


def schedule(manager: FlashMemoryManager, req_id: str, num_tokens: int, prefill_end: int) -> bool:
    """Ask and allocate as `KVCacheManager.allocate_slots` does for one step of a request."""
    asked = manager.get_num_blocks_to_allocate(req_id, num_tokens, [], 0, 0, num_tokens, prefill_end=prefill_end)
    if asked < TOO_MANY:
        manager.allocate_new_blocks(req_id, num_tokens, num_tokens)
    return asked < TOO_MANY


def admit(manager: FlashMemoryManager, req_id: str, num_tokens: int, prefill_end: int, chunk: int) -> bool:
    """As `schedule`, for a waiting request: vLLM asks for all of it first."""
    asked = manager.get_num_blocks_to_allocate(req_id, num_tokens, [], 0, 0, num_tokens, True, prefill_end)
    return asked < TOO_MANY and schedule(manager, req_id, min(num_tokens, chunk), prefill_end)


def test_what_does_not_fit_waits_until_another_returns_its_slots(counters: Path) -> None:
    manager = make_manager(counters)
    tokens = 50 * BLOCK
    assert [admit(manager, name, tokens, tokens, 40 * BLOCK) for name in "abcc"] == [True, True, False, False]
    manager.free("a")
    assert admit(manager, "c", tokens, tokens, 40 * BLOCK)
    values = CounterReader(counters).read()
    assert (values["refused_admissions_total"], values["requests_sparse_total"]) == (1, 3)


def num_kept(manager: FlashMemoryManager) -> int:
    """Entries of everything that the manager and its ledger keep by request."""
    owners = (manager, manager._ledger)
    return sum(len(kept) for owner in owners for kept in vars(owner).values() if isinstance(kept, dict | set))


def test_nothing_is_kept_of_a_request_however_it_ends(counters: Path) -> None:
    """As vLLM ends them: `free` is all that it calls, for running, waiting and preempted ones."""
    manager = make_manager(counters)
    tokens = 50 * BLOCK
    assert admit(manager, "a", tokens, tokens, 40 * BLOCK)
    assert admit(manager, "b", tokens, tokens, 40 * BLOCK)
    before = num_kept(manager)
    for number in range(5):
        assert not admit(manager, f"waiting-{number}", tokens, tokens, 40 * BLOCK)
        manager.free(f"waiting-{number}")
    assert num_kept(manager) == before
    manager.free("a")
    assert admit(manager, "c", tokens, tokens, 40 * BLOCK)
    assert not admit(manager, "a", tokens, tokens, 40 * BLOCK)
    for name in "abc":
        manager.free(name)
    assert num_kept(manager) == 0
    assert CounterReader(counters).read()["refused_admissions_total"] == 6


def test_a_preempted_request_reserves_for_a_prefill_of_all_its_tokens(counters: Path) -> None:
    manager = make_manager(counters)
    # 30 blocks with outputs, of which vLLM counts all but the last token as prefill: one chunk writes them all.
    tokens = 30 * BLOCK
    assert admit(manager, "a", tokens, tokens - 1, 40 * BLOCK)
    assert manager._ledger.reserved == 30
    assert schedule(manager, "a", tokens + 1, tokens)
    assert manager._ledger.reserved == 4


def test_under_pressure_requests_start_sparse_and_the_reason_is_counted(counters: Path) -> None:
    manager = make_manager(counters, mode="pressure", min_sparse_tokens=2 * BLOCK)
    assert admit(manager, "a", BLOCK, BLOCK, BLOCK)
    for name, num_blocks in (("b", 48), ("c", 100)):
        assert admit(manager, name, num_blocks * BLOCK, num_blocks * BLOCK, 40 * BLOCK)
    values = CounterReader(counters).read()
    assert values['requests_dense_total{reason="below_min_sparse_tokens"}'] == 1
    assert values['requests_dense_total{reason="mode_pressure"}'] == 1
    assert values["requests_sparse_total"] == 1


@pytest.mark.parametrize(
    ("tokens", "window", "min_sparse_tokens", "hits"),
    [
        # As vLLM's own manager: of 100 blocks that are known, all but the one with the last token
        (100 * BLOCK, 1, 0, 99),
        (100 * BLOCK + 1, 1, 0, 100),
        # The last tokens of the prompt are computed again, wherever it ends
        (100 * BLOCK, 16, 0, 99),
        (100 * BLOCK, 17, 0, 98),
        (100 * BLOCK + 15, 16, 0, 99),
        (100 * BLOCK + 16, 16, 0, 100),
        (5, 16, 0, 0),
        # Nobody asks where no request is ever sparse
        (100 * BLOCK + 1, 64, 900 * BLOCK + 1, 100),
    ],
)
def test_a_prefix_hit_leaves_the_question_to_be_computed(
    tokens: int, window: int, min_sparse_tokens: int, hits: int
) -> None:
    budget = BudgetPolicy(BLOCK, 0.1, min_sparse_tokens, BLOCK, BLOCK, 40 * BLOCK, 900 * BLOCK, 0)
    stock = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    spec = FlashMemorySpec.merge([FlashMemorySpec.from_spec(stock, budget, Path(), window)] * 2)
    pool = BlockPool(NUM_BLOCKS, enable_caching=True, hash_block_size=BLOCK)
    hashes = [BlockHash(bytes([index])) for index in range(100)]
    for block, block_hash in zip(pool.get_new_blocks(100), hashes, strict=True):
        pool.cached_block_hash_to_block.insert(make_block_hash_with_group_id(block_hash, 0), block)
    found: tuple[list[KVCacheBlock], ...]
    found, num_tokens = FlashMemoryManager.find_longest_cache_hit(
        block_hashes=hashes[: tokens // BLOCK],
        max_length=tokens - 1,
        kv_cache_group_ids=[0],
        block_pool=pool,
        kv_cache_spec=spec,
        drop_eagle_block=False,
        alignment_tokens=BLOCK,
    )
    assert (len(found[0]), num_tokens) == (hits, hits * BLOCK)


@pytest.mark.parametrize("while_scheduling", [True, False])
def test_tokens_that_a_preemption_takes_back_are_no_prefix_hit(counters: Path, *, while_scheduling: bool) -> None:
    """By priority, a step may preempt a request that it has given tokens already: nobody computes them."""
    init_none_hash(sha256)
    budget = BudgetPolicy(BLOCK, 0.1, 0, BLOCK, BLOCK, 40 * BLOCK, 900 * BLOCK, 0)
    stock = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    spec = FlashMemorySpec.from_spec(stock, budget, counters)
    pool = BlockPool(NUM_BLOCKS, enable_caching=True, hash_block_size=BLOCK)
    manager = FlashMemoryManager(
        spec, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=BLOCK
    )
    hasher = get_request_block_hasher(BLOCK, sha256)
    request = Request("low", list(range(9 * BLOCK)), SamplingParams(max_tokens=1), None, block_hasher=hasher)
    for num_tokens in (4 * BLOCK, 8 * BLOCK):
        manager.new_step_starts()
        assert schedule(manager, "low", num_tokens, 9 * BLOCK)
        manager.cache_blocks(request, num_tokens, replay_boundaries=())
        if num_tokens < 8 * BLOCK or not while_scheduling:
            manager.take_new_block_ids()  # as the scheduler does last
    manager.free("low")
    _, hit = FlashMemoryManager.find_longest_cache_hit(
        block_hashes=request.block_hashes,
        max_length=9 * BLOCK - 1,
        kv_cache_group_ids=[0],
        block_pool=pool,
        kv_cache_spec=spec,
        drop_eagle_block=False,
        alignment_tokens=BLOCK,
    )
    assert hit == (4 if while_scheduling else 8) * BLOCK
