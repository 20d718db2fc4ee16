"""The head of an indexer: its features by hand, and what it says before it is trained."""

import math

import pytest
import torch
from flashmemory_kernels.common.due_rows import Due, make_rows
from flashmemory_kernels.forecast_blocks import NOT_ASKED, Seen, forecast_blocks
from flashmemory_kernels.forecast_blocks.naive import forecast_features

from flashmemory_vllm.indexer.forecast_model import ForecastHead, with_neighbours

DECAYS = (0.0, 0.9)


def _seen(memory: torch.Tensor, newest: float = 0.0, *, is_first: bool = False) -> Seen:
    """Of blocks of 16 tokens, memory [C, N]."""
    num_blocks = memory.shape[1]
    logits = torch.full((num_blocks,), newest)
    distance = torch.arange(num_blocks, 0, -1) * 16
    return Seen(with_neighbours(memory), logits, -logits, distance, torch.tensor(is_first))


def _head() -> ForecastHead:
    head = ForecastHead(DECAYS)
    head.init_weights(torch.Generator().manual_seed(0))
    return head


def test_a_block_comes_with_those_beside_it() -> None:
    memory = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    beside = with_neighbours(memory)
    assert beside.tolist() == [[[0, 0], [1, 4], [2, 5]], [[1, 4], [2, 5], [3, 6]], [[2, 5], [3, 6], [0, 0]]]
    assert torch.equal(with_neighbours(memory.expand(5, 2, 3))[3], beside)


def test_features_are_logarithms_of_shares_and_where_a_block_lies() -> None:
    memory = torch.tensor([[0.5, 0.0], [0.25, 0.125]])
    found = forecast_features(_seen(memory, newest=2.0, is_first=True), torch.tensor([0.5, 1.0]))

    def log(share: float) -> float:
        return math.log(share + 1e-4) / 4 + 1

    first = [
        log(0),
        log(0),
        log(0.5),
        log(0.25),
        log(0),
        log(0.125),
        0.5,
        -0.5,
        math.log(32) / 8,
        256 / 288,
        1,
        log(0.5),
    ]
    assert found[0].tolist() == pytest.approx(first, rel=1e-5)
    last = [
        log(0.5),
        log(0.25),
        log(0),
        log(0.125),
        log(0),
        log(0),
        0.5,
        -0.5,
        math.log(16) / 8,
        256 / 272,
        1,
        log(0.25),
    ]
    assert found[1].tolist() == pytest.approx(last, rel=1e-5)


def test_at_first_what_was_paid_for_some_tokens_counts_and_content_a_little() -> None:
    head = _head()
    memory = torch.rand(2, 40, generator=torch.Generator().manual_seed(1))
    logits = head(_seen(memory))
    worth = torch.maximum(memory[1], torch.nn.functional.pad(memory[1] / 2, (1, -1)))
    torch.testing.assert_close(logits, (worth + 1e-4).log() + 4)
    torch.testing.assert_close(head(_seen(memory, newest=3.0)), logits + 0.75)


def test_it_computes_in_full_precision_under_autocast() -> None:
    memory = torch.rand(2, 40, generator=torch.Generator().manual_seed(1))
    head = _head()
    torch.nn.init.normal_(head.out)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(_seen(memory)), head(_seen(memory)))
        found = head(_seen(memory))
    assert torch.equal(found, head(_seen(memory)))


def test_the_operation_of_serving_says_the_same() -> None:
    head = _head().requires_grad_(requires_grad=False)
    torch.nn.init.normal_(head.out)
    head.calibration.copy_(torch.tensor([0.5, -1.0]))
    memory = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) ** 4
    state = torch.zeros(5, 1, 3, 44)
    state[:2, 0, 2, :40], state[2, 0, 2], state[3, 0, 2] = memory, 3.0, -3.0
    rows = make_rows([{Due.PLACE: 2, Due.NUM_QUERIES: 1, Due.NUM_BLOCKS: 40, Due.NUM_KNOWN: 40}], 1, 64)
    state[3, 0, 2, 30:] = NOT_ASKED
    forecast_blocks(state, rows, head.weights(), 16)
    seen = _seen(memory, newest=3.0)
    seen.asked[30:] = 3.0
    torch.testing.assert_close(state[4, 0, 2, :40], (0.5 * head(seen) - 1).sigmoid())
