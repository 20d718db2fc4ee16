"""Due rows: tiles are counted over the rows that are scored, and masses of a row stand side by side."""

import torch
from flashmemory_kernels.common.due_rows import Due, fill_first_tiles, make_rows, padded_mass, scored_rows


def test_each_row_begins_behind_the_tiles_of_those_before_it() -> None:
    blocks = ((0, 1), (9, 1), (5, 0), (8, 2), (1, 1))
    given = [{Due.PLACE: 3, Due.NUM_BLOCKS: count, Due.NUM_QUERIES: queries} for count, queries in blocks]
    rows = make_rows(given, 7, tile=4)
    assert rows[:, Due.FIRST_TILE].tolist() == [0, 0, 3, 3, 5, 6, 6]
    assert rows[:, Due.PLACE].tolist() == [3] * 5 + [-1] * 2
    assert fill_first_tiles(rows, 4) == 6
    assert fill_first_tiles(rows[:0], 4) == 0
    assert scored_rows(rows).tolist() == [0, 1, 3, 4]


def test_masses_of_a_row_side_by_side() -> None:
    mass = torch.arange(5 * 2 * 3 * 4.0).view(5, 2, 3, 4)
    given = [{Due.NUM_BLOCKS: count, Due.NUM_QUERIES: queries} for count, queries in ((3, 1), (9, 3))]
    side_by_side = padded_mass(mass, make_rows(given, 2, tile=4))
    assert side_by_side.shape == (2, 2, 3, 12)
    for row, (first, count, queries) in enumerate(((0, 3, 1), (1, 9, 3))):
        for head in range(2):
            for age in range(3):
                expected = [
                    float(mass[first + block // 4, head, age, block % 4])
                    if block < count and age < queries
                    else -torch.inf
                    for block in range(12)
                ]
                assert side_by_side[row, head, age].tolist() == expected
