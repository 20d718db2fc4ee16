"""At a resident ratio of 1, evictions, recalls, prefix hits and preemptions change no token; see `exactness`.

At 0.3, full graphs change none, and what eager steps read is right; see `sparse`.
"""

from pathlib import Path

import pytest

from flashmemory_vllm.evaluation.provenance import Provenance
from tests.gpu.exactness import measure
from tests.gpu.regimes import HYBRID_REGIMES, REGIMES, Regime
from tests.gpu.sparse import SPARSE_REGIMES, SparseRegime, make_work, measure_sparse

ON_GPU = [regime for regime in (*REGIMES, *HYBRID_REGIMES) if regime.device == "cuda"]
SPARSE_ON_GPU = [regime for regime in SPARSE_REGIMES if regime.device == "cuda"]


# What the CPU regime measures, `tests/integration/test_identity.py` asserts.
@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("regime", ON_GPU, ids=str)
def test_our_text_is_that_of_vllms_own_backend(regime: Regime, tmp_path: Path) -> None:
    provenance = Provenance("pytest", "", "", {})
    for row in measure(regime, provenance, tmp_path):
        assert row.problems() == [], str(row)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("regime", SPARSE_ON_GPU, ids=str)
def test_graphs_write_what_eager_steps_write_and_these_read_right(regime: SparseRegime, tmp_path: Path) -> None:
    row = measure_sparse(regime, make_work(regime, tmp_path), Provenance("pytest", "", "", {}))
    assert row.problems() == [], str(row)
