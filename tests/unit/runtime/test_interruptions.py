"""What takes everything from running requests: sleep and wake, a reset of the prefix cache; they go on as before."""

from pathlib import Path

import pytest
import torch

from flashmemory_vllm.residency.types import NewRequest
from flashmemory_vllm.transfer.engine import CpuTransferEngine, TransferEngine
from tests.unit.runtime.driven import BLOCK, DrivenRuntime
from tests.unit.runtime.test_faults import SlowEngine

PROMPT, DECODED = 12 * BLOCK, 7


def go_on(driven: DrivenRuntime, first_block: int) -> list[torch.Tensor]:
    """The request comes again with all its tokens, in other blocks, and decodes on."""
    num_tokens = PROMPT + DECODED
    request = NewRequest("a", tuple(range(first_block, first_block + 24)), 0, num_tokens, PROMPT)
    driven.step([request], preempted=["a", "other"], tokens={"a": num_tokens})
    return driven.decode("a", 9)


def interrupted(folder: Path, engine: type[TransferEngine]) -> DrivenRuntime:
    """A runtime whose request decodes, and has selections and copies under way."""
    driven = DrivenRuntime(folder, engine=engine)
    driven.prefill("a", PROMPT // BLOCK)
    driven.prefill("other", 12, first_block=30)
    driven.decode("a", DECODED)
    return driven


@pytest.fixture
def expected(tmp_path: Path) -> list[torch.Tensor]:
    """What a runtime gives that has seen nothing before."""
    return go_on(DrivenRuntime(tmp_path / "fresh"), 60)


@pytest.mark.parametrize("engine", [CpuTransferEngine, SlowEngine])
def test_after_sleep_nothing_of_before_is_read(
    tmp_path: Path, expected: list[torch.Tensor], engine: type[TransferEngine]
) -> None:
    driven = interrupted(tmp_path / "slept", engine)
    driven.runtime.reset()
    # Level 1 discards what lies on the device, and the scheduler has forgotten what lies on the host
    for cache in driven.caches:
        cache.fill_(torch.nan)
    driven.runtime.pool.poison()
    for mine, theirs in zip(go_on(driven, 60), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("engine", [CpuTransferEngine, SlowEngine])
def test_a_reset_of_the_prefix_cache_changes_nothing_for_who_runs(
    tmp_path: Path, expected: list[torch.Tensor], engine: type[TransferEngine]
) -> None:
    driven = interrupted(tmp_path / "reset", engine)
    # All are preempted; the blocks may come again in any order and in anybody's hands, here those of another request
    for mine, theirs in zip(go_on(driven, 30), expected, strict=True):
        assert torch.equal(mine, theirs)
