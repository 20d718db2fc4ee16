"""The loss: its definition, what it does not look at, and where it is least."""

import pytest
import torch

from flashmemory_vllm.training.losses import attention_loss

SHAPE = (2, 3, 7)


@pytest.fixture
def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SHAPE, generator=generator)
    shares = torch.rand(SHAPE, generator=generator) ** 3
    return logits, shares, (torch.rand(SHAPE, generator=generator) < 0.8).float()


@pytest.mark.parametrize("power", [4, 2])
def test_it_is_its_definition(parts: tuple[torch.Tensor, ...], power: int) -> None:
    logits, shares, weights = parts
    behind = worth = torch.zeros(())
    for of_row, paid, is_block in zip(*(part.flatten(0, 1) for part in parts), strict=True):
        total = of_row[is_block > 0].exp().sum()
        for own, share, counts in zip(of_row, paid, is_block, strict=True):
            behind = behind - counts * share**power * (own.exp() / total).log()
            worth = worth + counts * share**power
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, shares, weights, reduction="sum")
    expected = behind / worth + 0.01 * entropy / weights.sum()
    torch.testing.assert_close(attention_loss(logits, shares, weights, power), expected)
    if power == 4:
        assert attention_loss(logits, shares, weights) == attention_loss(logits, shares, weights, 4)


def test_what_has_no_weight_has_no_say(parts: tuple[torch.Tensor, ...]) -> None:
    logits, shares, weights = parts
    other = torch.where(weights > 0, logits, torch.full_like(logits, 50.0))
    torch.testing.assert_close(attention_loss(logits, shares, weights), attention_loss(other, shares, weights))
    assert float(attention_loss(logits, shares, torch.zeros_like(weights))) == 0


def test_it_is_least_where_blocks_are_in_the_order_of_their_shares(parts: tuple[torch.Tensor, ...]) -> None:
    _, shares, weights = parts
    best = attention_loss((4 * shares.log()), shares, weights)
    assert best < attention_loss((4 * shares.log()).flip(-1), shares, weights)
    # A mistake about a block that heads pay little to costs little
    order = shares.argsort(-1)
    less = torch.full((*SHAPE[:2], 1), -3.0)
    lowered = [(4 * shares.log()).scatter_add(-1, order[..., at, None], less) for at in (0, 6)]
    everywhere = torch.ones_like(weights)
    assert attention_loss(lowered[0], shares, everywhere) < attention_loss(lowered[1], shares, everywhere)
