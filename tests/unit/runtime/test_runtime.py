"""A whole runtime under a scheduler: every attention output is that of the logical KV, however late copies are made."""

from pathlib import Path

import pytest
import torch

from flashmemory_vllm.transfer.engine import CpuTransferEngine, TransferEngine
from tests.unit.runtime.late_engine import LateEngine
from tests.unit.runtime.model_twin import ModelTwin, Options

NUM_REQUESTS, MAX_STEPS = 14, 2_000


def run(twin: ModelTwin) -> None:
    """Requests arrive while others run, until all have ended."""
    arriving = list(range(NUM_REQUESTS))
    for _ in range(MAX_STEPS):
        while arriving and twin.random.random() < 0.3:
            uid = arriving.pop()
            twin.add(f"r{uid}", uid, twin.random.randint(10, twin.policy.max_model_len))
        if twin.scheduler.is_idle and not arriving:
            return
        twin.step()
        if twin.scheduler.running and twin.random.random() < 0.01:
            twin.scheduler.finish(twin.random.choice(twin.scheduler.running))
    raise AssertionError(f"{len(twin.scheduler.waiting)} requests wait for ever")


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("engine", [CpuTransferEngine, LateEngine])
@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_every_output_is_that_of_the_logical_kv(
    engine: type[TransferEngine], num_groups: int, ratio: float, tmp_path: Path
) -> None:
    twin = ModelTwin(Options(engine, num_groups, ratio), tmp_path, seed=num_groups)
    run(twin)
    counters = twin.parts.planner.counters
    assert twin.scheduler.num_preemptions > 0
    assert counters.evictions > 50
    if ratio < 1:
        assert twin.num_streamed > 20
        assert twin.num_sparse > 500
        assert twin.num_scored > 100
        assert counters.recalled_blocks > 0
        assert counters.prefetched_blocks > 0


def test_poison_is_in_every_slot_that_holds_nothing(tmp_path: Path) -> None:
    twin = ModelTwin(Options(CpuTransferEngine), tmp_path, seed=1)
    for cache in twin.caches:
        cache.zero_()
    twin.add("a", 0, 60)
    twin.step()
    free = torch.from_numpy(twin.parts.planner.free_slots(0)).long()
    assert len(free) > 5
    for cache in twin.caches:
        assert cache[free].isnan().all()
        assert not cache[1 : len(cache) - len(free)].isnan().any(), "a slot in use is poisoned"


@pytest.mark.parametrize("engine", [CpuTransferEngine, LateEngine])
def test_without_poison_nothing_else_is_read(engine: type[TransferEngine], tmp_path: Path) -> None:
    """Free slots keep what they held, as in production: a stray read finds plausible numbers instead of NaN."""
    run(ModelTwin(Options(engine, num_groups=2, poison=False), tmp_path, seed=5))
