"""vLLM's own parsers take what serving scenarios give to `vllm serve` and `vllm bench serve`."""

from pathlib import Path

import pytest
import yaml
from vllm.benchmarks.serve import add_cli_args
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from flashmemory_vllm.benchmark.scenario import check_fields, read_fields
from flashmemory_vllm.benchmark.serving_client import ServingClient, words
from flashmemory_vllm.benchmark.serving_scenario import ServingCell, ServingScenario, make_serving_cells
from tests.unit.benchmark.serving_twins import MODEL, make_cell

SERVING = Path(__file__).parents[3] / "configs" / "bench" / "serving.yaml"
CELLS = {
    cell.engine: cell
    for cell in make_serving_cells(check_fields(ServingScenario, SERVING, read_fields(SERVING)), None, MODEL)
    if cell.load.name == "16x32k"
}
GIB = 1 << 30


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_a_server_starts_with_them(cell: ServingCell, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(dict(cell.options)))
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(["folder", "--config", str(config)])
    assert (parsed.kv_cache_memory_bytes, parsed.max_model_len, parsed.load_format) == (16 * GIB, 33792, "dummy")
    assert parsed.kv_offloading_size == (96 if cell.engine == "offload" else None)
    assert parsed.kv_cache_dtype == ("fp8" if cell.engine == "fp8" else "auto")


@pytest.mark.parametrize("source", ["random", "lengths"])
def test_a_load_is_sent_with_them(source: str, tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.jsonl"
    lengths.write_text('{"input_length": 9, "output_length": 3}\n')
    from_file = make_cell({"name": "l", "requests": 1, "lengths": str(lengths), "request_rate": 0.5}, ttft_limit_ms=9.0)
    cell = CELLS["stock"] if source == "random" else from_file
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    parsed = parser.parse_args(words(ServingClient("model").options(cell, "http://here:1", tmp_path)))
    assert (parsed.base_url, parsed.tokenizer, parsed.num_prompts) == ("http://here:1", cell.model, cell.load.requests)
    if source == "random":
        assert (parsed.dataset_name, parsed.random_input_len, parsed.max_concurrency) == ("random", 32768, 16)
        assert parsed.goodput == ["tpot:100"]
    else:
        assert (parsed.dataset_name, parsed.self_timed, parsed.request_rate) == ("timed_trace", False, 0.5)
        assert parsed.goodput == ["tpot:50", "ttft:9"]
