"""The poison that tests of kernels run under reaches every way in which an op gets memory, and a result shows it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.score_chunks import naive
from flashmemory_kernels.score_chunks.cases import CASES, make_inputs

LIKE = torch.zeros(3, 5)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3, 5),
        lambda: torch.empty_like(LIKE),
        lambda: torch.empty_strided((3, 5), (5, 1)),
        lambda: LIKE.new_empty(3, 5),
        lambda: LIKE.new_empty_strided((3, 5), (5, 1)),
    ],
)
def test_memory_without_a_value_is_nan(allocate: Callable[[], torch.Tensor]) -> None:
    assert bool(allocate().isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_float_format_is_nan(dtype: torch.dtype) -> None:
    assert bool(torch.empty(7, dtype=dtype).float().isnan().all())


def test_integers_are_no_index_and_values_that_were_asked_for_stay() -> None:
    assert bool((torch.empty(4, dtype=torch.int32) == -1).all())
    assert not torch.zeros(4).any()
    assert torch.equal(torch.full((2,), 3.0), torch.tensor([3.0, 3.0]))


def test_an_op_that_forgets_a_row_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op as they are, but for one that leaves out its last portion."""
    inputs = make_inputs(CASES[2])
    row = inputs.rows[0, Due.PLACE]
    ids = inputs.block_ids[row, : CASES[2].num_blocks[0]].long()
    arguments = inputs.heads[0].float(), inputs.gates[0].float(), inputs.codes[:, ids, 0], inputs.scales[:, ids, 0]
    chunks = torch.arange(len(ids))
    assert not naive._products(*arguments, chunks, chunk_elems=1).isnan().any()
    portions = range
    monkeypatch.setattr(naive, "range", lambda *bounds: portions(*bounds)[:-1], raising=False)
    assert bool(naive._products(*arguments, chunks, chunk_elems=1).isnan().any())


def test_the_interpreter_and_the_gpu_run_under_it_too() -> None:
    for path in ("tests/kernels/interpreted_cases.py", "tests/gpu/test_kernels_cuda.py"):
        assert "poisoned_memory()" in (ROOT / path).read_text(), path
