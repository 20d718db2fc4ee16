"""row_lse: each head and query of a row by itself; nothing seen is no share."""

import math

import pytest
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.row_lse import row_lse
from flashmemory_kernels.row_lse.cases import CASES, LseCase, make_inputs


@pytest.mark.parametrize("case", CASES)
def test_shares_of_a_row_sum_up_to_one_or_there_are_none(case: LseCase) -> None:
    mass, rows, lse = make_inputs(case)
    row_lse(mass, rows, lse)
    for line, row in enumerate(rows.tolist()):
        for head in range(case.num_heads):
            for age in range(case.num_queries):
                is_query = age < row[Due.NUM_QUERIES]
                blocks = range(row[Due.NUM_BLOCKS] if is_query else 0)
                tiles = [(row[Due.FIRST_TILE] + block // case.tile, block % case.tile) for block in blocks]
                masses = [float(mass[tile, head, age, within]) for tile, within in tiles]
                got = float(lse[line, head, age])
                if all(value == -math.inf for value in masses):
                    assert got == math.inf
                else:
                    assert sum(math.exp(value - got) for value in masses) == pytest.approx(1.0, rel=1e-4)


def test_wrong_arguments_are_named() -> None:
    mass, rows, lse = make_inputs(CASES[1])
    with pytest.raises(ValueError, match=r"lse: expected shape \[6, 6, 3\], got \[6, 6, 2\]"):
        row_lse(mass, rows, lse[:, :, :2])
    with pytest.raises(ValueError, match=r"rows: expected dtype torch.int32, got torch.int64"):
        row_lse(mass, rows.long(), lse)
    with pytest.raises(ValueError, match=r"mass: expected a contiguous tensor"):
        row_lse(mass.mT.contiguous().mT, rows, lse)
