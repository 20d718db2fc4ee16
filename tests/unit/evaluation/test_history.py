"""What is replayed of a recording is what the operation of serving makes of the same shares."""

import numpy as np
import pytest
import torch
from flashmemory_kernels.common.due_rows import Due, make_rows
from flashmemory_kernels.remember_shares import Channel, Channels, remember_shares

from flashmemory_vllm.evaluation.history import mixed, replay

DECAYS = (0.0, 0.8, 0.97, 1.0)
HEADS, BLOCKS, TILE = 3, 13, 4
NUM_TILES = -(-BLOCKS // TILE)


@pytest.mark.parametrize("tau", [1, 3])
def test_a_replay_is_what_serving_remembers(tau: int) -> None:
    rng = np.random.default_rng(tau)
    # Blocks fill up on the way: what is newer than a token has no share
    positions = np.cumsum(rng.integers(1, 3, 12)) + 50
    known = np.minimum(BLOCKS, 6 + np.arange(12))
    by_head = rng.random((12, HEADS, BLOCKS)).astype(np.float32) ** 4 * (np.arange(BLOCKS) < known[:, None, None])
    replayed = replay(torch.from_numpy(by_head.max(1)), positions, DECAYS)
    assert replayed.shape == (12, len(DECAYS), BLOCKS)
    memory = torch.full((len(DECAYS), 1, 1, BLOCKS), torch.nan)
    channels = Channels.of([Channel(decay) for decay in DECAYS], "cpu")
    newest, known_before = 0, 0
    # Ages are tokens: those between two of them ask for nothing
    for end in range(tau, 13, tau):
        own = range(newest, end)
        last, first = int(positions[end - 1]), int(positions[newest])
        num_queries = last - first + 1
        shares = np.zeros((num_queries, HEADS, NUM_TILES * TILE), np.float32)
        for token in own:
            shares[last - positions[token], :, :BLOCKS] = by_head[token]
        mass = torch.from_numpy(shares).log().view(num_queries, HEADS, NUM_TILES, TILE).permute(2, 1, 0, 3).contiguous()
        fields = {
            Due.NUM_BLOCKS: int(known[end - 1]),
            Due.NUM_QUERIES: num_queries,
            Due.NUM_KNOWN: known_before,
            Due.ELAPSED: last - int(positions[newest - 1]) if newest else 0,
        }
        lse = torch.zeros(1, HEADS, num_queries)
        remember_shares(mass, lse, make_rows([fields], 1, TILE), torch.zeros(1, dtype=torch.int32), channels, memory)
        known_before, newest = int(known[end - 1]), end
        torch.testing.assert_close(memory[:, 0, 0, :known_before], replayed[end - 1, :, :known_before])
        assert not replayed[end - 1, :, known_before:].any()


def test_nothing_is_remembered_without_channels() -> None:
    assert replay(torch.ones(3, 5), np.arange(3), ()).shape == (3, 0, 5)


def test_a_mix_adds_up_its_channels_and_hands_half_on() -> None:
    memory = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0, 0.0, 1.0, 0.5]])
    torch.testing.assert_close(mixed(memory), torch.tensor([0.7, 0.35, 0.3, 0.5]))
    torch.testing.assert_close(mixed(memory.expand(3, 2, 4))[1], mixed(memory))
