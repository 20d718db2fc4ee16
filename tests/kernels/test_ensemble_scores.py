"""ensemble_scores: shares of each head, combined per layer group, with blocks and whole heads excluded."""

from typing import Any

import pytest
import torch
from flashmemory_kernels.ensemble_scores import Aggregate, ensemble_scores
from flashmemory_kernels.ensemble_scores.cases import CASES, EnsembleCase, make_inputs

# A sum of at most 9000 exponentials in float32, and one division.
TOL_FP32: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7}


@pytest.mark.parametrize("aggregate", ["max", "mean"])
@pytest.mark.parametrize("case", CASES)
def test_heads_and_layers_of_a_group_are_combined(case: EnsembleCase, aggregate: Aggregate) -> None:
    mass, layer_groups, num_groups = make_inputs(case)
    scores = ensemble_scores(mass, layer_groups, num_groups, aggregate)
    for group in range(num_groups):
        layers = [layer for layer, other in enumerate(case.layer_groups) if other == group]
        weights = mass[layers].double().exp().flatten(0, 1)
        total = weights.sum(1, keepdim=True)
        shares = weights / torch.where(total == 0, 1, total)
        expected = shares.amax(0) if aggregate == "max" else shares.mean(0)
        torch.testing.assert_close(scores[group].double(), expected, **TOL_FP32)


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_extreme_masses_keep_their_shares(shift: float) -> None:
    mass = torch.tensor([[[0.0, 0.0, -torch.inf, 0.0]]]) + shift
    scores = ensemble_scores(mass, torch.zeros(1, dtype=torch.int32), 1, "max")
    torch.testing.assert_close(scores, torch.tensor([[1 / 3, 1 / 3, 0, 1 / 3]]), **TOL_FP32)


def test_wrong_arguments_are_named() -> None:
    mass, layer_groups, num_groups = make_inputs(CASES[1])
    with pytest.raises(ValueError, match=r"aggregate: expected one of \['max', 'mean'\], got 'sum'"):
        ensemble_scores(mass, layer_groups, num_groups, "sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layer_groups: expected shape \[3\], got \[2\]"):
        ensemble_scores(mass, layer_groups[:2], num_groups, "max")
    with pytest.raises(ValueError, match=r"mass: expected a contiguous tensor"):
        ensemble_scores(mass.mT, layer_groups, num_groups, "max")
