"""The transfer benchmark's table, and its refusal where there is nothing to measure."""

from pathlib import Path

import pytest
import torch

from flashmemory_vllm.errors import UnsupportedError
from flashmemory_vllm.transfer import benchmark


def test_table_lines_align() -> None:
    lines = [benchmark.table_line(values) for values in (["pages", "gb_per_s"], [8, 51.26], [512, None])]
    assert [line.split() for line in lines] == [["pages", "gb_per_s"], ["8", "51.3"], ["512", "-"]]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        benchmark.main(["--out", str(tmp_path / "rows.json")])
    assert not (tmp_path / "rows.json").exists()
