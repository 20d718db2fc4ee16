"""At a resident ratio of 1, evictions, recalls, prefix hits and preemptions change no token; see `exactness`."""

from pathlib import Path

import pytest
import torch

from flashmemory_vllm.evaluation.provenance import Provenance
from tests.gpu.exactness import REGIMES, Regime, measure


def _parameter(regime: Regime) -> object:
    if regime.device == "cuda":
        marks = [pytest.mark.gpu]
    else:
        marks = [pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend")]
    return pytest.param(regime, marks=marks, id=str(regime))


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("regime", map(_parameter, REGIMES))
def test_our_text_is_that_of_vllms_own_backend(regime: Regime, tmp_path: Path) -> None:
    provenance = Provenance("pytest", "", "", {})
    for row in measure(regime, provenance, tmp_path):
        assert row.problems() == [], str(row)
