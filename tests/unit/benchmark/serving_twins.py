"""Stand-ins for what the serving benchmark drives."""

from pathlib import Path
from typing import Any

from flashmemory_vllm.benchmark.scenario import check_fields
from flashmemory_vllm.benchmark.serving_rows import ServingRow
from flashmemory_vllm.benchmark.serving_scenario import ServingCell, ServingScenario, make_serving_cells

LOAD: dict[str, Any] = {"name": "l", "requests": 4, "prompt_tokens": 100, "output_tokens": 20}
MODEL = {"model": "folder", "load_format": "dummy"}


def make_scenario(**changes: Any) -> ServingScenario:
    fields = {
        "kind": "serving",
        "name": "s",
        "why": "?",
        "itl_limit_ms": 50.0,
        "engine": {"kv_cache_memory_gib": 2.0, "max_num_seqs": 8, "kv_offloading_gib": 4.0},
        "flashmemory": {"host_memory_gib": 8},
        "loads": [LOAD],
    }
    return check_fields(ServingScenario, Path("s.yaml"), fields | changes)


def make_cell(load: dict[str, Any] | None = None, **changes: Any) -> ServingCell:
    (cell,) = make_serving_cells(make_scenario(loads=[load or LOAD], **changes), ["stock"], MODEL)
    return cell


def make_result(**changes: Any) -> dict[str, Any]:
    """What `vllm bench serve` saves."""
    percentiles = {f"p{share}_{name}_ms": float(share) for name in ("ttft", "itl") for share in (50, 95, 99)}
    return {
        "completed": 4,
        "failed": 0,
        "duration": 2.0,
        "total_input_tokens": 400,
        "total_output_tokens": 80,
        "request_throughput": 2.0,
        "request_goodput": 1.5,
        "output_throughput": 40.0,
        "total_token_throughput": 240.0,
        "errors": ["", "", "", ""],
        **percentiles,
        **changes,
    }


def make_serving_row(**changes: Any) -> ServingRow:
    fields: dict[str, Any] = {
        "scenario": "s",
        "load": "l",
        "engine": "flashmemory",
        "model": "tiny",
        "requests": 4,
        "prompt_tokens": 100,
        "answer_tokens": 20,
        "shared_prefix_tokens": 0,
        "max_concurrency": None,
        "request_rate": None,
        "kv_memory_bytes": 2 << 30,
        "itl_limit_ms": 50.0,
        "ttft_limit_ms": None,
        "command": "flashmemory bench",
        "commit": "abc",
        "gpu": "GPU",
        "versions": {},
    }
    return ServingRow(**fields | changes)
