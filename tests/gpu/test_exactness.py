"""At a resident ratio of 1, evictions, recalls, prefix hits and preemptions change no token; see `exactness`."""

from pathlib import Path

import pytest

from flashmemory_vllm.evaluation.provenance import Provenance
from tests.gpu.exactness import REGIMES, Regime, measure

ON_GPU = [regime for regime in REGIMES if regime.device == "cuda"]


# What the CPU regime measures, `tests/integration/test_identity.py` asserts.
@pytest.mark.gpu
@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("regime", ON_GPU, ids=str)
def test_our_text_is_that_of_vllms_own_backend(regime: Regime, tmp_path: Path) -> None:
    provenance = Provenance("pytest", "", "", {})
    for row in measure(regime, provenance, tmp_path):
        assert row.problems() == [], str(row)
