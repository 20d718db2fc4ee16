"""Losses: their definitions, and what they do not look at."""

import pytest
import torch

from flashmemory_vllm.training.losses import focal_loss, rank_loss

SHAPE = (2, 3, 7)


@pytest.fixture
def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SHAPE, generator=generator)
    labels = (torch.rand(SHAPE, generator=generator) < 0.3).float()
    return logits, labels, (torch.rand(SHAPE, generator=generator) < 0.8).float()


def test_focal_loss_is_its_definition(parts: tuple[torch.Tensor, ...]) -> None:
    logits, labels, weights = parts
    right = torch.where(labels == 1, logits.sigmoid(), 1 - logits.sigmoid())
    expected = (-((1 - right) ** 2) * right.log() * weights).sum() / weights.sum()
    torch.testing.assert_close(focal_loss(logits, labels, weights), expected)


def test_rank_loss_is_its_definition(parts: tuple[torch.Tensor, ...]) -> None:
    logits, labels, weights = parts
    behind = []
    for row in zip(*(part.flatten(0, 1) for part in parts), strict=True):
        of_row, is_needed, is_block = row[0], row[1] > 0, row[2] > 0
        rivals = of_row[is_block & ~is_needed].exp().sum()
        behind += [-(own.exp() / (own.exp() + rivals)).log() for own in of_row[is_block & is_needed]]
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum")
    expected = torch.stack(behind).mean() + 0.01 * entropy / weights.sum()
    torch.testing.assert_close(rank_loss(logits, labels, weights), expected)


@pytest.mark.parametrize("loss", [rank_loss, focal_loss])
def test_what_has_no_weight_has_no_say(loss: type[torch.Tensor], parts: tuple[torch.Tensor, ...]) -> None:
    logits, labels, weights = parts
    other = torch.where(weights > 0, logits, torch.full_like(logits, 50.0))
    torch.testing.assert_close(loss(logits, labels, weights), loss(other, labels, weights))
    assert float(loss(logits, labels, torch.zeros_like(weights))) == 0
