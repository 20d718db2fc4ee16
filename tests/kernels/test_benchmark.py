"""Benchmark: the arithmetic of its rows, jobs that can be run again and again, and no device."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from flashmemory_kernels import benchmark
from flashmemory_kernels.apply_step import cases as step_cases
from flashmemory_kernels.capture_queries import cases as capture_cases
from flashmemory_kernels.checksum_pages import cases as checksum_cases
from flashmemory_kernels.choose_sets import cases as choice_cases
from flashmemory_kernels.forecast_blocks import cases as forecast_cases
from flashmemory_kernels.merge_attention.cases import CASES as MERGE_CASES
from flashmemory_kernels.project_queries import cases as project_cases
from flashmemory_kernels.remember_shares import cases as remember_cases
from flashmemory_kernels.row_lse import cases as lse_cases
from flashmemory_kernels.score_chunks import cases as chunk_cases
from flashmemory_kernels.score_rows import cases as score_rows_cases
from flashmemory_kernels.summarise_keys import cases as summary_cases

CEILINGS: dict[benchmark.Route, float] = {"device": 2000.0, "host_to_device": 50.0, "device_to_host": 40.0}
SMALL_JOBS: dict[str, Callable[[], Iterator[benchmark.Job]]] = {
    "apply_step": lambda: benchmark.step_jobs(step_cases.CASES, "cpu"),
    "capture_queries": lambda: benchmark.capture_jobs([case for case in capture_cases.CASES if case.num_rows], "cpu"),
    "checksum_pages": lambda: benchmark.checksum_jobs(checksum_cases.CASES, "cpu"),
    "choose_sets": lambda: benchmark.choice_jobs(choice_cases.CASES, "cpu"),
    "forecast_blocks": lambda: benchmark.forecast_jobs(forecast_cases.CASES, "cpu"),
    "merge_attention": lambda: benchmark.merge_jobs(MERGE_CASES, "cpu"),
    "project_queries": lambda: benchmark.project_jobs(project_cases.CASES, "cpu"),
    "remember_shares": lambda: benchmark.remember_jobs(remember_cases.CASES, "cpu"),
    "row_lse": lambda: benchmark.lse_jobs(lse_cases.CASES, "cpu"),
    "score_chunks": lambda: benchmark.chunk_jobs(chunk_cases.CASES, "cpu"),
    "score_rows": lambda: benchmark.score_rows_jobs(score_rows_cases.CASES, "cpu"),
    "summarise_keys": lambda: benchmark.summary_jobs(summary_cases.CASES, "cpu"),
}


def test_every_op_that_the_cpu_can_run_has_small_jobs() -> None:
    assert set(SMALL_JOBS) == set(benchmark.OPS) - {"copy_pages"}


@pytest.mark.parametrize("op", SMALL_JOBS)
def test_jobs_run_again_and_again(op: str) -> None:
    for job in SMALL_JOBS[op]():
        assert job.op == op
        assert job.num_bytes > 0
        for _ in range(3):
            job.call()


def test_rows_relate_bytes_time_and_ceiling() -> None:
    jobs = [
        benchmark.Job("a", "x=1", 10**6, "device", int),
        benchmark.Job("b", "x=2", 10**6, "device_to_host", int),
    ]
    rows = list(benchmark.time_jobs(jobs, lambda _: 50.0, CEILINGS, {"gpu": "g"}))
    assert [row["gb_per_s"] for row in rows] == [20.0, 20.0]
    assert [row["share"] for row in rows] == [0.01, 0.5]
    assert rows[0] == {
        "op": "a", "case": "x=1", "us": 50.0, "bytes": 10**6, "gb_per_s": 20.0, "ceiling_gb_per_s": 2000.0,
        "share": 0.01, "gpu": "g",
    }  # fmt: skip
    json.dumps(rows)


def test_the_bytes_of_chunks_are_heads_codes_scales_ids_and_logits() -> None:
    case = chunk_cases.ChunkCase(
        (0, 1, 0), num_blocks=(4, 3), num_padding=0, chunks_per_block=2, reach=1, num_heads=2, width=16
    )
    (job,) = benchmark.chunk_jobs([case], "cpu")
    assert job.num_bytes == 2 * 3 * 2 * (16 + 1) * 4 + 7 * (3 * 2 * (16 + 4) + 4 + 2 * 4)
    assert "num_blocks=(4, 3)" in job.case


def test_the_fastest_configuration_of_each_case_is_found() -> None:
    rows = [
        {"case": f"{case} | tile_rows={tile}", "us": us}
        for (case, tile), us in zip(itertools.product("ab", (1, 2)), (3.0, 2.0, 4.0, 5.0), strict=True)
    ]
    best = benchmark.best_configs(rows)
    assert {case: row["case"] for case, row in best.items()} == {"a": "a | tile_rows=2", "b": "b | tile_rows=1"}


def test_without_a_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "rows.json"
    assert benchmark.main(["--out", str(out)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not out.exists()


def test_an_unknown_op_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--ops", "sort"])
    assert "invalid choice: 'sort'" in capsys.readouterr().err
