"""Of several groups of blocks, a worker sees and overwrites the slot mapping of its own, whichever runner it is."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashmemory_vllm.plugin.compat import install_slot_translation

MAPPINGS = torch.tensor([[1, 2, -1], [30, 40, -1]])


class RunnerV1:
    """What is wrapped of vLLM's first model runner."""

    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(req_ids=["a", "b"])
        self.seq_lens = torch.tensor([5, 6, 7, 8])
        self.mappings = MAPPINGS.clone()

    def step(self) -> torch.Tensor:
        """The slot mappings of a step of two rows and one of padding, by group."""
        by_group, _ = self._get_slot_mappings(3, 3)
        return torch.stack([by_group[group] for group in range(2)])

    def _get_slot_mappings(self, num_tokens_padded: int, num_reqs_padded: int) -> tuple[dict[int, torch.Tensor], Any]:
        del num_tokens_padded, num_reqs_padded
        return {group: self.mappings[group] for group in range(2)}, {}


class RunnerV2:
    """What is wrapped of the second one."""

    def __init__(self) -> None:
        self.mappings = MAPPINGS.clone()

    def step(self) -> torch.Tensor:
        """As the first one's."""
        batch = SimpleNamespace(req_ids=["a", "b"], seq_lens=torch.tensor([5, 6, 7]))
        return self.prepare_attn(batch)[1]

    def prepare_attn(self, input_batch: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        del input_batch
        return (), self.mappings


@pytest.mark.parametrize("managed", [0, 1])
@pytest.mark.parametrize("runner_cls", [RunnerV1, RunnerV2])
def test_one_group_is_translated(runner_cls: type[RunnerV1 | RunnerV2], managed: int) -> None:
    seen = []

    def set_batch(req_ids: list[str], seq_lens: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        seen.append((req_ids, seq_lens.tolist(), slot_mapping.tolist()))
        slot_mapping.fill_(9)

    runner = runner_cls()
    install_slot_translation(runner, set_batch, managed)
    expected = MAPPINGS.clone()
    expected[managed] = 9
    assert torch.equal(runner.step(), expected)
    assert seen == [(["a", "b"], [5, 6, 7], MAPPINGS[managed].tolist())]
