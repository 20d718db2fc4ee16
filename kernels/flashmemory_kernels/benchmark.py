"""Times the ops on a CUDA device: `python -m flashmemory_kernels.benchmark --out rows.json`.

All of them are bound by moving bytes, so each time is shown beside the bandwidth that a plain copy reaches on the
same device in the same run: inside the device, or between it and pinned host memory.
"""

import argparse
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from flashmemory_kernels.apply_step import apply_step
from flashmemory_kernels.apply_step import cases as step_cases
from flashmemory_kernels.capture_queries import capture_queries
from flashmemory_kernels.capture_queries import cases as capture_cases
from flashmemory_kernels.checksum_pages import PageSet, store_checksums, verify_checksums
from flashmemory_kernels.checksum_pages import cases as checksum_cases
from flashmemory_kernels.choose_sets import cases as choice_cases
from flashmemory_kernels.choose_sets import choose_sets
from flashmemory_kernels.common import TileConfig
from flashmemory_kernels.forecast_blocks import cases as forecast_cases
from flashmemory_kernels.forecast_blocks import forecast_blocks
from flashmemory_kernels.merge_attention import merge_attention
from flashmemory_kernels.merge_attention.cases import MergeCase
from flashmemory_kernels.project_queries import cases as project_cases
from flashmemory_kernels.project_queries import project_queries
from flashmemory_kernels.remember_shares import cases as remember_cases
from flashmemory_kernels.remember_shares import remember_shares
from flashmemory_kernels.row_lse import cases as lse_cases
from flashmemory_kernels.row_lse import row_lse
from flashmemory_kernels.score_chunks import cases as chunk_cases
from flashmemory_kernels.score_chunks import score_chunks
from flashmemory_kernels.score_rows import cases as score_rows_cases
from flashmemory_kernels.score_rows import score_rows
from flashmemory_kernels.summarise_keys import cases as summary_cases
from flashmemory_kernels.summarise_keys import summarise_keys

# One decode token, and chunks of prefill, of an 8B model.
MERGE_CASES = tuple(MergeCase(num_tokens, num_heads=32, head_dim=128) for num_tokens in (1, 2048, 8192))

COPY_PROGRAMS = (4, 8, 16, 32, 64, 132)
COPY_PAGE_BYTES = (64 << 10, 2 << 20)
# Bytes of one timed copy between host and device, and of the pool its pages are picked from.
COPY_BYTES = 64 << 20
COPY_POOL_BYTES = 256 << 20
CEILING_BYTES = 512 << 20

# Times that each case is run to warm up and to be timed.
WARM_UPS = 5
TIMED_RUNS = 100
# Ten times an L2 cache.
FLUSH_BYTES = 512 << 20

# Tiles that the score kernels are timed with: each a program of its own, then several to a program.
TUNED_CONFIGS = tuple(
    TileConfig(*values)
    for values in (
        *itertools.product((32, 64, 128, 256), (0,), (4, 8), (1,)),
        *itertools.product((64, 128), (2, 4, 8), (4,), (3, 5)),
    )
)

Route = Literal["device", "host_to_device", "device_to_host"]
Measure = Callable[[Callable[[], object]], float]


class Job(NamedTuple):
    """One call to time.

    Attributes:
        op: name of the op.
        case: its sizes, readable.
        num_bytes: bytes that it must read and write; over the bus, bytes of one direction.
        route: which plain copy it is compared with.
        call: runs it once.
    """

    op: str
    case: str
    num_bytes: int
    route: Route
    call: Callable[[], object]


def step_jobs(cases: Iterable[step_cases.StepCase], device: str) -> Iterator[Job]:
    """Jobs of `apply_step`."""
    for case in cases:
        inputs = step_cases.make_inputs(case, device)
        # What is uploaded, changed by edits, and of each row at most its entries, read and written
        num_bytes = inputs.packed.nbytes + 4 * case.num_edits + 8 * case.num_groups * case.num_rows * case.width
        yield Job("apply_step", _label(case), num_bytes, "device", partial(apply_step, *inputs))


def capture_jobs(cases: Iterable[capture_cases.CaptureCase], device: str) -> Iterator[Job]:
    """Jobs of `capture_queries`."""
    for case in cases:
        inputs = capture_cases.make_inputs(case, device=device)
        num_kept = int((inputs.query_row >= 0).sum())
        num_bytes = 4 * case.num_rows + 2 * num_kept * inputs.query[0].nbytes
        yield Job("capture_queries", _label(case), num_bytes, "device", partial(capture_queries, *inputs))


def choice_jobs(cases: Iterable[choice_cases.ChoiceCase], device: str) -> Iterator[Job]:
    """Jobs of `choose_sets`; after the first run sets change little, which costs the same."""
    for case in cases:
        inputs = choice_cases.make_inputs(case, device)
        # Each channel is read at a block and before it, and the set is read and written
        num_bytes = case.num_rows * case.num_groups * case.width * (8 * len(case.weights) + 2)
        yield Job("choose_sets", _label(case), num_bytes, "device", partial(choose_sets, *inputs))


def forecast_jobs(cases: Iterable[forecast_cases.ForecastCase], device: str) -> Iterator[Job]:
    """Jobs of `forecast_blocks`."""
    for case in cases:
        inputs = forecast_cases.make_inputs(case, device)
        num_bytes = 4 * len(inputs.memory) * case.num_groups * sum(case.num_blocks)
        yield Job("forecast_blocks", _label(case), num_bytes, "device", partial(forecast_blocks, *inputs))


def remember_jobs(cases: Iterable[remember_cases.RememberCase], device: str) -> Iterator[Job]:
    """Jobs of `remember_shares`."""
    for case in cases:
        inputs = remember_cases.make_inputs(case, device)
        num_bytes = inputs.mass.nbytes + inputs.lse.nbytes + 8 * len(case.channels) * sum(case.num_blocks)
        yield Job("remember_shares", _label(case), num_bytes, "device", partial(remember_shares, *inputs))


def merge_jobs(cases: Iterable[MergeCase], device: str) -> Iterator[Job]:
    """Jobs of `merge_attention`."""
    for case in cases:
        out = torch.randn(3, *case, device=device, dtype=torch.bfloat16)
        lse = torch.randn(3, case.num_heads, case.num_tokens, device=device)
        num_bytes = out.numel() * out.element_size() + lse.numel() * lse.element_size()
        call = partial(merge_attention, out[0], lse[0], out[1], lse[1], out[2], lse[2])
        yield Job("merge_attention", _label(case), num_bytes, "device", call)


def project_jobs(cases: Iterable[project_cases.ProjectCase], device: str) -> Iterator[Job]:
    """Jobs of `project_queries`."""
    for case in cases:
        inputs = project_cases.make_inputs(case, torch.bfloat16, device)
        made = case.num_tokens * case.num_layers * case.num_heads * case.width
        num_bytes = sum(tensor.nbytes for tensor in inputs[:-1]) + 4 * made
        yield Job("project_queries", _label(case), num_bytes, "device", partial(project_queries, *inputs))


def chunk_jobs(
    cases: Iterable[chunk_cases.ChunkCase], device: str, op: Callable[..., None] = score_chunks
) -> Iterator[Job]:
    """Jobs of `score_chunks`, or of the kernel under another configuration."""
    for case in cases:
        inputs = chunk_cases.make_inputs(case, device=device)
        # Index heads; of each block its codes, their scales, its id and its logits
        block_bytes = len(case.layer_groups) * case.chunks_per_block * (case.width + 4) + 4 + 4 * len(inputs.logits)
        num_bytes = inputs.heads.nbytes + inputs.gates.nbytes + sum(case.num_blocks) * block_bytes
        yield Job("score_chunks", _label(case), num_bytes, "device", partial(op, *inputs))


def score_rows_jobs(
    cases: Iterable[score_rows_cases.ScoreRowsCase], device: str, op: Callable[..., None] = score_rows
) -> Iterator[Job]:
    """Jobs of `score_rows`, or of the kernel under another configuration."""
    for case in cases:
        inputs = score_rows_cases.make_inputs(case, device=device)
        block_bytes = inputs.key_rows[:, 0].nbytes + (0 if inputs.scales is None else inputs.scales[:, 0].nbytes)
        num_bytes = sum(case.num_blocks) * (block_bytes + 4) + inputs.mass.nbytes
        yield Job("score_rows", _label(case), num_bytes, "device", partial(op, *inputs))


def lse_jobs(cases: Iterable[lse_cases.LseCase], device: str) -> Iterator[Job]:
    """Jobs of `row_lse`."""
    for case in cases:
        inputs = lse_cases.make_inputs(case, device)
        yield Job("row_lse", _label(case), inputs[0].nbytes + inputs[2].nbytes, "device", partial(row_lse, *inputs))


def summary_jobs(cases: Iterable[summary_cases.SummaryCase], device: str) -> Iterator[Job]:
    """Jobs of `summarise_keys`."""
    for case, kind in itertools.product(cases, summary_cases.KINDS):
        keys, slots, index, block_ids = summary_cases.make_inputs(case, kind, device=device)
        num_bytes = case.num_blocks * (keys[0].numel() + index[0].numel()) * keys.element_size()
        call = partial(summarise_keys, keys, slots, index, block_ids, kind)
        yield Job("summarise_keys", f"kind={kind} {_label(case)}", num_bytes, "device", call)


def checksum_jobs(cases: Iterable[checksum_cases.ChecksumCase], device: str) -> Iterator[Job]:
    """Jobs of `checksum_pages`: to keep sums, and to compare pages with them."""
    for case in cases:
        given = checksum_cases.make_inputs(case, device=device)
        pages, ids = PageSet(given.pages), (given.page_ids, given.sums, given.block_ids)
        wrong = torch.zeros(case.num_layers, case.num_pages, dtype=torch.uint8)
        wrong = wrong.pin_memory() if device == "cuda" else wrong
        num_bytes = case.num_layers * case.num_pages * (case.page_elems * given.pages[0].element_size() + 8)
        yield Job("checksum_pages", f"store {_label(case)}", num_bytes, "device", partial(store_checksums, pages, *ids))
        compare = partial(verify_checksums, pages, *ids, wrong)
        yield Job("checksum_pages", f"verify {_label(case)}", num_bytes, "device", compare)


def copy_jobs() -> Iterator[Job]:
    """Gathers of pages by `copy_pages` in both directions, under different numbers of programs."""
    from flashmemory_kernels.copy_pages.kernel import copy_pages_triton

    host = torch.zeros(COPY_POOL_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.zeros(COPY_POOL_BYTES, dtype=torch.uint8, device="cuda")
    routes: tuple[tuple[Route, torch.Tensor, torch.Tensor], ...] = (
        ("host_to_device", host, device),
        ("device_to_host", device, host),
    )
    for page_bytes, (route, source, target) in itertools.product(COPY_PAGE_BYTES, routes):
        num_pages = COPY_BYTES // page_bytes
        ids = torch.randperm(COPY_POOL_BYTES // page_bytes, device="cuda")[:num_pages]
        pages = source.view(-1, page_bytes), ids, target.view(-1, page_bytes), None
        for num_programs in COPY_PROGRAMS:
            call = partial(copy_pages_triton, *pages, num_programs=num_programs)
            label = f"route={route} page_bytes={page_bytes} num_pages={num_pages} num_programs={num_programs}"
            yield Job("copy_pages", label, COPY_BYTES, route, call)


OPS: dict[str, Callable[[], Iterator[Job]]] = {
    "apply_step": lambda: step_jobs(step_cases.BENCH_CASES, "cuda"),
    "capture_queries": lambda: capture_jobs(capture_cases.BENCH_CASES, "cuda"),
    "checksum_pages": lambda: checksum_jobs(checksum_cases.BENCH_CASES, "cuda"),
    "choose_sets": lambda: choice_jobs(choice_cases.BENCH_CASES, "cuda"),
    "copy_pages": copy_jobs,
    "forecast_blocks": lambda: forecast_jobs(forecast_cases.BENCH_CASES, "cuda"),
    "merge_attention": lambda: merge_jobs(MERGE_CASES, "cuda"),
    "project_queries": lambda: project_jobs(project_cases.BENCH_CASES, "cuda"),
    "remember_shares": lambda: remember_jobs(remember_cases.BENCH_CASES, "cuda"),
    "row_lse": lambda: lse_jobs(lse_cases.BENCH_CASES, "cuda"),
    "score_chunks": lambda: chunk_jobs(chunk_cases.BENCH_CASES, "cuda"),
    "score_rows": lambda: score_rows_jobs(score_rows_cases.BENCH_CASES, "cuda"),
    "summarise_keys": lambda: summary_jobs(summary_cases.BENCH_CASES, "cuda"),
}


def measure_cuda(call: Callable[[], object]) -> float:
    """Median microseconds of one call, with a cold L2 cache.

    Before each call a buffer larger than the cache is read. Had it been written, the call would wait for the way of
    those bytes to memory. While the device reads, the host enqueues the call: its launches are not waited for.
    """
    for _ in range(WARM_UPS):
        call()
    buffer = torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device="cuda").view(torch.float32)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(TIMED_RUNS)]  # type: ignore[no-untyped-call]
    for start, end in events:
        buffer.sum()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    median_ms: float = statistics.median(start.elapsed_time(end) for start, end in events)
    return 1e3 * median_ms


def measure_ceilings(measure: Measure) -> dict[Route, float]:
    """GB/s of plain copies; inside the device a byte counts twice, as it is read and written there."""
    host = torch.zeros(CEILING_BYTES, dtype=torch.uint8, pin_memory=True)
    source, target = torch.zeros(2, CEILING_BYTES, dtype=torch.uint8, device="cuda")
    return {
        "device": 2 * _gb_per_s(CEILING_BYTES, measure(lambda: target.copy_(source))),
        "host_to_device": _gb_per_s(CEILING_BYTES, measure(lambda: target.copy_(host, non_blocking=True))),
        "device_to_host": _gb_per_s(CEILING_BYTES, measure(lambda: host.copy_(source, non_blocking=True))),
    }


def time_jobs(
    jobs: Iterable[Job], measure: Measure, ceilings: dict[Route, float], facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One row for each job.

    Args:
        jobs: what to time.
        measure: microseconds of a call.
        ceilings: GB/s of plain copies.
        facts: fields of every row, such as the device.
    """
    for job in jobs:
        micros = measure(job.call)
        rate, ceiling = _gb_per_s(job.num_bytes, micros), ceilings[job.route]
        yield {
            "op": job.op,
            "case": job.case,
            "us": round(micros, 2),
            "bytes": job.num_bytes,
            "gb_per_s": round(rate, 2),
            "ceiling_gb_per_s": round(ceiling, 2),
            "share": round(rate / ceiling, 4),
            **facts,
        }


def tune_jobs(ops: Iterable[str]) -> Iterator[Job]:
    """Those of the ops that have configurations, under each that the device takes."""
    from triton.runtime.errors import OutOfResources

    from flashmemory_kernels.score_chunks.kernel import score_chunks_triton
    from flashmemory_kernels.score_rows.kernel import score_rows_triton

    chunks = [case for case in chunk_cases.BENCH_CASES if case.num_queries == 1]
    rows = [case for case in score_rows_cases.BENCH_CASES if len(case.num_blocks) > 1]
    makers: dict[str, Callable[[TileConfig], Iterator[Job]]] = {
        "score_chunks": lambda config: chunk_jobs(chunks, "cuda", partial(score_chunks_triton, config=config)),
        "score_rows": lambda config: score_rows_jobs(rows, "cuda", partial(score_rows_triton, config=config)),
    }
    for op, config in itertools.product(sorted(makers.keys() & set(ops)), TUNED_CONFIGS):
        if op == "score_chunks" and config.programs:
            # Its programs do not stay for another tile
            continue
        for job in makers[op](config):
            try:
                job.call()
            except OutOfResources:
                continue
            yield job._replace(case=f"{job.case} | {_label(config)}")


def best_configs(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The fastest row of each case among rows of `tune_jobs`."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        case = row["case"].partition(" | ")[0]
        if case not in best or row["us"] < best[case]["us"]:
            best[case] = row
    return best


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 without a CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m flashmemory_kernels.benchmark", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--ops", nargs="+", choices=sorted(OPS), default=sorted(OPS), help="default: all")
    parser.add_argument("--tune", action="store_true", help="also time the score kernels under many configurations")
    parser.add_argument("--commit", default="unknown", help="commit to name in the rows. Default: %(default)s")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("the benchmark needs a CUDA device; torch sees none\n")
        return 2
    facts = row_facts("flashmemory_kernels.benchmark", argv, options.commit)
    ceilings = measure_ceilings(measure_cuda)
    rows = []
    for row in time_jobs(itertools.chain.from_iterable(OPS[op]() for op in options.ops), measure_cuda, ceilings, facts):
        rows.append(row)
        sys.stdout.write(_line(row))
    if options.tune:
        tuned = list(time_jobs(tune_jobs(options.ops), measure_cuda, ceilings, facts))
        rows += tuned
        sys.stdout.write("fastest configurations\n" + "".join(map(_line, best_configs(tuned).values())))
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def row_facts(module: str, argv: Sequence[str] | None, commit: str) -> dict[str, Any]:
    """Fields of every row that say where it comes from.

    Args:
        module: what was run.
        argv: its arguments; None for those of this process.
        commit: commit of the checkout.
    """
    import triton

    arguments = sys.argv[1:] if argv is None else argv
    return {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "commit": commit,
        "command": shlex.join(["python", "-m", module, *arguments]),
    }


def _gb_per_s(num_bytes: int, micros: float) -> float:
    return num_bytes / micros / 1e3


def _label(case: Any) -> str:  # noqa: ANN401 - any named tuple
    return " ".join(f"{name}={value}" for name, value in case._asdict().items())


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['op']:16} {row['us']:10.2f} us {row['bytes']:12} B {row['gb_per_s']:9.2f} GB/s "
        f"{row['share']:7.1%} of {row['ceiling_gb_per_s']:.0f}  {row['case']}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
