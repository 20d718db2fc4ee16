"""Platt scaling finds the probability that labels were drawn with."""

import pytest
import torch

from flashmemory_vllm.training.calibration import fit_platt


@pytest.mark.parametrize(("slope", "offset"), [(0.5, -3.0), (2.0, 1.0), (0.01, -1.0)])
def test_the_probability_of_the_labels_is_recovered(slope: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100_000, generator=generator) / slope + 7
    labels = torch.rand(100_000, generator=generator) < (slope * (logits - 7) + offset).sigmoid()
    found = fit_platt(logits, labels)
    # A hundred thousand draws fix a probability to about one per cent.
    assert found[0] == pytest.approx(slope, rel=0.05)
    assert found[1] + found[0] * 7 == pytest.approx(offset, abs=0.05)


@pytest.mark.parametrize("labels", [[False, False, True], [False, False, False], [True, True, True]])
def test_separable_and_equal_labels_have_a_finite_answer(labels: list[bool]) -> None:
    found = torch.tensor(fit_platt(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor(labels)))
    assert bool(found.isfinite().all())


def test_the_order_of_blocks_never_changes() -> None:
    slope, _ = fit_platt(torch.tensor([-1.0, 0.0, 1.0, 2.0]), torch.tensor([True, True, False, False]))
    assert slope > 0
