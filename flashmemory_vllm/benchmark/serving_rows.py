"""Rows of the serving benchmark: what users of a server see, beside stock vLLM's, in JSON and in Markdown."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.files import write_json

GIB = 1 << 30
_HEADER = (
    *("load", "engine", "requests/s", "output tokens/s", "goodput/s", "goodput x stock", "requests x stock"),
    *("TTFT ms p50 / p95 / p99", "ITL ms p50 / p95 / p99", "preemptions", "KV GiB", "note"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRow:
    """One load on one server.

    Attributes:
        scenario: name of the scenario.
        load: name of the load.
        engine: stock, fp8 (stock with `--kv-cache-dtype fp8`), offload (stock with vLLM's own KV offloading) or
            flashmemory.
        model: what was served.
        requests: requests that were sent.
        prompt_tokens: tokens of a prompt; None where they differ by a file.
        answer_tokens: tokens of an answer; None where they differ by a file.
        shared_prefix_tokens: tokens that all prompts begin with.
        max_concurrency: requests under way at once, None without a limit.
        request_rate: requests a second, None if nothing is waited for.
        kv_memory_bytes: device memory for KV that the engine was given.
        itl_limit_ms: mean milliseconds between the tokens of an answer up to which it counts for goodput.
        ttft_limit_ms: milliseconds to its first token up to which it does, None without a limit.
        target: what was hoped for, in words.
        error: why there are no figures; the first line of what was said.
        completed: requests that were answered.
        failed: requests that were not.
        seconds: from the first request to the last token.
        input_tokens: prompt tokens of all answered requests.
        output_tokens: tokens of all answers.
        requests_per_s: answered requests over `seconds`.
        output_tokens_per_s: the same of `output_tokens`.
        total_tokens_per_s: the same of both.
        goodput_per_s: requests within the limits over `seconds`.
        ttft_p50_ms: milliseconds from a request's sending to its first token, median; then 95th and 99th percentile.
        ttft_p95_ms: see there.
        ttft_p99_ms: see there.
        itl_p50_ms: milliseconds between two tokens, of all pairs, median; then 95th and 99th percentile.
        itl_p95_ms: see there.
        itl_p99_ms: see there.
        preemptions: requests preempted by the scheduler during the load.
        device_kv_bytes: device memory of KV pages and states, without index keys and staging.
        goodput_ratio: goodput over stock's, None where stock's is none or 0.
        requests_ratio: requests a second over stock's.
        command: see `Provenance`, as are commit, gpu and versions.
        commit: commit of the checkout.
        gpu: name of the device.
        versions: version by distribution.
    """

    scenario: str
    load: str
    engine: str
    model: str
    requests: int
    prompt_tokens: int | None
    answer_tokens: int | None
    shared_prefix_tokens: int
    max_concurrency: int | None
    request_rate: float | None
    kv_memory_bytes: int
    itl_limit_ms: float
    ttft_limit_ms: float | None
    target: str | None = None
    error: str | None = None
    completed: int | None = None
    failed: int | None = None
    seconds: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    requests_per_s: float | None = None
    output_tokens_per_s: float | None = None
    total_tokens_per_s: float | None = None
    goodput_per_s: float | None = None
    ttft_p50_ms: float | None = None
    ttft_p95_ms: float | None = None
    ttft_p99_ms: float | None = None
    itl_p50_ms: float | None = None
    itl_p95_ms: float | None = None
    itl_p99_ms: float | None = None
    preemptions: int | None = None
    device_kv_bytes: int | None = None
    goodput_ratio: float | None = None
    requests_ratio: float | None = None
    command: str
    commit: str
    gpu: str
    versions: dict[str, str]

    @property
    def key(self) -> tuple[str, str, str]:
        """Tells the rows of one model apart."""
        return self.scenario, self.load, self.engine


def with_ratios(rows: Sequence[ServingRow]) -> list[ServingRow]:
    """The same rows, each beside stock's of its load and model."""
    stock = {(row.model, row.scenario, row.load): row for row in rows if row.engine == "stock"}

    def compared(row: ServingRow) -> ServingRow:
        other = stock.get((row.model, row.scenario, row.load))
        if other is None or row.engine == "stock":
            return replace(row, goodput_ratio=None, requests_ratio=None)
        return replace(
            row,
            goodput_ratio=_ratio(row.goodput_per_s, other.goodput_per_s),
            requests_ratio=_ratio(row.requests_per_s, other.requests_per_s),
        )

    return [compared(row) for row in rows]


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None


def load_serving_rows(path: Path) -> list[ServingRow]:
    """Read the rows of a file; none if it does not exist.

    Raises:
        ConfigError: the file holds something else.
    """
    if not path.exists():
        return []
    try:
        return [ServingRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} does not hold rows of the serving benchmark: {error}") from None


def save_serving_rows(path: Path, rows: Sequence[ServingRow]) -> None:
    """Write the rows so that an interrupted run leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(row) for row in rows])


def format_serving_tables(rows: Sequence[ServingRow]) -> str:
    """One Markdown table for each scenario, model and limit; above 1 a ratio says better than stock."""
    groups: dict[str, list[ServingRow]] = {}
    for row in rows:
        groups.setdefault(_title(row), []).append(row)
    return "\n".join(f"### {title}\n\n{_table(group)}{_wanted(group)}" for title, group in groups.items())


def _title(row: ServingRow) -> str:
    first = "" if row.ttft_limit_ms is None else f" and a first token within {row.ttft_limit_ms:,g} ms"
    memory = f"{row.kv_memory_bytes / GIB:g} GiB for KV"
    return f"{row.scenario} ({row.model}, {memory}), goodput at {row.itl_limit_ms:g} ms a token{first}"


def _table(rows: Sequence[ServingRow]) -> str:
    lines = [_HEADER, ("---",) * len(_HEADER), *(tuple(_cells(row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _wanted(rows: Sequence[ServingRow]) -> str:
    wanted = dict.fromkeys(f"- {row.load}: wanted {row.target}\n" for row in rows if row.target)
    return "".join(("\n", *wanted)) if wanted else ""


def _cells(row: ServingRow) -> Iterator[str]:
    yield from (row.load, row.engine)
    yield from map(_number, (row.requests_per_s, row.output_tokens_per_s, row.goodput_per_s))
    yield from map(_number, (row.goodput_ratio, row.requests_ratio))
    for times in (
        (row.ttft_p50_ms, row.ttft_p95_ms, row.ttft_p99_ms),
        (row.itl_p50_ms, row.itl_p95_ms, row.itl_p99_ms),
    ):
        yield " / ".join(map(_number, times)) if times[0] is not None else ""
    yield "" if row.preemptions is None else f"{row.preemptions:,}"
    yield "" if row.device_kv_bytes is None else _number(row.device_kv_bytes / GIB)
    yield (row.error or (f"{row.failed} of {row.requests} failed" if row.failed else "")).replace("|", "\\|")


def _number(value: float | None) -> str:
    """Three digits, and all of those before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
