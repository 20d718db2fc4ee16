"""What goes wrong in the middle of a runtime's life, and what is left of it: parts that fail on purpose."""

from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.base import Selector
from flashmemory_vllm.residency.types import NOTHING, Copies, NewRequest
from flashmemory_vllm.transfer.engine import CpuTransferEngine, Ids, Marker
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from tests.helpers.alone import Alone, ScoringSelector
from tests.helpers.indexers import save_untrained, spoil
from tests.unit.runtime.driven import BLOCK, HEAD_DIM, QUERY_HEADS, DrivenRuntime


class BrokenEngine(CpuTransferEngine):
    """After a device fault every call to the device fails."""

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_the_pool_is_unpinned_though_the_device_is_lost(tmp_path: Path) -> None:
    driven = DrivenRuntime(tmp_path, engine=BrokenEngine)
    with mock.patch.object(HostPool, "close") as close, pytest.raises(RuntimeError, match="illegal memory access"):
        driven.runtime.release()
    close.assert_called_once_with()


def test_a_runtime_that_cannot_be_built_changes_nothing_of_the_one_that_runs(tmp_path: Path) -> None:
    driven, undisturbed = DrivenRuntime(tmp_path / "a"), DrivenRuntime(tmp_path / "b")
    for one in (driven, undisturbed):
        one.prefill("a", 12)
        one.decode("a", 3)
    pool = driven.runtime.pool
    sizes = {"num_query_heads": QUERY_HEADS, "head_dim": HEAD_DIM, "block_size": BLOCK, "chunk_size": 2}
    damaged = save_untrained(tmp_path / "damaged.safetensors", **sizes)
    spoil(damaged)
    options = {"selector": "neural", "indexer": str(damaged)}
    with mock.patch.object(HostPool, "__init__") as new_pool, pytest.raises(ConfigError, match="NaN or infinite"):
        DrivenRuntime(tmp_path, options, replaced=driven)
    new_pool.assert_not_called()
    assert driven.runtime.pool is pool
    for mine, theirs in zip(driven.decode("a", 8), undisturbed.decode("a", 8), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("options", [{"selector": "streaming"}, {"resident_ratio": 0.3}])
def test_a_runtime_takes_over_the_pool_of_the_one_before(tmp_path: Path, options: dict[str, object]) -> None:
    first = DrivenRuntime(tmp_path / "a")
    first.prefill("a", 12)
    first.decode("a", 3)
    second, fresh = DrivenRuntime(tmp_path / "a", options, replaced=first), DrivenRuntime(tmp_path / "b", options)
    assert second.runtime.pool.pages.data_ptr() == first.runtime.pool.pages.data_ptr()
    for one in (second, fresh):
        one.prefill("b", 12)
    for mine, theirs in zip(second.decode("b", 8), fresh.decode("b", 8), strict=True):
        assert torch.equal(mine, theirs)


class FailingSelector(ScoringSelector):
    """Likes old blocks; fails from the second selection of a request on, or at the first."""

    name = "failing"
    needs_queries = True
    needs_keys = False
    first_failure = 1

    def score(self, request: Alone) -> torch.Tensor:
        scores = 1000 - torch.arange(float(len(request.block_ids))).unsqueeze(0)
        return scores if request.step_index < self.first_failure else self.fail(scores)

    def fail(self, scores: torch.Tensor) -> torch.Tensor:
        raise KeyError(f"no weight for {tuple(scores.shape)}")


class NanSelector(FailingSelector):
    def fail(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, torch.nan)


class InfinitySelector(FailingSelector):
    def fail(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.cat((scores[:, :-1], torch.full((1, 1), torch.inf)), 1)


class ShortSelector(FailingSelector):
    def fail(self, scores: torch.Tensor) -> torch.Tensor:
        return scores[:, 1:]


FAILING: dict[type[Selector], str] = {
    FailingSelector: "exception",
    NanSelector: "not_finite",
    InfinitySelector: "not_finite",
    ShortSelector: "exception",
}


def failed(driven: DrivenRuntime, reason: str) -> float:
    return driven.metric(f'failed_selections_total{{reason="{reason}"}}')


@pytest.mark.parametrize("selector", FAILING)
def test_a_selector_that_fails_leaves_the_sets_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, selector: type[Selector]
) -> None:
    driven = DrivenRuntime(tmp_path, selector=selector)
    driven.prefill("a", 12)
    driven.decode("a", 1)
    assert driven.resident("a") == [0, 1, 2, 3, 12]
    outputs = driven.decode("a", 11)
    # Blocks begun since then are newer than any selection
    assert driven.resident("a") == [0, 1, 2, 12, 13, 14]
    assert not any(output.isnan().any() for output in outputs)
    assert driven.metric("selections_total") == 1
    assert failed(driven, FAILING[selector]) > 2
    assert len([record for record in caplog.records if "selector failing" in record.message]) == 1


@pytest.mark.parametrize("selector", FAILING)
def test_a_selector_that_fails_at_once_leaves_what_has_slots(tmp_path: Path, selector: type[Selector]) -> None:
    at_once = type("AtOnce", (selector,), {"first_failure": 0})
    driven = DrivenRuntime(tmp_path, selector=at_once)
    driven.prefill("a", 12)
    outputs = driven.decode("a", 4)
    assert driven.resident("a") == [0, 9, 10, 11, 12]
    assert not any(output.isnan().any() for output in outputs)
    assert (driven.metric("selections_total"), driven.metric("missing_selections_total")) == (0, 1)


class ForgetfulSelector(FailingSelector):
    """Cannot make keys for a prompt of more than ten blocks, nor forget anything."""

    needs_keys = True
    first_failure = 1000

    def add_blocks(
        self, block_ids: torch.Tensor, keys: Sequence[torch.Tensor], slots: Sequence[torch.Tensor] | None = None
    ) -> None:
        if len(block_ids) > 10:
            raise MemoryError(f"{len(keys)} layers, {slots}")

    def forget(self, req_id: str) -> None:
        raise KeyError(req_id)


def test_blocks_without_index_keys_are_never_ranked_by_those_of_others(tmp_path: Path) -> None:
    driven = DrivenRuntime(tmp_path, selector=ForgetfulSelector)
    driven.prefill("a", 12)
    driven.decode("a", 4)
    assert driven.metric("selections_total") == 0
    assert failed(driven, "not_indexed") > 1
    # The same blocks, filled again by another request, are whole.
    driven.finish("a")
    driven.prefill("b", 9)
    driven.decode("b", 2)
    assert driven.metric("selections_total") > 0


class LostDevice(FailingSelector):
    def fail(self, scores: torch.Tensor) -> torch.Tensor:
        raise torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered ({scores.shape})")


def test_a_device_fault_in_a_selector_ends_the_engine(tmp_path: Path) -> None:
    driven = DrivenRuntime(tmp_path, selector=LostDevice)
    driven.prefill("a", 12)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        driven.decode("a", 4)


def test_a_selector_that_fails_before_the_server_is_up_is_refused(tmp_path: Path) -> None:
    driven = DrivenRuntime(tmp_path, selector=type("AtOnce", (FailingSelector,), {"first_failure": 0}))
    with pytest.raises(KeyError, match="no weight"):
        driven.runtime.warm_up()


class SlowEngine(CpuTransferEngine):
    """Every copy lands at the last moment that the contract allows, as if the link were a hundred times slower."""

    def __init__(self, layout: PageLayout, pool: HostPool, compared: int | None = None) -> None:
        super().__init__(layout, pool, compared)
        self._recalls: list[tuple[int, Ids, Ids]] = []
        self._saves: list[tuple[int, Ids, Ids]] = []

    def _fence(self, reused: Sequence[Copies]) -> None:
        if self._recalls:
            self._was_late(self.num_fences)
        for copies in reused:
            self._save(copies.group, slots=copies.slots)
        for group, blocks, slots in self._recalls:
            super()._recall(group, blocks, slots, None)
        self._recalls = []

    def wait(self, marker: Marker | None) -> None:
        if isinstance(marker, Gather):
            marker.land()

    def synchronize(self) -> None:
        self.fence(())
        for group in range(len(self.layout.groups)):
            self._save(group, slots=np.arange(self.layout.num_slots))

    def _recall(self, group: int, blocks: Ids, slots: Ids, after: Marker | None) -> None:  # noqa: ARG002 - is over
        self._save(group, blocks, slots)
        self._recalls.append((group, blocks, slots))

    def _write_back(self, group: int, blocks: Ids, slots: Ids) -> None:
        self._saves.append((group, blocks, slots))

    def _gather_layer(  # type: ignore[override]
        self, layer: int, blocks: torch.Tensor, host_blocks: Ids, out: torch.Tensor, after: Marker | None
    ) -> Marker:
        for group in range(len(self.layout.groups)):
            self._save(group, host_blocks)
        return Gather(lambda: super(SlowEngine, self)._gather_layer(layer, blocks, host_blocks, out, after))

    def _save(self, group: int, blocks: Ids = NOTHING, slots: Ids = NOTHING) -> None:
        """Let the write-backs of these blocks land, and those out of these slots."""
        waiting = []
        for save in self._saves:
            if save[0] == group and (np.isin(save[1], blocks).any() or np.isin(save[2], slots).any()):
                super()._write_back(*save)
            else:
                waiting.append(save)
        self._saves = waiting


class Gather:
    """A gather that lands when it is waited for."""

    def __init__(self, land: Callable[[], None]) -> None:
        self.land = land

    def query(self) -> bool:
        return False

    def wait(self, stream: object = None) -> None:
        raise AssertionError(f"only the engine waits, on {stream}")

    def synchronize(self) -> None:
        self.land()


def outputs_of(driven: DrivenRuntime) -> list[torch.Tensor]:
    """Two requests that do not fit together; the second is a prompt in chunks that stream what went before."""
    outputs = list(driven.prefill("a", 12).values())
    outputs += driven.decode("a", 3)
    prompt = NewRequest("b", tuple(range(40, 90)), 0, 160)
    outputs += driven.step([prompt], tokens={"b": 64}).values()
    outputs += driven.decode("a", 1)
    for count in (64, 32):
        outputs += driven.step(tokens={"b": count}).values()
    for _ in range(12):
        outputs += driven.step(tokens={"a": 1, "b": 1}).values()
    return outputs


def test_slow_copies_change_no_output_and_are_counted(tmp_path: Path) -> None:
    quick, slow = DrivenRuntime(tmp_path / "a"), DrivenRuntime(tmp_path / "b", engine=SlowEngine)
    for mine, theirs in zip(outputs_of(slow), outputs_of(quick), strict=True):
        assert torch.equal(mine, theirs)
    for name in ("recalled_blocks_total", "prefetched_blocks_total", "streamed_blocks_total"):
        assert slow.metric(name) == quick.metric(name) > 0
    assert slow.metric("late_recalls_total") > 0 == quick.metric("late_recalls_total")


class RefusedRecalls(CpuTransferEngine):
    """The driver refuses what the copy engines are asked to do."""

    def _recall(self, group: int, blocks: Ids, slots: Ids, after: Marker | None) -> None:
        raise RuntimeError(f"cuMemcpyBatchAsync: error 700 of {len(blocks)} to {slots} of group {group}, {after}")


class RefusedWriteBacks(CpuTransferEngine):
    """Likewise."""

    def _write_back(self, group: int, blocks: Ids, slots: Ids) -> None:
        raise RuntimeError(f"cuMemcpyBatchAsync: error 700 at copy 0 of {len(blocks)} from {slots} of group {group}")


class RefusedGathers(CpuTransferEngine):
    """Likewise."""

    def _gather_layer(
        self, layer: int, blocks: torch.Tensor, host_blocks: Ids, out: torch.Tensor, after: Marker | None
    ) -> None:
        raise RuntimeError(
            f"cuMemcpyBatchAsync: error 700, {layer}, {len(blocks)}, {host_blocks}, {out.shape}, {after}"
        )


@pytest.mark.parametrize("engine", [RefusedRecalls, RefusedWriteBacks, RefusedGathers])
def test_a_copy_that_is_refused_ends_the_engine_and_gives_the_pool_back(
    tmp_path: Path, engine: type[CpuTransferEngine]
) -> None:
    driven = DrivenRuntime(tmp_path, engine=engine)
    with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync: error 700"):
        outputs_of(driven)
    assert not driven.runtime.in_step
    with mock.patch.object(HostPool, "close") as close:
        driven.runtime.release()
    close.assert_called_once_with()
