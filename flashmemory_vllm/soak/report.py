"""Puts the row of a cell together, and tells all rows on a page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.soak.rows import SoakRow
from flashmemory_vllm.soak.settings import SoakSettings

_COUNTERS = {
    "preemptions": "preemptions",
    "evictions": "evictions_total",
    "recalls": "recalled_blocks_total",
    "prefetches": "prefetched_blocks_total",
    "streamed": "streamed_blocks_total",
    "selections": "selections_total",
    "prefix_hit_tokens": "prefix_hit_tokens",
}
_JUDGED = ("tokens", "token_differences", "identical", "largest_deficit", "control_deficit", "tolerance")
_COLUMNS = {
    "phase": "phase",
    "runner": "runner",
    "async": "is_async",
    "dtype": "dtype",
    "ratio": "ratio",
    "selector": "selector",
    "requests": "requests",
    "seconds": "seconds",
    "texts": "texts",
    "token differences": "token_differences",
    "answers right": "answers_right",
    "leaked slots": "leaked_slots",
    "leaked blocks": "leaked_blocks",
    "leaked entries": "leaked_entries",
    "hangs": "hangs",
    "overcommit": "overcommit",
    "preemptions": "preemptions",
    "evictions": "evictions",
    "recalls": "recalls",
    "aborts": "aborted",
    "RSS MiB, early": "rss_mib_start",
    "at the end": "rss_mib_end",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """What is known of a cell before it runs.

    Attributes:
        settings: of its trace.
        model: what is served.
        floor: share of right answers that is expected of the sparse phase.
        provenance: where its row comes from.
    """

    settings: SoakSettings
    model: str
    floor: float
    provenance: Provenance


def make_row(
    cell: Cell,
    outcome: Mapping[str, Any] | None,
    verdict: Mapping[str, Any] | None,
    answers: tuple[int, int],
    error: str | None,
    *,
    has_hung: bool,
) -> SoakRow:
    """Put a row together.

    Args:
        cell: what ran.
        outcome: what the serving process wrote, None if it failed.
        verdict: what the judging process wrote, None if it failed or there was none.
        answers: finished texts, and those of them that are right answers.
        error: why a process failed, or None.
        has_hung: a step did not return.
    """
    settings, told = cell.settings, outcome or {}
    measured = told.get("measured") or [{}]
    peaks = told.get("peaks", {})
    is_dense = settings.phase == "dense"
    texts, right = answers
    host_blocks = peaks.get("host_blocks")
    return SoakRow(
        phase=settings.phase,
        runner=settings.runner,
        is_async=settings.is_async,
        model=cell.model,
        dtype=settings.dtype,
        ratio=1.0 if is_dense else settings.resident_ratio,
        selector="full" if is_dense else settings.selector,
        requests=told.get("added", 0),
        seconds=round(told.get("seconds", 0.0), 1),
        steps=told.get("steps", 0),
        texts=texts,
        **_judged(verdict),
        answers_right=None if is_dense or not texts else round(right / texts, 4),
        floor=None if is_dense else cell.floor,
        **_leaked(told.get("leaks", {})),
        hangs=len(told.get("hanging", ())) + has_hung,
        overcommit=None if host_blocks is None else round(host_blocks / (settings.device_slots - 1), 2),
        slots=settings.device_slots,
        logical_blocks=settings.logical_blocks,
        finished=told.get("finished", 0),
        aborted=told.get("aborted", 0),
        running=_whole(peaks.get("running")),
        **_counted(told.get("counters", {})),
        **_memory_fields(measured),
        cuda_graphs=told.get("machinery", {}).get("cuda_graphs"),
        seed=settings.seed,
        error=error,
        **asdict(cell.provenance),
    )


def _judged(verdict: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: None if verdict is None else verdict[name] for name in _JUDGED}


def _leaked(leaks: Mapping[str, Any]) -> dict[str, Any]:
    entries = leaks.get("leaked_entries")
    return {
        "leaked_slots": leaks.get("leaked_slots"),
        "leaked_blocks": leaks.get("leaked_blocks"),
        "leaked_entries": None if entries is None else len(entries),
    }


def _counted(counters: Mapping[str, float]) -> dict[str, Any]:
    return {field: _whole(counters.get(counter)) for field, counter in _COUNTERS.items()}


def _memory_fields(measured: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    ends = {"start": measured[-2] if len(measured) > 1 else measured[-1], "end": measured[-1]}
    found = {f"{name}_{end}": ends[end].get(name) for name in ("rss_mib", "device_mib", "pinned_mib") for end in ends}
    return {name: None if value is None else round(value, 2) for name, value in found.items()}


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def format_report(rows: Sequence[SoakRow]) -> str:
    """The rows as a Markdown table, and what was compared, in words."""
    header = [*_COLUMNS, "problems"]
    lines = [header, ["---"] * len(header), *(_cells(row) for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    requests, seconds = sum(row.requests for row in rows), sum(row.seconds for row in rows)
    tokens = sum(row.tokens or 0 for row in rows)
    return f"{requests} requests in {seconds:.0f} s; {tokens} tokens compared with dense attention's.\n\n{table}"


def _cells(row: SoakRow) -> list[str]:
    values = [getattr(row, field) for field in _COLUMNS.values()]
    problems = "; ".join(problem.partition("\n")[0] for problem in row.problems()) or "none"
    return ["" if value is None else str(value).replace("|", "/") for value in (*values, problems)]
