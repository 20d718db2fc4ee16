"""Tiles shared out to programs: never more programs than tiles, never none, and the device is not exceeded."""

import pytest
import torch
from flashmemory_kernels.common import TileConfig, tiles
from hypothesis import given
from hypothesis import strategies as st

CPU = torch.device("cpu")


@given(num_tiles=st.integers(1, 5000), num_columns=st.integers(1, 100), programs=st.integers(1, 16))
def test_programs_fit_the_device_and_the_work(num_tiles: int, num_columns: int, programs: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_num_multiprocessors", lambda _: 132)
        count = TileConfig(64, programs, num_warps=4, num_stages=3).num_programs(num_tiles, num_columns, CPU)
    assert 1 <= count <= num_tiles
    assert count == 1 or count * num_columns <= 132 * programs
    # No more could be had
    assert count == num_tiles or (count + 1) * num_columns > 132 * programs


def test_without_sharing_each_tile_has_a_program() -> None:
    assert TileConfig(64, programs=0, num_warps=4, num_stages=1).num_programs(489, 8, CPU) == 489


def test_a_cpu_counts_as_one_multiprocessor() -> None:
    assert TileConfig(64, programs=4, num_warps=4, num_stages=1).num_programs(489, 2, CPU) == 2
