"""The selection benchmark: what its rows are made of, at a small size, and its refusals."""

from pathlib import Path

import pytest
import torch

from flashmemory_vllm.errors import ConfigError, UnsupportedError
from flashmemory_vllm.indexer import benchmark

CPU = torch.device("cpu")
ROWS, TOKENS = 3, 512
NUM_BLOCKS = ROWS * TOKENS // 16
FACTS = {"gpu": "g", "versions": {"torch": "2"}, "commit": "c", "command": "python -m m"}
# Three anchor layers; a head has one row of 128, one of 256, and 16 of 128 in bf16. A chunk of 4
# tokens has a code of 128 bytes and a scale.
INDEX_BYTES = {
    "mean": 3 * 8 * 256,
    "bounds": 3 * 8 * 512,
    "exact": 3 * 8 * 4096,
    "exact-memory": 3 * 8 * 4096,
    "exact-fp8": 3 * 8 * (2048 + 4),
    "h2o": 3 * 8 * 4096,
    "neural": 3 * 4 * 132,
    "neural-first": 3 * 4 * 132,
    "neural-forecast": 3 * 4 * 132 + 3 * 8 * (16 * 128 + 4),
}


@pytest.mark.parametrize("name", INDEX_BYTES)
def test_a_row_relates_bytes_time_and_ceiling(name: str) -> None:
    memories: list[torch.Tensor] = []

    def measure(call: object) -> float:
        assert callable(call)
        memories.extend(call().clone() for _ in range(2))
        return 50.0

    row = benchmark.measure_selection(name, (ROWS, TOKENS), CPU, measure, 2000.0, FACTS)
    assert [memory.shape[1:] for memory in memories] == [(1, ROWS, TOKENS // 16)] * 2
    assert all(memory[0].any() and memory.isfinite().all() for memory in memories)
    weights = row.device_bytes - NUM_BLOCKS * INDEX_BYTES[name]
    assert weights > 0 if name.startswith("neural") else weights == 0
    assert row.index_bytes_per_token == INDEX_BYTES[name] / 16
    assert row.gb_per_s == round(row.device_bytes / 50e3, 2)
    assert row.share == pytest.approx(row.device_bytes / 50e3 / 2000, abs=5e-5)
    assert (row.measurement, row.value, row.unit) == (f"{name} 3 x 512 tokens", 50.0, "us")
    assert (row.kv_bytes_per_token, row.gpu, row.commit) == (131_072, "g", "c")
    assert row.host_us > 0


def test_a_neural_indexer_reads_the_weights_of_its_query_side() -> None:
    selector = benchmark.make_selector("neural", benchmark.make_geometry(ROWS * TOKENS, CPU))
    rank, heads, dim = 512, 32, 128
    per_layer = 2 * 32 * 128 * rank + rank + rank * heads * dim + rank * heads + heads + 2 + 2
    assert benchmark.bytes_read(selector, 0) == 3 * 4 * per_layer


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        benchmark.main(["--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("batch", ["2x15", "0x4096", "4096", "x4096", "2x-4096"])
def test_requests_of_no_blocks_are_refused(tmp_path: Path, batch: str) -> None:
    with pytest.raises(ConfigError, match=f"--batches is {batch!r}: allowed is ROWSxTOKENS, 256 tokens or more"):
        benchmark.main(["--out", str(tmp_path / "rows.json"), "--batches", "2x4096", batch])
